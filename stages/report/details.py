"""The longer tables of findings, as data: loads, quantization, what differs, where it came from."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from nmoe.config import file as configs
from nmoe.config.sections import diff, kind
from nmoe.wording import counted
from stages.report.findings import LEGS, Arm, Findings

HEALTH = ("load_max_over_mean", "load_p05", "load_p95", "dead", "entropy", "bias_range")
FEW = 8  # arms of which all is shown; a sweep has fifty
OWN_COMMAND = {"ablate": "ablate", "research": "research run"}  # of stages that a TOML repeats


def load_rows(found: Findings) -> list[list[str]]:
  """Of every arm and MoE layer: HEALTH at the last logged step, mean over seeds."""
  rows = []
  for arm in found.arms:
    for layer in arm.layers():
      ends = [[y[-1] for _, y in arm.series(f"moe/{layer}/{name}")] for name in HEALTH]
      if all(ends):
        rows.append([arm.name, str(layer), *(f"{sum(end) / len(end):.3f}" for end in ends)])
  return rows


def flight_rows(found: Findings) -> list[list[str]]:
  """Of every arm and kind of operand: its worst place."""
  return [row for arm in found.arms for row in _flight_rows(arm)]


def _flight_rows(arm: Arm) -> list[list[str]]:
  kinds = ("sqnr_db", "sqnr_db_min", "saturated", "underflow")
  logged = [arm.flight(kind) for kind in kinds]
  rows = []
  for leg, label in LEGS.items():
    ratio, expert, saturated, lost = (
      {place: v for place, v in values.items() if place[2] == leg and math.isfinite(v)}
      for values in logged
    )
    if ratio:
      layer, product, _ = worst = min(ratio, key=ratio.get)
      least = f"{min(expert.values()):.1f}" if expert else "—"
      shares = [f"{100 * max(share.values()):.3g}" for share in (saturated, lost)]
      where = f"layer {layer} {product}"
      rows.append([arm.name, label, where, f"{ratio[worst]:.1f}", least, *shares])
  return rows


def changes(arms: Sequence[Arm]) -> list[list[str]]:
  """The keys that differ between two arms: key, both values, its kind.

  ConfigError if this version of nmoe does not know the configuration of one.
  """
  parsed = [configs.loads(arm.runs[0].toml, arm.name) for arm in arms]
  return [
    [key, repr(a), repr(b), kind(key)]
    for key, (a, b) in diff(*parsed).items()
    if not key.startswith("experiment.")
  ]


def provenance(found: Findings) -> list[tuple[str, str]]:
  """What decided the runs, each with all its values where runs differ."""
  runs = found.runs
  lines = runs[0].diff.count("\n")
  names = sorted({name for run in runs for name in run.environment})
  arms = found.arms if len(found.arms) <= FEW else ()
  fingerprints = [
    (f"fingerprint, {a.name}", _distinct(r.fingerprint for r in a.runs)) for a in arms
  ]
  return [
    ("commit", _distinct((run.commit or "not a git checkout") for run in runs)),
    ("changes on top", f"{counted(lines, 'line')} of diff" if runs[0].diff else "none"),
    ("code version", _distinct(run.code_version for run in runs)),
    ("target", _distinct(run.target for run in runs)),
    ("data digest", _distinct(run.data_digest for run in runs)),
    *fingerprints,
    ("host", _distinct(run.host for run in runs)),
    *([("continued", "; ".join(found.moves))] if found.moves else []),
    *((name, _distinct(str(run.environment.get(name, "—")) for run in runs)) for name in names),
  ]


def _distinct(values: Iterable[str]) -> str:
  return ", ".join(dict.fromkeys(values))


def file_name(arm: Arm) -> str:
  """Of an arm's TOML beside a report: no name leads out of its folder."""
  return re.sub(r"[^A-Za-z0-9._ -]", "_", arm.name).lstrip(".") + ".toml"


def commands(found: Findings, folder: Path) -> str:
  """The shell lines that repeat the experiment from the TOMLs beside its report."""
  first, e = found.runs[0], found.experiment
  lines = [f"git checkout {first.commit}"] if first.commit else []
  lines += [f"git apply {shlex.quote(str(folder / 'changes.patch'))}"] if first.diff else []
  repeats = any((link.from_id, link.relation) == (e.id, "repeats") for link in found.links)
  if e.stage in OWN_COMMAND and not repeats:  # what checks add stands in no configuration
    files = [shlex.quote(str(folder / file_name(arm))) for arm in found.arms]
    trunks = [f"--from {run.branch}" for run in found.runs if run.branch]
    seeds = trunks or [f"--seeds {max(len(arm.runs) for arm in found.arms)}"]
    lines.append(" \\\n  ".join([f"nmoe {OWN_COMMAND[e.stage]}", *files, *seeds]))
  root = shlex.quote(str(folder.parent.parent))
  lines.append(f"# one run of it:\nnmoe rerun {first.id} --root {root}")
  return "\n".join(lines)
