"""Downstream suites: boundaries, fixed shapes, bits, and measures against their definitions."""

from __future__ import annotations

import hashlib
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from nmoe.config.file import changed
from nmoe.data.tokenizer import get
from nmoe.distributed.parallel import Parallel
from nmoe.errors import ConfigError, DataError
from nmoe.evals import scoring
from nmoe.evals.downstream import Downstream
from nmoe.evals.measure import items_of, per_document, read_items, summary, write_items
from nmoe.evals.requests import Document, digest, read_manifest, read_task, rows_of
from nmoe.evals.scoring import NARROWEST, POSITIONS, batches, nats_of, score, width_of
from nmoe.evals.sources import prepare
from nmoe.evals.suites import Suite
from nmoe.model.decoder import Model

WORDS = "the cat sat on a mat while seven dogs sang of rain and gold".split()


def lines(task="pets", count=30, choices=3, longest=30):
  """Items of made-up words, some of them long."""
  chance = random.Random(task)
  for i in range(count):
    context = " ".join(chance.choices(WORDS, k=chance.randint(3, longest)))
    answers = [
      " " + " ".join(chance.choices(WORDS, k=chance.randint(1, 4))) for _ in range(choices)
    ]
    item = {"task": task, "name": f"n{i}", "context": context, "choices": answers}
    yield json.dumps(item | {"gold": i % choices})


def prepared(folder, *texts):
  source = folder / "items.jsonl"
  source.write_text("\n".join(line for text in texts for line in text) + "\n")
  return prepare(source, folder / "root")


@pytest.fixture
def config(lab):
  short = {"schedule.warmup_tokens": 0, "schedule.decay_tokens": 0}
  return changed(lab.config, short | {"data.seq_len": 256, "schedule.batch_tokens": 2048})


@pytest.fixture
def model(config):
  made = Model(config, reference)
  made.init_weights(3)
  return made


def downstream(folder, config, tasks=("pets",), limit=0, tokenizer="byte"):
  suite = Suite("mine", tuple(tasks), limit)
  return Downstream(suite, folder / "root" / "evals", config, get(tokenizer))


def test_a_choice_is_scored_as_float64_says(tmp_path, config, model):
  """Nats and greedy hits against the whole logits, one request at a time, unpadded."""
  prepared(tmp_path, lines(count=8))
  suite = downstream(tmp_path, config)
  items = suite.run(model, Parallel()).items["pets"]
  for row, nats, hit in zip(suite.rows["pets"], items.nats, items.hit, strict=True):
    ids = torch.from_numpy(row.ids).long()
    with torch.no_grad():
      logits = model.logits(ids[None, :-1])[0].double()
    at = torch.arange(row.start - 1, len(ids) - 1)
    log_p = logits[at].log_softmax(-1)
    wanted = -log_p.gather(1, ids[row.start :, None]).sum()
    assert nats == pytest.approx(float(wanted), rel=2e-6)
    assert hit == bool((log_p.argmax(-1) == ids[row.start :]).all())


def test_the_same_bits_in_any_order_and_number_of_items(tmp_path, config, model):
  texts = list(lines(count=40))
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  first = prepared(tmp_path / "a", texts)
  random.Random(1).shuffle(texts)
  assert prepared(tmp_path / "b", texts).name != ""  # another file, the same items
  a = downstream(tmp_path / "a", config).run(model, Parallel()).items["pets"]
  b = downstream(tmp_path / "b", config).run(model, Parallel()).items["pets"]
  assert np.array_equal(a.nats, b.nats)
  few = downstream(tmp_path / "a", config, limit=20)
  part = few.run(model, Parallel()).items["pets"]
  assert len(part.nats) == 60 and np.array_equal(part.nats, a.nats[:60])
  assert few.digest != downstream(tmp_path / "a", config).digest
  assert first.is_dir()


def test_another_width_moves_a_choice_by_rounding_alone(tmp_path, config, model, monkeypatch):
  """The widths that rows are padded to are no part of what is measured: 1e-4 nats at most."""
  prepared(tmp_path, lines(count=20, longest=12))
  narrow = downstream(tmp_path, config)
  found = narrow.run(model, Parallel()).items["pets"].nats
  monkeypatch.setattr(scoring, "NARROWEST", 256)
  wide = downstream(tmp_path, config)
  assert {b.tokens.shape[1] for b in narrow._batches} == {128}
  assert {b.tokens.shape[1] for b in wide._batches} == {256}
  assert np.abs(wide.run(model, Parallel()).items["pets"].nats - found).max() < 1e-4


