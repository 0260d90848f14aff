"""The gate of a production launch: what it cites, and that it takes what won."""

import pytest
from roots import start_run

from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.config.sections import fingerprint
from nmoe.records.reader import Hypothesis
from nmoe.records.root import Root
from stages.prod.evidence import evidence

CLAIM = Hypothesis("It is better.", "val/bpb", "lower", 0.0)


def add_run(lab, records, experiment, arm, code="code", **values):
  """A completed run of the lab's configuration with keys replaced."""
  config = changed(lab.config, {key.replace("__", "."): value for key, value in values.items()})
  told = {"toml": configs.to_toml(config), "fingerprint": fingerprint(config, "data")}
  run = start_run(records, experiment.id, arm, 0, **told, data_digest="data", code_version=code)
  records.update_run(run.id, status="completed")


def conclude(lab, records, stage, name, verdict, code="code", **values):
  """A concluded experiment with one run, an ablation's variant; its id."""
  experiment = records.create(name, stage, (CLAIM,))
  add_run(lab, records, experiment, "variant", code, **values)
  records.conclude(experiment.id, verdict, {})
  return experiment.id


def ablate(lab, records, baseline, verdict="confirmed", **variant):
  """A concluded ablation."""
  experiment = records.create("better", "ablate", (CLAIM,))
  add_run(lab, records, experiment, "baseline", **baseline)
  add_run(lab, records, experiment, "variant", **variant)
  records.conclude(experiment.id, verdict, {})


def of_better(lab, records, **values) -> str:
  """What a configuration with these keys lacks that cites it."""
  return lacks(lab, records, prod__evidence=["better"], **values)["better"]


def lacks(lab, records, **values) -> dict[str, str]:
  config = changed(lab.config, {key.replace("__", "."): value for key, value in values.items()})
  found = evidence(config, lab.file, records, "code")
  return {one.what: one.lack for one in found}


def test_the_gate(lab, records):
  """Everything is missing, with the command that makes it; then it comes, piece by piece."""
  missing = lacks(lab, records, prod__evidence=["better"])
  assert missing.keys() == {"better", "check-resume", "prod-check"}  # check-ep: of several ranks
  assert "no experiment 'better'" in missing["better"]
  assert f"run `nmoe check resume {lab.file}`" in missing["check-resume"]
  conclude(lab, records, "ablate", "better", "refuted")
  assert (
    "is refuted; only what was confirmed"
    in lacks(lab, records, prod__evidence=["better"])["better"]
  )
  conclude(lab, records, "research", "better", "confirmed")
  assert "is of stage research" in lacks(lab, records, prod__evidence=["better"])["better"]
  conclude(lab, records, "ablate", "better", "confirmed", optim__beta1=0.8)
  assert "optim.beta1" in lacks(lab, records, prod__evidence=["better"])["better"]
  conclude(lab, records, "ablate", "better", "confirmed", model__num_layers=1)  # another size
  assert lacks(lab, records, prod__evidence=["better"])["better"] == ""
  conclude(lab, records, "check", "check-resume-x", "confirmed", model__num_layers=1)
  assert "was not run for this configuration" in lacks(lab, records)["check-resume"]
  conclude(lab, records, "check", "check-resume-x", "confirmed", code="other")
  assert "passed with other code" in lacks(lab, records)["check-resume"]
  conclude(
    lab,
    records,
    "check",
    "check-resume-x",
    "confirmed",
    schedule__total_tokens=1024,
    schedule__warmup_tokens=0,
    schedule__decay_tokens=0,
  )
  conclude(lab, records, "check", "prod-check-x", "confirmed")
  assert set(lacks(lab, records, prod__evidence=["better"]).values()) == {""}
  told = [str(one) for one in evidence(lab.config, lab.file, records, "code") if not one.lack]
  assert all(one.endswith(" passed") for one in told) and len(told) == 2
  conclude(lab, records, "check", "prod-check-x", "refuted")
  assert "did not pass" in lacks(lab, records)["prod-check"]
  assert "cites no experiment" in lacks(lab, records)["prod.evidence"]


@pytest.mark.parametrize(
  ("key", "value"),
  [("optim__experts", "muon"), ("optim__expert_lr", 3e-3), ("moe__num_experts", 8)],
)
def test_a_launch_takes_what_won(lab, records, key, value):
  """The value that an ablation confirmed, be it of identity, of the schedule or of size; the
  baseline's is not what was shown. What was refuted is no evidence for either.
  """
  ablate(lab, records, {}, **{key: value})
  dotted = key.replace("__", ".")
  assert f"confirmed {dotted} = {value!r}, and this has" in of_better(lab, records)
  assert of_better(lab, records, **{key: value}) == ""
  ablate(lab, records, {}, "refuted", **{key: value})
  assert "is refuted" in of_better(lab, records)
  assert "is refuted" in of_better(lab, records, **{key: value})
  ablate(lab, records, {key: value})  # and the way back: the variant has the lab's own
  assert of_better(lab, records) == ""
  assert f"confirmed {dotted} = " in of_better(lab, records, **{key: value})


def test_what_is_not_size_is_the_winner_s(lab, records):
  ablate(lab, records, {}, optim__experts="muon")
  wanted = {"optim__experts": "muon"}
  assert of_better(lab, records, **wanted, model__num_layers=3, moe__expert_dim=16) == ""
  told = of_better(lab, records, **wanted, model__tie_embeddings=True)
  assert told == "no arm of it has this configuration's model.tie_embeddings"


@pytest.mark.faults
@pytest.mark.parametrize("text", [None, "[optim]\nexpert_lr = 0.01\n", "[optim", "optim = 1\n"])
def test_a_launch_takes_the_rates_of_its_sweep(lab, records, text):
  """Those on record: whether its transfer.toml is gone, was edited by hand, or never written, for
  a kill after the verdict.
  """
  name = conclude(lab, records, "proxy", "better", "confirmed")
  found = {"groups": [], "transfer": {"optim.expert_lr": 0.02, "schedule.decay_tokens": 7}}
  records.conclude(name, "confirmed", found)
  if text is not None:
    path = Root(lab.root).report(name) / "transfer.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
  assert "confirmed optim.expert_lr = 0.02, and this has 0.01" in of_better(lab, records)
  assert of_better(lab, records, optim__expert_lr=0.02) == ""
  records.conclude(name, "confirmed", {"groups": []})  # as an earlier version did
  assert "call `nmoe proxy sweep` on its file again" in of_better(lab, records)
