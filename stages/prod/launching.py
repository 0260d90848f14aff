"""`nmoe prod launch`, `status`, `stop`: a run that rests on evidence, and what it is doing now.

Launching a configuration again goes on with its run. The local engine is here: this process starts
torch's agent, follows the run's heartbeat, and begins the next attempt when one crashed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nmoe import files
from nmoe.config import file as configs
from nmoe.config.sections import Config, fingerprint
from nmoe.errors import ConfigError, RunError
from nmoe.records.attempts import Attempts, History
from nmoe.records.goodput import Production, production
from nmoe.records.heartbeat import Heartbeat
from nmoe.records.reader import Run
from nmoe.records.root import Root
from stages.judge.table import Judgement
from stages.launch import local, slurm
from stages.launch.display import Display, Line
from stages.prod import hosts
from stages.prod.attempt import DONE, End, begin, newest_step, settle
from stages.prod.evidence import Evidence, evidence
from stages.prod.plan import advice, stall_of, young
from stages.runs import Work, taken_up, under_way
from stages.workbench import Arm, Workbench, hypothesis_of

POLL_S = 0.5
HEALTHY, UNKNOWN, SICK = 0, 1, 2  # exit statuses of `status --check`


def launch(path: Path, console: Console, without_evidence: str = "", dry_run: bool = False) -> int:
  """Check the evidence, record the run or find it; execute it to its end, or hand it to the engine
  that starts its hosts. The exit status of stages.prod.attempt.

  dry_run: start and submit nothing. ConfigError if evidence is missing and no reason to do without
  is given.
  """
  config = configs.load(path)
  if config.train.checkpoint_every == 0:
    raise ConfigError(
      f"{path}: train.checkpoint_every = 0 in a production run: a crash would lose all of it; "
      + advice(config, path)
    )
  with Workbench.open(config.run.root, console) as bench:
    found = evidence(config, path, bench.experiments, bench.code_version)
    _show_evidence(found, console)
    lacking = [one for one in found if one.lack]
    if lacking and not without_evidence:
      lines = "\n".join(f"  {one.what}: {one.lack}" for one in lacking)
      raise ConfigError(
        f"{path}: a launch rests on evidence, and this is missing:\n{lines}\n"
        "or launch --without-evidence REASON, which every report of the run will show"
      )
    arm = bench.arm("production", config)
    asked = (config.experiment.name, [hypothesis_of(config)], [arm], [config.train.seed])
    work = taken_up(bench, "prod", *asked)
    run = _run(work, arm, console)
    if run.status == "completed":
      console.print(f"run {run.id} is completed", markup=False)
      return DONE
    _rest_on(work, run, found, without_evidence)
    if config.launch.engine != "local":
      if config.launch.engine == "slurm" and not dry_run and (job := slurm.queued(run.id)):
        raise launched(bench.root, run.id, f"Slurm's job {job}")
      generated = hosts.generate(config, run.id, bench.root)
      if dry_run:
        console.print(generated.read_text(), markup=False, highlight=False, soft_wrap=True)
      else:
        hosts.submit(config, generated, console)
        with closing(Attempts(bench.root)) as records:
          records.event(run.id, 0, "submit")
      return DONE
    return DONE if dry_run else _carried_out(work, run, config)


def _carried_out(work: Work, run: Run, config: Config) -> int:
  """The exit status of a run's attempts; the experiment concludes when it completed."""
  bench, root = work.bench, work.bench.root
  with _alone(root, run.id, config.prod.stale_s), under_way(work):
    with Display(bench.console) as display:
      line = display.line("production", config.steps, f"starting {run.id}")
      end = _execute(root, run, config, line)
      line.end(f"{end.outcome}{f': {end.why}' if end.why else ''}")
    if end.status == DONE and end.outcome == "completed":
      done = bench.experiments.run(run.id)
      reason = f"{done.results['steps']} steps, {_restarts(root, run.id)}."
      work.conclude(Judgement("completed", reason), [done], summary=True)
    elif end.status == DONE:
      bench.experiments.set_status(work.experiment.id, "interrupted")
  return end.status


def _run(work: Work, arm: Arm, console: Console) -> Run:
  """The newest run of this computation, under the configuration's free keys; else a new one."""
  config, bench = arm.config, work.bench
  key = fingerprint(config, arm.data.name), arm.data.name, config.train.seed, bench.code_version
  done = bench.experiments.find_finished(*key)
  if done is not None and done.status == "completed":
    return done
  run = bench.experiments.find_unfinished(*key)
  if run is None or not work.usable(run):
    return work.start(arm, config.train.seed)
  if run.status != "running":
    work.hand_over(run, decided(run, config))
  step = newest_step(bench.root, run.id)
  console.print(f"run {run.id} goes on from step {step}", markup=False)
  return run