class Rank:
  """One of several ranks, whose sums the test adds up."""

  def __init__(self, rank, ranks, sums):
    self.rank, self.ranks, self.sums = rank, ranks, sums

  def sum(self, x):
    self.sums.append(x.clone())
    return x


def test_the_same_bits_for_any_number_of_ranks(tmp_path, config, model):
  prepared(tmp_path, lines(count=40), lines("tales", count=7, longest=38))
  suite = downstream(tmp_path, config, tasks=("pets", "tales"))
  alone = score(model, Parallel(), suite._batches, suite._total)
  for ranks in (2, 4):
    sums = []
    for rank in range(ranks):
      score(model, Rank(rank, ranks, sums), suite._batches, suite._total)
    assert np.array_equal(sum(sums).numpy()[0], alone[0])


def test_every_rank_runs_as_many_batches_of_each_shape(tmp_path, config):
  prepared(tmp_path, lines(count=40), lines("tales", count=7, longest=38))
  suite = downstream(tmp_path, config, tasks=("pets", "tales"))
  shapes = []

  class Counting:
    head_weight = torch.zeros(257, 4)

    def hidden(self, tokens):
      shapes[-1].append(tuple(tokens.shape))
      return torch.zeros(*tokens.shape, 4), [], []

  for rank in range(3):
    shapes.append([])
    score(Counting(), Rank(rank, 3, []), suite._batches, suite._total)
  assert shapes[0] == shapes[1] == shapes[2]
  assert {size * width for size, width in shapes[0]} == {config.rank_tokens}
  assert {width for _, width in shapes[0]} == {128, 256}


def test_a_model_that_knows_nothing_is_at_chance(tmp_path, config):
  """Uniform logits: bits per byte are tokens · log2 V / bytes, probabilities 1 / choices."""
  prepared(tmp_path, lines(count=30, choices=4))
  suite = downstream(tmp_path, config)

  class Uniform:
    head_weight = torch.zeros(257, 4)

    def hidden(self, tokens):
      return torch.ones(*tokens.shape, 4), [], []

  items = suite.run(Uniform(), Parallel()).items["pets"]
  found = per_document(items)
  assert found["bpb"] == pytest.approx(np.full(30, math.log2(257)), rel=1e-6)  # a byte a token
  assert found["p_correct"] == pytest.approx(np.full(30, 0.25), rel=1e-5)
  shortest = [
    int(np.argmin([len(a) for a in d.answers])) == d.gold for d in suite.documents["pets"]
  ]
  assert found["acc"].tolist() == [float(x) for x in shortest]


def test_measures_by_hand():
  documents = [
    Document("a", ("q",) * 2, (" yes", " é"), 0),
    Document("b", ("q",) * 3, ("x", "yy", "zz"), 2),
  ]
  nats = np.array([2.0, 1.5, 3.0, 4.0, 4.0])
  found = per_document(items_of(documents, nats, np.ones(5, int), np.zeros(5, bool)))
  assert found["bpb"].tolist() == pytest.approx([2 / 4 / math.log(2), 4 / 2 / math.log(2)])
  assert found["acc"].tolist() == [0, 0]  # 1.5 < 2; the first of equal ones is taken
  assert found["acc_char"].tolist() == [1, 0]  # 0.5 < 0.75; 2 of yy comes first
  assert found["acc_byte"].tolist() == [1, 0]  # 2 / 4 = 1.5 / 3: the first wins
  tokens = np.array([2, 1, 3, 4, 2])
  per_token = per_document(items_of(documents, nats, tokens, np.zeros(5, bool)))["acc_token"]
  assert per_token.tolist() == [1, 0]  # 1 < 1.5; 1 of x and yy comes before 2
  weight = np.exp([-0.5, -0.5])
  assert found["p_correct"][0] == pytest.approx(weight[0] / weight.sum())
  told = summary(items_of(documents, nats, np.ones(5, int), np.zeros(5, bool)))
  assert told["bpb_se"] == pytest.approx(np.std(found["bpb"], ddof=1) / math.sqrt(2))


def test_one_answer_counts_as_hit_or_miss():
  documents = [Document(str(i), ("q",), (" a",), 0) for i in range(4)]
  hit = np.array([True, False, True, True])
  found = per_document(items_of(documents, np.ones(4), np.ones(4, int), hit))
  assert found.keys() == {"bpb", "acc"} and found["acc"].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("name", ["byte", "o200k_harmony"])
