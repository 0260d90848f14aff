"""Plain PyTorch implementation of kernels.ops: the oracle of every kernel and what the cpu target runs."""
