"""Steps that are not finite or spikes: replayed, then stopped, skipped or rewound; what is kept."""

import numpy as np
import pytest
import torch
from labs import same_bits

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.data.holes import skipped, with_hole
from nmoe.data.loader import Loader
from nmoe.data.prepared import open_data
from nmoe.errors import CheckpointError, DivergedError
from nmoe.records import checkpoint
from nmoe.records.attempts import Attempts, Event
from nmoe.records.reader import Amendment
from nmoe.train.badsteps import BadStepError, decide
from nmoe.train.guard import Guard
from nmoe.train.passes import Passes
from nmoe.train.retention import permanent

BAD = 8  # the step that is bad; checkpoints are of every third
SAMPLES = 8  # of a step


@pytest.fixture
def records(lab):
  found = Attempts(lab.root)
  yield found
  found.close()


@pytest.fixture
def not_finite(monkeypatch):
  """The loss of step BAD is NaN as often as `times` says."""
  state = {"times": 100}
  passes = Passes.__call__

  def planted(self, tokens, targets):
    loss, counts, loss_T = passes(self, tokens, targets)
    if self.state.step + 1 == BAD and state["times"]:
      state["times"] -= 1
      loss = loss * torch.nan
    return loss, counts, loss_T

  monkeypatch.setattr(Passes, "__call__", planted)
  return state


@pytest.fixture
def poisoned(monkeypatch):
  """The samples of step BAD, of the order without holes, are noise."""
  samples = Loader.samples

  def planted(self, ids):
    rows = samples(self, ids)
    noise = np.random.default_rng(0).integers(0, 256, rows.shape)
    true = skipped(ids, self.holes)
    bad = (true >= (BAD - 1) * SAMPLES) & (true < BAD * SAMPLES)
    return np.where(bad[:, None], noise, rows)

  monkeypatch.setattr(Loader, "samples", planted)


def attempts(lab, records, run: str, number: int) -> list[str]:
  """Restarts of a run until it ends; the kinds of its events about them."""
  begun = {"engine": "local", "job_id": "", "nodes": ["a"], "commit": "", "step": 0}
  records.begin(run, **begun)
  for _ in range(number):
    try:
      lab.attempt(run, number=1)
      break
    except BadStepError:
      continue
    except DivergedError:
      break
  return [event.kind for event in about(records, run)]


def about(records, run: str) -> list[Event]:
  return [event for event in records.events(run) if event.kind != "permanent"]


def test_what_repeats_is_the_runs_own(lab, records, not_finite):
  """Computed again with the same bits: diverged, for good, and nothing of after is kept."""
  run = lab.record()
  kinds = attempts(lab, records, run, 5)
  assert kinds == ["launch", "bad step", "restart", "bad step", "diverged"]
  assert checkpoint.steps(lab.checkpoints(run)) == [3, 6]
  assert lab.run(run).finished and "computed again it is the same" in str(
    records.events(run)[-1].detail
  )
  first, second = (e.detail["values"] for e in records.events(run) if e.kind == "bad step")
  assert first == second and first[0][0] == "nan"


def test_what_does_not_repeat_is_the_hardwares(lab, records, not_finite):
  not_finite["times"] = 0
  calm = lab.record()
  assert lab.attempt(calm) == 0
  not_finite["times"] = 1
  run = lab.record()
  kinds = attempts(lab, records, run, 5)
  assert kinds == ["launch", "bad step", "restart", "hardware"]
  assert lab.run(run).status == "completed" and same_bits(lab.state(run), lab.state(calm))


def test_a_skipped_step_changes_nothing(lab, records, not_finite):
  """Its update is left out, in the manifest too, and a resumed run leaves it out as well."""
  run = lab.record(prod__bad_step="skip")
  kinds = attempts(lab, records, run, 5)
  assert kinds == ["launch", "bad step", "restart", "bad step", "skip", "restart"]
  not_finite["times"] = 0
  same = lab.record(train__skip_steps=(BAD,))
  assert lab.attempt(same) == 0 and same_bits(lab.state(run), lab.state(same))
  other = lab.record()
  assert lab.attempt(other) == 0 and not same_bits(lab.state(run), lab.state(other))
  written = checkpoint.manifest(lab.checkpoints(run) / "step_00000012")
  assert configs.loads(written["config"], env={}).train.skip_steps == (BAD,)
  assert lab.state(run)["optimizer.steps"] == 12 - 1  # AdamW's bias correction counts updates


def test_a_rewind_leaves_out_its_samples(lab, records, poisoned):
  """Back by an interval; the same bits as a run that never had these samples; twice the same."""
  values = {"prod__bad_step": "rewind", "prod__spike_sigma": 1.0, "prod__spike_window": 5}
  ends = []
  for _ in range(2):
    run = lab.record(**values)
    kinds = attempts(lab, records, run, 5)
    assert kinds == ["launch", "bad step", "restart", "bad step", "rewind", "restart"]
    rewind = about(records, run)[4]
    assert rewind.step == BAD and rewind.detail["to"] == 3
    assert rewind.detail["samples"] == [3 * SAMPLES, BAD * SAMPLES - 1]
    ends.append(lab.state(run))
  assert same_bits(*ends)
  hole = ((3 * SAMPLES, 5 * SAMPLES),)
  assert configs.loads(lab.run(run).toml, env={}).data.holes == hole
  never = lab.record(**values, data__holes=hole)
  assert attempts(lab, records, never, 1) == ["launch"]
  assert same_bits(ends[0], lab.state(never))