def test_the_boundary_splits_where_the_context_ends_or_where_a_token_spans_it(name):
  tokenizer = get(name)
  cases = {("The sky is", " blue"): False, ("def f():\n    ", "    return 1\n"): name != "byte"}
  for (context, answer), merged in cases.items():
    (row,) = rows_of(Document("d", (context,), (answer,), 0), tokenizer, 1000)
    assert row.ids[0] == tokenizer.eot and row.merged == merged and row.cut == 0
    assert tokenizer.decode(row.ids) == (context + answer).encode()
    scored = tokenizer.decode(row.ids[row.start :])
    assert scored == answer.encode() if not merged else scored.endswith(answer.lstrip().encode())
    assert len(row.ids) > row.start >= 1


@settings(max_examples=200)
@given(st.text("a \n\t{}é1", min_size=1), st.text("a \n\t{}é1", min_size=1))
def test_no_answer_is_empty_whatever_token_spans_the_boundary(context, answer):
  """Neither with a token across the end of the context nor with an answer that merges into it."""
  tokenizer = get("o200k_harmony")
  (row,) = rows_of(Document("d", (context,), (answer,), 0), tokenizer, 10_000)
  joint = [tokenizer.eot, *tokenizer.encode(context + answer).tolist()]
  assert row.ids.tolist() == joint and 1 <= row.start < len(row.ids)
  assert (
    tokenizer.decode(row.ids[: row.start])
    == (context + answer).encode()[: len(tokenizer.decode(row.ids[: row.start]))]
  )
  assert len(tokenizer.decode(row.ids[: row.start])) <= len(context.encode()) or row.merged


def test_long_contexts_lose_their_left_and_answers_stay():
  tokenizer = get("byte")
  (row,) = rows_of(Document("d", ("x" * 50 + "abc",), ("de",), 0), tokenizer, 8)
  assert tokenizer.decode(row.ids) == b"xxxxabcde" and row.cut == row.lost == 47
  assert row.start == 7
  (row,) = rows_of(Document("d", ("a",), ("b" * 20,), 0), tokenizer, 8)
  assert len(row.ids) == 9 and row.start == 1  # the first of them has no state before it


def test_too_many_long_items_are_refused(tmp_path, config):
  prepared(tmp_path, lines(count=30, longest=120))
  with pytest.raises(DataError, match=r"task pets: \d+ of 90 items do not fit data.seq_len = 256"):
    downstream(tmp_path, config)


def test_widths():
  row = rows_of(Document("d", ("x" * 200,), ("de",), 0), get("byte"), 1000)[0]
  assert width_of(row, 1000) == 256 and width_of(row, 202) == 202
  assert NARROWEST == 128
  made = batches([row], [0], 1000, 4096)
  assert made[0].shape == made[0].tokens.shape == (16, 256)
  assert made[0].rows[0] is row and row.ids.dtype == np.int32  # no second copy of a suite is kept


def test_nats_over_blocks_of_the_vocabulary():
  torch.manual_seed(0)
  x, head = torch.randn(POSITIONS, 8), torch.randn(40_000, 8)
  target = torch.randint(40_000, (POSITIONS,))
  nats, hits = nats_of(x, head, target)
  log_p = (x.double() @ head.double().T).log_softmax(-1)
  wanted = -log_p.gather(1, target[:, None])[:, 0]
  torch.testing.assert_close(nats.double(), wanted, rtol=1e-6, atol=1e-5)
  assert torch.equal(hits, log_p.argmax(-1) == target)
  best = log_p.argmax(-1)
  assert nats_of(x, head, best)[1].all()


