"""Benches of what a step does to its state: AdamW, Newton-Schulz, and the block-scale quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.copies import Copies, Key
from kernels.cuda.adamw import adamw
from kernels.cuda.jit import ARCH
from kernels.cuda.muon import muon
from kernels.cuda.newton_schulz import newton_schulz
from kernels.cuda.products import block_scaled_product
from kernels.cuda.quantization import quantize, quantize_operand
from kernels.ops import Recipe, Rows
from kernels.tools.rates import Case, How, Row, normal, rows
from kernels.tools.timing import SETS

RULE = {"step": 10, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
EXPERTS = (64, 2816, 2048)  # a w13: 369 M elements
LEGS = ("fprop_w", "dgrad_w")
BLOCK_BYTES = {"fp8": 1 + 1 / 32, "nvfp4": 1 / 2 + 1 / 16}  # of an element, scales counted


def operands(weight: Tensor, format: str) -> Copies:
  """A weight's operands for the tensor cores, which a step then brings up to date."""
  copies = Copies()
  for leg, matrix in zip(LEGS, (weight, weight.mT), strict=True):
    make = partial(quantize_operand, matrix, format, square=format == "nvfp4")
    copies.get(Key(format, False, leg, 0), weight, make)
  return copies


def adamw_case(what: str, moment: torch.dtype, grad: torch.dtype, format: str | None) -> Case:
  """One input set: a step's state, 7.4 GB, is far larger than any cache."""
  weight = normal(*EXPERTS)
  state = [normal(*EXPERTS, dtype=t) for t in (grad, torch.float32, moment, moment)]
  state[3].abs_()
  copies = None if format is None else [operands(weight, format)]
  one = torch.ones((), device="cuda")

  def step(_: int) -> None:
    adamw([weight], *([t] for t in state), **RULE, grad_scale=one, copies=copies)

  # weight written; gradient read; master and both moments read and written
  size = 2 + grad.itemsize + 2 * 4 + 4 * moment.itemsize
  if format is not None:
    size += 2 * BLOCK_BYTES[format] + (2 if format == "nvfp4" else 0)
  shape = dict(zip("ERC", EXPERTS, strict=True)) | {"moments": str(moment), "gradient": str(grad)}
  return Case(what, step, size * weight.numel(), shape)


def bench_adamw(how: How) -> Iterator[Row]:
  fp32, bf16 = torch.float32, torch.bfloat16
  kinds = (
    ("adamw", fp32, None),
    ("adamw, bf16 moments", bf16, None),
    ("adamw with MXFP8 operands", fp32, "fp8"),
    ("adamw with NVFP4 operands", fp32, "nvfp4"),
  )
  cases = [adamw_case(what, moment, fp32, format) for what, moment, format in kinds]
  yield from rows(cases, "GB/s", how)


def bench_newton_schulz(how: How, steps: int = 5) -> Iterator[Row]:
  """FLOPs as of whole products, though two of three are symmetric and half computed."""
  cases = []
  for batch, narrow, wide in ((64, 1408, 2048), (4, 2048, 2048)):
    g = [normal(batch, narrow, wide) for _ in range(SETS)]
    flops = steps * batch * (4.0 * narrow**2 * wide + 2.0 * narrow**3)
    shape = {"batch": batch, "A": narrow, "B": wide, "steps": steps}
    norm = torch.linalg.matrix_norm(g[0], keepdim=True) * 1.01
    cases.append(Case("newton_schulz", partial(_orthogonal, g, norm, steps), flops, shape))
  yield from rows(cases, "TFLOP/s", how)


def _orthogonal(g: list[Tensor], norm: Tensor, steps: int, i: int) -> Tensor:
  return newton_schulz(g[i], norm, steps)


