"""`nmoe research run LONGER.toml --from RUN[@STEP]`: one trunk, many decays."""

import io
import json

import pytest
from labs import Lab, same_bits, write_variant
from rich.console import Console
from roots import tree_hash
from typer.testing import CliRunner

from nmoe.errors import CheckpointError, ConfigError, RecordError, RunError
from nmoe.records import manifests
from nmoe.records.root import Root
from nmoe.train import loop as train
from nmoe.train.progress import Entry
from stages import cli, research
from stages.launch.display import Display
from stages.report.details import commands
from stages.report.findings import gather

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_page")]
LONGER = "[schedule]\ntotal_tokens = 10240\ndecay_tokens = 2048\n"  # 20 steps


@pytest.fixture
def trunk(lab, launches):
  """A completed run of 12 steps without a decay: checkpoints of steps 9 and 12."""
  text = lab.file.read_text().replace("decay_tokens = 2048", "decay_tokens = 0")
  lab.file.write_text(text)
  research.run(lab.file, 1, Console(file=io.StringIO()))
  return lab.records.runs(lab.records.list()[0].id)[0]


def variant(lab: Lab, body: str = LONGER, name: str = "longer"):
  return write_variant(lab.file, name, body)


def call(lab: Lab, *checkpoints: str, body: str = LONGER, seeds: int | None = None) -> str:
  out = io.StringIO()
  research.run(variant(lab, body), seeds, Console(file=out, width=300), checkpoints)
  return out.getvalue()


def newest(lab: Lab):
  return lab.records.runs(lab.records.list()[0].id)[-1]


def test_a_stable_phase_goes_on_as_if_it_had_not_ended(lab, launches, trunk):
  """To the bit as the longer run from its first step; the trunk stays as it is."""
  folder = Root(lab.root).checkpoints(trunk.id)
  before = tree_hash(folder)
  said = call(lab, trunk.id)
  run = newest(lab)
  assert run.id != trunk.id and run.status == "completed" and run.seed == trunk.seed
  assert f"seed 0: from {trunk.id}@12, 6,144 tokens; " in said
  assert "schedule.total_tokens 6144 → 10240, schedule.decay_tokens 0 → 2048" in said
  assert tree_hash(folder) == before and lab.run(trunk.id) == trunk

  assert (run.branch.trunk, run.branch.step, run.branch.tokens) == (trunk.id, 12, 6144)
  assert run.branch.changed["schedule.total_tokens"] == [6144, 10240]
  (link,) = [x for x in lab.records.links(run.experiment_id) if x.relation == "continues"]
  assert (link.from_id, link.to_id) == (run.experiment_id, trunk.experiment_id)
  assert f"run {run.id} goes on from {trunk.id}@12: schedule.total_tokens" in link.note

  research.run(variant(lab), 1, Console(file=io.StringIO()))
  whole = newest(lab)
  assert whole.id != run.id and whole.fingerprint != run.fingerprint and whole.branch is None
  assert same_bits(lab.state(whole.id, 20), lab.state(run.id, 20))
  ours, theirs = lab.logged(run.id), lab.logged(whole.id)
  assert [step for step, _ in ours["train/loss"]] == list(range(13, 21))
  assert all(ours[tag] == theirs[tag][-len(ours[tag]) :] for tag in ours)
  same = ("val/bpb", "val/loss", "train/loss", "steps", "tokens")
  assert {k: run.results[k] for k in same} == {k: whole.results[k] for k in same}


def test_many_decays_of_one_trunk_are_runs_of_their_own(lab, launches, trunk):
  call(lab, f"{trunk.id}@9", body="[schedule]\ndecay_tokens = 1024\n")
  early = newest(lab)
  call(lab, trunk.id)
  late = newest(lab)
  assert [early.branch.step, late.branch.step] == [9, 12]
  assert [step for step, _ in lab.logged(early.id)["lr/dense"]] == [10, 11, 12]
  count = len(launches.ids)
  call(lab, trunk.id)
  call(lab, f"{trunk.id}@12")
  assert len(launches.ids) == count and newest(lab).id == late.id
  call(lab, f"{trunk.id}@9")
  assert len(launches.ids) == count + 1 and newest(lab).id not in (early.id, late.id)