def test_enough_is_enough(lab, records, not_finite):
  """prod.max_bad_steps: then the run stops."""
  kinds = attempts(lab, records, lab.record(prod__bad_step="skip", prod__max_bad_steps=0), 5)
  assert kinds[-1] == "diverged"


def test_spikes_against_numpy():
  """The verdict and its window, worked out beside it in float64."""
  chance, guard = np.random.default_rng(1), Guard(1.0, torch.device("cpu"), 3.0, 16)
  losses, good, found, wanted = chance.normal(3.0, 0.1, 200), [], [], []
  losses[[20, 50, 51, 120]] += 2.0
  for step, loss in enumerate(losses):
    last = np.array(good[-16:])
    spike = len(good) >= 16 and loss > last.mean() + 3.0 * last.std(ddof=1)
    wanted += [step] if spike else []
    good += [] if spike else [float(np.float32(loss))]
    try:
      guard.factor(step, torch.tensor(loss, dtype=torch.float32), torch.tensor(1.0))
    except DivergedError as error:
      assert f"step {step + 1}: the loss" in str(error)
      found.append(int(guard.bad_step))
      guard.bad_step.fill_(-1)
  assert found == wanted and {20, 50, 51, 120} <= set(found)


def repeated(lab, records, run: str, step: int) -> tuple[tuple[int, ...], ...]:
  """The holes of a run with checkpoints of steps 3 and 5 whose `step` is bad twice."""
  for at in (3, 5):
    if at not in checkpoint.steps(lab.checkpoints(run)):
      told = {"run": run, "tokens": 512 * at, "samples": SAMPLES * at}
      checkpoint.save(lab.checkpoints(run), at, {"w": torch.zeros(1)}, 0, told)
  bad = BadStepError("it is bad", step, [[float("nan")] * 3])
  for _ in range(2):
    assert not decide(records, lab.root, records.run(run), 1, bad)
  return configs.loads(records.run(run).toml).data.holes


def test_a_step_is_rewound_as_often_as_it_is_bad(lab, records):
  """The second time at the same checkpoint, with other samples."""
  run = lab.record(prod__bad_step="rewind")
  assert repeated(lab, records, run, 6) == ((24, 24),)
  assert checkpoint.steps(lab.checkpoints(run)) == [3]
  assert repeated(lab, records, run, 6) == ((24, 24), (48, 24))
  assert checkpoint.steps(lab.checkpoints(run)) == [3]


def test_a_rewind_leaves_out_the_batches_that_an_amendment_made(lab, records):
  """Steps 4 and 5 have 8 samples each, and step 6, which begins at 2,560 tokens, has 16."""
  run = lab.record(prod__bad_step="rewind")
  records.amend(run, [Amendment(2560, "schedule.batch_tokens", "1024", "larger", "me", 0.0)], 0)
  assert repeated(lab, records, run, 6) == ((24, 32),)


def test_holes_are_a_pure_function_of_n(lab):
  """Against a list from which samples are taken out; a hole in a hole; batches of the loader."""
  holes = ()
  order = list(range(400))
  for start, stop in ((10, 20), (5, 12), (100, 101), (3, 40)):
    holes = with_hole(holes, start, stop)
    order[start:stop] = []
    assert skipped(range(300), holes).tolist() == order[:300]
  assert len(holes) == 2
  data = open_data(lab.data)
  whole = Loader(data, seq_len=64, seed=0)
  part = Loader(data, seq_len=64, seed=0, holes=holes)
  assert np.array_equal(part.samples(np.arange(50)), whole.samples(np.array(order[:50])))


def test_what_is_permanent(lab):
  """The first after every 2,000 tokens, and the last before the rates decay at 4,096."""
  config = changed(lab.config, {"prod.permanent_tokens": 2000})
  steps = [n for n in range(1, 13) if permanent(n * 512, config)]
  assert steps == [4, 8, 12]  # 2,048; 4,096, which decays from here; 6,144
  assert permanent(8 * 512, lab.config) == "before the rates decay"
  assert [n for n in range(1, 13) if permanent(n * 512, lab.config)] == [8]


def test_permanent_checkpoints_stay(lab, records):
  run = lab.record(prod__permanent_tokens=2000, train__keep_checkpoints=2)
  attempts(lab, records, run, 1)
  kept = [event for event in records.events(run) if event.kind == "permanent"]
  assert [event.step for event in kept] == [4, 8, 12]
  assert checkpoint.steps(lab.checkpoints(run)) == [4, 8, 9, 12]
  assert checkpoint.manifest(lab.checkpoints(run) / "step_00000004")["permanent"]
  assert kept[0].detail["why"] == "every 2000 tokens"


def test_nothing_is_pruned_until_a_newer_one_is_verified(tmp_path):
  state = {"w": torch.arange(6.0)}
  for step in (1, 2, 3):
    checkpoint.save(tmp_path, step, state, 0, {"run": "r", "config": ""})
  (file,) = (tmp_path / "step_00000003").glob("*.distcp")
  whole = file.read_bytes()
  file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(CheckpointError, match="is corrupt"):
    checkpoint.prune(tmp_path, 2)
  assert checkpoint.steps(tmp_path) == [1, 2, 3]
  file.write_bytes(whole)
  checkpoint.prune(tmp_path, 2)
  assert checkpoint.steps(tmp_path) == [2, 3]
