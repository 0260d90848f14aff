"""The section of a production run: where its time went, what happened to it, what it rests on."""

from __future__ import annotations

from html import escape
from pathlib import Path

from nmoe.records import metrics
from nmoe.records.goodput import BUCKETS, Production, production
from stages.report.drawing import Bars, Curve, Figure, Panel, Rule
from stages.report.events import details, kind, when
from stages.report.figures import COLORS, ORANGE, thin
from stages.report.findings import Findings
from stages.report.page import definitions, facts, table

NOTE = (
  "Goodput: the part of the wall time that trained steps which still count. ETTR: the same without "
  "the time in a queue. The bar is the wall time from the first launch; below it, training loss "
  "with the steps at which something happened."
)
COLOR_OF = {  # a bucket's, as in the dashboard
  "stepping": "#0072b2",
  "save stall": "#cc79a7",
  "eval": "#009e73",
  "lost steps": "#d55e00",
  "hang wait": "#e69f00",
  "starting": "#d3d7dc",
  "compiling": "#8a6a3a",
  "loading": "#56b4e9",
  "queued": "#4e4167",
  "stopped": "#45494e",
}
QUIET = ("launch", "checkpoint", "permanent", "override")  # events that no line marks


def parts(found: Findings, root: Path) -> list[tuple[str, Figure | str]]:
  """Name -> figure, and pieces of HTML under the name ""; none for another stage's experiment."""
  if found.experiment.stage != "prod" or not found.runs:
    return []
  seen = production(root, found.runs[-1].id)
  if not seen.spans:
    return []
  return [
    ("", _numbers(seen)),
    ("timeline", _timeline(seen)),
    ("marked-loss", _marked_loss(seen, root)),
    ("", _tables(seen)),
  ]


def _numbers(seen: Production) -> str:
  pairs = [
    ("goodput", f"{seen.goodput:.1%}"),
    ("ETTR", f"{seen.ettr:.1%}"),
    ("wall time, s", f"{seen.wall_s:,.1f}"),
    ("step", f"{seen.step:,}"),
  ]
  return facts(pairs)


def _timeline(seen: Production) -> Figure:
  """The spans of the wall time, a colour a bucket."""
  begun, marks = seen.spans[0].begin, []
  for bucket in BUCKETS:
    bars = [
      (0, s.begin - begun, s.seconds, "", f"{bucket}: {s.seconds:.1f} s from {s.begin - begun:.1f}")
      for s in seen.spans
      if s.bucket == bucket
    ]
    marks += (
      [Bars(bars, COLOR_OF[bucket], f"{bucket}, {seen.seconds[bucket]:,.1f} s")] if bars else []
    )
  panel = Panel(marks, x="seconds since the first launch", rows=["wall time"])
  return Figure([panel], 120)


def _marked_loss(seen: Production, root: Path) -> Figure | None:
  logged = metrics.read(root, seen.run.id, ["train/loss"])
  if not logged:
    return None
  steps, _, losses = logged["train/loss"]
  steps, losses = thin(steps, losses)
  rules = [
    Rule(event.step, ORANGE, "2 3", event.kind) for event in seen.events if event.kind not in QUIET
  ]
  ends = (float(steps[0]), max(float(steps[-1]), float(steps[0]) + 1, *(rule.x for rule in rules)))
  line = Curve(steps, losses, COLORS[1], "training loss", width=1.6)
  panel = Panel([line], "training loss", "step", x_range=ends, rules=rules)
  return Figure([panel], 280, key=False)


def _tables(seen: Production) -> str:
  attempts = [
    (str(a.number), a.engine, str(len(a.nodes)), str(a.first_step), str(a.last_step), a.outcome)
    for a in seen.attempts
  ]
  events = [
    (when(e), str(e.attempt), str(e.step), kind(e), e.host, details(e)) for e in seen.events
  ]
  rows = [[escape(cell or "under way") for cell in row] for row in attempts]
  html = table(("attempt", "engine", "hosts", "from step", "to step", "outcome"), rows, left=6)
  rows = [[escape(cell) for cell in row] for row in events]
  html += table(("UTC", "attempt", "step", "event", "host", "what"), rows, left=6)
  evidence = ", ".join(link.from_id for link in seen.evidence) or "none: launched without"
  without = [
    (f"without {', '.join(e.detail['without'])}", e.detail["reason"])
    for e in seen.events
    if e.kind == "override"
  ]
  kept = ", ".join(str(step) for step in seen.checkpoints) or "none"
  amended = [
    (f"amendment {n}", f"{a.key} = {a.value} from {a.at_tokens:,} tokens: {a.reason} ({a.who})")
    for n, a in enumerate(seen.amendments, start=1)
  ]
  codes = [
    (f"code from step {e.step} on", f"{e.detail['code']}, commit {e.detail['commit'][:10]}")
    for e in seen.events
    if e.kind == "code"
  ]
  stands = [("evidence", evidence), *without, ("checkpoints", f"steps {kept}")]
  pairs = [*stands, *amended, *codes]
  return html + definitions(pairs)
