"""The hot operations: one contract (ops.py), a reference and a CUDA implementation of it."""
