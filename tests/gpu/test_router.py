from functools import partial

import pytest
import torch

from gpu.oracle import ONE, assert_repeats, compare, relative
from kernels.cuda.router import logit_parts, padded, route
from kernels.ops import KernelError, RouterSpec
from kernels.tools.benches.moe import Moe, MoeLayer, kept

pytestmark = pytest.mark.gpu

CASES = [  # T, D, E and the rule
  (4096, 2048, 64, RouterSpec(6, scale=2.446)),
  (8192, 2048, 256, RouterSpec(8)),  # dw of slices that fill the SMs once
  (1000, 1024, 256, RouterSpec(8, num_groups=8, topk_groups=4, scale=2.5)),
  (777, 512, 512, RouterSpec(16, score="softmax")),
  (65, 64, 6, RouterSpec(2, score="softmax", normalize=False)),
  (513, 256, 96, RouterSpec(5, num_groups=32, topk_groups=3)),
  (128, 256, 40, RouterSpec(4, num_groups=40 // 8, topk_groups=2, normalize=False)),
]


def inputs(tokens, dim, experts):
  x = torch.randn(tokens, dim, device="cuda").bfloat16().requires_grad_()
  weight = (torch.randn(experts, dim, device="cuda") * dim**-0.5).requires_grad_()
  return x, weight, torch.randn(experts, device="cuda") * 0.1


@pytest.mark.parametrize("case", CASES)
def test_logits_have_fp32_accuracy(case):
  tokens, dim, experts, _ = case
  x, weight, _ = inputs(tokens, dim, experts)
  parts = logit_parts(x.detach(), weight.detach()).unflatten(1, (3, padded(experts)))
  logits = parts.flip(1).sum(1)[:, :experts]
  exact = x.double() @ weight.double().T
  assert relative(logits, exact) < dim**0.5 * 2**-24  # an fp32 sum of D products


@pytest.mark.parametrize("case", CASES)
def test_selection_follows_the_rule_on_its_own_scores(case):
  tokens, dim, experts, spec = case
  x, weight, bias = inputs(tokens, dim, experts)
  out = route(x, weight, bias, spec)
  biased = (out.score_TE + bias).detach()
  size = experts // spec.num_groups
  if spec.topk_groups < spec.num_groups:
    groups = biased.unflatten(1, (spec.num_groups, size))
    best = groups.topk(min(2, size), 2).values.sum(2)
    kept = best.argsort(dim=1, descending=True, stable=True)[:, : spec.topk_groups]
    mask = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
    biased = groups.masked_fill(~mask[..., None], -torch.inf).flatten(1)
  expert = biased.sort(dim=1, descending=True, stable=True).indices[:, : spec.top_k]
  assert torch.equal(out.expert_TK, expert.int())
  gate = out.score_TE.gather(1, expert)
  gate = gate / (gate.sum(1, keepdim=True) + 1e-20) if spec.normalize else gate
  assert relative(out.gate_TK, gate * spec.scale) < 1e-6
  assert torch.equal(out.count_E, torch.bincount(expert.flatten(), minlength=experts).int())
  assert out.expert_TK.dtype == out.count_E.dtype == torch.int32


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients(case):
  """Of every set of outputs: gates, scores, and x handed on, whose gradient the product for x's
  own takes up before it is rounded (in bf16 it would be rounded twice: 1.2 of one rounding).
  """
  tokens, dim, experts, spec = case
  x, weight, bias = inputs(tokens, dim, experts)
  picked = route(x, weight, bias, spec).expert_TK.long()

  def ours(x, weight, bias):
    out = route(x, weight, bias, spec)
    return out.gate_TK, out.score_TE, out.x_TD

  def exact(x, weight, bias):
    logits = x @ weight.T
    score = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)
    gate = score.gather(1, picked)
    gate = gate / (gate.sum(1, keepdim=True) + 1e-20) if spec.normalize else gate
    return gate * spec.scale, score, x

  dys = [torch.randn(tokens, n, device="cuda") for n in (spec.top_k, experts)]
  (dx,) = torch.autograd.grad(ours(x, weight, bias)[0], x, dys[0])
  dys.append((torch.randn_like(x) * dx.float().std()).bfloat16())  # as large as what it meets
  for which in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):

    def some(fn, *a, which=which):
      found = fn(*a)
      return [found[i] for i in which]

    learnt = [x, weight.requires_grad_(which != (2,)), bias]
    compare(partial(some, ours), partial(some, exact), learnt, [dys[i] for i in which], ONE)


