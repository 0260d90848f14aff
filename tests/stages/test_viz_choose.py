"""Columns and panels are chosen from what there is, by keyboard; the address has them."""

import duckdb
import pytest
from pages import STEPS

from nmoe.records.root import Root

pytestmark = pytest.mark.browser
ROWS = "[...document.querySelectorAll('tbody tr')]"


def type_in(page, words):
  for key in words:
    page.press(key)


def cells(page, head):
  """The column of this head, from the top: texts."""
  find = f"[...document.querySelectorAll('th')].findIndex(h => h.title == {head!r})"
  return page.ask(f"(i => {ROWS}.map(r => r.cells[i].innerText))({find})")


def last(root, run, tag):
  """The last value that a run logged of a tag."""
  sql = "SELECT value FROM metrics WHERE tag = ? ORDER BY step DESC LIMIT 1"
  with duckdb.connect(str(Root(root).metrics(run, 0)), read_only=True) as db:
    return db.execute(sql, [tag]).fetchone()[0]


def tags(root, runs):
  found = set()
  for run in runs:
    with duckdb.connect(str(Root(root).metrics(run, 0)), read_only=True) as db:
      found |= {tag for (tag,) in db.execute("SELECT DISTINCT tag FROM metrics").fetchall()}
  return found


def test_a_column_of_a_key_that_differs_is_chosen_sorted_and_filtered_by_keyboard(
  page, served, made
):
  page.open(served + "/?f=rate-1")
  page.wait(f"{ROWS}.length == 6")
  page.press("o")
  page.wait("document.querySelector('dialog[open] summary')")
  offered = "[...document.querySelectorAll('dialog[open] details:first-of-type label .mono')]"
  assert page.ask(f"{offered}.map(e => e.innerText)") == ["optim.dense_lr"], "all else is the same"
  type_in(page, "dense_lr")
  page.press("Enter")
  page.wait("location.search.includes('optim.dense_lr')")
  page.press("Escape")
  page.wait("!document.querySelector('dialog[open]')")
  assert sorted(cells(page, "optim.dense_lr")) == ["0.003"] * 3 + ["0.005"] * 3
  page.ask("[...document.querySelectorAll('th')].find(h => /dense_lr/.test(h.innerText)).focus()")
  page.press("Enter")
  page.wait("location.search.includes('sort=optim.dense_lr')")
  assert cells(page, "optim.dense_lr") == ["0.003"] * 3 + ["0.005"] * 3
  page.press("Enter")
  page.wait("location.search.includes('sort=-optim.dense_lr')")
  seen = cells(page, "optim.dense_lr"), cells(page, "val/bpb")
  assert seen[0] == ["0.005"] * 3 + ["0.003"] * 3
  page.open(page.ask("location.href"))
  page.wait(f"{ROWS}.length == 6 && document.querySelectorAll('th').length == 12")
  assert (cells(page, "optim.dense_lr"), cells(page, "val/bpb")) == seen
  page.ask(f"{ROWS}[0].querySelector('button.plain').click()")
  page.wait(f"{ROWS}.length == 3")
  assert page.ask("document.querySelector('input.filter').value") == "rate-1 optim.dense_lr=0.005"
  assert cells(page, "optim.dense_lr") == ["0.005"] * 3 and page.errors == []


def test_a_column_of_a_tag_has_its_last_values_and_sorts_and_filters(page, served, made):
  root, ids = made
  tag = "moe/1/load_max_over_mean"
  known = {run: last(root, run, tag) for run in ids.values()}
  page.open(f"{served}/?f=rate-1&cols={tag}&sort=-{tag}")
  found = f"{ROWS}.map(r => [r.cells[1].innerText, +r.cells[6].innerText])"
  page.wait(f"{found}.every(([, v]) => v > 0)")
  page.wait(f"{found}.every(([, v], i, all) => !i || v <= all[i - 1][1])")
  for run, value in page.ask(found):
    assert value == pytest.approx(known[run], rel=1e-3)
  low, middle, _ = sorted(set(known.values()))
  page.open(f"{served}/?f=rate-1 load_max_over_mean>{(low + middle) / 2:.6f}&cols={tag}")
  above = {run for run, value in known.items() if value >= middle}
  page.wait(f"{ROWS}.length == {len(above)} && {found}.every(([, v]) => v > 0)")
  assert {run for run, _ in page.ask(found)} == above


def test_every_tag_of_the_selected_runs_is_offered_as_a_panel(page, served, made):
  root, ids = made
  run = ids["variant", 1]
  page.open(f"{served}/?sel={run}&x=step")
  page.wait("document.querySelectorAll('.panel canvas').length == 6")
  page.press("p")
  boxes = "[...document.querySelectorAll('dialog[open] input[type=checkbox]')]"
  page.wait(f"{boxes}.length > 6")
  assert set(page.ask(f"{boxes}.map(b => b.value)")) == tags(root, [run])
  groups = page.ask("[...document.querySelectorAll('dialog[open] summary')].map(s => s.innerText)")
  assert [g.split()[0] for g in groups] == sorted({t.split("/")[0] for t in tags(root, [run])})
  type_in(page, "moe/2 entropy")
  page.press("Enter")
  page.wait("location.search.includes('moe/2/entropy')")
  page.press("ArrowDown")
  page.press("ArrowUp")
  page.press("Escape")
  page.wait("document.querySelectorAll('.panel canvas').length == 7")
  page.wait(f"[...document.querySelectorAll('.panel')].at(-1).dataset.last == '{STEPS[-1]}'")
  page.press("p")
  page.ask(
    "[...document.querySelectorAll('dialog[open] button')]"
    ".find(b => /usual/.test(b.innerText)).click()"
  )
  page.wait("!location.search.includes('tags=')")
  assert page.errors == []


def test_keys_of_the_page_are_not_pressed_behind_the_list(page, served, made):
  page.open(served + "/?f=rate-1")
  page.wait(f"{ROWS}.length == 6")
  before = page.ask("location.search")
  page.press("o")
  page.wait("document.querySelector('dialog[open] input[type=checkbox]')")
  page.press("ArrowDown")
  type_in(page, "nxjc")
  assert page.ask("location.pathname + location.search") == "/" + before
