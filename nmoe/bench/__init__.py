"""Ranks of the benchmarks: expert parallelism, the loader alone."""
