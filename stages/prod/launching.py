"""`nmoe prod launch` and `stop`: a run that rests on evidence.

Launching a configuration again goes on with its run. The local engine is here: this process starts
torch's agent, follows the run's heartbeat, and begins the next attempt when one crashed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from nmoe import files
from nmoe.config import file as configs
from nmoe.config.sections import Config
from nmoe.errors import ConfigError, RunError
from nmoe.records.attempts import Attempts, History
from nmoe.records.condition import ago
from nmoe.records.heartbeat import Entry, Heartbeat
from nmoe.records.launches import Launch
from nmoe.records.reader import Run
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.judge.table import Judgement
from stages.launch import local
from stages.launch.display import Display, Line
from stages.prod import earlier, hosts
from stages.prod.attempt import DONE, NEVER, End, begin, newest_step, request, settle
from stages.prod.evidence import Evidence, evidence
from stages.prod.plan import advice
from stages.runs import Work, taken_up, under_way
from stages.workbench import Arm, Workbench, hypothesis_of

POLL_S = 0.5
AHEAD_S = 60.0  # clocks of hosts that are set may differ by less


def launch(
  path: Path,
  console: Console,
  without_evidence: str = "",
  dry_run: bool = False,
  accept_code: bool = False,
  anew: bool = False,
) -> int:
  """Check the evidence, record the run or find it; execute it to its end, or hand it to the engine
  that starts its hosts. The exit status of stages.prod.attempt.

  dry_run: start and submit nothing. anew: a new run, whatever is recorded. accept_code: see
  stages.prod.earlier. ConfigError if evidence is missing and no reason to do without is given.
  """
  config = configs.load(path)
  if config.train.checkpoint_every == 0:
    raise ConfigError(
      f"{path}: train.checkpoint_every = 0 in a production run: a crash would lose all of it; "
      + advice(config, path)
    )
  with Workbench.open(config.run.root, console) as bench:
    found = evidence(config, path, bench.experiments, bench.code_version)
    lacking = [one for one in found if one.lack]
    refused = lacking and not without_evidence  # the error says then what is missing
    _show([one for one in found if not (one.lack and refused)], console)
    if refused:
      lines = "\n".join(f"  {one.what}: {one.lack}" for one in lacking)
      raise ConfigError(
        f"{path}: a launch rests on evidence, and this is missing:\n{lines}\n"
        "or launch --without-evidence REASON, which every report of the run will show"
      )
    arm = bench.arm("production", config)
    known = None if anew else earlier.known(bench, arm, accept_code)
    work = _work_of(bench, arm, known)
    if known is not None and not (known.finished or work.usable(known)):
      known = None
    if known is not None and known.status == "completed":
      console.print(f"run {known.id} is completed", markup=False)
      return DONE
    run = known or _new(work, arm, anew)
    with nullcontext() if dry_run else _alone(bench.root, run.id, config):
      if known is not None:
        _go_on(work, run, config, dry_run)
      else:
        told = f"run {run.id}; its logs: {Root(bench.root).logs(run.id)}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
      _rest_on(work, run, found, without_evidence)
      if config.launch.engine != "local":
        return _handed_over(work, run, config, dry_run)
      return DONE if dry_run else _carried_out(work, run, config)


def _work_of(bench: Workbench, arm: Arm, known: Run | None) -> Work:
  """The experiment that a known run is of, if a launch began it; else that of the configuration."""
  if known is not None:
    experiment = bench.experiments.find(known.origin)
    if experiment.stage == "prod":
      return Work(bench, experiment)
  config = arm.config
  asked = (config.experiment.name, [hypothesis_of(config)], [arm], [config.train.seed])
  return taken_up(bench, "prod", *asked)


def _new(work: Work, arm: Arm, anew: bool) -> Run:
  """A new run; or that of another launch which looked at the same moment and was faster."""
  seed, records = arm.config.train.seed, work.bench.experiments
  if anew:
    return work.start(arm, seed)
  run = records.find_or_start(
    work.experiment.id,
    arm.name,
    seed,
    usable=lambda run: not run.finished and work.usable(run),
    **work.record(arm, arm.config),
  )
  records.release(run.id)
  return run


def _handed_over(work: Work, run: Run, config: Config, dry_run: bool) -> int:
  """Generate what the engine that starts the hosts takes, and give it to it."""
  bench = work.bench
  generated = hosts.generate(config, run.id, bench.root)
  if dry_run:
    text = generated.read_text()
    bench.console.print(text, markup=False, highlight=False, soft_wrap=True)
  else:
    with closing(Attempts(bench.root)) as records:
      following = records.following(run.id)
      hosts.submit(config, run.id, generated, bench.console)
      records.event(run.id, 0, "submit", detail={"for_attempt": following})
  return DONE


def _carried_out(work: Work, run: Run, config: Config) -> int:
  """The exit status of a run's attempts; the experiment concludes when it completed."""
  bench, root = work.bench, work.bench.root
  with under_way(work):
    with Display(bench.console) as display:
      line = display.line("production", config.steps, f"starting {run.id}")
      end = _execute(root, run, config, line)
      line.end(f"{end.outcome}{f': {end.why}' if end.why else ''}")
    if end.status == DONE and end.outcome == "completed":
      done = bench.experiments.run(run.id)
      reason = f"{counted(done.results['steps'], 'step')}, {_restarts(root, run.id)}."
      work.conclude(Judgement("completed", reason), [done], summary=True)
    elif end.status != NEVER or end.outcome == "superseded":  # it goes on
      bench.experiments.set_status(work.experiment.id, "interrupted")
  return end.status