def bench_muon(how: How, steps: int = 5) -> Iterator[Row]:
  """Experts' w13: FLOPs of Newton-Schulz as of whole products, all else is in the time."""
  experts, rows_, columns = EXPERTS
  cases, one = [], torch.ones((), device="cuda")
  rule = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1, "grad_scale": one, "experts": True}
  rule |= {"blocks": (Rows(2, 0, 1), Rows(2, 1, 2)), "sizes": (1.0, 1.0), "steps": steps}
  narrow = rows_ // 2
  flops = 2.0 * steps * experts * (4.0 * narrow**2 * columns + 2.0 * narrow**3)
  for moment in (torch.float32, torch.bfloat16):
    state = [
      normal(*EXPERTS, dtype=t) for t in (torch.bfloat16, torch.float32, torch.float32, moment)
    ]
    shape = dict(zip("ERC", EXPERTS, strict=True)) | {"moments": str(moment), "steps": steps}
    cases.append(Case("muon", partial(_step, state, rule), flops, shape))
  yield from rows(cases, "TFLOP/s", how)


def _step(state: list[Tensor], rule: dict[str, object], _: int) -> None:
  muon(*([t] for t in state), **rule)


def bench_quantizer(how: How, num_rows: int = 196608, dim: int = 2048) -> Iterator[Row]:
  """bf16 in, codes and scales out; NVFP4 without a given amax reads the tensor twice."""
  x = [normal(num_rows, dim) for _ in range(SETS)]
  amax = torch.stack([t.abs().max() for t in x]).float()
  edge = torch.arange(65, device="cuda", dtype=torch.int32) * (num_rows // 64)
  calls: dict[str, tuple[str, int, Callable[[int], object]]] = {
    "MXFP8 along rows": ("fp8", 1, lambda i: quantize(x[i], "fp8")),
    "MXFP8 along rows, blocked": ("fp8", 1, lambda i: quantize_operand(x[i], "fp8")),
    "MXFP8 along rows, 64 experts": (
      "fp8",
      1,
      lambda i: quantize_operand(x[i], "fp8", offset_E1=edge),
    ),
    "MXFP8 along columns": ("fp8", 1, lambda i: quantize(x[i], "fp8", axis=-2)),
    "NVFP4 along rows": ("nvfp4", 2, lambda i: quantize(x[i], "nvfp4")),
    "NVFP4 along rows, amax given": (
      "nvfp4",
      1,
      lambda i: quantize(x[i], "nvfp4", tensor_amax=amax[i]),
    ),
    "NVFP4 along rows, stochastic": (
      "nvfp4",
      1,
      lambda i: quantize(x[i], "nvfp4", tensor_amax=amax[i], seed=1),
    ),
  }
  shape = {"N": num_rows, "D": dim}
  cases = [
    Case(what, run, x[0].numel() * (2 * reads + BLOCK_BYTES[format]), shape)
    for what, (format, reads, run) in calls.items()
  ]
  yield from rows(cases, "GB/s", how)


def bench_block_scaled(how: How, num_rows: int = 49152, dim: int = 2048) -> Iterator[Row]:
  """A grouped product and its gradients, quantization included; emulated without tensor cores."""
  experts, width = 64, 2816
  w = normal(experts, width, dim, scale=dim**-0.5, grad=True)
  dy = normal(num_rows, width)
  x = [normal(num_rows, dim, grad=True) for _ in range(SETS)]
  edge = torch.arange(experts + 1, device="cuda", dtype=torch.int32) * (num_rows // experts)

  def step(recipe: Recipe, i: int) -> None:
    torch.autograd.grad(block_scaled_product(x[i], w, edge, recipe, 0), [x[i], w], dy)

  shape = {"N": num_rows, "I": dim, "O": width, "E": experts, "emulated": not ARCH.block_scaled}
  cases = [
    Case(
      f"{format} product, forward + backward",
      partial(step, Recipe(format, not ARCH.block_scaled)),
      6.0 * num_rows * dim * width,
      shape,
    )
    for format in BLOCK_BYTES
  ]
  yield from rows(cases, "TFLOP/s", how)


BENCHES: dict[str, Callable[[How], Iterator[Row]]] = {
  "adamw": bench_adamw,
  "newton_schulz": bench_newton_schulz,
  "muon": bench_muon,
  "quantizer": bench_quantizer,
  "block_scaled": bench_block_scaled,
}
