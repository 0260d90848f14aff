"""What quantization loses: sums worked out by hand, and in float64 from the dequantized values."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kernels.flight import Flight, flight, flight_sums
from kernels.formats import signs
from kernels.ops import Operand, Recipe
from kernels.reference import grouped_mlp, linear, quantize


def operand(x, format, offsets=None, **how):
  return Operand("x", 0, x, quantize(x, format, **how), offsets, how.get("hadamard"))


def whole(x, format, **how):
  """The ratios of all of x as one expert's rows."""
  return flight(flight_sums(operand(x, format, [0, len(x)], **how))[0].tolist())


def test_fp8_by_hand():
  """Under the scale 1, 17 is 16 and 35 is 36; the second row is exact under 2^-3, the third 0."""
  x = torch.zeros(3, 32)
  x[0, :3] = torch.tensor([448.0, 17.0, -35.0])
  x[1, 4] = 56.0
  sums = flight_sums(operand(x, "fp8", [0, 1, 1, 3]))
  assert sums.tolist() == [
    [448**2 + 17**2 + 35**2, 2, 3, 0, 1, 0],
    [0, 0, 0, 0, 0, 0],
    [56**2, 0, 1, 0, 1, 0],
  ]
  assert sums.dtype == torch.float64


def test_nvfp4_by_hand():
  """tensor_amax 2688 makes the tensor's scale 1. The blocks' scales are 448; 18 for 17.5, so that
  105 is 6 · 18; and 0 for 2^-11 / 6, which is lost. A scale of 16 for 16.9 saturates its element.
  """
  x = torch.zeros(1, 48)
  x[0, 0], x[0, 16], x[0, 32] = 2688.0, 105.0, 2.0**-11
  amax = torch.tensor(2688.0)
  (sums,) = flight_sums(operand(x, "nvfp4", [0, 1], tensor_amax=amax)).tolist()
  noise = [0.0, (105.0 - 6 * 18) ** 2, 2.0**-22]
  assert sums == [2688**2 + 105**2 + 2.0**-22, sum(noise), 3, 0, 3, 1]
  x[0, 16] = 6 * 16.9
  (sums,) = flight_sums(operand(x, "nvfp4", [0, 1], tensor_amax=amax)).tolist()
  assert sums[3] == 1


def test_ratios():
  assert flight([100.0, 1.0, 8, 2, 4, 1]) == Flight(20.0, 0.25, 0.25)
  assert flight([1.0, 0.0, 1, 0, 1, 0]) == (math.inf, 0, 0)
  nothing = flight([0.0] * 6)
  assert math.isnan(nothing.sqnr_db) and nothing[1:] == (0, 0)
  assert math.isnan(flight([math.nan] * 6).sqnr_db)


HOW = {
  "fp8 rows": ("fp8", {}),
  "fp8 columns": ("fp8", {"axis": -2}),
  "nvfp4 rows": ("nvfp4", {}),
  "nvfp4 stochastic": ("nvfp4", {"seed": 5}),
  "nvfp4 rotated": ("nvfp4", {"axis": -2, "hadamard": 7, "seed": 5}),
}


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_noise_of_every_expert_against_float64(name, dtype):
  format, how = HOW[name]
  generator = torch.Generator().manual_seed(3)
  x = torch.randn(128, 48, generator=generator) * torch.rand(128, 1, generator=generator) ** 4
  x, offsets = x.to(dtype), [0, 32, 32, 96, 96]  # the rows after the last offset are nobody's
  given = operand(x, format, offsets, **how)
  exact = x.double().numpy()
  if "hadamard" in how:
    h = np.array([[1.0]])
    for _ in range(4):
      h = np.block([[h, h], [h, -h]])
    turn = np.array(signs(how["hadamard"]))[:, None] * h / 4
    exact = np.einsum("gic,ij->gjc", exact.reshape(8, 16, 48), turn).reshape(128, 48)
  noise = exact - given.quantized.dequantize(torch.float64).numpy()
  for sums, (a, b) in zip(flight_sums(given).tolist(), pairwise(offsets), strict=True):
    assert sums[0] == pytest.approx((exact[a:b] ** 2).sum(), rel=1e-5)
    assert sums[1] == pytest.approx((noise[a:b] ** 2).sum(), rel=1e-4)
    assert sums[2] == np.count_nonzero(exact[a:b])


def test_weights_of_experts_in_squares():
  w = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(1))
  w[1] = 0
  given = operand(w, "nvfp4", square=True)
  noise = w.double() - given.quantized.dequantize(torch.float64)
  sums = flight_sums(given)
  torch.testing.assert_close(sums[:, 1], noise.square().sum((1, 2)), rtol=1e-5, atol=0)
  assert sums[:, 4].tolist() == [6, 0, 6]


def test_random_data_behave_as_the_formats_promise():
  x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
  fp8, nvfp4 = whole(x, "fp8"), whole(x, "nvfp4")
  assert 31 < fp8.sqnr_db < 33 and 20 < nvfp4.sqnr_db < 22
  assert fp8.saturated == 0 and 0 < nvfp4.saturated < 1 / 16 and nvfp4.underflow == 0
  assert whole(x, "nvfp4", seed=1).sqnr_db < nvfp4.sqnr_db - 2
  x[:64] *= 1e-7
  assert whole(x, "nvfp4").underflow == 0.25


def test_an_observer_sees_each_operand_once_and_changes_nothing():
  generator = torch.Generator().manual_seed(2)
  x, w13 = torch.randn(70, 64, generator=generator), torch.randn(3, 64, 64, generator=generator)
  w2 = torch.randn(3, 64, 32, generator=generator)
  offsets = torch.tensor([0, 40, 40, 69], dtype=torch.int32)
  seen = []

  def gradients(recipe):
    tensors = [t.clone().requires_grad_() for t in (x, w13, w2)]
    y = grouped_mlp(tensors[0], offsets, *tensors[1:], recipe)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors)]

  for format in ("fp8", "nvfp4"):
    plain = gradients(Recipe(format, emulate=True))
    watched = gradients(Recipe(format, emulate=True, observe=seen.append))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    legs = ["fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_x", "wgrad_dy"]
    assert sorted((o.leg, o.salt) for o in seen) == sorted((g, s) for g in legs for s in (0, 1))
    for o in seen:
      sums = flight_sums(o)
      assert sums.shape == (3, 6) and (sums[1, 0] == 0) == (not o.leg.endswith("_w"))
    assert {o.hadamard for o in seen} == ({None} if format == "fp8" else {None, 0})
    seen.clear()


def test_the_forward_bf16_finish_leaves_only_gradients_to_see():
  seen = []
  x, w = torch.randn(4, 32).requires_grad_(), torch.randn(32, 32).requires_grad_()
  recipe = Recipe("nvfp4", emulate=True, forward_only_bf16=True, observe=seen.append)
  linear(x, w, recipe).sum().backward()
  assert sorted(o.leg for o in seen) == ["dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x"]