def _go_on(work: Work, run: Run, config: Config, dry_run: bool) -> None:
  """Say so; the run takes over this code and what the configuration now says of free keys."""
  if run.status != "running" and not dry_run:
    earlier.take_over(work.bench, run)
    work.hand_over(run, earlier.decided(run, config))
  step = newest_step(work.bench.root, run.id)
  work.bench.console.print(f"run {run.id} goes on from step {step}", markup=False)


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


def _show(found: list[Evidence], console: Console) -> None:
  for one in found:
    console.print(str(one), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _alone(root: Path, run_id: str, config: Config) -> Iterator[None]:
  """Hold the launch of a run; RunError naming who does, if another process or a job of the engine
  has it. Of the local engine also if the last sign of another host's ranks or agent is younger than
  prod.stale_s: on some filesystems locks hold for one host only.
  """
  folder = Root(root).prod(run_id)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "launch.lock").open("a+") as lock:
    free = files.lock(lock)
    lock.seek(0)
    who = lock.read() or "another process"
    if not free:
      raise launched(root, run_id, who)
    if config.launch.engine != "local":
      if job := hosts.job_of(config, run_id):
        raise launched(root, run_id, job)
    elif fresh_elsewhere(root, run_id, config.prod.stale_s) and open_attempt(root, run_id):
      raise launched(root, run_id, who)
    lock.truncate(0)
    lock.write(f"{socket.gethostname()}, pid {os.getpid()}")
    lock.flush()
    yield


def fresh_elsewhere(root: Path, run_id: str, stale_s: float) -> bool:
  """Whether ranks or an agent of another host gave a sign within stale_s."""
  signs = (Heartbeat.read(Root(root).heartbeat(run_id)), Launch.read(root, run_id))
  elsewhere = [one.time for one in signs if one and one.host != socket.gethostname()]
  return time.time() - max(elsewhere, default=0.0) < stale_s


def launched(root: Path, run_id: str, who: str) -> RunError:
  """The error of a second launch."""
  beat, told = Heartbeat.read(Root(root).heartbeat(run_id)), "no heartbeat yet"
  if beat is not None:
    age = f"heartbeat {ago(beat.time)} by {beat.host}, pid {beat.pid}"
    told = f"attempt {beat.attempt}, {age}"
  remedy = f"`nmoe prod stop {run_id}` ends it"
  if beat is not None and beat.time > time.time() + AHEAD_S:
    signs = f"{Root(root).heartbeat(run_id)} and {Root(root).launch(run_id)}"
    remedy += f"; its clock is ahead: if {beat.host} is gone, delete {signs}"
  return RunError(f"run {run_id} is launched already by {who} ({told}); {remedy}")


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
    end = settle(root, run.id, number, told)
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
  told, lost, beat = False, 0, Heartbeat.read(Root(root).heartbeat(run.id))
  before = None if beat is None else beat.entry
  with ExitStack() as cleanup:
    cleanup.callback(local.terminate, local.compile_beside(root, config, logs))
    agent = local.spawn(command, hosts.environment(config, root), logs / "agent.txt")
    cleanup.callback(agent.kill)
    while agent.poll() is None:
      try:
        lost = _follow(root, run.id, number, line, lost, before)
        time.sleep(POLL_S)
      except KeyboardInterrupt:
        if told:
          raise
        agent.terminate()
        told = True
    _follow(root, run.id, number, line, lost, before)
  return told


def _follow(
  root: Path, run_id: str, number: int, line: Line, lost: int, before: Entry | None
) -> int:
  """Show the newest step, and that the ranks were lost, if it was more than `lost` times; how often
  it was. before: of an earlier attempt, which the heartbeat says until a step is logged.
  """
  launch = Launch.read(root, run_id)
  if launch is not None and launch.attempt == number and launch.restarts > lost:
    lost = launch.restarts
    line.display.say(
      f"production: attempt {number} lost ranks, {counted(lost, 'time')} so far; "
      "`nmoe prod status` says which"
    )
  beat = Heartbeat.read(Root(root).heartbeat(run_id))
  logged = beat is not None and beat.attempt == number and beat.entry.tokens_per_s > 0
  if logged and beat.entry not in (line.entry, before):
    line.follow(beat.entry)
  else:
    line.idle(state=beat.state if beat is not None and beat.attempt == number else "")
  return lost


def _restarts(root: Path, run_id: str) -> str:
  with closing(History(root)) as records:
    attempts, events = records.attempts(run_id), records.events(run_id)
  restarts = sum(event.kind == "restart" for event in events)
  within = "it" if len(attempts) == 1 else "them"
  return f"{counted(len(attempts), 'attempt')}, {counted(restarts, 'restart')} within {within}"


def stop(run_id: str, root: Path, console: Console) -> None:
  """Ask a run to save its state and leave; it does at its next log. RecordError: no such run."""
  with closing(History(root)) as records:
    run = records.run(run_id)
  if not run.live:
    config = configs.loads(run.toml, f"run {run_id}", env={})
    told = f"run {run_id} is {run.status}; there is nothing to stop"
    raise RunError(told + hosts.withdrawn(config, run_id))
  request(Root(root).stop_request(run_id))
  console.print(f"run {run_id} saves its state and leaves at its next log", markup=False)
