"""Block-scaled products of ragged rows with SwiGLU, or its gradient, in the epilogue (sm_100a).

  gated    v = alpha · a · w[e]ᵀ,   preact = v,   act = swiglu(v)         each bf16, rounded once
  dgated   da = alpha · dy · w[e],  dpreact = swiglu'(preact) · da,   act = swiglu(preact)

QuACK's kernels do this, its host layer refuses the combination. Here its kernel class is compiled
with one array of row scales, in which each expert's rows begin a new tile of 128, and one array of
weight scales per expert, and launched through QuACK's own launcher.

Compiled, not run: no sm_100a GPU was at hand.
"""

from __future__ import annotations

import cutlass
import torch
from quack.activation import dswiglu, swiglu
from quack.blockscaled import BlockScaledFormat
from quack.cute_dsl_utils import torch2cute_dtype_map
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import pack, unpack
from quack.gemm_runtime.host import FakeArgCtx, run_gemm_epi_plan
from quack.gemm_tvm_ffi_utils import (
  compile_gemm_kernel,
  make_fake_gemm_tensors,
  make_fake_scheduler_args,
  make_fake_sf_tensor,
  make_fake_varlen_args,
)
from quack.rounding import RoundingMode
from torch import Tensor

from kernels.cuda.gemms import config, epilogue_plan
from kernels.cuda.jit import ARCH, cached, compiling
from kernels.cuda.quantization import Operand


@gemm_epilogue(outputs=("act",), mode="acc_pair")
def gated_epilogue(acc, alpha):
  v = acc * alpha
  gate, up = unpack(v)
  return {"D": v, "act": swiglu(gate, up)}


@gemm_epilogue(outputs=("act",), mode="packed_cd_b16x2")
def dgated_epilogue(acc, c, alpha):
  gate, up = unpack(c)
  dgate, dup, act = dswiglu(gate, up, acc * alpha)
  return {"D": pack(dgate, dup), "act": act}


EPILOGUES = {
  "gated": (gated_epilogue, (("alpha", "scalar"),)),
  "dgated": (dgated_epilogue, (("c", "c"), ("alpha", "scalar"))),
}


def _class(kind: str):
  """QuACK's kernel class with this epilogue."""
  epilogue, kinds = EPILOGUES[kind]
  paired, packed = kind == "gated", kind == "dgated"
  key = (kinds, ARCH.capability[0], paired, packed, (), RoundingMode.RN, (), False)
  return epilogue._mint(*key)


def _epilogue_keys(kind: str) -> list[tuple[object, object]]:
  """(operation, compile-time key) of the epilogue's operands: a bf16 matrix, an fp32 pointer."""
  operations = {op.name: op for op in _class(kind)._epi_ops}
  act, alpha = operations["act"], operations["alpha"]
  matrix = torch.empty(8, 8, dtype=torch.bfloat16)
  return [(act, act.host_arg_key(matrix)), (alpha, alpha.host_key_for_mode(2))]


@cached
def compile_block_scaled(kind: str, format_name: str):
  """The kernel for any shape: rows ragged, both operands K-major, bf16 out."""
  fmt, tile, cls = BlockScaledFormat.from_name(format_name), config("block_scaled"), _class(kind)
  data, mma, bf16 = torch2cute_dtype_map[fmt.qdata_dtype], fmt.to_cutlass_dtype(), cutlass.BFloat16
  packed = "n" if kind == "dgated" else None
  *tensors, m, n, k, experts = make_fake_gemm_tensors(
    data,
    data,
    bf16,
    bf16 if packed else None,
    "k",
    "k",
    "n",
    "n",
    varlen_m=True,
    gather_A=False,
    b_kn=False,
    packed_cd=packed,
    a_mma_dtype=mma,
    b_mma_dtype=mma,
  )
  context = FakeArgCtx(m, n, k, experts, True, True, False)
  arguments = {op.name: op.host_fake_arg(key, context) for op, key in _epilogue_keys(kind)}

  def post_init(kernel) -> None:
    if packed:
      kernel.implicit_dtype = bf16

  return compile_gemm_kernel(
    cls,
    data,
    (tile.tile_m, tile.tile_n),
    (tile.cluster_m, tile.cluster_n, 1),
    tile.pingpong,
    True,  # persistent
    False,  # no gather
    tile.is_dynamic_persistent,
    ARCH.capability,
    *tensors,
    cls.EpilogueArguments(**arguments),
    make_fake_scheduler_args(False, False, experts),
    make_fake_varlen_args(True, False, False, m),
    post_init=post_init,
    mSFA=make_fake_sf_tensor(torch2cute_dtype_map[fmt.scale_dtype], 1),
    mSFB=make_fake_sf_tensor(torch2cute_dtype_map[fmt.scale_dtype], experts),
    sf_vec_size=fmt.sf_vec_size,
    a_mma_dtype=mma,
    b_mma_dtype=mma,
    b_transposed=False,
    cd_packed=packed,
  )


def _run(
  kind: str,
  fmt: BlockScaledFormat,
  a: Operand,
  w: Operand,
  out: Tensor,
  preact: Tensor | None,
  offset: Tensor,
  alpha: Tensor | float,
) -> Tensor:
  """Launch; returns act [N, F]. `out` is preact or dpreact [N, 2F]."""
  tile = config("block_scaled")
  act = out.new_empty(out.shape[0], out.shape[1] // 2)
  compiled = compile_block_scaled(kind, fmt.name)
  if compiling():
    return act
  plan = epilogue_plan(_class(kind), compiled, tile, _epilogue_keys(kind))
  scale = torch.full((1,), alpha, device=out.device) if isinstance(alpha, float) else alpha
  run_gemm_epi_plan(
    plan,
    a.data.view(fmt.qdata_dtype),
    w.data.view(fmt.qdata_dtype),
    out,
    preact,
    {"act": act, "alpha": scale},
    cu_seqlens_m=offset,
    SFA=a.scale,
    SFB=w.scale,
  )
  return act


def gated(
  fmt: BlockScaledFormat, a: Operand, w13: Operand, offset: Tensor, alpha: Tensor | float
) -> tuple[Tensor, Tensor]:
  """(preact [N, 2F], act [N, F]) of a [N, D] and w13 [E, 2F, D], both quantized along D."""
  preact = a.data.new_empty(a.data.shape[0], w13.data.shape[1], dtype=torch.bfloat16)
  return preact, _run("gated", fmt, a, w13, preact, None, offset, alpha)


def dgated(
  fmt: BlockScaledFormat,
  dy: Operand,
  w2: Operand,
  preact: Tensor,
  offset: Tensor,
  alpha: Tensor | float,
) -> tuple[Tensor, Tensor]:
  """(dpreact [N, 2F], act [N, F]) of dy [N, D] and w2 [E, F, D], both quantized along D."""
  dpreact = torch.empty_like(preact)
  return dpreact, _run("dgated", fmt, dy, w2, dpreact, preact, offset, alpha)
