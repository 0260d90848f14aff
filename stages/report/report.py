"""The report of an experiment: an HTML page that loads nothing; the same numbers in the terminal.

Everything is read from the databases; a report of a running experiment shows what there is so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nmoe.config import file as configs
from nmoe.errors import ConfigError, RecordError
from nmoe.records import metrics
from nmoe.records.measures import MEASURES, Measure
from nmoe.records.reader import Experiment, Link, Reader, Run
from nmoe.records.root import Root
from stages.judge.statistics import Paired, Single, paired, single, time_to_loss
from stages.report import figures
from stages.report.figures import Arm
from stages.report.page import definitions, facts, folded, page, section, table

RESULTS = {  # the measures, and what a report adds to them
  "val/bpb": MEASURES["val/bpb"],
  "unigram_bpb": Measure("bits per byte of a unigram model", ".4f", "lower"),
  "val/loss": MEASURES["val/loss"],
  "to_baseline": Measure("tokens to the baseline's final loss", ",.0f", "lower"),
} | MEASURES
HEALTH = ("load_max_over_mean", "load_p05", "load_p95", "dead", "entropy", "bias_range")
BADGES = {"confirmed": "green", "refuted": "red", "inconclusive": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Row:
  """One result of every arm, and the variant's paired difference where there are two arms."""

  key: str
  label: str
  arms: tuple[Single, ...]
  difference: Paired | None


@dataclass(frozen=True)
class Findings:
  """What the databases hold about an experiment."""

  experiment: Experiment
  arms: tuple[Arm, ...]
  links: tuple[Link, ...]
  rows: tuple[Row, ...]
  seeds: tuple[int, ...]  # that both arms of a pair have

  @property
  def runs(self) -> list[Run]:
    return [run for arm in self.arms for run in arm.runs]

  @property
  def headline(self) -> Row | None:
    """The row of the hypothesis' metric."""
    return next((row for row in self.rows if row.key == self.experiment.headline.metric), None)

  @property
  def verdict(self) -> str:
    return self.experiment.verdict or self.experiment.status

  @property
  def reason(self) -> str:
    return self.experiment.conclusion.get("reason", "There is no conclusion yet.")


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
      (folder / f"{arm.name}.toml").write_text(arm.runs[0].toml, encoding="utf-8")
    if found.runs and found.runs[0].diff:
      (folder / "changes.patch").write_text(found.runs[0].diff, encoding="utf-8")
    beside = folder / "index.html.new"
    beside.write_text(render(found, folder), encoding="utf-8")
    return beside.rename(folder / "index.html")
  except OSError as error:
    raise RecordError(
      f"{folder}: the report cannot be written ({error.strerror}); free space or set run.root"
    ) from error


def gather(root: Path, name: str) -> Findings:
  """Read an experiment, its newest run of every arm and seed, and what they logged."""
  records = Reader(root)
  experiment = records.find(name)
  newest: dict[str, dict[int, Run]] = {}
  for run in records.runs(experiment.id):
    newest.setdefault(run.arm, {})[run.seed] = run
  arms = []
  for arm, by_seed in newest.items():
    runs = tuple(by_seed[seed] for seed in sorted(by_seed))
    arms.append(Arm(arm, runs, tuple(metrics.read(root, run.id) for run in runs)))
  links = tuple(records.links(experiment.id))
  records.close()
  seeds = tuple(sorted(set.intersection(*map(set, newest.values())))) if newest else ()
  rows = tuple(row for key in RESULTS if (row := _row(key, arms, seeds)))
  return Findings(experiment, tuple(arms), links, rows, seeds)


def _row(key: str, arms: Sequence[Arm], seeds: Sequence[int]) -> Row | None:
  """A result over seeds, or None where no run has it."""
  values = [_to_baseline(arm, arms) if key == "to_baseline" else arm.values(key) for arm in arms]
  if not any(math.isfinite(v) for arm in values for v in arm):
    return None
  difference = None
  if len(arms) == 2 and seeds:
    a, b = (
      [dict(zip((r.seed for r in arm.runs), of, strict=True))[seed] for seed in seeds]
      for arm, of in zip(arms, values, strict=True)
    )
    difference = paired(a, b, direction="none", min_effect=0.0)
  return Row(key, RESULTS[key].label, tuple(map(single, values)), difference)


