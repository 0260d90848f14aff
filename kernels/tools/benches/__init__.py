"""The benches of the cuda kernels, by what they belong to. kernels.tools.bench runs them."""
