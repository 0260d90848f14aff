"""Values against the reference in float64, in units of the error of rounding it to bf16 once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Roundings to bf16 in series add as squares: a result behind n of them errs by about sqrt(n).
FP32 = 1e-4  # relative, of an fp32 sum: a rounding to bf16 errs by 17 times as much
ONE = 1.01
TWO = 1.5
FOUR = 2.4  # pre-activation (through silu and the product: up to 2), activation, result


def relative(out: Tensor, exact: Tensor) -> float:
  """‖out − exact‖ / ‖exact‖; ‖out‖ when exact is zero. nan and inf fail every comparison."""
  exact = exact.double()
  error, norm = (out.double() - exact).norm(), exact.norm()
  return float(error / norm) if norm > 0 else float(error)


def roundings(out: Tensor, exact: Tensor) -> float:
  """The error of `out` over that of rounding `exact` to bf16 once."""
  once = relative(exact.bfloat16(), exact)
  return relative(out, exact) / max(once, 1e-4)


def grads(fn: Callable, inputs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
  """fn's differentiable outputs, then its inputs' gradients for output gradients dys."""
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
  fn: Callable, reference: Callable, inputs: list[Tensor], dys: list[Tensor], tolerance: float
) -> list[float]:
  """Errors of outputs and gradients in roundings, asserted to be at most `tolerance`."""
  ours = grads(fn, inputs, dys)
  exact = grads(reference, exact_inputs(inputs), dys)
  errors = [round(roundings(a, b), 3) for a, b in zip(ours, exact, strict=True)]
  assert all(error <= tolerance for error in errors), f"errors in roundings: {errors}"
  return errors


def assert_repeats(fn: Callable, inputs: list[Tensor], dys: list[Tensor]) -> None:
  """Two runs of fn and its gradients are equal bit for bit."""
  for a, b in zip(grads(fn, inputs, dys), grads(fn, inputs, dys), strict=True):
    assert torch.equal(a, b)


def fp32_grads(
  fn: Callable, inputs: list[Tensor], dys: list[Tensor], weights: list[Tensor], calls: int = 1
) -> list[Tensor]:
  """The .grad of `weights`, of fp32 grad_dtype, after this many backward passes from None."""
  for weight in weights:
    weight.grad, weight.grad_dtype = None, torch.float32
  for _ in range(calls):
    outs = fn(*inputs)
    outs = [y for y in ([outs] if isinstance(outs, Tensor) else outs) if y.requires_grad]
    torch.autograd.backward(outs, dys)
  assert all(weight.grad.dtype == torch.float32 for weight in weights)
  return [weight.grad for weight in weights]


def raw_bytes(parts: Iterable[Tensor | None]) -> list[Tensor]:
  """The bytes of a quantized tensor's parts, of those that it has."""
  return [part.view(-1).view(torch.uint8) for part in parts if part is not None]


def normal(*shape: int, scale: float = 1.0, dtype=torch.bfloat16, grad: bool = True) -> Tensor:
  """Random normal values on the GPU."""
  return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_(grad)