def decided(run: Run, config: Config) -> Config:
  """The configuration with what the run itself left out of it (nmoe.train.badsteps)."""
  own = configs.loads(run.toml, f"run {run.id}", env={})
  return configs.changed(
    config, {"train.skip_steps": own.train.skip_steps, "data.holes": own.data.holes}
  )


def _rest_on(work: Work, run: Run, found: list[Evidence], reason: str) -> None:
  """Link the evidence to the launch, and record what it does without."""
  bench, experiment = work.bench, work.experiment
  known = {link.from_id for link in bench.experiments.links(experiment.id)}
  for one in found:
    if not one.lack and one.experiment not in known:
      note = f"{one.what}, with another {one.apart}" if one.apart else one.what
      bench.experiments.link(one.experiment, experiment.id, "supports", note)
  lacking = {one.what: one.lack for one in found if one.lack}
  if lacking:
    with closing(Attempts(bench.root)) as records:
      records.event(run.id, 0, "override", detail={"reason": reason, "without": lacking})


def _show_evidence(found: list[Evidence], console: Console) -> None:
  for one in found:
    passed = f"{one.experiment} passed" + (f", with another {one.apart}" if one.apart else "")
    text = f"evidence {one.what}: {one.lack or passed}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _alone(root: Path, run_id: str, stale_s: float) -> Iterator[None]:
  """Hold the launch of a run; RunError naming who does, if another process has it, or if another
  host's heartbeat is younger than stale_s.
  """
  folder = Root(root).prod(run_id)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "launch.lock").open("a+") as lock:
    free = files.lock(lock)
    lock.seek(0)
    who = lock.read() or "another process"
    if not free:
      raise launched(root, run_id, who)
    beat = Heartbeat.read(Root(root).heartbeat(run_id))
    elsewhere = beat is not None and beat.host != socket.gethostname()
    if elsewhere and open_attempt(root, run_id) and time.time() - beat.time < stale_s:
      raise launched(root, run_id, who)  # on a filesystem whose locks hold for one host only
    lock.truncate(0)
    lock.write(f"{socket.gethostname()}, pid {os.getpid()}")
    lock.flush()
    yield


def launched(root: Path, run_id: str, who: str) -> RunError:
  """The error of a second launch."""
  beat, told = Heartbeat.read(Root(root).heartbeat(run_id)), "no heartbeat yet"
  if beat is not None:
    age = f"heartbeat {time.time() - beat.time:.0f} s ago by {beat.host}, pid {beat.pid}"
    told = f"attempt {beat.attempt}, {age}"
  return RunError(
    f"run {run_id} is launched already by {who} ({told}); `nmoe prod stop {run_id}` ends it"
  )


def open_attempt(root: Path, run_id: str) -> bool:
  """Whether the newest attempt of a run has not ended, as far as the records know."""
  with closing(History(root)) as records:
    attempts = records.attempts(run_id)
  return bool(attempts) and not attempts[-1].outcome


def _execute(root: Path, run: Run, config: Config, line: Line) -> End:
  """Attempts, until one ends otherwise than by a crash or this process is told to stop."""
  while True:
    number = begin(root, run.id, "local")
    told = _attempt(root, run, config, number, line)
    end = settle(root, run.id, number)
    if end.outcome not in ("crashed", "amended") or told:
      return end
    line.display.say(f"production: attempt {number} {end.outcome}: {end.why}")


def _attempt(root: Path, run: Run, config: Config, number: int, line: Line) -> bool:
  """Run the agent of this host until it ends; whether an interrupt was passed on as SIGTERM."""
  logs = Root(root).logs(run.id)
  logs.mkdir(parents=True, exist_ok=True)
  arguments = ["--root", str(root), "--run", run.id, "--attempt", str(number)]
  arguments += ["--address", "127.0.0.1"]
  command = local.child_command("stages.launch.agent", arguments)
  told = False
  with ExitStack() as cleanup, local.interruptible():
    cleanup.callback(local.terminate, local.compile_beside(root, config, logs))
    agent = local.spawn(command, hosts.environment(config, root), logs / "agent.txt")
    cleanup.callback(agent.kill)
    while agent.poll() is None:
      try:
        _follow(root, run.id, number, line)
        time.sleep(POLL_S)
      except KeyboardInterrupt:
        if told:
          raise
        agent.terminate()
        told = True
    _follow(root, run.id, number, line)
  return told