def test_a_killed_branch_goes_on_from_its_own_checkpoint(lab, launches, trunk, monkeypatch):
  call(lab, trunk.id)
  whole = newest(lab)
  factor = train.lr_factor

  def crash(tokens, *more):
    if tokens == 17 * 512:
      raise RunError("planted")
    return factor(tokens, *more)

  with monkeypatch.context() as patch:
    patch.setattr(train, "lr_factor", crash)
    with pytest.raises(RunError):
      call(lab, trunk.id, body=LONGER + "final_ratio = 0.1\n")
  run = newest(lab)
  assert manifests.steps(lab.checkpoints(run.id)) == [15]
  call(lab, trunk.id, body=LONGER + "final_ratio = 0.1\n")
  assert newest(lab).id == run.id and newest(lab).status == "completed"
  assert lab.logged(run.id)["train/loss"][:4] == lab.logged(whole.id)["train/loss"][:4]
  assert [step for step, _ in lab.logged(run.id)["train/loss"]] == list(range(13, 21))


def test_what_keeps_a_run_from_going_on_is_one_error(lab, launches, trunk):
  count, runs_before = len(launches.ids), len(lab.records.list())
  other = LONGER + "[optim]\nbeta1 = 0.8\n[moe]\ntop_k = 3\n"
  with pytest.raises(ConfigError) as caught:
    call(lab, trunk.id, body=other)
  assert "moe.top_k: 2 there, 3 here; optim.beta1: 0.9 there, 0.8 here" in str(caught.value)
  assert "restore these, or train from the first step" in str(caught.value)
  with pytest.raises(ConfigError, match=r"has checkpoints of steps 9, 12; name one of them"):
    call(lab, f"{trunk.id}@6")
  with pytest.raises(ConfigError, match=r"@x: the run has checkpoints of steps 9, 12"):
    call(lab, f"{trunk.id}@x")
  with pytest.raises(ConfigError, match=r"6,144 tokens, and schedule.total_tokens = 6,144 leaves"):
    call(lab, trunk.id, body="")
  with pytest.raises(ConfigError, match=f"@9: two runs of seed {trunk.seed}"):
    call(lab, trunk.id, f"{trunk.id}@9")
  with pytest.raises(ConfigError, match="leave --seeds out"):
    call(lab, trunk.id, seeds=2)
  with pytest.raises(RecordError, match="no run 'nobody'"):
    call(lab, "nobody")
  text = lab.file.with_name("text.jsonl")
  text.write_text(text.read_text() + '{"text": "one more document than there was"}\n')
  with pytest.raises(ConfigError, match=r"it has read 6,144 tokens of from sample 0 on text \("):
    call(lab, trunk.id)
  assert (len(launches.ids), len(lab.records.list())) == (count, runs_before)


@pytest.fixture
def more(lab):
  """A mixture of the trunk's source and another behind it."""
  lines = (f'{{"text": "other text of line {i} {i * i}"}}\n' for i in range(300))
  lab.file.with_name("other.jsonl").write_text("".join(lines))
  mixture = lab.file.with_name("mixture.toml").read_text()
  source = 'name = "other"\nkind = "files"\npaths = ["other.jsonl"]\nformat = "jsonl"\n'
  lab.file.with_name("more.toml").write_text(f"{mixture}\n[[source]]\n{source}")
  return '[data]\nmixture = "more.toml"\nweights = [1.0, 0.0]\n'


def test_a_decay_on_other_text(lab, launches, trunk, more):
  """To the bit as a run that had that text from the start, with a weight of 0 up to there."""
  body = f"{more}weights_from = [[6144, 0.25, 0.75]]\n{LONGER}"
  said = call(lab, trunk.id, body=body)
  run = newest(lab)
  assert run.status == "completed" and run.branch.changed["data.mixture"][0] == trunk.data_digest
  assert "data.weights () → (1.0, 0.0)" in said and "data.weights_from () → ((6144.0" in said
  research.run(variant(lab, body), 1, Console(file=io.StringIO()))
  whole = newest(lab)
  assert whole.branch is None and whole.data_digest == run.data_digest != trunk.data_digest
  assert same_bits(lab.state(whole.id, 20), lab.state(run.id, 20))
  research.rerun(run.id, lab.root, Console(file=io.StringIO()))
  assert lab.records.list()[0].verdict == "confirmed"


