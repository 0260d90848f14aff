"""Text to batches: mixtures, sources, tokenizer, shards, the loader as a pure function."""
