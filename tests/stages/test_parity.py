"""`nmoe check ep` on real ranks, what it must notice, and checkpoints that change hands."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from labs import same_bits, write_files, write_variant
from rich.console import Console

from kernels import reference
from nmoe.config import file as configs
from nmoe.distributed.buckets import shared
from nmoe.distributed.parallel import Parallel
from nmoe.errors import ConfigError, RunError
from nmoe.model.decoder import Model
from nmoe.records import checkpoint
from nmoe.records.experiments import Experiments
from nmoe.records.metrics import Metrics, read
from nmoe.train.optim import Optimizer
from nmoe.train.session import TrainState
from stages.proofs import check_ep as parity
from stages.proofs import shortened


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = write_files(tmp_path_factory.mktemp("parity"))
  body = '[model]\nnum_layers = 3\n[moe]\nnum_experts = 8\n[optim]\nmatrices = "muon"\n'
  return write_variant(path, "ranks", body)


def test_the_certificate_holds_on_1_2_and_4_ranks(file):
  """Experts lie over two ranks: over all of 2, and over each half of 4."""
  body = "[rdep]\ngroup = 2\n[launch]\nranks = 4\n[train]\nmicro_batch = 2\n"
  replicas = write_variant(file, "replicas", body)
  made = shortened.at_ranks(configs.load(replicas, env={}), 4)
  assert (made.launch.ranks, made.expert_ranks) == (4, 2)
  claims = parity.ep(replicas, [1, 2, 4], 4, Console(quiet=True))
  assert all(claim.holds for claim in claims)
  assert any("collective" in claim.what for claim in claims)
  records = Experiments(configs.load(file, env={}).run.root)
  found = records.list()[0]
  assert (found.stage, found.verdict) == ("check", "confirmed")
  assert len(found.conclusion["rows"]) == len(claims)


def test_ranks_that_do_not_fit_are_refused_with_those_that_do(file):
  with pytest.raises(ConfigError, match="choose from 1, 2, 4, 8"):
    shortened.at_ranks(configs.load(file, env={}), 3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_batches_divide_what_a_rank_gets(lab, ranks):
  """20 sequences in micro-batches of 10 on one rank: on four ranks 5 each, one at a time."""
  values = {"schedule.batch_tokens": 20 * 64, "train.micro_batch": 10}
  made = shortened.at_ranks(configs.changed(lab.config, values), ranks)
  assert made.train.micro_batch == {1: 10, 2: 5, 4: 1}[ranks]


@pytest.mark.parametrize("ranks", [0, -2])
def test_no_ranks_are_refused(lab, ranks):
  with pytest.raises(ConfigError, match=f"{ranks} ranks.*choose from 1, 2, 4$"):
    shortened.at_ranks(lab.config, ranks)


def test_a_deviation_is_found_and_named():
  one, zero = torch.ones(4), torch.zeros(2)
  same = [("w", one, one.clone()), ("v", zero, zero.clone())]
  assert parity._largest("2", "gradient", same, 0.0).holds
  claim = parity._largest(
    "2", "gradient", [("w", one, torch.tensor([1.0, 1, 1, 1.1])), same[1]], 1e-3
  )
  assert not claim.holds
  assert claim.where == "w"
  assert claim.found == pytest.approx(0.05)
  assert not parity._largest("2", "gradient", [same[0], ("v", zero, torch.ones(2))], 1e9).holds


def test_deviations_after_a_step(lab):
  """Only of the steps that were asked for, each in the claim that speaks of it."""
  ids = [lab.record(), lab.record()]
  assert [lab.attempt(run_id) for run_id in ids] == [0, 0]
  runs = [lab.run(run_id) for run_id in ids]

  def broken(since, *until):
    claims = list(parity.deviations(lab.root, "2", *runs, since, parity.Until(*until)))
    assert len(claims) == 6
    return {
      claim.what.partition(", largest")[0]: claim.where for claim in claims if not claim.holds
    }

  assert broken(9, 12, 12, 11) == {}
  state = lab.state(ids[1])
  state["embed.weight"] += 0.1
  checkpoint.save(lab.checkpoints(ids[1]), 12, state, 0, {})
  metrics, logged = Metrics(lab.root, ids[1]), read(lab.root, ids[1])
  metrics.rewind(0)
  factors = {(s, "train/loss"): factor for s, factor in ((5, 2), (11, 1.1), (12, 9))}
  factors[10, "moe/0/load_p50"] = 3
  for tag, series in logged.items():
    for step, tokens, value in zip(*series, strict=True):
      metrics.add(int(step), int(tokens), {tag: value * factors.get((step, tag), 1)})
  metrics.flush()
  loads = {"expert loads, 7 series, step 10": "moe/0/load_p50"}
  losses = {"train/loss, step 11": "step 11"}
  assert broken(9, 11, 12, 11) == {**losses, **loads, "update, steps 10 to 12": "embed.weight"}


def test_a_collective_inside_a_moe_layer_is_found():
  def event(name, begin, duration, tid=1):
    return {"name": name, "ts": begin, "dur": duration, "tid": tid}

  layer = [event("_Send", 0, 10), event("_ReceiveBackward", 100, 10)]
  outside = [event("c10d::allreduce_", 50, 5), event("ncclKernel", 105, 1, tid=2)]
  assert parity.collective_calls(layer + outside) == []
  inside = event("gloo:all_reduce", 104, 2)
  assert parity.collective_calls([*layer, *outside, inside]) == ["gloo:all_reduce"]
  with pytest.raises(RunError, match="nothing was checked"):
    parity.collective_calls(outside)


def hand_over(group, toml: str, source: str, target: str, step: int) -> None:
  """Load a checkpoint with this group's ranks and save it again."""
  config, rank = configs.loads(toml, env={}), group.rank()
  place = SimpleNamespace(rank=rank % config.expert_ranks, num_ranks=config.expert_ranks)
  ours = Parallel(rank, group.size(), shared=shared(config, rank))
  model = Model(config, reference, place)
  state = TrainState(model, Optimizer(model, config, reference, ours.owned)).tensors()
  first = place.rank * config.moe.num_experts // place.num_ranks
  checkpoint.load(Path(source), step, state, first)
  writer = checkpoint.Writer(Path(target), 1, first, group)
  writer.copy(state)
  with writer:
    writer.start(step, {})


def test_a_checkpoint_changes_hands_from_1_over_4_to_1_bit_for_bit(lab, tmp_path):
  run_id = lab.record(moe__num_experts=8, optim__experts="muon", schedule__total_tokens=4096)
  assert lab.attempt(run_id) == 0
  step, folder = 8, lab.checkpoints(run_id)
  config = configs.loads(lab.run(run_id).toml, env={})
  written = lab.state(run_id, step)
  assert {f"layers.1.moe.experts.{e}.w2.momentum" for e in range(8)} <= written.keys()
  for hop, (num_ranks, group) in enumerate(((2, 0), (4, 0), (4, 2), (2, 1), (1, 0))):
    target = tmp_path / f"hop{hop}"
    micro = config.train.micro_batch // num_ranks
    values = {"launch.ranks": num_ranks, "rdep.group": group, "train.micro_batch": micro}
    toml = configs.to_toml(configs.changed(config, values))
    ranks.run(hand_over, num_ranks, toml, str(folder), str(target), step)
    folder = target
    assert same_bits(checkpoint.read(folder / f"step_{step:08d}"), written)