def _to_baseline(arm: Arm, arms: Sequence[Arm]) -> list[float]:
  """Tokens at which each run's held-out loss reaches the mean final one of the first arm."""
  target = single(arms[0].values("val/loss")).mean
  if len(arms) < 2 or not math.isfinite(target):
    return [math.nan] * len(arm.runs)
  curves = [logged.get("val/loss") for logged in arm.logged]
  return [time_to_loss(c[1], c[2], target) if c and len(c[0]) > 1 else math.nan for c in curves]


def render(found: Findings, folder: Path) -> str:
  """The page."""
  sections = (
    _head(found),
    _results(found),
    _curves(found),
    _routing(found),
    _flight(found),
    _cost(found),
    _configuration(found),
    _runs(found),
    _provenance(found, folder),
  )
  return page(f"{found.experiment.id}: {found.verdict}", sections, get_plotlyjs())


def _head(found: Findings) -> str:
  e = found.experiment
  kind = {"ablate": "Paired ablation", "research": "Architecture research"}.get(e.stage, e.stage)
  seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) != 1 else ''}"
  eyebrow = f"{kind} · {e.id} · {seeds} · {e.created[:10]}"
  return (
    f'<div class="eyebrow">{escape(eyebrow)}</div><h1>{escape(e.headline.statement)}</h1>'
    f'<div class="verdict"><span class="badge {escape(found.verdict)}">'
    f"{escape(found.verdict.capitalize())}</span><p>{escape(found.reason)}</p></div>"
    f"{_facts(found)}"
  )


def _facts(found: Findings) -> str:
  e, row = found.experiment, found.headline
  if row is None:
    return ""
  pairs = [
    (f"{arm.name}, {e.headline.metric}", _show(row.key, one.mean))
    for arm, one in _named(found, row)
  ]
  d = row.difference
  if d is not None:
    pairs += [
      ("variant − baseline, mean", _show(row.key, d.mean_difference, "+")),
      ("smallest effect that matters", _show(row.key, e.headline.min_effect)),
      ("smallest detectable effect, 80 % power", _show(row.key, d.mde)),
      ("noise floor: sd over seeds in an arm", _show(row.key, d.noise_floor)),
    ]
  unigram = next((r for r in found.rows if r.key == "unigram_bpb"), None)
  if d is None and unigram and e.headline.metric == "val/bpb":
    pairs.append(("unigram model", _show(row.key, unigram.arms[0].mean)))
  return facts(pairs)


def _named(found: Findings, row: Row) -> list[tuple[Arm, Single]]:
  return list(zip(found.arms, row.arms, strict=True))


def _results(found: Findings) -> str:
  e = found.experiment
  compare = any(row.difference for row in found.rows)
  head = ["", *(arm.name for arm in found.arms), *(["variant − baseline"] if compare else [])]
  key = next((i for i, row in enumerate(found.rows) if row.key == e.headline.metric), None)
  cells = [
    [escape(row.label), *(_plus_minus(row.key, one) for one in row.arms)]
    + ([_interval(row.key, row.difference)] if compare else [])
    for row in found.rows
  ]
  d = found.headline.difference if found.headline else None
  plot = text = ""
  if d is not None and d.n:
    plot = _figure("differences", _differences(found, d))
    rho = f"{d.correlation:.2f}" if math.isfinite(d.correlation) else "not defined"
    text = (
      f'<p class="note">Correlation of the arms over seeds {rho}; exact sign-flip p = '
      f"{d.p_sign_flip:.3g} (with {d.n} pairs it is at least {2.0 ** (1 - d.n):.3g}).</p>"
    )
  note = "Mean over seeds ± half of the 95 % Student interval"
  note += "; differences are paired by seed." if compare else "."
  return section("Results", table(head, cells, key=key) if cells else "", plot, text, note=note)


def _differences(found: Findings, d: Paired) -> go.Figure:
  e = found.experiment
  values = [
    dict(zip((r.seed for r in a.runs), a.values(e.headline.metric), strict=True))
    for a in found.arms
  ]
  seeds = [s for s in found.seeds if all(math.isfinite(v[s]) for v in values)]
  measure = RESULTS[e.headline.metric]
  title = f"{measure.label}: variant − baseline"
  return figures.differences(
    d, seeds, title, e.headline.direction, e.headline.min_effect, measure.factor
  )


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


