"""Amendments: refused or audited; the end is that of a run whose schedule was so from the start."""

import hashlib
import io
import json
import os
import shutil
from contextlib import closing

import pytest
from labs import same_bits
from rich.console import Console

from nmoe.config import amend as rules
from nmoe.config import file as configs
from nmoe.config.amend import amended, following
from nmoe.config.file import changed
from nmoe.errors import ConfigError, RecordError
from nmoe.records import checkpoint
from nmoe.records.attempts import Attempts
from nmoe.records.manifests import digest
from nmoe.records.reader import Amendment
from nmoe.records.root import Root
from nmoe.train import loop
from stages.prod.amend import amend, read
from stages.prod.attempt import begin, settle
from stages.prod.launching import stop

RATES = ("dense", "router", "expert")
AT = 5 * 512  # tokens: step 6 is the first under the amendment


def write(folder, *entries: str):
  path = folder / "amend.toml"
  path.write_text("".join(f"[[amend]]\n{entry}\n" for entry in entries))
  return path


def halved(folder, at: int = AT):
  """All learning rates, from 1e-2 to half of it."""
  of = 'at_tokens = {}\nkey = "optim.{}_lr"\nvalue = 0.005\nreason = "it is restless"'
  return write(folder, *(of.format(at, rate) for rate in RATES))


def told(run: str, path, lab) -> str:
  out = io.StringIO()
  amend(run, path, lab.root, Console(file=out, width=200))
  return out.getvalue()


