"""CuTeDSL and QuACK implementation of kernels.ops for sm_90a and sm_100a."""

from kernels.cuda.combine import combine
from kernels.cuda.layout import layout

__all__ = ["combine", "layout"]
