"""The report of an experiment as an HTML page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from nmoe import files
from nmoe.errors import ConfigError, RecordError
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.judge.paired import Paired
from stages.report import details, figures, mixtures, production, sweep
from stages.report.drawing import Figure
from stages.report.evaluations import NOTE, answers
from stages.report.findings import Arm, Cell, Findings, gather, measure_of
from stages.report.page import definitions, facts, folded, page, section, table

SPEED = "train/tokens_per_s"
PANELS = (("bpb", "answers' bits per byte"), ("acc", "accuracy"))


def write_report(root: Path, experiment: str) -> Path:
  """Write `{root}/reports/{id}/index.html` and, beside it, each arm's TOML and the code's diff.

  `experiment` is an id, or a name, which means its newest. Returns the page's path. Raises
  RecordError if there is no such experiment or the folder cannot be written.
  """
  found = gather(root, experiment)
  folder = Root(Path(root)).report(found.experiment.id)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for arm in found.arms:
      files.replace(folder / details.file_name(arm), arm.runs[0].toml)
    if found.runs and found.runs[0].diff:
      files.replace(folder / "changes.patch", found.runs[0].diff)
    return files.replace(folder / "index.html", render(found, folder))
  except OSError as error:
    raise RecordError(
      f"{folder}: the report cannot be written ({error.strerror}); free space or set run.root"
    ) from error


def render(found: Findings, folder: Path) -> str:
  """The page."""
  swept = sweep.is_sweep(found.experiment)
  many = swept or mixtures.is_swarm(found.experiment)  # arms: a panel or a column each is none
  sections = (
    _head(found, many),
    _sweep(found) if swept else _mixtures(found) if many else _results(found),
    _production(found, folder.parent.parent),
    *(() if many else _measured(found, folder.parent.parent)),
    _configuration(found),
    _runs(found),
    _provenance(found, folder),
  )
  return page(f"{found.experiment.id}: {found.verdict}", sections, _script())


def _measured(found: Findings, root: Path) -> tuple[str, ...]:
  """What an experiment of few arms has a panel for."""
  return (
    _curves(found),
    _evaluations(found, root),
    _routing(found),
    _flight(found),
    _cost(found),
  )


def _production(found: Findings, root: Path) -> str:
  parts = production.parts(found, root)
  html = (part if isinstance(part, str) else _figure(name, part) for name, part in parts)
  return section("Production", *html, note=production.NOTE)


def _script() -> str:
  name = "static/report.js"
  return (resources.files("stages.report") / name).read_text(encoding="utf-8")


def _head(found: Findings, many: bool) -> str:
  e = found.experiment
  kind = {"ablate": "Paired ablation", "research": "Architecture research"}.get(e.stage, e.stage)
  own = {run.seed for arm in found.arms for run in arm.runs}  # a sweep repeats some of its arms
  seeds = counted(len(found.seeds if found.compares else own), "seed")
  eyebrow = f"{kind} · {e.id} · {seeds} · {e.created[:10]}"
  return (
    f'<div class="eyebrow">{escape(eyebrow)}</div><h1>{escape(found.claim.statement)}</h1>'
    f'<div class="verdict"><span class="badge {escape(found.verdict)}">'
    f"{escape(found.verdict.capitalize())}</span><p>{escape(found.reason)}</p></div>"
    f"{''.join(f'<p class=note>{escape(line)}</p>' for line in found.timing)}"
    f"{_claims(found)}{'' if many else _facts(found)}"
  )


def _claims(found: Findings) -> str:
  """All hypotheses, where there are several."""
  hypotheses = found.experiment.hypotheses
  rows = [
    (f"hypothesis {n}", f"{h.statement} ({h.metric}, {h.direction}, {h.min_effect:g})")
    for n, h in enumerate(hypotheses, start=1)
  ]
  return definitions(rows) if len(rows) > 1 else ""


def _facts(found: Findings) -> str:
  claim, row = found.claim, found.headline
  if row is None:
    return ""
  pairs = [
    (f"{arm.name}, {claim.metric}", row.show(one.mean))
    for arm, one in zip(found.arms, row.arms, strict=True)
  ]
  d = row.difference
  if d is not None:
    pairs += [
      ("variant − baseline, mean", row.show(d.mean_difference, "+")),
      ("smallest effect that matters", row.show(claim.min_effect)),
      ("smallest detectable effect, 80 % power", row.show(d.mde)),
      ("noise floor: sd over seeds in an arm", row.show(d.noise_floor)),
    ]
  unigram = next((r for r in found.rows if r.key == "unigram_bpb"), None)
  if d is None and unigram and claim.metric == "val/bpb":
    pairs.append(("unigram model", row.show(unigram.arms[0].mean)))
  return facts(pairs)


def _results(found: Findings) -> str:
  head = ["", *(arm.name for arm in found.arms)]
  head += ["variant − baseline"] if found.compares else []
  key = next((i for i, row in enumerate(found.rows) if row.key == found.claim.metric), None)
  cells = [
    [escape(row.label), *map(_cell, row.cells())]
    + ([_cell(row.difference_cell())] if found.compares else [])
    for row in found.rows
  ]
  d = found.headline.difference if found.headline else None
  plot = text = ""
  if d is not None and d.n:
    plot = _figure("differences", _differences(found, d))
    rho = f"{d.correlation:.2f}" if math.isfinite(d.correlation) else "not defined"
    text = (
      f'<p class="note">Correlation of the arms over seeds {rho}; exact sign-flip p = '
      f"{d.p_sign_flip:.3g} (with {counted(d.n, 'pair')} it is at least "
      f"{2.0 ** (1 - d.n):.3g}).</p>"
    )
  note = "Mean over seeds ± half of the 95 % Student interval"
  note += "; differences are paired by seed." if found.compares else "."
  return section("Results", table(head, cells, key=key) if cells else "", plot, text, note=note)


def _sweep(found: Findings) -> str:
  """Rates against loss, and what the judge says of each group."""
  e = found.experiment
  return section(
    "Sweep",
    _figure("sweep", sweep.figure(e)),
    table(sweep.HEAD[:-1], _escaped(row[:-1] for row in sweep.group_rows(e)), left=2),
    definitions([(row[0], row[-1]) for row in sweep.group_rows(e) if row[-1]]),
    _figure("shifts", sweep.shifts(e)),
    facts(sweep.budget_pairs(e)),
    table(sweep.HEALTH_HEAD, _escaped(sweep.health_rows(e)), left=1),
    note="A color a scale, a parabola a seed, its optimum a diamond, later seeds faint; off and "
    "embed_only are controls at the largest scale. Shift: of the optimum from base to the largest "
    "scale; regret: of the base's optimum there; both with 95 % intervals over seeds, the limit "
    "dashed. The last table has what else may differ between scales, mean over the joint points.",
  ) + section(
    "Coordinate check",
    _figure("coords", sweep.coords_figure(e)),
    note="Slope of each tensor's effect, log2 against log2 of the width or the depth, with 95 % "
    "intervals over seeds: near 0 under a right rule, -1/2 for what an output starts at.",
  )


def _mixtures(found: Findings) -> str:
  e = found.experiment
  return section(
    "Mixtures",
    _figure("mixtures", mixtures.figure(e)),
    facts(mixtures.facts(e)),
    table(mixtures.PROOF_HEAD, _escaped(mixtures.proof_rows(e)), left=1),
    table(mixtures.MODEL_HEAD, _escaped(mixtures.model_rows(e)), left=1),
    table(mixtures.head(e), _escaped(mixtures.rows(e)), left=1),
    note="Skill: 1 − RMSE² / variance of what a model says of mixtures that it was not fitted to. "
    "The lower the objective, the better.",
  )


def _cell(cell: Cell) -> str:
  aside = f' <i class="pm">{escape(cell.aside)}</i>' if cell.aside else ""
  return f"{escape(cell.number)}{aside}"


def _differences(found: Findings, d: Paired) -> Figure:
  claim = found.claim
  values = [
    dict(zip((r.seed for r in a.runs), a.values(claim.metric), strict=True)) for a in found.arms
  ]
  seeds = [s for s in found.seeds if all(math.isfinite(v[s]) for v in values)]
  measure = measure_of(claim.metric)
  title = f"{measure.label}: variant − baseline"
  return figures.differences(d, seeds, title, claim.direction, claim.min_effect, measure.factor)


def _curves(found: Findings) -> str:
  panels = (("train/loss", "training loss"), ("val/bpb", "held-out bits per byte"))
  optimizer = (("lr/dense", "dense learning rate"), ("grad_norm/all", "gradient norm"))
  return section(
    "Training",
    _figure("loss", figures.curves(found.arms, panels, skip=0.05)),
    _figure("optimizer", figures.curves(found.arms, optimizer)),
    note="Line: mean over seeds. Band: smallest to largest seed. The first 5 % of tokens may leave "
    "the top of the loss panels.",
  )


def _evaluations(found: Findings, root: Path) -> str:
  """Downstream tasks: curves of what runs measured on their way, and a table a suite."""
  try:
    suites = answers(root, found.arms)
  except RecordError as error:
    return section("Evaluations", f'<p class="note">{escape(str(error))}</p>')
  parts = []
  for suite in suites:
    panels = [(f"eval/{suite.suite}/{m}", f"{suite.suite}, {label}") for m, label in PANELS]
    parts.append(_figure(f"evaluations-{suite.suite}", figures.curves(found.arms, panels)))
    rows = [[row.task, *row.cells()] for row in suite.rows]
    parts.append(table(suite.head(found.arms), _escaped(rows), left=2))
    parts.append(f"<p class=note>{escape(suite.suite)}: {counted(suite.seeds, 'seed')}.</p>")
  return section("Evaluations", *parts, note=f"Mean over documents and seeds; {NOTE}.")


def _routing(found: Findings) -> str:
  head = ("arm", "layer", "max / mean", "5th pct.", "95th pct.", "dead", "entropy", "bias range")
  rows = details.load_rows(found)
  return section(
    "Expert load",
    _figure("load", figures.load_heatmap(found.arms)),
    table(head, _escaped(rows), left=2) if rows else "",
    note="How evenly tokens spread over experts: 1 is perfect balance. The table is the last "
    "logged step, mean over seeds; percentiles are of the load over its mean, dead is below 1 % "
    "of it, entropy is 1 when balanced.",
  )


def _escaped(rows: Iterable[Iterable[str]]) -> list[list[str]]:
  return [list(map(escape, row)) for row in rows]


def _flight(found: Findings) -> str:
  head = ("arm", "operand", "where its SQNR is lowest", "SQNR, dB", "of one expert, dB")
  head += ("saturated, %", "scales lost, %")
  rows = details.flight_rows(found)
  return section(
    "Quantization",
    _figure("flight", figures.flight_heatmap(found.arms)),
    table(head, _escaped(rows), left=3) if rows else "",
    note="Signal over quantization noise of every operand of the block-scaled products at the last "
    "measured step, mean over seeds. The table has the worst place of each operand: its lowest "
    "ratio, the lowest of a single expert in any layer, the largest share of elements beyond "
    "their block's largest value, and of blocks whose scale fell below its format.",
  )


def _cost(found: Findings) -> str:
  return section("Time of a step", _figure("phases", figures.phases(found.arms)))


def _configuration(found: Findings) -> str:
  changes = _changes(found.arms) if len(found.arms) == 2 else ""
  shown = found.arms if len(found.arms) <= details.FEW else found.arms[:1]
  texts = [folded(f"Resolved configuration of {a.name}", a.runs[0].toml) for a in shown]
  more = len(found.arms) - len(shown)
  note = (
    f"Those of {counted(more, 'more arm')} lie beside this page, each as NAME.toml." if more else ""
  )
  return section("Configuration", changes, *texts, note=note)


def _changes(arms: Sequence[Arm]) -> str:
  """The keys that differ between two arms."""
  try:
    rows = details.changes(arms)
  except ConfigError as error:
    return f'<p class="note">Not comparable by this version of nmoe: {escape(str(error))}</p>'
  code = [[*(f"<code>{escape(text)}</code>" for text in row[:3]), row[3]] for row in rows]
  return table(["key", *(arm.name for arm in arms), "changes"], code, left=4)


def _runs(found: Findings) -> str:
  e, metric = found.experiment, found.claim.metric
  head = ("run", "arm", "seed", "status", metric, "tokens/s")
  rows = [
    [
      f"<code>{escape(run.id)}</code>",
      escape(run.arm),
      str(run.seed),
      escape(run.status + (f", run for {run.origin}" if run.origin != e.id else "")),
      *(measure_of(tag).show(run.results.get(tag, math.nan)) for tag in (metric, SPEED)),
    ]
    for run in found.runs
  ]
  notes = [(run.id, run.error) for run in found.runs if run.error]
  notes += [(f"{x.run_id} step {x.step}", f"exported to {x.path}") for x in found.exports]
  notes += [(f"{link.from_id} {link.relation} {link.to_id}", link.note) for link in found.links]
  return section("Runs", table(head, rows, left=4), definitions(notes) if notes else "")


def _provenance(found: Findings, folder: Path) -> str:
  if not found.runs:
    return ""
  first = found.runs[0]
  patch = folded("Uncommitted changes", first.diff) if first.diff else ""
  repeat = section("Reproduce", f"<pre>{escape(details.commands(found, folder))}</pre>")
  return repeat + section("Provenance", definitions(details.provenance(found)), patch)


def _figure(name: str, figure: Figure | None) -> str:
  return figure.html(name) if figure else ""