def _routing(found: Findings) -> str:
  head = ("arm", "layer", "max / mean", "5th pct.", "95th pct.", "dead", "entropy", "bias range")
  rows = []
  for arm in found.arms:
    for layer in arm.layers():
      ends = [[y[-1] for _, y in arm.series(f"moe/{layer}/{name}")] for name in HEALTH]
      if all(ends):
        cells = [f"{sum(end) / len(end):.3f}" for end in ends]
        rows.append([escape(arm.name), str(layer), *cells])
  return section(
    "Expert load",
    _figure("load", figures.load_heatmap(found.arms)),
    table(head, rows, left=2) if rows else "",
    note="How evenly tokens spread over experts: 1 is perfect balance. The table is the last "
    "logged step, mean over seeds; percentiles are of the load over its mean, dead is below 1 % "
    "of it, entropy is 1 when balanced.",
  )


def _flight(found: Findings) -> str:
  head = ("arm", "operand", "where its SQNR is lowest", "SQNR, dB", "of one expert, dB")
  head += ("saturated, %", "scales lost, %")
  rows = [row for arm in found.arms for row in _flight_rows(arm)]
  return section(
    "Quantization",
    _figure("flight", figures.flight_heatmap(found.arms)),
    table(head, rows, left=3) if rows else "",
    note="Signal over quantization noise of every operand of the block-scaled products at the last "
    "measured step, mean over seeds. The table has the worst place of each operand: its lowest "
    "ratio, the lowest of a single expert in any layer, the largest share of elements beyond "
    "their block's largest value, and of blocks whose scale fell below its format.",
  )


def _flight_rows(arm: Arm) -> list[list[str]]:
  """One line per kind of operand."""
  kinds = ("sqnr_db", "sqnr_db_min", "saturated", "underflow")
  logged = [arm.flight(kind) for kind in kinds]
  rows = []
  for leg, label in figures.LEGS.items():
    ratio, expert, saturated, lost = (
      {place: v for place, v in values.items() if place[2] == leg and math.isfinite(v)}
      for values in logged
    )
    if ratio:
      layer, product, _ = worst = min(ratio, key=ratio.get)
      least = f"{min(expert.values()):.1f}" if expert else "—"
      shares = [f"{100 * max(share.values()):.3g}" for share in (saturated, lost)]
      where = f"layer {layer} {product}"
      rows.append([escape(arm.name), label, escape(where), f"{ratio[worst]:.1f}", least, *shares])
  return rows


def _cost(found: Findings) -> str:
  return section("Time of a step", _figure("phases", figures.phases(found.arms)))


def _configuration(found: Findings) -> str:
  changes = _changes(found.arms) if len(found.arms) == 2 else ""
  texts = [folded(f"Resolved configuration of {a.name}", a.runs[0].toml) for a in found.arms]
  return section("Configuration", changes, *texts)


def _changes(arms: Sequence[Arm]) -> str:
  """The keys that differ between two arms."""
  try:
    parsed = [configs.loads(arm.runs[0].toml, arm.name) for arm in arms]
  except ConfigError as error:
    return f'<p class="note">Not comparable by this version of nmoe: {escape(str(error))}</p>'
  rows = [
    [*(f"<code>{escape(text)}</code>" for text in (key, repr(a), repr(b))), configs.kind(key)]
    for key, (a, b) in configs.diff(*parsed).items()
    if not key.startswith("experiment.")
  ]
  return table(["key", *(arm.name for arm in arms), "changes"], rows, left=4)


def _runs(found: Findings) -> str:
  metric = found.experiment.headline.metric
  head = ("run", "arm", "seed", "status", metric, "tokens/s")
  rows = [
    [
      f"<code>{escape(run.id)}</code>",
      escape(run.arm),
      str(run.seed),
      escape(run.status),
      _show(metric, run.results.get(metric, math.nan)),
      _show("train/tokens_per_s", run.results.get("train/tokens_per_s", math.nan)),
    ]
    for run in found.runs
  ]
  notes = [(run.id, run.error) for run in found.runs if run.error]
  notes += [(f"{link.from_id} {link.relation} {link.to_id}", link.note) for link in found.links]
  return section("Runs", table(head, rows, left=4), definitions(notes) if notes else "")


