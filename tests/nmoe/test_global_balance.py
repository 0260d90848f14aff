"""The global-batch balance loss: counted once per step, over all micro-batches and ranks."""

from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from labs import Lab
from model_configs import tiny

import kernels.reference
from kernels.reference import symmetric
from nmoe.config import file as configs
from nmoe.data.loader import Loader
from nmoe.data.prepared import open_data
from nmoe.distributed import parallel
from nmoe.distributed.buckets import shared
from nmoe.distributed.parallel import Parallel
from nmoe.distributed.rdep import Rdep
from nmoe.model.decoder import Model
from nmoe.model.router import global_balance_loss
from nmoe.records import metrics
from nmoe.train.clock import Clock
from nmoe.train.loop import build
from nmoe.train.passes import Passes
from nmoe.train.session import TrainState
from stages.launch import local as launch
from stages.launch.local import Job, Launcher

LAYERS, TOKENS, EXPERTS, K, ALPHA = 3, 40, 8, 2, 0.5


def by_definition(score_LTE: np.ndarray, chosen_LTE: np.ndarray) -> np.ndarray:
  """arXiv 2501.11873: E · Σ_i f_i P_i, f_i expert i's share of the choices, P_i its mean score's
  share; float64 [L].
  """
  found = []
  for score_TE, chosen_TE in zip(score_LTE.astype(np.float64), chosen_LTE, strict=True):
    f_E = chosen_TE.sum(0) / chosen_TE.sum()
    p_E = (score_TE / score_TE.sum(1, keepdims=True)).mean(0)
    found.append(score_TE.shape[1] * float((f_E * p_E).sum()))
  return np.array(found)


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Scores [L, T, E], and which of them a router with a bias chose."""
  generator = torch.Generator().manual_seed(seed)
  score_LTE = torch.rand(LAYERS, TOKENS, EXPERTS, generator=generator)
  biased = score_LTE + torch.rand(EXPERTS, generator=generator)
  return score_LTE, torch.zeros_like(score_LTE).scatter_(2, biased.topk(K).indices, 1.0)


def test_it_is_its_definition_and_one_when_even():
  score_LTE, chosen_LTE = drawn(0)
  found = global_balance_loss(score_LTE, chosen_LTE.sum(1).int())
  np.testing.assert_allclose(found, by_definition(score_LTE.numpy(), chosen_LTE.numpy()), rtol=1e-6)
  even = torch.full((2, EXPERTS), 17, dtype=torch.int32)
  np.testing.assert_allclose(global_balance_loss(score_LTE[:2], even), [1, 1], rtol=1e-6)


def test_parts_of_a_step_average_to_the_whole_with_its_gradient():
  score_LTE, chosen_LTE = drawn(1)
  count_LE = chosen_LTE.sum(1).int()
  whole, parts = (score_LTE.clone().requires_grad_() for _ in range(2))
  global_balance_loss(whole, count_LE).sum().backward()
  losses = [global_balance_loss(part, count_LE).sum() / 4 for part in parts.chunk(4, 1)]
  sum(losses).backward()
  torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)


def gradients(lab: Lab, **values) -> dict[str, torch.Tensor]:
  """Of the first step's passes, by parameter."""
  keys = {"moe.balance_alpha": 0.0, "train.seed": 3}
  config = configs.changed(lab.config, keys | {k.replace("__", "."): v for k, v in values.items()})
  session = lab.session("x", config=config)
  state = build(config, session.target, Parallel())
  loader = Loader(open_data(lab.data), seq_len=64, seed=0)
  tokens, targets = (torch.from_numpy(x) for x in loader.batch(0, config.sequences))
  Passes(session, state, Clock(session.target.device), loader)(tokens, targets)
  return {name: p.grad.float() for name, p in state.model.named_parameters()}


def expected(lab: Lab) -> dict[str, torch.Tensor]:
  """Of the loss and the balance by its definition, by autograd over the whole batch at once."""
  config = configs.changed(lab.config, {"moe.balance_alpha": 0.0, "train.seed": 3})
  model = build(config, lab.session("x").target, Parallel()).model
  loader = Loader(open_data(lab.data), seq_len=64, seed=0)
  tokens, targets = (torch.from_numpy(x) for x in loader.batch(0, config.sequences))
  seen = []
  for router in model.routers:
    router.register_forward_hook(lambda _, args, routing: seen.append(routing))
  total = model(tokens, targets).loss_sum / config.schedule.batch_tokens
  for routing in seen:
    f_E = (
      torch.bincount(routing.expert_TK.flatten().long(), minlength=4) / routing.expert_TK.numel()
    )
    share_TE = routing.score_TE / routing.score_TE.sum(1, keepdim=True)
    total = total + ALPHA * 4 * (f_E * share_TE.mean(0)).sum()
  total.backward()
  return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch", [8, 4, 1])
