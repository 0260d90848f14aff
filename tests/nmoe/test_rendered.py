"""BIG-bench's sdist and DCLM's bundle: prompts as they are rendered, and the number CORE."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml

from kernels import reference
from nmoe.config.file import changed
from nmoe.data.tokenizer import get
from nmoe.distributed.parallel import Parallel
from nmoe.errors import DataError
from nmoe.evals.downstream import Downstream, core
from nmoe.evals.rendered import parted, read_bigbench, read_bundle
from nmoe.evals.requests import read_manifest, read_task
from nmoe.evals.sources import prepare
from nmoe.evals.suites import BIGBENCH, CORE, SUITES, Suite
from nmoe.model.decoder import Model

KINDS = ("multiple_choice", "schema", "language_modeling")


def item(kind: str, i: int) -> dict:
  if kind == "multiple_choice":
    return {"query": f"q{i}?", "choices": [f"a{i}", f"b{i}"], "gold": i % 2}
  if kind == "schema":
    return {"context_options": [f"cat {i}", f"dog {i}"], "continuation": "ran.", "gold": i % 2}
  return {"context": f"c{i} ", "continuation": f"d{i}"}


def bundle(folder, labels, count=14, shots=2):
  """A bundle whose tasks are of the three kinds in turn."""
  (folder / "eval_data").mkdir(parents=True)
  listed, rows = [], ["Eval Task,Random baseline"]
  for n, label in enumerate(labels):
    kind = KINDS[n % 3]
    lines = "\n".join(json.dumps(item(kind, i)) for i in range(count))
    (folder / "eval_data" / f"{label}.jsonl").write_text(lines + "\n")
    entry = {"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [shots]}
    entry |= {"icl_task_type": kind} | ({"continuation_delimiter": "\nA: "} if n % 3 == 0 else {})
    listed.append(entry)
    rows.append(f"{label},{0 if n % 3 == 2 else 50 + n}")
  (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": listed}))
  (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
  return folder


LABELS = [task.removeprefix("core_") for task in CORE]


def test_blanks_before_an_answer_are_its_own():
  assert parted("q?", "\nAnswer: ", "yes") == ("q?\nAnswer:", " yes")
  assert parted("q? ", " ", "yes") == ("q?", "  yes")


def test_prompts_of_a_bundle(tmp_path):
  tasks = read_bundle(bundle(tmp_path / "b", ["arc_easy", "winograd", "jeopardy"]))
  choice, schema, text = (tasks[f"core_{n}"] for n in ("arc_easy", "winograd", "jeopardy"))
  assert (choice.primary, schema.primary, text.primary) == ("acc_token", "acc_token", "acc")
  assert (choice.chance, schema.chance, text.chance) == (0.5, 0.51, 0.0)
  first = choice.documents[3]
  assert first.answers == (" a3", " b3") and first.gold == 1
  head, own = first.contexts[0][: first.shots], first.contexts[0][first.shots :]
  assert own == "q3?\nA:" and head.count("\nA: ") == 2 and head.endswith("\n\n")
  for shot in head.split("\n\n")[:2]:
    number = int(shot[1 : shot.index("?")])
    assert number != 3 and shot == f"q{number}?\nA: {'ab'[number % 2]}{number}"
  one = schema.documents[5]
  assert [c[one.shots :] for c in one.contexts] == ["cat 5", "dog 5"]
  assert one.answers == (" ran.", " ran.") and one.gold == 1
  assert text.documents[4].contexts[0].endswith("\n\nc4") and text.documents[4].answers == (" d4",)


def test_between_examples_is_what_the_bundle_says(tmp_path):
  folder = bundle(tmp_path / "b", ["arc_easy"])
  edited("core.yaml", "  num_few", '  example_delimiter: "\\n"\n  num_few')(folder)
  document = read_bundle(folder)["core_arc_easy"].documents[3]
  head = document.contexts[0][: document.shots]
  assert head.count("\n\n") == 0 and head.count("\n") == 4 and head.endswith("\n")


A, ROWS = "\nAnswer: ", 12
PUBLISHED = {  # label: file, examples, kind, delimiter, chance in percent
  "hellaswag_zeroshot": ("language_understanding/hellaswag", 0, 0, None, 25),
  "jeopardy": ("world_knowledge/jeopardy_all", 10, 2, A, 0),
  "bigbench_qa_wikidata": ("world_knowledge/bigbench_qa_wikidata", 10, 2, None, 0),
  "arc_easy": ("world_knowledge/arc_easy", 10, 0, A, 25),
  "arc_challenge": ("world_knowledge/arc_challenge", 10, 0, A, 25),
  "copa": ("commonsense_reasoning/copa", 0, 0, None, 50),
  "commonsense_qa": ("commonsense_reasoning/commonsense_qa", 10, 0, None, 20),
  "piqa": ("commonsense_reasoning/piqa", 10, 0, A, 50),
  "openbook_qa": ("commonsense_reasoning/openbook_qa", 0, 0, None, 25),
  "lambada_openai": ("language_understanding/lambada_openai", 0, 2, None, 0),
  "hellaswag": ("language_understanding/hellaswag", 10, 0, None, 25),
  "winograd": ("language_understanding/winograd_wsc", 0, 1, None, 50),
  "winogrande": ("language_understanding/winogrande", 0, 1, None, 50),
  "bigbench_dyck_languages": ("symbolic_problem_solving/bigbench_dyck_languages", 10, 2, None, 0),
  "agi_eval_lsat_ar": ("symbolic_problem_solving/agi_eval_lsat_ar", 3, 0, None, 20),
  "bigbench_cs_algorithms": ("symbolic_problem_solving/bigbench_cs_algorithms", 10, 2, None, 0),
  "bigbench_operators": ("symbolic_problem_solving/bigbench_operators", 10, 2, None, 0),
  "bigbench_repeat_copy_logic": (
    "symbolic_problem_solving/bigbench_repeat_copy_logic",
    10,
    2,
    None,
    0,
  ),
  "squad": ("reading_comprehension/squad", 10, 2, None, 0),
  "coqa": ("reading_comprehension/coqa", 0, 2, None, 0),
  "boolq": ("reading_comprehension/boolq", 10, 0, A, 62),
  "bigbench_language_identification": (
    "language_understanding/bigbench_language_identification",
    10,
    0,
    None,
    9.1,
  ),
}


def published(folder):
  """The bundle's files as DCLM publishes them, with a dozen made-up items each: sub-folders, YAML
  with comments, a table with quoted commas and rows of tasks that CORE has not.
  """
  head = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?"
  rows = [
    f"{head},Description",
    'mmlu_zeroshot,world knowledge,multiple choice,0,14042,25,,"A, B."',
  ]
  tasks = ["icl_tasks:"]
  for label, (file, shots, kind, delimiter, chance) in PUBLISHED.items():
    tasks += ["-", f"  label: {label}", f"  dataset_uri: {file}.jsonl", f"  num_fewshot: [{shots}]"]
    tasks += [f"  icl_task_type: {KINDS[kind]}"]
    if delimiter:
      tasks += ['  continuation_delimiter: "\\nAnswer: " # this separates questions from answers']
    rows += [f'{label},a category,a type,{shots},{ROWS},{chance},,"{label}, of {ROWS} items."']
    path = folder / "eval_data" / f"{file}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"category": "word origins"} if label == "jeopardy" else {}
    path.write_text("".join(json.dumps(item(KINDS[kind], i) | more) + "\n" for i in range(ROWS)))
  (folder / "core.yaml").write_text("\n".join(tasks) + "\n")
  (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
  return folder


def test_the_bundle_as_it_is_published(tmp_path):
  """All of CORE's tasks, with their own examples, delimiter, measure and chance."""
  tasks = read_bundle(published(tmp_path / "eval_bundle"))
  assert tasks.keys() == set(CORE) == {f"core_{label}" for label in PUBLISHED}
  for label, (_, shots, kind, delimiter, chance) in PUBLISHED.items():
    about, own = tasks[f"core_{label}"], item(KINDS[kind], 3)
    assert about.chance == chance / 100 and len(about.documents) == ROWS
    assert about.primary == ("acc" if KINDS[kind] == "language_modeling" else "acc_token")
    document = about.documents[3]
    assert document.contexts[0][: document.shots].count("\n\n") == shots
    asked = [own["context"].strip()] if kind == 2 else own.get("context_options") or [own["query"]]
    told = own.get("choices") or [own["continuation"]]
    wanted = {question + (delimiter or " ") + answer for question in asked for answer in told}
    whole = zip(document.contexts, document.answers, strict=True)
    assert {context[document.shots :] + answer for context, answer in whole} == wanted
    assert document.gold == own.get("gold", 0)
  inside = tmp_path / "eval_bundle"
  with pytest.raises(DataError, match="has no core.yaml.*; name the folder eval_bundle in it"):
    prepare(f"bundle:{inside.parent}", tmp_path / "root")


