"""A sweep from its file to transfer.toml: grids, extension, repeats, records, what it refuses.

One file: every sweep is one text of which a line or two differ.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli
from rich.console import Console

from nmoe.config import file as configs
from nmoe.config.sections import diff
from nmoe.errors import ConfigError, RunError
from nmoe.records.root import Root
from stages.judge.intervals import Interval
from stages.judge.table import Result, Table
from stages.proxy import coords, grid, plan, recommend, sweep
from stages.proxy.file import load_sweep
from stages.report import sweep as report
from stages.study import Outcome
from stages.workbench import Workbench

BASE = """
extends = "tiny.toml"
[optim]
embed_lr = 1e-2
[schedule]
batch_tokens = 128
total_tokens = 3200
warmup_tokens = 256
decay_tokens = 2560
[data]
val_tokens = 256
[train]
micro_batch = 2
checkpoint_every = 0
keep_checkpoints = 0
"""
SWEEP = """
[sweep]
name = "rates"
statement = "The best rates stay."
base = "base.toml"
points = 3
extend = 1
seeds = 2
control = ["off"]
[[scale]]
width = 2
[budget]
runs = 40
"""
SIX = ("points = 3", "points = 6")  # edits of the sweep's text
REACH = ("extend = 1", "extend = 4")
ALONE = ('control = ["off"]', "control = []")
TARGET = ('base = "base.toml"', 'base = "base.toml"\ntarget = "target.toml"')


@pytest.fixture
def write(lab):
  folder = lab.file.parent
  (folder / "base.toml").write_text(BASE)

  def file(text=SWEEP, **replaced):
    for old, new in replaced.values():
      assert old in text
      text = text.replace(old, new)
    (folder / "sweep.toml").write_text(text)
    return folder / "sweep.toml"

  return file


def slope(mean):
  return coords.Slope("adamw", "width", "router", Interval(2, mean, 0.0, mean, mean), (-0.25, 0.25))


@pytest.fixture(autouse=True)
def checks(monkeypatch):
  """Coordinate checks that cost nothing: the optimizers asked for, and what they find."""
  found = SimpleNamespace(asked=[], slope=0.1)

  def check(file, kind):
    found.asked.append(kind)
    return [slope(found.slope)]

  monkeypatch.setattr(coords, "check", check)
  return found


def console():
  return Console(file=io.StringIO(), width=250)


def test_scales_expand_the_base(write):
  file = load_sweep(write())
  base, large = file.scales
  m = large.config.model
  assert (m.dim, m.num_heads, m.kv_lora_rank, m.dense_dim) == (64, 4, 32, 128)
  assert (large.name, large.ratio, large.config.moe.expert_dim) == ("width2", 2.0, 64)
  assert large.config.scaling.base_dim == base.config.model.dim == 32
  text = SWEEP.replace("width = 2", 'depth = 2\ntokens = 4\nbatch = 2\n"moe.num_shared" = 2')
  config = load_sweep(write(text)).scales[1].config
  assert config.model.num_layers == 4 and config.moe.num_shared == 2
  s = config.schedule
  assert (s.batch_tokens, s.total_tokens, s.warmup_tokens, s.decay_tokens) == (
    256,
    12800,
    1024,
    10240,
  )


def test_from_the_file_to_the_overlay(write, lab, launches, checks, monkeypatch):
  """Everything runs once; a second call answers from the records, by whatever path; the overlay
  can be loaded from anywhere.
  """
  path = write()
  said = console()
  plan.show(path, said)
  assert not launches.ids and "no run to go by" in said.file.getvalue()
  monkeypatch.chdir(path.parent)
  page = sweep.run(Path(path.name), console())
  monkeypatch.chdir("/")
  num_runs = len(launches.ids)
  assert num_runs >= 9
  records = lab.records.find("rates")
  assert records.stage == "proxy" and records.verdict
  registered = [a for a in records.arms if a.created == records.arms[0].created]
  assert len(registered) == 9  # three grids of three, written before the first run
  seeds = {(p["group"], p["seed"]) for p in records.conclusion["points"]}
  assert seeds == {("joint", 0), ("joint", 1), ("off", 0), ("off", 1)}
  assert "Sweep" in page.read_text() and records.conclusion["budget"]["runs"] == num_runs
  written = Root(lab.root).report(records.id) / "transfer.toml"
  overlay = configs.load(written, env={})
  assert overlay.scaling.rule == "completep-moe" and overlay.scaling.base_dim == 32
  assert overlay.model.dim == 32
  table = tomli.loads(written.read_text())
  evidence = table.pop("evidence")
  told = {f"{s}.{key}": v for s, keys in table.items() if s != "extends" for key, v in keys.items()}
  assert records.conclusion["transfer"] == told and told["scaling.base_dim"] == 32
  assert evidence["experiment"] == records.id and evidence["extrapolation_width"] == 1.0
  assert evidence["joint"] == records.conclusion["groups"][0]["state"]
  assert checks.asked == ["adamw"]
  sweep.run(path, console())
  assert len(launches.ids) == num_runs and checks.asked == ["adamw"]
  assert lab.records.find("rates").id == records.id
  assert "no run to go by" not in plan_of(path)
  assert sum(recorded(path)) == 0, "of other code nothing is there"
  monkeypatch.setattr(plan, "code_version", lambda: "code")
  assert sum(recorded(path)) == num_runs
  changed = (path.parent / "base.toml").read_text().replace("embed_lr = 1e-2", "embed_lr = 2e-2")
  (path.parent / "base.toml").write_text(changed)
  assert sum(recorded(path)) == 0, "of another base nothing is there"


def plan_of(path):
  said = console()
  plan.show(path, said)
  return said.file.getvalue()


def recorded(path):
  """The last column of the plan."""
  rows = [row.split("│")[-2] for row in plan_of(path).splitlines() if row.startswith("│")]
  return [int(cell) for cell in rows]


def test_a_class_that_is_out_stops_the_sweep(write, lab, launches, checks):
  checks.slope = 0.7
  with pytest.raises(
    RunError, match="router is out over width with adamw: slope .0.70 .*, required"
  ):
    sweep.run(write(), console())
  assert not launches.ids and not [e for e in lab.records.list() if e.stage == "proxy"]


def test_controls_differ_in_the_rule_alone(write):
  both = ('control = ["off"]', 'control = ["off", "embed_only"]')
  file = load_sweep(write(a=both))
  found = grid.Sweep.planned(file)
  arms = {a.point["group"]: a for a, _ in found.first() if a.point["scale"] == "width2"}
  joint, off, embed = (arms[name].config for name in ("joint", "off", "embed_only"))
  assert diff(joint, off) == {"scaling.rule": ("completep-moe", "none")}
  assert diff(joint, embed) == {"scaling.rule": ("completep-moe", "embed-only")}


def test_a_killed_sweep_goes_on(write, lab, launches):
  def stop(run_id):
    raise KeyboardInterrupt

  launches.before[4] = stop
  with pytest.raises(RunError, match="it was told to"):
    sweep.run(write(), console())
  finished = sum(run.finished for run in lab.records.runs("rates-1"))
  assert 0 < finished <= 4
  sweep.run(write(), console())
  runs = lab.records.runs("rates-1")
  assert all(run.finished for run in runs)
  assert len({(run.arm, run.seed) for run in runs}) == len(runs)


@pytest.mark.faults
@pytest.mark.parametrize("edit", ["[schedule]\ntotal_tokens = 6400", "[model]\nv_dim = 32", None])
def test_a_target_that_changes_under_its_sweep(write, lab, launches, edit):
  """The rates are for what it was when the sweep began and found it fit; None: it is gone."""
  path = write(a=TARGET, b=ALONE)
  target, body = path.with_name("target.toml"), 'extends = "base.toml"\n[model]\nnum_layers = 4\n'
  target.write_text(body)
  launches.before[4] = lambda _: target.write_text(body + edit) if edit else target.unlink()
  sweep.run(path, console())
  found = lab.records.find("rates")
  written = (Root(lab.root).report(found.id) / "transfer.toml").read_text()
  keys = tomli.loads(written)
  assert keys["schedule"] == {"warmup_tokens": 256, "decay_tokens": 2560}
  ratios = [keys["evidence"][f"extrapolation_{axis}"] for axis in ("depth", "tokens")]
  assert ratios == [2.0, 1.0]


def test_a_limit_that_changes_after_the_runs_is_another_question(write, lab, launches):
  """Three limits: the verdict that was given stands, and each new question, without a run of its
  own, says what it is a second look at.
  """
  sweep.run(write(), console())
  first, runs = lab.records.find("rates-1"), len(launches.ids)
  edits = [
    ("[budget]", "[verdict]\nmax_shift = 9.0\n[budget]"),
    ("[budget]", "[verdict]\nmin_control_shift = 0.0\n[budget]"),
    ALONE,
  ]
  for number, edit in enumerate(edits, 2):
    sweep.run(write(a=edit), console())
    again, found = lab.records.find("rates-1"), lab.records.find("rates")
    assert len(launches.ids) == runs and found.id == f"rates-{number}"
    assert (again.verdict, again.conclusion) == (first.verdict, first.conclusion)
    links = [(link.to_id, link.relation) for link in lab.records.links(found.id)]
    assert links == [(f"rates-{number - 1}", "refines")]


def planned(write, loss, **replaced):
  """The sweep, and rounds of its further points on made-up losses until there are none."""
  path = write(**replaced)
  file = load_sweep(path)
  bench = Workbench.open(file.base.run.root, console())
  found = grid.Sweep.of(file, bench)
  pairs, results = found.first(), []
  while pairs:
    for arm, seed in pairs:
      p = arm.point
      value = loss(p["group"], p["scale"], p["log2_rate"], seed)
      diverged = not np.isfinite(value)
      results.append(Result(arm.name, seed, {"val/loss": value}, diverged, p))
    pairs = found.further(Table(tuple(results)))
  return found, Table(tuple(results))


def parabola(rng, shift):
  def loss(group, scale, x, seed):
    at = 0.0 if scale == "base" else shift if group == "joint" else -2.5
    return 2 + seed + 0.05 * (x - at) ** 2 + 1e-3 * rng.normal()

  return loss


@pytest.mark.parametrize(("shift", "state"), [(0.1, "transfers"), (-2.5, "drifts")])
def test_the_grid_follows_the_optimum(write, shift, state):
  """Whatever the made-up truth is: found, with the best three points repeated at the other seed."""
  loss = parabola(np.random.default_rng(0), shift)
  found, table = planned(write, loss, a=SIX, b=REACH, c=("seeds = 2", "seeds = 4"))
  judged = found.judge(table)
  joint = judged.numbers["groups"][0]
  assert joint["state"] == state, judged.reason
  assert joint["shift"]["mean"] == pytest.approx(shift, abs=0.15)
  second = [r for r in table.results if r.seed == 1 and r.point["group"] == "joint"]
  assert len(second) == 6


def test_an_optimum_beyond_reach(write):
  found, table = planned(write, lambda group, scale, x, seed: x, a=SIX)
  xs = {p["log2_rate"] for p in found.judge(table).numbers["points"] if p["scale"] == "base"}
  assert min(xs) == -4.0  # -3 and one beyond
  joint = found.judge(table).numbers["groups"][0]
  assert joint["state"] in ("no interior optimum", "not identified")


def test_a_scale_whose_runs_all_diverge(write):
  loss = parabola(np.random.default_rng(0), 0.0)
  found, table = planned(
    write, lambda g, scale, x, seed: loss(g, scale, x, seed) if scale == "base" else np.nan, a=SIX
  )
  judged = found.judge(table)
  assert judged.numbers["groups"][0]["state"] == "no interior optimum"
  assert "Every run at width2 diverged" in judged.reason
  assert judged.verdict == "inconclusive" and judged.numbers["budget"]["diverged"] > 0


def concluded(judged):
  """As a record has it: through JSON."""
  return SimpleNamespace(conclusion=json.loads(json.dumps({**judged.numbers, "reason": ""})))


def test_what_is_drawn_is_what_was_judged(write, checks):
  """Points as measured, the parabola through them, its optimum where it was planted."""
  at = {("joint", "base"): 0.0, ("joint", "width2"): -0.4, ("off", "width2"): -1.5}

  def loss(group, scale, x, seed):
    return 2 + seed + 0.05 * (x - at[group, scale]) ** 2 if x > -3.5 else np.nan

  found, table = planned(write, loss, a=SIX, b=REACH)
  lines = report.lines(concluded(found.judge(table)))
  assert {(line.group, line.scale) for line in lines} == at.keys()
  for line in lines:
    x, level = line.optimum
    assert x == pytest.approx(at[line.group, line.scale], abs=1e-6)
    assert level == pytest.approx(2 + line.seed)
    assert dict(line.points) == {
      r.point["log2_rate"]: r.values["val/loss"]
      for r in table.results
      if (r.point["group"], r.point["scale"], r.seed) == (line.group, line.scale, line.seed)
      and not r.diverged
    }
    middle, height = line.parabola[len(line.parabola) // 2]
    assert height == pytest.approx(loss(line.group, line.scale, middle, line.seed))
  assert [line.diverged for line in lines if line.group == "off" and not line.seed] == [()]


def test_an_interval_is_written_as_in_every_other_table():
  shown = report._interval({"mean": -0.138, "low": -0.279, "high": 0.00175, "n": 6})
  assert shown == "−0.138 [−0.279, +0.00175]"


def over(axis, *factors):
  return "\n".join(f"[[scale]]\n{axis} = {factor}" for factor in factors)


@pytest.mark.parametrize(("axis", "power"), [("tokens", 0.3), ("depth", -0.25), ("width", 0.0)])
def test_what_the_rule_leaves_over_is_recommended(write, axis, power):
  """A planted x* = −power · log2(ratio): found, and the overlay's rates or horizon follow it."""
  rng = np.random.default_rng(0)
  ratios = {"base": 1, f"{axis}2": 2, f"{axis}4": 4}

  def loss(group, scale, x, seed):
    return 2 + 0.05 * (x + power * np.log2(ratios[scale])) ** 2 + 1e-4 * rng.normal()

  keys = (SIX, ("seeds = 2", "seeds = 4"), ALONE, TARGET)
  scales = ("[[scale]]\nwidth = 2", over(axis, 2, 4))
  path = write()
  (path.parent / "target.toml").write_text(
    'extends = "base.toml"\n[model]\nnum_layers = 16\nnum_dense_layers = 8\n'
  )
  found, table = planned(write, loss, **dict(zip("abcde", (*keys, scales), strict=True)))
  judged = found.judge(table)
  exponent = judged.numbers["groups"][0]["exponent"]
  assert exponent["mean"] == pytest.approx(power, abs=0.02)
  bench = Workbench.open(found.file.base.run.root, console())
  Root(bench.root).report("x").mkdir(parents=True)
  outcome = Outcome(SimpleNamespace(id="x"), table, judged, Path())
  written = recommend.write_transfer(found.file, outcome, bench)
  overlay, evidence = configs.load(written, env={}), tomli.loads(written.read_text())["evidence"]
  expected = {"tokens": (1.0, 0.6), "depth": (8**0.25, 0.3), "width": (1.0, 0.3)}[axis]
  best = judged.numbers["groups"][0]["optima"]["base"]
  rate = found.file.base.optim.dense_lr * 2 ** (sum(best.values()) / len(best))
  assert overlay.optim.dense_lr / rate == pytest.approx(expected[0], rel=0.05)
  assert overlay.scaling.horizon == pytest.approx(expected[1], abs=0.02)
  assert (f"corrected_{axis}" in evidence) == (power != 0)
  assert evidence[f"swept_{axis}"] == 4.0 and evidence["extrapolation_depth"] == 8.0
  assert evidence["joint_exponent"] == [exponent["low"], exponent["high"]]