def _provenance(found: Findings, folder: Path) -> str:
  if not found.runs:
    return ""
  runs = found.runs
  first = runs[0]
  pairs = [
    ("commit", _distinct((run.commit or "not a git checkout") for run in runs)),
    ("changes on top", "none" if not first.diff else f"{first.diff.count(chr(10))} lines of diff"),
    ("code version", _distinct(run.code_version for run in runs)),
    ("target", _distinct(run.target for run in runs)),
    ("data digest", _distinct(run.data_digest for run in runs)),
    *((f"fingerprint, {a.name}", _distinct(r.fingerprint for r in a.runs)) for a in found.arms),
    ("host", _distinct(run.host for run in runs)),
    *sorted((name, str(value)) for name, value in first.environment.items()),
  ]
  patch = folded("Uncommitted changes", first.diff) if first.diff else ""
  return (
    section("Reproduce", f"<pre>{escape(_command(found, folder))}</pre>")
    + section("Provenance", definitions(pairs), patch)
  )  # fmt: skip


def _distinct(values) -> str:
  return ", ".join(dict.fromkeys(values))


def _command(found: Findings, folder: Path) -> str:
  """The shell lines that repeat the experiment from the TOMLs beside the report."""
  first = found.runs[0]
  lines = [f"git checkout {first.commit}"] if first.commit else []
  lines += [f"git apply {folder / 'changes.patch'}"] if first.diff else []
  e, own = found.experiment, {"ablate": "ablate", "research": "research run"}
  repeats = any((link.from_id, link.relation) == (e.id, "repeats") for link in found.links)
  if e.stage in own and not repeats:  # what checks and benches add stands in no configuration
    files = [str(folder / f"{arm.name}.toml") for arm in found.arms]
    seeds = f"--seeds {max(len(arm.runs) for arm in found.arms)}"
    lines.append(" \\\n  ".join([f"nmoe {own[e.stage]}", *files, seeds]))
  lines.append(f"# one run of it:\nnmoe rerun {first.id} --root {folder.parent.parent}")
  return "\n".join(lines)


def _figure(name: str, figure: go.Figure | None) -> str:
  """A plot's place and its data; plotly.js itself is in the page's head, once."""
  if figure is None:
    return ""
  config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
  drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
  return f'<div class="figure">{drawn}</div>'


def _show(key: str, value: float, sign: str = "") -> str:
  """A result in its unit; a loss that is not reached is "never"."""
  return "never" if key == "to_baseline" and value == math.inf else RESULTS[key].show(value, sign)


def _plus_minus(key: str, one: Single) -> str:
  half = one.high - one.mean
  spread = f' <i class="pm">± {_show(key, half)}</i>' if half and math.isfinite(half) else ""
  lost = (
    f' <i class="pm">({one.n} of {one.n + one.diverged} runs)</i>' if one.diverged and one.n else ""
  )
  return f"{_show(key, one.mean)}{spread}{lost}"


def _interval(key: str, d: Paired | None) -> str:
  if d is None or not d.n:
    return "—"
  bounds = ""
  if d.sd and math.isfinite(d.high):
    bounds = f' <i class="pm">[{_show(key, d.low, "+")}, {_show(key, d.high, "+")}]</i>'
  return f"{_show(key, d.mean_difference, '+')}{bounds}"


def terminal_summary(root: Path, experiment: str) -> Group:
  """The report's head and results as a rich renderable."""
  found = gather(root, experiment)
  e = found.experiment
  compare = any(row.difference for row in found.rows)
  grid = Table(title=Text(e.headline.statement, style="bold"), title_justify="left")
  grid.add_column("")
  for arm in found.arms:
    grid.add_column(arm.name, justify="right")
  if compare:
    grid.add_column("variant − baseline", justify="right")
  for row in found.rows:
    cells = [_plain(_plus_minus(row.key, one)) for one in row.arms]
    cells += [_plain(_interval(row.key, row.difference))] if compare else []
    grid.add_row(row.label, *cells, style="bold" if row.key == e.headline.metric else "")
  style = f"bold {BADGES.get(found.verdict, 'default')}"
  verdict = Text.assemble((found.verdict, style), ": ", found.reason)
  return Group(grid, verdict)


def _plain(cell: str) -> str:
  return cell.replace('<i class="pm">', "").replace("</i>", "")
