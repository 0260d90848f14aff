"""What kernels.costs says an operation keeps, against what autograd saves of the plain one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import costs, reference
from kernels.ops import Recipe, RouterSpec
from kernels.reference import blockscale

T, D, F, V, E, K = 24, 32, 20, 57, 8, 3
PLAIN = Recipe("bf16")


def leaf(*shape: int) -> Tensor:
  return torch.randn(*shape, requires_grad=True)


def saved(operation: Callable[..., object], *inputs: Tensor, weights: tuple[Tensor, ...]) -> int:
  """Bytes of the storages that autograd keeps, but for weights, their copies and scalars."""
  own = {w.numel() for w in weights}
  storages = {}

  def pack(tensor: Tensor) -> Tensor:
    if tensor.numel() not in own and tensor.numel() > 1:
      storage = tensor.untyped_storage()
      storages[storage.data_ptr()] = (storage.nbytes(), tensor)
    return tensor

  with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
    kept = operation(*inputs, *weights)  # what it returns stays alive meanwhile
  del kept
  return sum(size for size, _ in storages.values())


def test_rms_norm():
  kept = saved(lambda x, w: reference.rms_norm(x, w, 1e-6), leaf(T, D), weights=(leaf(D),))
  assert kept == T * costs.rms_norm(D, 4)


def test_linear():
  kept = saved(lambda x, w: reference.linear(x, w, PLAIN), leaf(T, D), weights=(leaf(F, D),))
  assert kept == T * costs.linear(D, 4)


def test_attention():
  """Of one width; the plain operation pads a narrower v."""
  q, k, v = (leaf(2, T, 3, 16) for _ in range(3))
  kept = saved(lambda *qkv: reference.attention(*qkv, 0.25), q, k, v, weights=())
  assert kept == 2 * T * costs.attention(3, 16, 16, 4)


def test_mlp():
  weights = leaf(2 * F, D), leaf(D, F)
  kept = saved(lambda x, *w: reference.mlp(x, *w, PLAIN), leaf(T, D), weights=weights)
  assert kept == T * (costs.linear(D, 4) + costs.mlp(F, 4))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_routed_experts(score):
  """The plain operations keep scores of both kinds, and an index takes up to twice four bytes."""
  spec = RouterSpec(K, score, normalize=False)
  weights = leaf(E, D), leaf(E, 2 * F, D), leaf(E, D, F)

  def block(x: Tensor, router: Tensor, *experts: Tensor) -> object:
    routing = reference.route(x, router, torch.zeros(E), spec)
    layout = reference.layout(routing.expert_TK, E)
    return reference.experts(x, routing.gate_TK, layout, *experts, PLAIN)

  kept = saved(block, leaf(T, D), weights=weights)
  planned = costs.linear(D, 4) + K * costs.mlp(F, 4) + costs.route(E, K, "softmax", balanced=False)
  assert 0 <= kept - T * planned <= T * 5 * K * 4


def test_linear_cross_entropy():
  """Kept: both gradients. The logits are gone."""
  x, target = leaf(T, D), torch.randint(V, (T,))
  loss = costs.linear_cross_entropy(T, D, V, 7, 4)
  kept = saved(
    lambda x, w: reference.linear_cross_entropy(x, w, target, 7), x, weights=(leaf(V, D).detach(),)
  )
  assert kept == loss.dx
  w = leaf(V, D)
  assert saved(lambda x: reference.linear_cross_entropy(x, w, target, 7), x, weights=()) == (
    loss.dx + 2 * loss.dweight  # one of them is the weight
  )
  assert loss.logits == 7 * V * 4


@pytest.mark.parametrize(
  ("format", "emulated", "each"), [("fp8", False, 33 / 32), ("nvfp4", False, 9 / 16)]
)
def test_quantized_copies(format, emulated, each):
  assert costs.quantized_copy(format, emulated).nbytes == each


def test_a_quantized_copy_is_what_the_formats_hold():
  w = torch.randn(64, 64)
  for format in ("fp8", "nvfp4"):
    copy = blockscale.quantize(w, format, square=format == "nvfp4")
    held = copy.data.nbytes + copy.scale.nbytes
    assert held == w.numel() * costs.quantized_copy(format, True).nbytes


def test_counting_does_not_import_torch():
  code = "import sys, kernels.costs, kernels.sizes; assert 'torch' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