def test_a_layer_keeps_what_the_docstring_says():
  layer = MoeLayer(Moe(tokens=512, dim=256, width=64))  # tensors up to 1 MiB have exact blocks
  layer.step(0)
  assert kept(lambda: layer.forward(0)) == 4 * 512 * 6 * (64 + 5) + 512  # 512: the offsets


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_scores_are_kept_where_they_are_used(score):
  x, weight, bias = inputs(512, 256, 64)
  spec, rows, scores = RouterSpec(8, score), 4 * 512 * 8, 4 * 512 * 64
  always = 2 * rows + (scores if score == "softmax" else 0)  # experts and their scores
  assert kept(lambda: route(x, weight, bias, spec).gate_TK) == always
  assert kept(lambda: route(x, weight, bias, spec).score_TE.sum(1)) == 2 * rows + scores


def test_ties_go_to_the_lower_index():
  x, weight = torch.ones(40, 64, device="cuda").bfloat16(), torch.zeros(64, 64, device="cuda")
  out = route(x, weight, torch.zeros(64, device="cuda"), RouterSpec(6))
  assert out.expert_TK.tolist() == [list(range(6))] * 40
  grouped = route(x, weight, torch.zeros(64, device="cuda"), RouterSpec(6, "sigmoid", 8, 2))
  assert grouped.expert_TK.tolist() == [list(range(6))] * 40


def test_negative_biased_scores_beat_masked_groups():
  x, weight, _ = inputs(100, 128, 16)
  bias = torch.full((16,), -3.0, device="cuda")
  spec = RouterSpec(4, num_groups=4, topk_groups=1)
  expert = route(x, weight, bias, spec).expert_TK
  assert (expert // 4 == expert[:, :1] // 4).all()


@pytest.mark.parametrize("experts", [64, 256])
def test_repeats_bit_for_bit(experts):
  x, weight, bias = inputs(32768, 2048, experts)

  def outputs(x, weight, bias):
    return route(x, weight, bias, CASES[0][3])

  dys = [torch.randn(32768, 6, device="cuda"), torch.randn(32768, experts, device="cuda"), x]
  assert_repeats(outputs, [x, weight, bias], [dy.detach() for dy in dys])
  assert torch.equal(outputs(x, weight, bias).expert_TK, outputs(x, weight, bias).expert_TK)


def test_no_tokens():
  x, weight, bias = inputs(0, 64, 8)
  out = route(x, weight, bias, RouterSpec(2))
  (out.gate_TK.sum() + out.score_TE.sum() + out.x_TD.sum()).backward()
  assert out.expert_TK.shape == (0, 2) and out.count_E.tolist() == [0] * 8
  assert x.grad.shape == (0, 64) and weight.grad.abs().sum() == 0


def test_nan_stays_in_range():
  x, weight, bias = inputs(64, 64, 40)
  with torch.no_grad():
    x[3] = torch.nan
  expert = route(x, weight, bias, RouterSpec(4)).expert_TK
  assert 0 <= int(expert.min()) and int(expert.max()) < 40


def test_unsupported_requests_are_refused():
  x, weight, bias = inputs(8, 64, 8)
  with pytest.raises(KernelError, match="bfloat16"):
    route(x.float(), weight, bias, RouterSpec(2))
  with pytest.raises(KernelError, match="top_k at most 2"):
    route(x, weight, bias, RouterSpec(3, num_groups=4, topk_groups=1))
