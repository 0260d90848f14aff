"""The matrix products of this package, on QuACK's kernels, with every tile chosen by rule.

Grouped products run over expert-sorted rows: expert e owns rows offset[e] : offset[e + 1]; experts may be empty.
`index` gathers the rows of the first operand inside the kernel, so a gathered copy never exists. All products
accumulate in fp32 and are bit-identical from run to run: no split-K, no atomics.

  gated         preact = a[index] · w13[e]ᵀ,  act = swiglu(preact)              both rounded once
  dgated        dact = dy[index] · w2[e];  act' = scale · swiglu(preact),  dpreact = swiglu'(preact) · scale · dact,
                dscale = Σ_F swiglu(preact) · dact, in fp32, in a fixed order
  rows          a · w[e]ᵀ
  weight_grad   a[index]ᵀ · b over the rows of each expert
"""

from __future__ import annotations

import torch
from quack.gemm import gemm
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_dgated, gemm_gated
from torch import Tensor

from kernels.cuda.jit import ARCH, check_device
from kernels.ops import check, check_same_device

ALIGNMENT = 8  # bf16 elements in the 16 bytes that TMA strides are multiples of


def _sm90(
  tile_m: int, tile_n: int, pingpong: bool, cluster: tuple[int, int] = (2, 1)
) -> GemmConfig:
  return GemmConfig(
    tile_m=tile_m,
    tile_n=tile_n,
    pingpong=pingpong,
    cluster_m=cluster[0],
    cluster_n=cluster[1],
    is_dynamic_persistent=False,
    device_capacity=9,
  )


SM100 = GemmConfig(
  tile_m=256, tile_n=256, pingpong=False, cluster_m=2, cluster_n=1, device_capacity=10
)
CONFIGS = {
  "sm_90a": {
    "gated": _sm90(128, 192, True),
    "gated_gather": _sm90(128, 192, True),
    "dgated": _sm90(128, 128, True),
    "rows": _sm90(128, 256, False),
    "weight_grad": _sm90(128, 256, False),
    "dense": _sm90(128, 256, False),
  },
  "sm_100a": dict.fromkeys(
    ("gated", "gated_gather", "dgated", "rows", "weight_grad", "dense"), SM100
  ),
}


def config(kind: str) -> GemmConfig:
  """The tile of a kind of product on this process's architecture."""
  return CONFIGS[ARCH.name][kind]


def check_operands(**tensors: Tensor) -> None:
  """KernelError unless all are bf16 on one GPU of this architecture with whole 16-byte rows."""
  check_device(check_same_device(*tensors.values()))
  for name, t in tensors.items():
    check(
      t.dtype == torch.bfloat16,
      f"{name} is {t.dtype}; the cuda kernels multiply bfloat16: convert it",
    )
    check(
      t.shape[-1] % ALIGNMENT == 0,
      f"{name} has rows of {t.shape[-1]} bf16 elements; make them a multiple of {ALIGNMENT} (16 bytes)",
    )


def gated(
  a: Tensor,
  w13: Tensor,
  *,
  offset: Tensor | None = None,
  index: Tensor | None = None,
  keep: bool = True,
) -> tuple[Tensor | None, Tensor]:
  """(preact [N, 2F] or None when not `keep`, act [N, F]). a [*, D]; w13 [E, 2F, D], or [2F, D] without offset."""
  tile = config("gated" if index is None else "gated_gather")
  return gemm_gated(
    a, w13.mT, activation="swiglu", cu_seqlens_m=offset, A_idx=index, store_preact=keep, config=tile
  )


def dgated(
  dy: Tensor,
  w2: Tensor,
  preact: Tensor,
  *,
  offset: Tensor | None = None,
  index: Tensor | None = None,
  scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
  """(dpreact [N, 2F], act' [N, F], dscale fp32 [N] or None without `scale`). w2 [E, D, F], or [D, F]."""
  tile = config("dgated")
  out = gemm_dgated(
    dy,
    w2,
    preact,
    activation="swiglu",
    colvec_scale=scale,
    colvec_reduce=scale is not None,
    cu_seqlens_m=offset,
    A_idx=index,
    dynamic_scheduler=tile.is_dynamic_persistent,
    config=tile,
  )
  return out if scale is not None else (*out, None)


def _gemm(kind: str, a: Tensor, b: Tensor, out: Tensor, **varlen: Tensor | None) -> Tensor:
  tile = config(kind)
  gemm(
    a,
    b,
    out,
    None,
    None,
    tile.tile_m,
    tile.tile_n,
    tile.cluster_m,
    tile.cluster_n,
    pingpong=tile.pingpong,
    is_dynamic_persistent=tile.is_dynamic_persistent,
    max_swizzle_size=tile.max_swizzle_size,
    **varlen,
  )
  return out


def rows(a: Tensor, w: Tensor, offset: Tensor) -> Tensor:
  """a [N, I] · w[e]ᵀ -> [N, O], w [E, O, I] (a transposed view serves). Rows beyond offset[-1] stay unwritten."""
  return _gemm("rows", a, w, a.new_empty(a.shape[0], w.shape[1]), cu_seqlens_m=offset)


def weight_grad(
  a: Tensor, b: Tensor, offset: Tensor, out: Tensor, index: Tensor | None = None
) -> Tensor:
  """out[e] = a[index]ᵀ · b over expert e's rows: a [*, I], b [N, O], out [E, I, O] (a transposed view serves)."""
  return _gemm("weight_grad", a.mT, b.mT, out, cu_seqlens_k=offset, A_idx=index)


def accumulate(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
  """out = aᵀ · b, or out += aᵀ · b: a [T, I] and b [T, O] bf16, out fp32 [I, O] in place."""
  tile = config("dense")
  gemm(
    a.mT,
    b.mT,
    out,
    None,
    None,
    tile.tile_m,
    tile.tile_n,
    tile.cluster_m,
    tile.cluster_n,
    pingpong=tile.pingpong,
    is_dynamic_persistent=tile.is_dynamic_persistent,
    add_to_output=add,
  )
