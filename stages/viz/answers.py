"""What the pages ask for, as JSON: runs, one run, a comparison, an experiment, a production run.

Read from the live records. Statistics are the judges'.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from functools import lru_cache

import numpy as np
import tomli

from nmoe.config import file as configs
from nmoe.config import plan
from nmoe.config.sections import SECTIONS, diff, kind
from nmoe.config.sections import leaves as config_leaves
from nmoe.errors import ConfigError
from nmoe.records import condition, goodput
from nmoe.records.live import OVERVIEW, Live, Logged
from nmoe.records.measures import MEASURES
from nmoe.records.reader import Experiment, Run
from nmoe.records.snapshot import Snapshot
from stages.judge.intervals import student_t
from stages.judge.paired import compare as paired
from stages.judge.single import describe

Json = dict[str, object]
LEVELS = ("train/loss", "val/loss", "val/bpb")  # whose curves a comparison subtracts
MAX_STEPS = 600  # of a curve in JSON


def runs(live: Live) -> Json:
  """Every run once, its experiments, and every distinct configuration (without its seed) once."""
  seen = live.snapshot()
  members: dict[str, list[Run]] = {}
  for run in seen.runs:
    members.setdefault(run.id, []).append(run)
  stamps, now = live.stamps(members), time.time()
  places: dict[str, int] = {}
  rows = []
  for run_id, of in members.items():
    run = of[-1]
    config = _without_seed(run.toml)
    rows.append(
      _brief(run)
      | {
        "memberships": [[r.experiment_id, r.arm] for r in of],
        "config": places.setdefault(config, len(places)),
        "production": run_id in seen.history,
        "age_s": now - stamps[run_id] / 1e9 if stamps[run_id] else None,
      }
    )
  return plain(
    {
      "root": str(live.root),
      "notice": seen.notice,
      "experiments": [experiment_row(e) for e in seen.experiments],
      "runs": rows[::-1],
      "configs": [leaves(text) for text in places],
      "measures": measures(),
      "panels": OVERVIEW,
    }
  )


def run(live: Live, seen: Snapshot, run: Run) -> Json:
  """One run with its configuration, what it logged, its attempts and the end of its log."""
  file = live.file(run.id)
  tags = file.tags()
  return plain(
    _brief(run)
    | {
      "memberships": [[r.experiment_id, r.arm] for r in seen.runs if r.id == run.id],
      "siblings": [_brief(r) for r in seen.runs if r.experiment_id == run.experiment_id],
      "environment": run.environment,
      "commit": run.commit,
      "code_version": run.code_version,
      "data_digest": run.data_digest,
      "fingerprint": run.fingerprint,
      "leaves": _marked(run.toml),
      "tags": tags,
      "ranks": live.ranks(run.id),
      "experts": file.expert_names(),
      "planned_bytes": _planned_bytes(run.toml),
      "evaluations": [asdict(e) for e in seen.evaluations.get(run.id, [])],
      "starts": starts(file.read(["train/loss", *STARTS])),
      "log": live.log_tail(run.id),
      "measures": measures(),
    }
  )


def compare(live: Live, a: Sequence[Run], b: Sequence[Run]) -> Json:
  """Two groups of runs, paired by seed: results, curves of the difference, configurations."""
  pairs = pairs_of(a, b)
  rows = [row for key in MEASURES if (row := _result(key, a, b, pairs))]
  return plain(
    {
      "a": [_brief(run) for run in a],
      "b": [_brief(run) for run in b],
      "seeds": [run.seed for run, _ in pairs],
      "rows": rows,
      "curves": {tag: _difference(live, tag, pairs) for tag in LEVELS},
      "changes": _changes(a[0], b[0]),
      "measures": measures(),
    }
  )


def pairs_of(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[Run, Run]]:
  """The runs of either side by seed, of the seeds that both have."""
  a_by, b_by = ({run.seed: run for run in of} for of in (a, b))
  return [(a_by[seed], b_by[seed]) for seed in sorted(a_by.keys() & b_by.keys())]


def experiment(live: Live, seen: Snapshot, e: Experiment) -> Json:
  """One experiment: hypotheses, arms against the first, verdict, and the evidence around it."""
  arms: dict[str, dict[int, Run]] = {}
  for run in (r for r in seen.runs if r.experiment_id == e.id):
    arms.setdefault(run.arm, {})[run.seed] = run
  groups = [[by[seed] for seed in sorted(by)] for by in arms.values()]
  results = []
  for other in groups[1:] if len(groups) > 1 else groups:
    base = groups[0]
    pairs = pairs_of(base, other) if other is not base else []
    rows = [row for key in MEASURES if (row := _result(key, base, other, pairs))]
    results.append({"a": base[0].arm, "b": other[0].arm, "rows": rows})
  return plain(
    experiment_row(e)
    | {
      "conclusion": e.conclusion,
      "arms": [
        {
          "name": name,
          "point": next((dict(a.point) for a in e.arms if a.name == name), {}),
          "runs": [_brief(by[seed]) for seed in sorted(by)],
        }
        for name, by in arms.items()
      ],
      "results": results,
      "graph": _graph(seen, e.id),
      "report": (live.paths.report(e.id) / "index.html").is_file(),
      "measures": measures(),
    }
  )


def production(live: Live, seen: Snapshot, run: Run) -> Json:
  """Where the wall time of a production run went, as `nmoe.records.goodput` accounts for it."""
  file = live.file(run.id)
  attempts, events = seen.history.get(run.id, ([], []))
  logged = file.read([*goodput.LOGGED, "train/tokens_per_s", *STARTS])
  found = goodput.account(live.root, run, attempts, events, logged)
  speeds = logged.get("train/tokens_per_s")
  return plain(
    _brief(run)
    | {
      "status": condition.status(found),
      "attempts": [asdict(a) for a in attempts],
      "events": [asdict(e) for e in events],
      "evidence": [asdict(link) for link in seen.links if link.to_id == run.experiment_id],
      "checkpoints": found.checkpoints,
      "spans": [asdict(span) for span in found.spans],
      "seconds": found.seconds,
      "wall_s": found.wall_s,
      "goodput": found.goodput if found.spans else None,
      "ettr": found.ettr if found.spans else None,
      "left_s": found.left_s,
      "step": found.step,
      "tokens": found.tokens,
      "total_tokens": found.total_tokens,
      "tokens_per_s": None if speeds is None else float(np.median(speeds.value[-20:])),
      "state": condition.state(found),
      "starts": starts(logged),
    }
  )


STARTS = ("startup/first_step_s", "startup/rewound_steps")


def starts(logged: dict[str, Logged]) -> list[Json]:
  """Where a run went on after a process ended: the last line before it, and how many steps beyond
  it were logged, deleted and trained again.
  """
  clock, begun = (logged.get(tag) for tag in ("train/loss", STARTS[0]))
  if clock is None or begun is None:
    return []
  lost = logged.get(STARTS[1])
  rewound = {} if lost is None else dict(zip(lost.step.tolist(), lost.value.tolist(), strict=True))
  found = []
  for step in begun.step.tolist():
    i = int(np.searchsorted(clock.step, step)) - 1
    if 0 <= i < len(clock.step) - 1:
      at = {"step": int(clock.step[i]), "tokens": int(clock.tokens[i])}
      after = {"time": float(clock.time[i] - clock.time[0]), "when": float(clock.time[i + 1])}
      found.append(at | after | {"rewound": rewound.get(step, 0)})
  return found


def _result(
  key: str, a: Sequence[Run], b: Sequence[Run], pairs: Sequence[tuple[Run, Run]]
) -> Json | None:
  """One measure of both groups, and its paired difference; None where nobody has it."""
  left, right = ([run.results.get(key, math.nan) for run in of] for of in (a, b))
  if not any(map(math.isfinite, left + right)):
    return None
  row: Json = {"key": key, "a": asdict(describe(left)), "b": asdict(describe(right))}
  if pairs:
    of_pairs = [
      [run.results.get(key, math.nan) for run in side] for side in zip(*pairs, strict=True)
    ]
    difference = paired(*of_pairs, direction="none", min_effect=0.0)
    row["difference"] = asdict(difference) | {"seeds": [x.seed for x, _ in pairs]}
  return row


def _difference(live: Live, tag: str, pairs: Sequence[tuple[Run, Run]]) -> Json | None:
  """b − a of a tag at the steps that all pairs which logged it have: each seed's, of whom, the mean
  and its 95 % band.
  """
  every = {a.seed: [live.file(run.id).read([tag]).get(tag) for run in (a, b)] for a, b in pairs}
  of_seed = {seed: pair for seed, pair in every.items() if None not in pair}
  logged = list(of_seed.values())
  if not logged:
    return None
  steps = logged[0][0].step
  for rows in (rows for pair in logged for rows in pair):
    steps = np.intersect1d(steps, rows.step)
  steps = steps[:: max(1, math.ceil(len(steps) / MAX_STEPS))]
  if not len(steps):
    return None
  at = [[rows.value[np.searchsorted(rows.step, steps)] for rows in pair] for pair in logged]
  seeds_N = np.stack([b - a for a, b in at])
  n = len(seeds_N)
  mean = seeds_N.mean(0)
  half = student_t(0.975, n - 1) * seeds_N.std(0, ddof=1) / math.sqrt(n) if n > 1 else None
  return {
    "steps": steps.tolist(),
    "of": list(of_seed),
    "seeds": seeds_N.tolist(),
    "mean": mean.tolist(),
    "low": None if half is None else (mean - half).tolist(),
    "high": None if half is None else (mean + half).tolist(),
  }


def _graph(seen: Snapshot, experiment_id: str) -> Json:
  """Every experiment that links reach from this one, and those links."""
  around = {experiment_id}
  while True:
    links = [link for link in seen.links if {link.from_id, link.to_id} & around]
    wider = around.union(*({link.from_id, link.to_id} for link in links))
    if wider == around:
      break
    around = wider
  nodes = [experiment_row(e) for e in seen.experiments if e.id in around]
  return {"nodes": nodes, "links": [asdict(link) for link in links]}


def _changes(a: Run, b: Run) -> Json:
  """The leaves that differ, or why that cannot be said."""
  try:
    left, right = (configs.loads(run.toml, run.id, env={}) for run in (a, b))
  except ConfigError as error:
    return {"error": f"not comparable by this version of nmoe: {error}"}
  changed = diff(left, right).items()
  rows = [[key, _text(x), _text(y), kind(key)] for key, (x, y) in changed]
  return {"rows": [row for row in rows if row[0] not in ("train.seed", "run.root")]}


def experiment_row(e: Experiment) -> Json:
  return {
    "id": e.id,
    "name": e.name,
    "stage": e.stage,
    "status": e.status,
    "verdict": e.verdict,
    "reason": e.conclusion.get("reason", ""),
    "hypotheses": [asdict(h) for h in e.hypotheses],
    "created": e.created,
    "updated": e.updated,
    "axes": sorted({axis for arm in e.arms for axis in arm.point}),
  }


def _brief(run: Run) -> Json:
  return {
    "id": run.id,
    "experiment": run.experiment_id,
    "arm": run.arm,
    "seed": run.seed,
    "status": run.status,
    "results": run.results,
    "error": run.error,
    "target": run.target,
    "host": run.host,
    "pid": run.pid,
    "created": run.created,
    "updated": run.updated,
  }


def _marked(toml: str) -> list[Json]:
  """Every leaf of a configuration; `given` where it isn't the default."""
  try:
    config = configs.loads(toml, env={})
  except ConfigError:  # of another version: as it stands
    return [{"key": key, "value": value, "kind": "", "given": True} for key, value in leaves(toml)]
  rows = []
  for key, value in config_leaves(config).items():
    section, name = key.split(".")
    default = next(f.default for f in fields(SECTIONS[section]) if f.name == name)
    given = default is MISSING or default != value
    rows.append({"key": key, "value": _text(value), "kind": kind(key), "given": given})
  return rows