def test_several_micro_batches_are_one(lab, micro_batch):
  found = gradients(lab, moe__global_balance_alpha=ALPHA, train__micro_batch=micro_batch)
  without = gradients(lab, train__micro_batch=micro_batch)
  for name, wanted in expected(lab).items():
    size = float(wanted.abs().max())
    torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5 * size, msg=name)
  router = "layers.1.moe.router.weight"
  assert float((found[router] - without[router]).norm() / without[router].norm()) > 0.05


def in_groups(group, repeats: bool) -> dict[str, np.ndarray]:
  """This rank's part of a step's gradients, of four ranks in two groups, of which the first repeats
  a forward pass, as where one of its ranks runs full.
  """
  config = tiny(
    launch__ranks=4,
    rdep__group=2,
    rdep__deadline_s=20.0,
    schedule__batch_tokens=8 * 24,
    moe__balance_alpha=0.0,
    moe__global_balance_alpha=ALPHA,
  )
  inside, replicas = parallel.expert_groups(config, group, *2 * [timedelta(seconds=20)])
  rdep, rank = Rdep(config, kernels.reference, inside, symmetric), group.rank()
  full = iter([False, repeats and rank < 2])  # asked before the first forward pass and after it
  rdep.exchange.overflowed = lambda: next(full, False)
  parts = shared(config, rank, replicas)
  together = Parallel(rank, 4, rdep, rdep.first, group, None, parts)
  model = Model(config, kernels.reference, rdep)
  model.init_weights(0)
  session = SimpleNamespace(
    config=config, parallel=together, target=SimpleNamespace(device=torch.device("cpu"))
  )
  state = TrainState(model, None)
  nobody = SimpleNamespace(data=SimpleNamespace(sources=[]))
  passes = Passes(session, state, Clock(torch.device("cpu")), nobody)
  generator = torch.Generator().manual_seed(0)
  batch = torch.randint(0, 97, (8, 25), generator=generator).chunk(4)[rank]
  loss, counts, _ = passes(batch[:, :-1], batch[:, 1:])
  assert (rdep.waited, rdep.full) == (repeats and rank < 2, 0)
  together.reduce_gradients(model)
  found = {
    name: model.get_parameter(name).grad[slice(*rows)] for name, rows in together.owned.items()
  }
  found |= {"loss": together.sum(loss), "counts": together.sum(counts)}
  return {name: x.numpy().copy() for name, x in found.items()}


def test_one_group_may_repeat_its_passes_without_the_others():
  """No sum over all ranks is inside them."""
  wanted, found = (ranks.run(in_groups, 4, repeats) for repeats in (False, True))
  for one, other in zip(wanted, found, strict=True):
    assert {n: x.tobytes() for n, x in one.items()} == {n: x.tobytes() for n, x in other.items()}


def test_it_is_off_unless_asked_for(lab):
  assert lab.config.moe.global_balance_alpha == 0


def test_two_ranks_are_one(lab):
  """By real processes: losses of four steps, and another balance than without the loss."""
  short = {
    "schedule__total_tokens": 2048,
    "schedule__warmup_tokens": 0,
    "schedule__decay_tokens": 0,
    "moe__balance_alpha": 0.0,
    "moe__bias_update_rate": 0.0,
  }
  cases = {
    "one": {"train__micro_batch": 8, "moe__global_balance_alpha": ALPHA},
    "two": {"train__micro_batch": 4, "moe__global_balance_alpha": ALPHA, "launch__ranks": 2},
    "two, in parts": {
      "train__micro_batch": 2,
      "moe__global_balance_alpha": ALPHA,
      "launch__ranks": 2,
    },
    "without": {"train__micro_batch": 8},
  }
  losses = {}
  for name, values in cases.items():
    run = lab.record(**short | values)
    handle = launch.run(Launcher(lab.root), Job(run, configs.loads(lab.run(run).toml)))
    assert handle.poll() == 0, handle.tail()
    losses[name] = metrics.read(lab.root, run)["train/loss"][2]
  np.testing.assert_allclose(losses["two"], losses["one"], rtol=2e-5)
  np.testing.assert_allclose(losses["two, in parts"], losses["one"], rtol=2e-5)
  assert abs(losses["without"] - losses["one"]).max() > 1e-4
