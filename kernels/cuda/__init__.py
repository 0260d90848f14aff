"""CuTeDSL and QuACK implementation of kernels.ops for sm_90a and sm_100a."""
