"""The bare page of a report: its style, and the few pieces of HTML that sections are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { --ink: #1c2127; --soft: #5f6873; --line: #e3e6ea; --faint: #edeff2; --tint: #f6f7f9;
  --accent: #1f5fbf; }
* { box-sizing: border-box; }
html { font: 15px/1.55 ui-sans-serif, system-ui, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink);
  background: #fff;
  -webkit-font-smoothing: antialiased; text-rendering: optimizeLegibility; }
body { max-width: 1080px; margin: 0 auto; padding: 56px 32px 96px; }
h1 { font-size: 30px; line-height: 1.22; font-weight: 650; letter-spacing: -0.018em;
  margin: 10px 0 22px;
  max-width: 28em; text-wrap: balance; }
h2 { font-size: 19px; font-weight: 650; letter-spacing: -0.01em; margin: 60px 0 6px; }
p { margin: 0 0 12px; max-width: 46em; }
.soft { color: var(--soft); }
.eyebrow { font-size: 12.5px; color: var(--soft); letter-spacing: 0.01em; }
.verdict { display: flex; gap: 16px; align-items: baseline; border-top: 1px solid var(--line);
  border-bottom: 1px solid var(--line); padding: 16px 0; }
.verdict p { margin: 0; max-width: none; font-variant-numeric: tabular-nums; }
.badge { font-size: 13px; font-weight: 650; padding: 3px 11px; border-radius: 999px;
  white-space: nowrap;
  color: var(--soft); background: var(--tint); box-shadow: inset 0 0 0 1px var(--line); }
.badge.confirmed { color: #0b6b46; background: #e9f7f0; box-shadow: inset 0 0 0 1px #b9e3d0; }
.badge.refuted, .badge.failed { color: #a32626; background: #fdeeee;
  box-shadow: inset 0 0 0 1px #f3c9c9; }
.badge.inconclusive { color: #8a5a00; background: #fdf4e0; box-shadow: inset 0 0 0 1px #efd9a7; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 20px 24px;
  margin: 26px 0 0; }
.facts div { font-size: 13px; color: var(--soft); }
.facts b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -0.015em;
  color: var(--ink);
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px;
  margin: 12px 0 8px; }
th { font-weight: 500; color: var(--soft); font-size: 12.5px; text-align: left;
  white-space: nowrap; }
th, td { padding: 7px 20px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; }
tr.key td { font-weight: 600; }
i.pm { font-style: normal; font-weight: 400; color: var(--soft); }
code, pre { font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--tint); border-radius: 6px; padding: 14px 16px; overflow-x: auto;
  margin: 10px 0; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 28px; font-size: 14px;
  margin: 12px 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.figure { margin: 14px 0 0; break-inside: avoid; }
.panels { display: grid; gap: 16px 28px; }
.panels > svg { display: block; width: 100%; height: auto; }
.figure text { font: 11.5px ui-sans-serif, system-ui, "Helvetica Neue", Arial, sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
.figure text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.plot polyline { fill: none; stroke-linejoin: round; }
.area { fill: none; pointer-events: all; }
.grid { stroke: var(--faint); fill: none; }
.axis, .tick { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; justify-content: flex-end;
  font-size: 12.5px; color: var(--soft); margin: 0 0 6px; }
.legend i { display: inline-block; vertical-align: middle; margin: 0 6px 2px 0; }
.legend .line { width: 18px; }
.legend .dot { width: 9px; height: 9px; border-radius: 9px; }
.legend .bar { width: 11px; height: 11px; border-radius: 2px; }
.legend .shades { width: 110px; height: 9px; border-radius: 2px; margin: 0 4px 2px; }
.note { font-size: 13px; color: var(--soft); margin: 8px 0 0; max-width: none; }
@media (max-width: 800px) { .panels { grid-template-columns: 1fr !important; } }
@media print { body { padding: 0; } h2 { break-after: avoid; } }
"""


def page(title: str, sections: Iterable[str], script: str) -> str:
  """A whole document that loads nothing: style and script are inside it. The script stands last, so
  that text and plots are painted before it is read.
  """
  body = "\n".join(section for section in sections if section)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<link rel="icon" href="data:,">'
    f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
    f"<body>{body}\n<script>{script}</script></body></html>\n"
  )


def section(title: str, *parts: str, note: str = "") -> str:
  """A heading, a sentence that says how to read what follows, and the parts; "" without parts."""
  if not any(parts):
    return ""
  text = f'<p class="soft">{escape(note)}</p>' if note else ""
  return f"<section><h2>{escape(title)}</h2>{text}{''.join(parts)}</section>"


def table(
  head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, key: int | None = None
) -> str:
  """Cells are HTML. The first `left` columns are text, the others numbers; row `key` stands out."""
  kinds = ["" if i < left else ' class="num"' for i in range(len(head))]
  mark = ' class="key"'
  lines = [
    f"<tr{mark if i == key else ''}>{_cells('td', row, kinds)}</tr>" for i, row in enumerate(rows)
  ]
  top = _cells("th", [escape(name) for name in head], kinds)
  return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _cells(tag: str, row: Sequence[str], kinds: Sequence[str]) -> str:
  pairs = zip(row, kinds, strict=True)
  return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in pairs)


def facts(pairs: Iterable[tuple[str, str]]) -> str:
  """Large numbers, each with its label."""
  items = "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for label, value in pairs)
  return f'<div class="facts">{items}</div>'


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
  """Terms and their text."""
  items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in pairs)
  return f"<dl>{items}</dl>"


def folded(summary: str, text: str) -> str:
  """Preformatted text behind a line that opens it."""
  return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
