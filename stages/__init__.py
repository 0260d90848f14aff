"""What a researcher runs: thin stage runners over the core."""
