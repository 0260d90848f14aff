"""Values against the reference in float64: relative errors, in units of one bf16 rounding of the exact result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Errors allowed, as multiples of the error of rounding the exact result to bf16 once.
TOLERANCE = 2.0
FLOOR = 2e-5  # of results that fp32 keeps: the error of an fp32 sum of bf16 products


def relative(out: Tensor, exact: Tensor) -> float:
  """‖out − exact‖ / ‖exact‖ in float64; 0 when both are zero, nan or inf fail every comparison."""
  exact, norm = exact.double(), exact.double().norm()
  error = (out.double() - exact).norm()
  return float(error / norm) if norm > 0 else float(error)


def roundings(out: Tensor, exact: Tensor) -> float:
  """The error of `out` over that of rounding `exact` to out's dtype once (at least FLOOR)."""
  once = relative(exact.to(out.dtype), exact)
  return relative(out, exact) / max(once, FLOOR)


def grads(fn: Callable, inputs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
  """fn's floating outputs, then the gradients of its inputs that require one, for output gradients dys."""
  outs = fn(*inputs)
  outs = [outs] if isinstance(outs, Tensor) else list(outs)
  outs = [y for y in outs if y.requires_grad]
  wanted = [x for x in inputs if x.requires_grad]
  return [y.detach() for y in outs] + list(
    torch.autograd.grad(outs, wanted, [d.to(y.dtype) for d, y in zip(dys, outs, strict=True)])
  )


def exact_inputs(inputs: list[Tensor]) -> list[Tensor]:
  """The same values in float64 (integers stay), with the same requires_grad."""
  return [
    x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    for x in inputs
  ]


def compare(
  fn: Callable, reference: Callable, inputs: list[Tensor], dys: list[Tensor], tolerance=TOLERANCE
) -> list[float]:
  """Assert that every output and gradient of fn is within `tolerance` roundings of the float64 reference."""
  ours = grads(fn, inputs, dys)
  exact = grads(reference, exact_inputs(inputs), dys)
  errors = [roundings(a, b) for a, b in zip(ours, exact, strict=True)]
  assert all(e <= tolerance for e in errors), f"errors in roundings: {[f'{e:.2f}' for e in errors]}"
  return errors


def assert_repeats(fn: Callable, inputs: list[Tensor], dys: list[Tensor]) -> None:
  """Two runs of fn and its gradients are equal bit for bit."""
  for a, b in zip(grads(fn, inputs, dys), grads(fn, inputs, dys), strict=True):
    assert torch.equal(a, b)


def normal(*shape: int, scale: float = 1.0, dtype=torch.bfloat16, grad: bool = True) -> Tensor:
  """Random normal values on the GPU."""
  return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_(grad)
