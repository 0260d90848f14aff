"""What a run leaves: experiments (SQLite), metrics (DuckDB), checkpoints."""
