"""Plain PyTorch implementation of kernels.ops: every kernel's oracle, and what the cpu target runs.

Any device. Inputs may be bf16, fp32 or float64; sums, norms and softmax are computed in at least
fp32, float64 stays float64. Every function repeats its bits from run to run on one machine.
"""

from kernels.reference.adamw import adamw
from kernels.reference.attention import attention
from kernels.reference.blockscale import quantize
from kernels.reference.dense import linear, mlp
from kernels.reference.experts import (
  experts,
  grouped_mlp,
  grouped_mlp_backward,
  grouped_mlp_forward,
)
from kernels.reference.loss import linear_cross_entropy
from kernels.reference.muon import muon
from kernels.reference.norm import add_rms_norm, rms_norm
from kernels.reference.rope import mla_qkv
from kernels.reference.router import combine, layout, route

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