def test_an_item_is_never_among_its_own_examples(tmp_path):
  folder = bundle(tmp_path / "b", ["arc_easy"], count=9, shots=8)
  path = folder / "eval_data" / "arc_easy.jsonl"
  path.write_text(path.read_text() + json.dumps(item("multiple_choice", 0)) + "\n")  # a copy of 0
  for document in read_bundle(folder)["core_arc_easy"].documents:
    own = document.contexts[0][document.shots :]
    assert own not in document.contexts[0][: document.shots]
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
  with pytest.raises(DataError, match="core_arc_easy: 8 examples are wanted, item 0 has 7"):
    read_bundle(folder)


def test_what_does_not_fit_loses_examples_and_never_its_question(lab, tmp_path):
  """The last ids are scored, as many as the context has; with less of the question: refused."""
  prepare(f"bundle:{bundle(tmp_path / 'b', ['arc_easy'], shots=10)}", lab.root)
  config = changed(lab.config, {"data.seq_len": 64, "train.micro_batch": 4})
  model = Model(config, reference)
  model.init_weights(0)
  suite, text = Suite("one", ("core_arc_easy",), 0), get("byte")
  found = Downstream(suite, lab.root / "evals", config, text)
  outcome = found.run(model, Parallel())
  assert outcome.values["eval/core_arc_easy/truncated"] == 28
  nats = iter(outcome.items["core_arc_easy"].nats)
  for d in found.documents["core_arc_easy"]:
    for context, answer in zip(d.contexts, d.answers, strict=True):
      ids = [text.eot, *(context + answer).encode()][-65:]
      assert bytes(ids).endswith((context[d.shots :] + answer).encode()) and d.shots > 65
      with torch.no_grad():
        log_p = model.logits(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
      count = len(answer.encode())
      wanted = -sum(log_p[i - 1, ids[i]] for i in range(65 - count, 65))
      assert next(nats) == pytest.approx(float(wanted), rel=2e-6)
  with pytest.raises(DataError, match="28 of 28 items do not fit data.seq_len = 8, even without"):
    Downstream(suite, lab.root / "evals", changed(config, {"data.seq_len": 8}), text)


def test_core_is_made_of_all_of_its_tasks_and_of_no_fewer(lab, tmp_path):
  """The centred mean by hand; of 21 tasks there is no such number."""
  folder = prepare(f"bundle:{bundle(tmp_path / 'b', LABELS)}", lab.root)
  config = changed(lab.config, {"data.seq_len": 128, "train.micro_batch": 4})
  model = Model(config, reference)
  model.init_weights(0)
  found = Downstream(SUITES["core"], lab.root / "evals", config, get("byte"))
  values = found.run(model, Parallel()).values
  wanted = []
  for task, about in read_manifest(folder)["tasks"].items():
    accuracy = values[f"eval/{task}/{about['primary']}"]
    wanted.append((accuracy - about["chance"]) / (1 - about["chance"]))
  assert values["eval/core/core"] == pytest.approx(np.mean(wanted), rel=1e-12)
  part = Downstream(Suite("core", CORE[:-1], 0), lab.root / "evals", config, get("byte"))
  assert not [tag for tag in part.run(model, Parallel()).values if tag.endswith("/core")]
  with pytest.raises(KeyError):
    core(values, {task: {} for task in CORE})


def test_a_task_of_core_that_is_not_there_is_named(lab, tmp_path):
  prepare(f"bundle:{bundle(tmp_path / 'b', LABELS[:-1])}", lab.root)
  with pytest.raises(DataError, match="no items of task core_bigbench_lang.*prep-evals bundle:"):
    Downstream(SUITES["core"], lab.root / "evals", lab.config, get("byte"))


ITEMS = "eval_data/arc_easy.jsonl"


def edited(file, old, new):
  def spoil(folder):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))

  return spoil


