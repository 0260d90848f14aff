"""CuTeDSL and QuACK implementation of kernels.ops for sm_90a and sm_100a."""

from kernels.cuda.adamw import adamw
from kernels.cuda.attention import attention
from kernels.cuda.combine import combine
from kernels.cuda.dense import linear, mlp
from kernels.cuda.experts import (
  experts,
  grouped_mlp,
  grouped_mlp_backward,
  grouped_mlp_forward,
)
from kernels.cuda.layout import layout
from kernels.cuda.loss import linear_cross_entropy
from kernels.cuda.muon import muon
from kernels.cuda.norm import add_rms_norm, rms_norm
from kernels.cuda.quantization import quantize
from kernels.cuda.rope import mla_qkv
from kernels.cuda.router import route

__all__ = [
  "adamw",
  "add_rms_norm",
  "attention",
  "combine",
  "experts",
  "grouped_mlp",
  "grouped_mlp_backward",
  "grouped_mlp_forward",
  "layout",
  "linear",
  "linear_cross_entropy",
  "mla_qkv",
  "mlp",
  "muon",
  "quantize",
  "rms_norm",
  "route",
]