def _follow(root: Path, run_id: str, number: int, line: Line) -> None:
  beat = Heartbeat.read(Root(root).heartbeat(run_id))
  logged = beat is not None and beat.attempt == number and beat.entry.tokens_per_s > 0
  if logged and beat.entry != line.entry:
    line.follow(beat.entry)
  else:
    line.idle()


def _restarts(root: Path, run_id: str) -> str:
  with closing(History(root)) as records:
    attempts, events = records.attempts(run_id), records.events(run_id)
  restarts = sum(event.kind == "restart" for event in events)
  return f"{len(attempts)} attempts, {restarts} restarts within them"


def stop(run_id: str, root: Path, console: Console) -> None:
  """Ask a run to save its state and leave; it does at its next log. RecordError: no such run."""
  with closing(History(root)) as records:
    run = records.run(run_id)
  if run.status != "running":
    raise RunError(f"run {run_id} is {run.status}; there is nothing to stop")
  request = Root(root).stop_request(run_id)
  request.parent.mkdir(parents=True, exist_ok=True)
  request.write_text(json.dumps({"host": socket.gethostname(), "time": time.time()}))
  console.print(f"run {run_id} saves its state and leaves at its next log", markup=False)


def status(run_id: str | None, root: Path, console: Console) -> int:
  """Print what a production run is doing, by default the newest; HEALTHY, UNKNOWN or SICK."""
  with closing(History(root)) as records:
    run = records.run(run_id) if run_id else _newest(records)
  found = production(root, run.id)
  attempts, events, beat = found.attempts, found.events, found.heartbeat
  config = configs.loads(run.toml, f"run {run.id}", env={})
  told = "no sign of life yet"
  age = float("inf")
  if beat is not None:
    age = time.time() - beat.time
    told = f"{beat.entry}; {beat.state}, {age:.0f} s ago on {beat.host}"
  console.print(f"run {run.id}: {run.status}; {told}", markup=False, highlight=False)
  table = Table()
  for column in ("attempt", "engine", "hosts", "from step", "to step", "outcome"):
    table.add_column(column)
  for a in attempts:
    steps = str(a.first_step), str(a.last_step) if a.ended else ""
    table.add_row(str(a.number), a.engine, str(len(a.nodes)), *steps, a.outcome or "under way")
  console.print(table)
  _show_goodput(found, console)
  _show_failures(found, config, console)
  for event in events[-10:]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
    text = f"{when} attempt {event.attempt} step {event.step}: {event.kind} {event.detail or ''}"
    console.print(text, markup=False, highlight=False)
  return health(run, age, config.prod.stale_s)


def _show_goodput(found: Production, console: Console) -> None:
  parts = ", ".join(f"{name} {s:,.1f} s" for name, s in found.seconds.items() if s)
  text = f"goodput {found.goodput:.1%}, ETTR {found.ettr:.1%} of {found.wall_s:,.1f} s: {parts}"
  if found.left_s is not None:
    text += f"; {timedelta(seconds=round(found.left_s))} left at this pace"
  console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show_failures(found: Production, config: Config, console: Console) -> None:
  """How often it failed, and the interval of checkpoints that this asks for."""
  if found.mttf_s is None or found.step == 0:
    return
  interval_s = young(stall_of(config, found.run).value, found.mttf_s)
  steps = max(1, round(interval_s * found.step / max(found.seconds["stepping"], 1e-9)))
  each = timedelta(seconds=round(found.mttf_s))
  told = f"{found.failures} failures, one in {each}; by Young's formula "
  told += f"train.checkpoint_every = {steps}, it is {config.train.checkpoint_every}"
  console.print(told, markup=False, highlight=False, soft_wrap=True)


def health(run: Run, age_s: float, stale_s: float) -> int:
  """What a monitor is told: a run that is over is healthy, one that failed or is silent is sick."""
  if run.status == "completed":
    return HEALTHY
  if run.status == "running":
    return HEALTHY if age_s <= stale_s else UNKNOWN if age_s == float("inf") else SICK
  return SICK if run.status == "failed" else UNKNOWN


def _newest(records: History) -> Run:
  for experiment in records.list():
    if experiment.stage == "prod" and (runs := records.runs(experiment.id)):
      return runs[-1]
  raise RunError(f"{records.path}: no production run; `nmoe prod launch CONFIG` starts one")