BROKEN = {
  "a key of others": (edited("core.yaml", "  num_few", "  prelimiter: Q\n  num_few"), "prelimiter"),
  "tasks of others": (
    edited("core.yaml", "label: arc_easy", "label: arc_pl"),
    "none of CORE's tasks",
  ),
  "no table": (lambda b: (b / "core.yaml").unlink(), "has no core.yaml; is it DCLM's"),
  "no chance": (lambda b: (b / "eval_meta_data.csv").write_text("Eval Task\n"), "arc_easy"),
  "no items": (lambda b: (b / "eval_data" / "arc_easy.jsonl").unlink(), "arc_easy.jsonl"),
  "no number of examples": (edited("core.yaml", "- 2", "- []"), "num_fewshot"),
  "a negative number of examples": (edited("core.yaml", "- 2", "- -1"), "num_fewshot"),
  "brackets": (lambda b: (b / "core.yaml").write_text("a: " + "[" * 5000), "RecursionError"),
  "a chance of 500 %": (
    edited("eval_meta_data.csv", ",50", ",500"),
    "500 .* of 0 to less than 100",
  ),
  "no number": (edited("eval_meta_data.csv", ",50", ",nan"), "nan .* of 0 to less than 100"),
  "no lines": (lambda b: (b / ITEMS).write_text("\n"), "arc_easy.jsonl has no items"),
  "gold in words": (edited(ITEMS, '"gold": 1', '"gold": "1"'), "gold .* must be a whole number"),
  "gold true": (edited(ITEMS, '"gold": 1', '"gold": true'), "gold .* must be a whole number"),
  "choices in one": (edited(ITEMS, '["a3", "b3"]', '"ab"'), "choices"),
  "a lone surrogate": (edited(ITEMS, "q3?", "\\ud800"), "core_arc_easy, document .*: .*surrogate"),
  "kind": (
    lambda b: (b / "core.yaml").write_text(
      (b / "core.yaml").read_text().replace("multiple_choice", "generation_task")
    ),
    "items of kind 'generation_task' cannot be scored without generation",
  ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_refused_and_nothing_is_left(tmp_path, name):
  spoil, message = BROKEN[name]
  folder = bundle(tmp_path / "b", ["arc_easy"])
  spoil(folder)
  with pytest.raises(DataError, match=message):
    prepare(f"bundle:{folder}", tmp_path / "root")
  assert not list((tmp_path / "root").glob("evals/*"))


def test_chances_of_other_tasks_are_not_asked_for(tmp_path):
  folder = bundle(tmp_path / "b", ["arc_easy"])
  with (folder / "eval_meta_data.csv").open("a") as stream:
    stream.write("mmlu,\n")
  assert read_bundle(folder)["core_arc_easy"].chance == 0.5


def sdist(path, leave_out=""):
  """An sdist with a dozen examples of every task."""
  with tarfile.open(path, "w:gz") as tar:
    for parts in BIGBENCH.values():
      for part in parts:
        table = {"examples": [{"input": f"i{n}", "target": [f"t{n}", "u"]} for n in range(12)]}
        if part in ("language_identification", "dyck_languages"):
          scores = [{"xx": n % 2, "yy": 1 - n % 2} for n in range(12)]
          table["examples"] = [{"input": f"i{n}", "target_scores": s} for n, s in enumerate(scores)]
        if part == "operators":
          table |= {"task_prefix": "Compute.", "example_output_prefix": " = "}
          table["example_input_prefix"] = "\n"
        if part != leave_out:
          data = json.dumps(table).encode()
          about = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{part}/task.json")
          about.size = len(data)
          tar.addfile(about, io.BytesIO(data))
  return path


def test_bigbench_is_read_as_a_tar_file(tmp_path):
  tasks = read_bigbench(sdist(tmp_path / "b.tar.gz"))
  assert tasks.keys() == BIGBENCH.keys()
  assert len(tasks["bigbench_cs_algorithms"].documents) == 24
  one = tasks["bigbench_operators"].documents[0]
  assert one.contexts[0].startswith("Compute.\ni") and one.contexts[0].endswith("\n\ni0 =")
  assert one.answers == (" t0",) and one.contexts[0].count(" = t") == 10
  choice = tasks["bigbench_language_identification"].documents[2]
  assert choice.answers == (" xx", " yy") and choice.gold == 1
  assert choice.contexts[0][choice.shots :] == "\nQ: i2\n  choice: xx\n  choice: yy\nA:"
  assert tasks["bigbench_dyck_languages"].documents[2].answers == (" yy",)
  with pytest.raises(DataError, match="it has no bigbench/benchmark_tasks/operators/task.json"):
    read_bigbench(sdist(tmp_path / "c.tar.gz", leave_out="operators"))
  (tmp_path / "d.tar.gz").write_bytes(b"no tar")
  with pytest.raises(DataError, match="d.tar.gz is not the sdist of bigbench"):
    read_bigbench(tmp_path / "d.tar.gz")


def test_a_context_that_choices_share_is_stored_once(tmp_path):
  source = bundle(tmp_path / "b", ["arc_easy", "winograd"])
  folder = prepare(f"bundle:{source}", tmp_path / "root")
  for task, contexts in (("core_arc_easy", 1), ("core_winograd", 2)):
    line = json.loads((folder / f"{task}.jsonl").read_text().splitlines()[0])
    assert len(line["contexts"]) == contexts
    rendered = {d.name: d for d in read_bundle(source)[task].documents}
    assert all(d == rendered[d.name] for d in read_task(folder, task, 0))