def measures() -> Json:
  return {
    tag: {"label": m.label, "format": m.format, "factor": m.factor, "better": m.better}
    for tag, m in MEASURES.items()
  }


@lru_cache(maxsize=4096)
def leaves(toml: str) -> tuple[tuple[str, object], ...]:
  """Dotted key and value of every leaf of a recorded configuration, of whatever version."""
  try:
    table = tomli.loads(toml)
  except tomli.TOMLDecodeError:
    return ()
  return tuple(
    (f"{section}.{key}", value)
    for section, of in table.items()
    if isinstance(of, dict)
    for key, value in of.items()
  )


@lru_cache(maxsize=4096)
def expert_share(toml: str) -> float | None:
  """The routed experts' share of a token's FLOPs; None for a configuration of another version."""
  try:
    terms = plan.flops(configs.loads(toml, env={}))
  except ConfigError:
    return None
  return sum(t.value for t in terms if t.name == "routed experts") / sum(t.value for t in terms)


@lru_cache(maxsize=4096)
def _planned_bytes(toml: str) -> int | None:
  """Of an accelerator's memory; None on a CPU, where a process has more than the plan counts."""
  try:
    config = configs.loads(toml, env={})
  except ConfigError:
    return None
  return None if config.target.arch == "cpu" else plan.plan(config).peak_bytes


@lru_cache(maxsize=4096)
def _without_seed(toml: str) -> str:
  return "\n".join(line for line in toml.splitlines() if not line.startswith("seed ="))


def _text(value: object) -> str:
  return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def plain(value: object) -> object:
  """For JSON: what is not finite is null, tuples and arrays are lists."""
  if isinstance(value, dict):
    return {str(key): plain(of) for key, of in value.items()}
  if isinstance(value, str):
    return value
  if isinstance(value, Iterable):
    return [plain(of) for of in value]
  if isinstance(value, (float, np.floating)):
    return float(value) if math.isfinite(value) else None
  return value
