"""The matrix products of this package, on QuACK's kernels, with every tile chosen by rule.

Grouped products run over expert-sorted rows: expert e owns rows offset[e] : offset[e + 1]; experts
may be empty. `index` gathers the rows of the first operand inside the kernel, so a gathered copy
never exists. All accumulate in fp32 and are bit-identical from run to run: no split-K, no atomics.

  gated        preact = a[index] · w13[e]ᵀ,  act = swiglu(preact), each rounded once
  dgated       dact = dy[index] · w2[e],  act' = scale · swiglu(preact),
               dpreact = swiglu'(preact) · scale · dact,
               dscale = Σ_F swiglu(preact) · dact, in fp32, in a fixed order
  rows         a · w[e]ᵀ
  weight_grad  a[index]ᵀ · b over the rows of each expert, or added to an fp32 tensor
  accumulate   aᵀ · b, or added to an fp32 tensor
  dense_grad   aᵀ · b by cuBLAS, which splits the long sum of a small output among all SMs
  product      a · bᵀ without experts, or with an addend in fp32

A product's thread blocks hold their SMs, registers and all, for as long as it lasts: what is queued
beside it waits for its end. Inside `leaving(n)` a gated or dgated product of one matrix has n
blocks fewer: n SMs stay for others. The tiles, and so the bits, are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from quack.blockscaled import BlockScaledFormat
from quack.cute_dsl_utils import get_max_active_clusters
from quack.epilogue.frontend import EpiMod, EpiPlan
from quack.epilogue.library import dgated_mod, linear_act_mod
from quack.gemm import gemm
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_dgated, gemm_gated
from quack.gemm_runtime.host import GemmEpiPlan
from quack.gemm_tvm_ffi_utils import make_scheduler_args
from torch import Tensor

from kernels.cuda.blockscale import ATOM_ROWS
from kernels.cuda.jit import ARCH, check_device, compiling
from kernels.cuda.quantization import Operand
from kernels.ops import check, check_same_device
from kernels.ragged import gather, moved

ALIGNMENT = 8  # bf16 elements in the 16 bytes that TMA strides are multiples of

_left = 0  # SMs that gated and dgated products of one matrix leave to other kernels


class Choice(NamedTuple):
  """A tile and its measured time per multiply-add of whole clusters of tiles, relative to the
  kind's best.
  """

  config: GemmConfig
  cost: float


def _sm90(
  tile_m: int, tile_n: int, schedule: str, cost: float = 1.0, cluster: tuple[int, int] = (2, 1)
) -> Choice:
  config = GemmConfig(
    tile_m=tile_m,
    tile_n=tile_n,
    pingpong=schedule == "pingpong",
    cluster_m=cluster[0],
    cluster_n=cluster[1],
    is_dynamic_persistent=False,
    device_capacity=9,
  )
  return Choice(config, cost)


# Costs on sm_90a: one H200, bf16, T 32768, D 2048, F 1408, E 64, K 6; the 9 to 22 tiles of QuACK's
# search that are valid for each kind, the best and those that win at other widths.
SM90 = {
  "gated": (
    _sm90(128, 192, "pingpong"),
    _sm90(128, 256, "cooperative", 1.055),
    _sm90(128, 256, "cooperative", 1.093, (1, 1)),  # a cluster's second tile may have no rows
    _sm90(128, 160, "pingpong", 1.053),
  ),
  "dgated": (_sm90(128, 128, "pingpong"),),  # 128 x 160 and wider spill registers: 1.1 to 1.7
  "rows": (
    _sm90(192, 128, "pingpong", 1.002, (1, 2)),
    _sm90(128, 208, "pingpong", 1.0, (1, 2)),
    _sm90(128, 128, "pingpong", 1.028, (1, 2)),
  ),
  "rows, weight transposed": (  # here 128 x 208 costs 1.39
    _sm90(192, 128, "pingpong", 1.0, (1, 2)),
    _sm90(256, 128, "cooperative", 1.022, (1, 2)),
    _sm90(128, 128, "pingpong", 1.046, (1, 2)),
  ),
  "scatter": (  # as rows, of whole groups of 32 columns; not measured by themselves
    _sm90(192, 128, "pingpong", 1.0, (1, 2)),
    _sm90(128, 128, "pingpong", 1.028, (1, 2)),
  ),
  "weight": (
    _sm90(256, 192, "cooperative"),
    _sm90(256, 160, "cooperative", 1.010),
    _sm90(128, 256, "cooperative", 1.023),
    _sm90(256, 128, "cooperative", 1.075),
  ),
  "logits": (_sm90(128, 256, "cooperative"),),
  "dense": (_sm90(128, 256, "cooperative"),),
  "router, logits": (_sm90(128, 192, "pingpong"),),  # of two tiles, at E 256 and 64
  "router, weight": (_sm90(128, 256, "cooperative"),),  # of three
}


def _sm100(tile_n: int) -> tuple[Choice, ...]:
  tile = GemmConfig(
    tile_m=256, tile_n=tile_n, pingpong=False, cluster_m=2, cluster_n=1, device_capacity=10
  )
  return (Choice(tile, 1.0),)


SM100 = dict.fromkeys([*SM90, "block_scaled"], _sm100(256)) | {"router, logits": _sm100(192)}
CHOICES = {"sm_90a": SM90, "sm_100a": SM100}


@lru_cache
def config(kind: str, m: int = 1, n: int = 1, ragged: bool = False) -> GemmConfig:
  """The tile of least predicted time for a kind of product of m rows by n columns.

  The prediction is cost · (m and n rounded up to whole clusters); if `ragged`, m is an expert's
  mean and its last cluster half empty on average.
  """

  def time(choice: Choice) -> float:
    tile = choice.config
    block_m, block_n = tile.tile_m * tile.cluster_m, tile.tile_n * tile.cluster_n
    rows = m + block_m / 2 if ragged else -(-m // block_m) * block_m
    return choice.cost * rows * (-(-n // block_n) * block_n)

  return min(CHOICES[ARCH.name][kind], key=time).config


def rows_config(kind: str, num_rows: int, n: int, offset: Tensor | None) -> GemmConfig:
  """`config` for rows that `offset` splits among experts; dense without it."""
  if offset is None:
    return config(kind, num_rows, n)
  return config(kind, num_rows // (offset.shape[0] - 1), n, True)


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
      f"{name} has rows of {t.shape[-1]} bf16 elements; make them a multiple of {ALIGNMENT}",
    )


@contextmanager
def leaving(sms: int) -> Iterator[None]:
  """Inside, this process's gated and dgated products of one matrix leave so many SMs to others."""
  global _left
  before, _left = _left, sms
  try:
    yield
  finally:
    _left = before