def test_a_base_that_the_rule_is_not_for(write, lab, launches):
  """Tied embeddings, whose head would need a factor."""
  path = write()
  with (path.parent / "base.toml").open("a") as file:
    file.write("[model]\ntie_embeddings = true\n")
  with pytest.raises(ConfigError, match="has no form for tied embeddings"):
    sweep.run(path, console())
  assert not launches.ids


def test_every_run_of_the_sweep_diverges(write):
  """At both scales, whatever the rate: no optimum, said so, and every run is kept."""
  found, table = planned(write, lambda group, scale, x, seed: np.nan, a=SIX)
  judged = found.judge(table)
  assert judged.verdict == "inconclusive" and "Every run at base diverged" in judged.reason
  assert judged.numbers["budget"]["diverged"] == len(judged.numbers["points"]) == len(table.results)


def test_seconds_that_are_spent_end_the_sweep(write):
  """The first round is registered; nothing follows once its runs have used the budget."""
  found, table = planned(write, parabola(np.random.default_rng(0), 0.0), a=SIX)
  first = table.results[: len(found.first())]
  assert found.further(Table(first))
  path = write(a=SIX, b=("runs = 40", "runs = 40\ndevice_seconds = 100"))
  limited = grid.Sweep(load_sweep(path), found.scales, found.data, {})
  spent = [replace(r, values={**r.values, "wall_s": 100 / 18}) for r in first]
  assert limited.further(Table(tuple(spent[:-1])))
  assert limited.further(Table(tuple(spent))) == ()
  said = limited.judge(Table(tuple(spent))).reason
  ended = (
    "The budget ended the sweep (100 s of 100 s, 18 of 40 runs) before what its points ask for"
  )
  assert f"{ended}, 1 more at least; raise it" in said
  assert "budget" not in found.judge(table).reason