def test_items_of_a_version_that_wrote_less_are_refused(tmp_path):
  folder = prepared(tmp_path, lines(count=3))
  text = (folder / "pets.jsonl").read_text()
  older = "".join(
    json.dumps({k: v for k, v in json.loads(line).items() if k != "shots"}) + "\n"
    for line in text.splitlines()
  )
  manifest = read_manifest(folder)
  manifest["tasks"]["pets"]["sha256"] = hashlib.sha256(older.encode()).hexdigest()
  old = folder.with_name(digest(manifest))
  old.mkdir()
  (old / "pets.jsonl").write_text(older)
  (old / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(DataError, match="has no 'shots': another version of nmoe wrote it"):
    read_task(old, "pets", 0)


def test_items_are_frozen(tmp_path, config):
  folder = prepared(tmp_path, lines(count=10))
  assert prepared(tmp_path, lines(count=10)) == folder  # found, not made again
  assert [p.name for p in folder.parent.iterdir()] == [folder.name]
  (folder / "pets.jsonl").write_text((folder / "pets.jsonl").read_text().replace("cat", "cut"))
  with pytest.raises(DataError, match="pets.jsonl was changed: sha256"):
    downstream(tmp_path, config)
  text = (folder / "manifest.json").read_text()
  (folder / "manifest.json").write_text(text.replace('"documents": 10', '"documents": 11'))
  with pytest.raises(DataError, match="manifest.json was changed"):
    downstream(tmp_path, config)
  with pytest.raises(DataError, match="holds no items of task cats; run `pip download"):
    downstream(tmp_path, config, tasks=("cats",))
  (folder / "manifest.json").write_text("[" * 100_000)
  with pytest.raises(DataError, match="manifest.json cannot be read"):
    downstream(tmp_path, config)
  (folder / "manifest.json").write_text(text)
  (folder / "mine.jsonl").write_text("")
  with pytest.raises(DataError, match="manifest.json has no task mine; delete .*mine.jsonl"):
    downstream(tmp_path, config, tasks=("mine",))
  (tmp_path / "root" / "evals" / "0123").mkdir()
  (tmp_path / "root" / "evals" / "0123" / "pets.jsonl").write_text("")
  with pytest.raises(DataError, match="task pets is in 0123, .*; delete all of these but one"):
    downstream(tmp_path, config)


def test_items_are_written_and_read(tmp_path, config, model):
  prepared(tmp_path, lines(count=5), lines("tales", count=4, choices=1))
  outcome = downstream(tmp_path, config, tasks=("pets", "tales")).run(model, Parallel())
  write_items(tmp_path / "a" / "step.parquet", outcome.items)
  read = read_items(tmp_path / "a" / "step.parquet")
  assert list(read) == ["pets", "tales"] and len(read["pets"].nats) == 15
  for task, items in outcome.items.items():
    for name, column in vars(items).items():
      assert np.array_equal(getattr(read[task], name), column)
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["step.parquet"]
  values = outcome.values
  assert values["eval/mine/bpb"] == (values["eval/pets/bpb"] + values["eval/tales/bpb"]) / 2


@pytest.mark.faults
def test_a_suite_s_accuracy_is_of_tasks_that_are_judged_by_one(tmp_path, config, model):
  """A task of one answer is judged by its bits: that greedy decoding never gives a whole program
  halved the accuracy of a suite. Without a task of several answers there is none.
  """
  prepared(tmp_path, lines(count=8), lines("tales", count=8, choices=1))
  values = downstream(tmp_path, config, tasks=("pets", "tales")).run(model, Parallel()).values
  assert values["eval/mine/acc"] == values["eval/pets/acc"] > 0 == values["eval/tales/acc"]
  alone = downstream(tmp_path, config, tasks=("tales",)).run(model, Parallel()).values
  assert "eval/mine/bpb" in alone and "eval/mine/acc" not in alone


def test_a_suite_in_the_loop_changes_no_bit_of_training(lab, tmp_path):
  prepared(tmp_path, lines(count=20, longest=6))
  (tmp_path / "mine.toml").write_text('tasks = ["pets"]\nlimit = 8\n')
  suite = {"eval__suite": str(tmp_path / "mine.toml"), "eval__every": 5}
  plain, measured = lab.record(), lab.record(**suite)
  assert lab.attempt(plain) == lab.attempt(measured) == 0
  a, b = lab.logged(plain), lab.logged(measured)
  tags = {tag for tag in b if tag.startswith("eval/")}
  assert {"eval/pets/bpb", "eval/pets/acc_se", "eval/mine/acc"} <= tags
  assert [step for step, _ in b["eval/pets/bpb"]] == [5, 10, 12]
  assert a == {tag: values for tag, values in b.items() if tag not in tags}
  state, other = lab.state(plain), lab.state(measured)
  assert all(torch.equal(state[name], other[name]) for name in state)
  assert lab.run(measured).results["eval/mine/bpb"] == b["eval/mine/bpb"][-1][1]
  files = sorted((lab.root / "evals" / "runs" / measured).iterdir())
  assert [f.name for f in files] == [f"step_{n:08d}_mine.parquet" for n in (5, 10, 12)]


def test_missing_items_stop_a_run_before_it_trains(lab):
  run = lab.record(eval__suite="short")
  with pytest.raises(DataError, match="holds no items of task csqa_0shot"):
    lab.attempt(run)
  assert lab.run(run).status == "failed"


def test_a_metric_of_a_suite_needs_the_suite(lab):
  with pytest.raises(ConfigError, match="is not measured by .eval. suite"):
    changed(lab.config, {"experiment.metric": "eval/quick/bpb"})
  made = changed(lab.config, {"experiment.metric": "eval/quick/bpb", "eval.suite": "quick"})
  assert made.eval.suite == "quick"