# QuACK's own epilogues of gemm_gated and gemm_dgated
_gated = linear_act_mod("swiglu", gated=True, has_c=False, has_rowvec=False, has_colvec=False)
_dgated = dgated_mod("swiglu", has_scale=False, has_reduce=False)
_plans: dict[tuple, EpiPlan] = {}  # of `_one`, by all that a launch depends on


def _one(
  epilogue: EpiMod, tile: GemmConfig, a: Tensor, b: Tensor, c: Tensor | None, out: dict[str, Tensor]
) -> None:
  """A product of one matrix, b [I, O], on the SMs that are not left."""
  made = (None if t is None else (t.shape, t.stride(), t.dtype) for t in (a, b, c, *out.values()))
  key = id(epilogue), tile, _left, *out, *made
  if key not in _plans:
    _plans[key] = plan = epilogue.plan(a, b, c, out=out, config=tile)
    kernel, size = plan.gemm_plan, tile.cluster_m * tile.cluster_n
    clusters = max(kernel.max_active_clusters - _left // size, 1)
    launch = make_scheduler_args(clusters, tile.max_swizzle_size, None)
    plan.gemm_plan = kernel._replace(max_active_clusters=clusters, scheduler_static=launch)
  _plans[key].run(a, b, c, out=out)


def gated(
  a: Tensor,
  w13: Tensor,
  *,
  offset: Tensor | None = None,
  index: Tensor | None = None,
  keep: bool = True,
) -> tuple[Tensor | None, Tensor]:
  """(preact [N, 2F], None unless `keep`, and act [N, F]). a [*, D], w13 [E, 2F, D].

  Without offset it is one dense product, w13 [2F, D].
  """
  num_rows = (a if index is None else index).shape[0]
  tile = rows_config("gated", num_rows, w13.shape[-2], offset)
  if offset is None and _left:
    act = a.new_empty(num_rows, w13.shape[0] // 2)
    preact = a.new_empty(num_rows, w13.shape[0]) if keep else None
    out = {"mAuxOut": act} | ({"D": preact} if keep else {})
    _one(_gated, tile, a, w13.mT, None, out)
    return preact, act
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
  """(dpreact [N, 2F], act' [N, F], dscale fp32 [N], None without `scale`). w2 [E, D, F].

  Without offset it is one dense product, w2 [D, F].
  """
  tile = rows_config("dgated", preact.shape[0], w2.shape[-1], offset)
  if offset is None and _left and scale is None:
    dpreact, act = torch.empty_like(preact), preact.new_empty(preact.shape[0], w2.shape[1])
    _one(_dgated, tile, dy, w2, preact, {"D": dpreact, "mAuxOut": act})
    return dpreact, act, None
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


def _gemm(
  tile: GemmConfig, a: Tensor, b: Tensor, out: Tensor, c: Tensor | None = None, **more
) -> Tensor:
  gemm(
    a,
    b,
    out,
    c,
    None,
    tile.tile_m,
    tile.tile_n,
    tile.cluster_m,
    tile.cluster_n,
    pingpong=tile.pingpong,
    is_dynamic_persistent=tile.is_dynamic_persistent,
    max_swizzle_size=tile.max_swizzle_size,
    **more,
  )
  return out


def product(kind: str, a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None) -> Tensor:
  """out = a · bᵀ, with `add` added before it is rounded: a [M, K], b [N, K], out and add [M, N], or
  batches of all. kind: of `CHOICES`, whose tile it takes.
  """
  return _gemm(config(kind, *out.shape[-2:]), a, b, out, add)


def rows(a: Tensor, w: Tensor, offset: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
  """alpha · a [N, I] · w[e]ᵀ -> [N, O], w [E, O, I] (a transposed view serves).

  Rows beyond offset[-1] stay unwritten. alpha is a float or an fp32 tensor of one element.
  """
  out = a.new_empty(a.shape[0], w.shape[1])
  kind = "rows" if w.stride(-1) == 1 else "rows, weight transposed"
  tile = rows_config(kind, a.shape[0], w.shape[1], offset)
  return _gemm(tile, a, w, out, cu_seqlens_m=offset, alpha=alpha)


def weight_grad(
  a: Tensor,
  b: Tensor,
  offset: Tensor,
  out: Tensor,
  index: Tensor | None = None,
  alpha: Tensor | float = 1.0,
  add: bool = False,
) -> Tensor:
  """out[e] = alpha · a[index]ᵀ · b over expert e's rows: a [*, I], b [N, O], out [E, I, O].

  A transposed view serves as out; index int32 [N] gathers the rows of a. With `add` out is fp32 and
  the product is added to it: one addition an element, 0 for an expert without rows.

  QuACK's kernels start before the one before them has ended, and wait for its end before they load
  operands. An expert without rows has none: its zeros are written at once. So out must not be
  memory that a kernel of QuACK launched right before still reads, as memory freed behind its launch
  is: free it behind this call.
  """
  tile = config("weight", a.shape[1], b.shape[1])
  more = {"add_to_output": True} if add else {}
  return _gemm(tile, a.mT, b.mT, out, cu_seqlens_k=offset, A_idx=index, alpha=alpha, **more)


def accumulate(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
  """out = aᵀ · b, or out += aᵀ · b: a [T, I] and b [T, O] bf16, out fp32 [I, O] in place."""
  tile = config("weight", a.shape[1], b.shape[1])
  return _gemm(tile, a.mT, b.mT, out, add_to_output=add)


def dense_grad(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
  """out = aᵀ · b, or out += aᵀ · b if out is fp32: a [T, I], b [T, O], out [I, O] fp32 or as a."""
  if compiling():  # cuBLAS is not compiled, and torch 2.11 has no fp32 sum of bf16 meta tensors
    return out
  more = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
  if add:
    return torch.addmm(out, a.T, b, out=out, **more)
  return torch.mm(a.T, b, out=out, **more)


def rows_block_scaled(
  fmt: BlockScaledFormat, a: Operand, w: Operand, offset: Tensor, alpha: Tensor | float
) -> Tensor:
  """`rows` of quantized operands on sm_100a's block-scaled tensor cores -> bf16 [N, O].

  a is quantized with expert offsets along I, w [E, O, I] along I.
  """
  out = a.data.new_empty(a.data.shape[0], w.data.shape[1], dtype=torch.bfloat16)
  return _block_scaled(fmt, a, w, out, cu_seqlens_m=offset, alpha=alpha)


def weight_grad_block_scaled(
  fmt: BlockScaledFormat, a: Operand, b: Operand, offset: Tensor, out: Tensor, add: bool = False
) -> Tensor:
  """`weight_grad` on sm_100a's block-scaled tensor cores: a [N, I], b [N, O], along their rows.

  MXFP8 only. Each expert's rows begin at a multiple of 128. The kernel reads expert e's scales from
  e row tiles further than its rows, so the scales are moved apart.
  """
  num_experts, tile = len(offset) - 1, offset // ATOM_ROWS
  expert = torch.arange(num_experts + 1, device=offset.device, dtype=torch.int32)
  to = gather(tile, tile + expert, a.data.shape[0] // ATOM_ROWS + num_experts)

  def spread(operand: Operand) -> Operand:
    apart = moved(operand.scale.view(torch.uint8), to, 2)
    return Operand(operand.data.mT, apart.view(operand.scale.dtype), None)

  more = {"add_to_output": True} if add else {}
  return _block_scaled(fmt, spread(a), spread(b), out, cu_seqlens_k=offset, **more)


def _block_scaled(fmt: BlockScaledFormat, a: Operand, b: Operand, out: Tensor, **more) -> Tensor:
  return _gemm(
    config("block_scaled"),
    a.data.view(fmt.qdata_dtype),
    b.data.view(fmt.qdata_dtype),
    out,
    SFA=a.scale,
    SFB=b.scale,
    bs_format_a=fmt.name,
    bs_format_b=fmt.name,
    **more,
  )


def epilogue_plan(
  cls: type, compiled: Callable, tile: GemmConfig, operations: Iterable[tuple]
) -> GemmEpiPlan:
  """How QuACK launches `compiled`, its kernel class `cls` with an epilogue of our own.

  operations: the epilogue's operations, each with the compile-time key of its argument.
  """
  clusters = get_max_active_clusters(tile.cluster_m * tile.cluster_n)
  return GemmEpiPlan(
    compiled_fn=compiled,
    gemm_cls=cls,
    is_sm100_family=ARCH.capability[0] == 10,
    max_active_clusters=clusters,
    max_swizzle_size=tile.max_swizzle_size,
    scheduler_uses_semaphore=False,
    scheduler_static=make_scheduler_args(clusters, tile.max_swizzle_size, None),
    epi_arg_keys=(),
    tile_M=tile.tile_m,
    cluster_M=tile.cluster_m,
    call_ops=tuple((op.name, op.host_call_arg, key) for op, key in operations),
    arg_template=dict.fromkeys(cls.EpilogueArguments._fields),
    tile_N=tile.tile_n,
    cluster_N=tile.cluster_n,
  )
