"""The section of a production run: where its time went, what happened to it, what it rests on."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from nmoe.records import metrics
from nmoe.records.goodput import BUCKETS, Production, production
from stages.report.figures import COLORS, PHASE_COLORS, finish
from stages.report.findings import Findings
from stages.report.page import definitions, facts, table

NOTE = (
  "Goodput: the part of the wall time that trained steps which still count. ETTR: the same without "
  "the time in a queue. The bar is the wall time from the first launch; below it, training loss "
  "with the steps at which something happened."
)
QUIET = ("launch", "checkpoint", "permanent", "override")  # events that no line marks


def parts(found: Findings, root: Path) -> list[tuple[str, go.Figure | str]]:
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


def _timeline(seen: Production) -> go.Figure:
  """The spans of the wall time, a colour a bucket."""
  figure, begun = go.Figure(), seen.spans[0].begin
  for bucket, color in zip(BUCKETS, PHASE_COLORS, strict=True):
    spans = [span for span in seen.spans if span.bucket == bucket]
    if not spans:
      continue
    figure.add_trace(
      go.Bar(
        x=[span.seconds for span in spans],
        base=[span.begin - begun for span in spans],
        y=["wall time"] * len(spans),
        name=f"{bucket}, {seen.seconds[bucket]:,.1f} s",
        orientation="h",
        marker_color=color,
        width=0.55,
        hovertemplate=f"{bucket}: %{{x:.1f}} s from %{{base:.1f}}<extra></extra>",
      )
    )
  figure.update_layout(barmode="overlay", legend_traceorder="normal")
  figure.update_xaxes(title_text="seconds since the first launch")
  figure.update_yaxes(showgrid=False)
  return finish(figure, 190)


def _marked_loss(seen: Production, root: Path) -> go.Figure | None:
  logged = metrics.read(root, seen.run.id, ["train/loss"])
  if not logged:
    return None
  steps, _, losses = logged["train/loss"]
  line = {"color": COLORS[1], "width": 1.6}
  figure = go.Figure(go.Scatter(x=steps, y=losses, mode="lines", line=line, showlegend=False))
  for event in seen.events:
    if event.kind not in QUIET:
      figure.add_vline(event.step, line={"color": COLORS[2], "dash": "dot"})
      figure.add_annotation(x=event.step, y=1, yref="paper", text=event.kind, showarrow=False)
  figure.update_xaxes(title_text="step")
  figure.update_yaxes(title_text="training loss")
  return finish(figure, 280)


def _tables(seen: Production) -> str:
  attempts = [
    (str(a.number), a.engine, str(len(a.nodes)), str(a.first_step), str(a.last_step), a.outcome)
    for a in seen.attempts
  ]
  events = [
    (time.strftime("%F %T", time.gmtime(e.time)), str(e.attempt), str(e.step), e.kind, e.host)
    for e in seen.events
  ]
  rows = [[escape(cell or "under way") for cell in row] for row in attempts]
  html = table(("attempt", "engine", "hosts", "from step", "to step", "outcome"), rows, left=6)
  rows = [[escape(cell) for cell in row] for row in events]
  html += table(("UTC", "attempt", "step", "event", "host"), rows, left=5)
  evidence = ", ".join(link.from_id for link in seen.evidence) or "none: launched without"
  kept = ", ".join(str(step) for step in seen.checkpoints) or "none"
  amended = [
    (f"amendment {n}", f"{a.key} = {a.value} from {a.at_tokens:,} tokens: {a.reason} ({a.who})")
    for n, a in enumerate(seen.amendments, start=1)
  ]
  return html + definitions([("evidence", evidence), ("checkpoints", f"steps {kept}"), *amended])