def test_an_amended_run_ends_as_one_whose_schedule_was_so(lab, tmp_path, monkeypatch):
  """The oracle halves the factor of the rates in the loop itself, which is exact; one more run is
  interrupted between amendment and its tokens, and resumed on both sides.
  """
  factor = loop.lr_factor

  def other(tokens, *more):
    return factor(tokens, *more) * (0.5 if tokens >= AT else 1.0)

  with monkeypatch.context() as patched:
    patched.setattr(loop, "lr_factor", other)
    wanted = lab.record()
    assert lab.attempt(wanted) == 0
  run = lab.record()
  assert "optim.expert_lr = 0.005 from 2560 tokens on (it is restless)" in told(
    run, halved(tmp_path), lab
  )
  outcomes = []
  for number in (1, 2):
    assert begin(lab.root, run, "local") == number
    outcomes.append(lab.attempt(run, number=number))
    outcomes.append(settle(lab.root, run, number).outcome)
  assert outcomes == [loop.INTERRUPTED, "amended", 0, "completed"]
  assert same_bits(lab.state(run), lab.state(wanted))
  never = lab.record()
  assert lab.attempt(never) == 0 and not same_bits(lab.state(run), lab.state(never))
  before = checkpoint.manifest(lab.checkpoints(run) / "step_00000005")
  path = lab.checkpoints(run) / "step_00000005" / "manifest.json"
  with closing(Attempts(lab.root)) as records:
    kept = records.artifacts(run)
  assert kept[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert before["permanent"] == "before an amendment" and "expert_lr = 0.01" in before["config"]
  assert (
    "expert_lr = 0.005" in checkpoint.manifest(lab.checkpoints(run) / "step_00000012")["config"]
  )


def test_an_amended_batch(lab, tmp_path):
  """Twice as large from 5 steps on; against a stopped run whose record is rewritten by hand."""
  at = f'at_tokens = {AT}\nreason = "x"\nkey = "schedule.batch_tokens"\nvalue = 1024'
  run, other = lab.record(), lab.record()
  told(run, write(tmp_path, at), lab)
  for number in (1, 2):
    begin(lab.root, run, "local")
    lab.attempt(run, number=number)
    settle(lab.root, run, number)
  folder = lab.checkpoints(other)
  shutil.copytree(lab.checkpoints(run) / "step_00000005", folder / "step_00000005")
  path = folder / "step_00000005" / "manifest.json"
  written = json.loads(path.read_text()) | {"run": other}
  del written["sha256"]
  path.write_text(json.dumps(written | {"sha256": digest(written)}))
  larger = changed(lab.config, {"schedule.batch_tokens": 1024})
  lab.records.update_run(other, toml=configs.to_toml(larger))
  assert lab.attempt(other) == 0
  assert lab.run(run).results["tokens"] == AT + 3 * 1024
  assert same_bits(lab.state(run, 8), lab.state(other, 8))


def test_amendments_are_audited(lab, tmp_path):
  run = lab.record()
  told(run, halved(tmp_path), lab)
  with closing(Attempts(lab.root)) as records:
    found = records.run(run).amendments
    assert [one.key for one in found] == [f"optim.{rate}_lr" for rate in RATES]
    assert found[0].at_tokens == AT and json.loads(found[0].value) == 0.005
    assert "@" in found[0].who and found[0].reason == "it is restless"
    assert [event.kind for event in records.events(run)] == ["amend"] * 3
    with pytest.raises(RecordError, match="never rewritten"), records._writing() as db:
      db.execute("DELETE FROM amendments")


def test_a_user_without_a_name_amends(lab, tmp_path, monkeypatch):
  """docker run --user 1234: getpass knows no such user (KeyError; OSError from Python 3.13 on)."""
  run = lab.record()
  for error in (KeyError("getpwuid(): uid not found: 1234"), OSError("No username set")):

    def unknown(error=error):
      raise error

    monkeypatch.setattr("getpass.getuser", unknown)
    assert read(halved(tmp_path))[0].who.startswith(f"user {os.getuid()}@")
  assert "0.005" in told(run, halved(tmp_path), lab)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ('key = "model.dim"\nvalue = 64', "model.dim at 2560 tokens: the key makes another model"),
    ('key = "train.log_every"\nvalue = 2', "is read at a launch"),
    ('key = "launch.ranks"\nvalue = 2', "is not read by tokens"),
    ('key = "optim.lr"\nvalue = 2', "there is no such key"),
    ('key = "optim.dense_lr"\nvalue = -1.0', "optim.dense_lr = -1.0"),
  ],
)
def test_what_is_refused(lab, tmp_path, entry, message):
  """With the key and the reason; nothing of the file is recorded."""
  run, good = lab.record(), f'at_tokens = {AT}\nreason = "x"\n'
  path = write(tmp_path, good + 'key = "optim.clip_norm"\nvalue = 2.0', good + entry)
  with pytest.raises(ConfigError, match=message):
    told(run, path, lab)
  with closing(Attempts(lab.root)) as records:
    assert not records.amendments(run)


def entry(key: str, value: object, at: int = AT) -> str:
  return f'at_tokens = {at}\nkey = "{key}"\nvalue = {value}\nreason = "x"'


TOTAL, DECAY = "schedule.total_tokens", "schedule.decay_tokens"


@pytest.mark.faults
@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ([("optim.dense_lr", 1e-3), ("optim.dense_lr", 2e-3)], "dense_lr at 2560 .* this key twice"),
    ([(DECAY, 4096), (TOTAL, 4608, AT + 512)], "total_tokens at 3072 .*decay_tokens 4096"),
    ([(TOTAL, 3072), ("optim.dense_lr", 1e-3, 3584)], "dense_lr at 3584 .*ends at 3072 tokens"),
  ],
)
@pytest.mark.parametrize("files", [1, 2])
def test_amendments_that_contradict_each_other(lab, tmp_path, entries, message, files):
  """Each alone is good. Of two files the second is refused; one key twice is a correction then."""
  run, written = lab.record(), [entry(*one) for one in entries]
  correction = files == 2 and "twice" in message
  if files == 2:
    told(run, write(tmp_path, written[0]), lab)
  path = write(tmp_path, *written[files - 1 :])
  if correction:
    told(run, path, lab)
  else:
    with pytest.raises(ConfigError, match=message):
      told(run, path, lab)
  with closing(Attempts(lab.root)) as records:
    found = records.run(run).amendments
  assert len(found) == (2 if correction else files - 1)
  if correction:
    assert amended(lab.config, found, AT).optim.dense_lr == 2e-3


