import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kernels.ops import KernelError, RouterSpec
from kernels.reference import combine, layout, route


def chosen(biased, spec):
  """One token's experts, from the definition: sort by (-value, index) among the kept groups.

  Groups are compared by fp32 sums, as scores are fp32: in more digits a tie may not be one.
  """
  size = len(biased) // spec.num_groups
  groups = [biased[g * size : (g + 1) * size] for g in range(spec.num_groups)]
  strength = [sum(np.float32(score) for score in sorted(group)[-2:]) for group in groups]
  kept = sorted(range(len(groups)), key=lambda g: (-strength[g], g))[: spec.topk_groups]
  allowed = [e for e in range(len(biased)) if e // size in kept]
  return sorted(allowed, key=lambda e: (-biased[e], e))[: spec.top_k]


def logits_as_given(logits):
  """x and weight whose products are exactly these logits [T, E]."""
  return logits, torch.eye(logits.shape[1])


specs = st.sampled_from(
  [
    RouterSpec(2),
    RouterSpec(3, "softmax", normalize=False),
    RouterSpec(3, num_groups=4, topk_groups=2, scale=2.5),
    RouterSpec(2, "softmax", num_groups=2, topk_groups=1),
    RouterSpec(8, num_groups=8, topk_groups=8),
    RouterSpec(2, num_groups=8, topk_groups=3),
  ]
)


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(0, 9), st.data())
def test_selection_gates_and_counts_follow_the_definition(spec, tokens, data):
  """Small integers make ties common; negative biases make biased scores negative."""
  numbers = st.lists(st.integers(-2, 2), min_size=tokens * 8, max_size=tokens * 8)
  logits = torch.tensor(data.draw(numbers), dtype=torch.float32).view(tokens, 8)
  bias = torch.tensor(
    data.draw(st.lists(st.sampled_from([-2, -1, 0, 0.5]), min_size=8, max_size=8))
  )
  routing = route(*logits_as_given(logits), bias, spec)
  scores = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)
  torch.testing.assert_close(routing.score_TE, scores)
  for t in range(tokens):
    expected = chosen((routing.score_TE[t] + bias).tolist(), spec)
    assert routing.expert_TK[t].tolist() == expected
    gates = routing.score_TE[t, expected].double()
    gates = gates / gates.sum() if spec.normalize else gates
    torch.testing.assert_close(routing.gate_TK[t].double(), gates * spec.scale, rtol=1e-6, atol=0)
  assert routing.count_E.tolist() == [(routing.expert_TK == e).sum().item() for e in range(8)]
  assert routing.expert_TK.dtype == routing.count_E.dtype == torch.int32
  assert routing.gate_TK.dtype == routing.score_TE.dtype == torch.float32


def test_bf16_tokens_meet_an_fp32_weight():
  x, weight = torch.randn(50, 64).bfloat16(), torch.randn(8, 64)
  scores = route(x, weight, torch.zeros(8), RouterSpec(2)).score_TE
  exact = (x.double() @ weight.double().T).sigmoid()
  torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-6)


def test_gates_and_scores_are_differentiable_and_the_bias_is_not():
  x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
  weight = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
  bias = torch.randn(8, requires_grad=True)
  for spec in (RouterSpec(3, scale=1.5), RouterSpec(2, "softmax", 4, 2, normalize=False)):
    assert gradcheck(lambda x, w, s=spec: route(x, w, bias, s)[1:3], (x, weight))
    routing = route(x, weight, bias, spec)
    (routing.gate_TK.sum() + routing.score_TE.sum()).backward()
  assert bias.grad is None


def test_x_is_passed_on_with_the_gradients_that_come_to_it():
  x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
  weight = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
  bias, spec = torch.randn(8), RouterSpec(3, scale=1.5)
  routing = route(x, weight, bias, spec)
  assert torch.equal(routing.x_TD, x)
  factor = torch.randn_like(x)
  (gates,) = torch.autograd.grad(routing.gate_TK.sum(), x, retain_graph=True)
  (both,) = torch.autograd.grad(routing.gate_TK.sum() + (routing.x_TD * factor).sum(), x)
  torch.testing.assert_close(both, gates + factor)


@pytest.mark.parametrize(
  "spec,message",
  [
    (RouterSpec(9), "exceeds the 8 experts"),
    (RouterSpec(5, num_groups=4, topk_groups=2), "exceeds the 4 experts"),
    (RouterSpec(2, num_groups=3, topk_groups=1), "1 of 3 groups of 8 experts"),
    (RouterSpec(2, num_groups=2, topk_groups=3), "3 of 2 groups"),
    (RouterSpec(2, score="tanh"), "'tanh' is unknown"),
  ],
)
def test_impossible_specs_are_refused(spec, message):
  with pytest.raises(KernelError, match=message):
    route(torch.randn(3, 4), torch.randn(8, 4), torch.zeros(8), spec)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 4), st.integers(4, 9), st.randoms(use_true_random=False))
def test_layout_sorts_by_expert_then_token_then_k(tokens, top_k, num_experts, random):
  rows = [random.sample(range(num_experts), top_k) for _ in range(tokens)]
  order = sorted((e, t, k) for t, row in enumerate(rows) for k, e in enumerate(row))
  got = layout(torch.tensor(rows, dtype=torch.int32).view(tokens, top_k), num_experts)
  assert got.source_N.tolist() == [t * top_k + k for _, t, k in order]
  assert got.offset_E1.tolist() == [sum(o[0] < e for o in order) for e in range(num_experts + 1)]
  for row, (_, t, k) in enumerate(order):
    assert got.row_TK[t, k] == row
  assert got.row_TK.shape == (tokens, top_k)
  assert {part.dtype for part in got} == {torch.int32}


def test_combine_adds_in_the_order_of_k():
  y, gate = torch.randn(40, 5, 16), torch.rand(40, 5)
  total = np.zeros((40, 16), np.float32)
  for k in range(5):
    total = total + gate[:, k, None].numpy() * y[:, k].numpy()
  assert torch.equal(combine(y, gate), torch.from_numpy(total))


def test_combine_rounds_once():
  y, gate = torch.randn(40, 6, 16).bfloat16(), torch.rand(40, 6)
  exact = (gate.double()[..., None] * y.double()).sum(1)
  error = (combine(y, gate).double() - exact).abs().max()
  assert error <= 1.01 * (exact.bfloat16().double() - exact).abs().max()


def test_combine_gradients():
  y = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
  gate = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
  assert gradcheck(combine, (y, gate))


def test_combine_of_no_tokens():
  assert combine(torch.zeros(0, 3, 5), torch.zeros(0, 3)).shape == (0, 5)
  with pytest.raises(KernelError, match=r"agree in \[T, K\]"):
    combine(torch.zeros(2, 3, 5), torch.zeros(3, 2))