@pytest.mark.parametrize(
  "body",
  [
    '[data]\nmixture = "more.toml"\n',
    '[data]\nmixture = "more.toml"\nweights = [0.5, 0.5]\n',
    '[data]\nmixture = "more.toml"\nweights = [1.0, 0.0]\nweights_from = [[3072, 0.5, 0.5]]\n',
    "[data]\nweights_from = [[3072, 1.0]]\n",
    "[data]\nholes = [[0, 5]]\n",
  ],
)
def test_text_that_was_read_stays_what_it_was(lab, launches, trunk, more, body):
  """Another past would let the branch read text again, or leave some out."""
  told = r"it has read 6,144 tokens of from sample 0 on text \(\w+\) 1, this would have read"
  with pytest.raises(ConfigError, match=told) as caught:
    call(lab, trunk.id, body=body + LONGER)
  assert "data.weights (text 1, 0 for new ones)" in str(caught.value)
  assert "a row of data.weights_from, [6144, ...] or later" in str(caught.value)


def test_a_step_of_a_thousand_digits_is_none(lab, launches, trunk):
  with pytest.raises(ConfigError, match="has checkpoints of steps 9, 12"):
    call(lab, f"{trunk.id}@{'9' * 5000}")


def test_a_trunk_inside_its_decay_is_said(lab, launches):
  research.run(lab.file, 1, Console(file=io.StringIO()))
  run = newest(lab)
  said = call(lab, f"{run.id}@9")
  assert f"the learning rate goes on at 1 of its peak, in {run.id} it was 0.388" in said


def test_a_checkpoint_that_is_another_one_meanwhile(lab, launches, trunk):
  """Between the record and the first step of the branch."""
  file = Root(lab.root).checkpoints(trunk.id) / "step_00000012" / "manifest.json"

  def rewrite(run_id):
    written = json.loads(file.read_text())
    written.pop("sha256")
    written["note"] = "written anew"
    file.write_text(json.dumps(written | {"sha256": manifests.digest(written)}))

  launches.before[1] = rewrite
  with pytest.raises(RunError):
    call(lab, trunk.id)
  assert "has another checkpoint of step 12 than when this run was recorded" in newest(lab).error
  with pytest.raises(CheckpointError):
    lab.attempt(newest(lab).id)


def test_seeds_branch_each_from_its_own_run(lab, launches, trunk):
  text = lab.file.read_text()
  lab.file.write_text(text.replace("[train]", "[train]\nseed = 1"))
  research.run(lab.file, 1, Console(file=io.StringIO()))
  second = newest(lab)
  call(lab, second.id, trunk.id)
  found = lab.records.runs(lab.records.list()[0].id)
  assert [(r.seed, r.branch.trunk) for r in found] == [(0, trunk.id), (1, second.id)]
  told = commands(gather(lab.root, found[0].experiment_id), lab.root / "reports" / "x")
  assert f"--from {trunk.id}@12 \\\n  --from {second.id}@12" in told and "--seeds" not in told


def test_a_branch_is_repeated_as_a_branch(lab, launches, trunk):
  call(lab, trunk.id)
  run = newest(lab)
  out = io.StringIO()
  research.rerun(run.id, lab.root, Console(file=out, width=200))
  again = newest(lab)
  assert again.id != run.id and str(again.branch) == f"{trunk.id}@12"
  assert "8 logged losses, bit-identical" in out.getvalue()


def test_a_bar_ends_where_the_run_does():
  """Not at total_tokens / batch_tokens steps, if earlier batches were others."""
  with Display(Console(file=io.StringIO())) as display:
    display.line("x", 12, "starting").follow(Entry(13, 25, 5.0, 1.0, 60.0))
    (task,) = display.bars.tasks
    assert (task.completed, task.total) == (13, 25)


def test_help_says_it():
  said = CliRunner().invoke(cli.app, ["research", "run", "--help"], env={"COLUMNS": "200"}).output
  assert "--from" in said and "RUN[@STEP]" in said and "such as a decay" in said