def test_what_may_stand_behind_a_shift_is_said():
  calm = {"optim/clipped": 0.1, "load/dead": 0.0}
  assert grid.confounded({"base": calm}) == ""
  said = grid.confounded({"base": calm, "width8": {"optim/clipped": 0.4, "load/dead": 2.0}})
  assert "40 % of the steps at width8 were clipped" in said
  assert "dead experts of a run at width8: 2." in said


@pytest.mark.parametrize(
  ("replaced", "message"),
  [
    (("points = 3", "points = 1"), "sweep.points = 1 gives no parabola"),
    (("runs = 40", "runs = 8"), "budget.runs = 8, but the registered points are 18"),
    (("width = 2", "width = 0.3"), "width = 0.3 makes model.dim 9.6, from 32; choose a whole one"),
    (("width = 2", "widht = 2"), "unknown axis widht = 2; did you mean 'width'"),
    (("width = 2", '"model.v_dim" = 32'), "model.v_dim = 32, 16 at the base; head dims stay"),
    (("[[scale]]\nwidth = 2", ""), r"needs at least one \[\[scale\]\]"),
    (("[[scale]]\nwidth = 2", "[[scale]]\nwidth = 2\n[[scale]]\nwidth = 2"), "two scales are both"),
    (
      ("width = 2", "width = 4\n[[scale]]\nwidth = 2"),
      "scale 'width2' comes after 'width4'; write",
    ),
    (("width = 2", '"train.log_every" = 7'), "log_every7' is the base itself"),
    (("width = 2", '"train.seed" = 7'), "train.seed = 7: every scale runs at the sweep's seeds"),
    (("width = 2", '"data.mixture" = "m"'), "data.mixture = 'm': all scales read the base's text"),
    (("points = 3", "points = 900\nstep = 1000.0"), r"takes rates to 2\^4495 times the base's"),
    (
      ("[budget]", "[coords]\ndepths = [1, 9999]\n[budget]"),
      r"depths = \[1, 9999\] must have .* 64",
    ),
    (("width = 2", "width = 1"), "scale 'width1' is the base itself"),
    (("width = 2", "batch = 2"), "scale 'batch2' decays over 10 steps; 20 are needed"),
    (("[budget]", "[coords]\nwidths = [2]\n[budget]"), r"coords.widths = \[2\] has no slope; give"),
    (("[budget]\nruns = 40", ""), "budget.runs is missing"),
    (("[sweep]", "[swep]"), r"unknown section \[swep\]; did you mean 'sweep'"),
  ],
)
def test_what_a_sweep_refuses(write, launches, replaced, message):
  with pytest.raises(ConfigError, match=message):
    sweep.run(write(a=replaced), console())
  assert not launches.ids


@pytest.mark.parametrize(
  ("target", "message"),
  [
    ("[model]\ntie_embeddings = true", "has no form for tied embeddings"),
    ("[model]\nv_dim = 32", "model.v_dim = 32, 16 at the base"),
    ("[moe]\nnum_experts = 16", "0.125 of the experts are active, 0.5 at the base"),
    ("[model]\ndim = 48\nnum_heads = 3", "base_dim = 32 neither divides model.dim 48"),
    ("[model]\nq_lora_rank = 16", "one of base and target has a model.q_lora_rank"),
  ],
)
def test_targets_that_the_rule_does_not_reach(write, lab, launches, target, message):
  (lab.file.parent / "target.toml").write_text(f'extends = "base.toml"\n{target}')
  with pytest.raises(ConfigError, match=message):
    sweep.run(write(a=TARGET), console())
  assert not launches.ids