def test_amendments_that_need_each_other(lab, tmp_path):
  """Together they are a valid configuration, in whichever order; alone neither would be: a decay
  longer than the run, and what begins after its first end.
  """
  longer = [entry(DECAY, 8192), entry(TOTAL, 12288), entry("optim.dense_lr", 1e-3, 7168)]
  for entries in (longer, longer[::-1]):
    run = lab.record()
    told(run, write(tmp_path, *entries), lab)
    with closing(Attempts(lab.root)) as records:
      found = records.run(run).amendments
    then = amended(lab.config, found, AT)
    assert (then.schedule.decay_tokens, then.schedule.total_tokens) == (8192, 12288)
    assert amended(lab.config, found, 7168).optim.dense_lr == 1e-3


@pytest.mark.faults
@pytest.mark.parametrize("first", ["stop", "amend"])
def test_a_stop_outlives_an_amendment(lab, tmp_path, first):
  """Two operators ask at once: the run stops, and takes the amendment up when it is launched."""
  run = lab.record()
  number = begin(lab.root, run, "local")
  asks = {
    "stop": lambda: stop(run, lab.root, Console(file=io.StringIO())),
    "amend": lambda: told(run, halved(tmp_path), lab),
  }
  for name in (first, *(asks.keys() - {first})):
    asks[name]()
  with closing(Attempts(lab.root)) as records:
    records.event(run, number, "amended", step=1)  # its tokens were reached in this very step
  assert settle(lab.root, run, number).outcome == "stopped"
  assert not Root(lab.root).amend_request(run).exists()


@pytest.mark.faults
def test_a_run_that_is_launched_meanwhile_is_asked(lab, tmp_path, monkeypatch):
  """It was not live when the command began, and may have read its amendments before the new one."""
  run = lab.record()
  real = rules.check

  def check(*asked):
    begin(lab.root, run, "local")
    real(*asked)

  monkeypatch.setattr(rules, "check", check)
  told(run, halved(tmp_path), lab)
  assert Root(lab.root).amend_request(run).exists()


def test_what_is_trained_is_not_amended(lab, tmp_path):
  run = lab.record()
  assert lab.attempt(run) == 0
  with pytest.raises(
    ConfigError, match="the run is at 6144 tokens; what is trained is not amended"
  ):
    told(run, halved(tmp_path), lab)


@pytest.mark.parametrize(
  "text", ["at_tokens = 1", "[amend]\nx = 1", "[[amend]]\nat_tokens = 9\nkey = 'a'\nvalue = 1"]
)
def test_a_file_that_says_something_else(lab, tmp_path, text):
  path = tmp_path / "amend.toml"
  path.write_text(text)
  with pytest.raises(ConfigError, match=r"amend.toml.* must have|must hold tables"):
    told(lab.record(), path, lab)


def test_a_configuration_is_a_function_of_tokens(lab):
  def one(at: int, key: str, value: str) -> Amendment:
    return Amendment(at, key, value, "r", "w", 0.0)

  given = (
    one(1000, "optim.clip_norm", "2.0"),
    one(2000, "data.weights", "[3.0]"),
    one(3000, "optim.clip_norm", "3.0"),
  )
  found = [amended(lab.config, given, tokens) for tokens in (999, 1000, 2000, 9000)]
  assert [c.optim.clip_norm for c in found] == [1.0, 2.0, 2.0, 3.0]
  assert [c.data.weights_from for c in found] == [(), (), ((2000.0, 3.0),), ((2000.0, 3.0),)]
  assert [following(given, tokens) for tokens in (0, 1000, 2999, 3000)] == [1000, 2000, 3000, 0]
  twice = amended(found[-1], given, 9000)
  assert twice == found[-1] and twice != changed(lab.config, {})
