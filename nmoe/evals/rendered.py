"""Sources whose prompts are rendered here, once, when items are prepared.

bigbench-1.0.0.tar.gz   the six tasks of BIG-bench (arXiv 2206.04615) that CORE has a part of
bundle:FOLDER           DCLM's evaluation bundle (arXiv 2406.11794): core.yaml, eval_meta_data.csv
                        and eval_data/, the 22 tasks of CORE

The examples of a prompt are other items of the same task, drawn by (task, item); an item with the
same question is never among them. Blanks at the end of a question belong to the answer.
"""

from __future__ import annotations

import csv
import json
import random
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nmoe.errors import DataError
from nmoe.evals.requests import Document, Task
from nmoe.evals.suites import BIGBENCH, CORE

SHOTS = 10  # of BIG-bench's tasks, as in CORE
BLOCK = "bigbench/benchmark_tasks/"
FILES = ("core.yaml", "eval_meta_data.csv", "eval_data")
KEYS = (  # of a task in core.yaml; by has_categories others part a task's mean, here it stays whole
  "label dataset_uri num_fewshot icl_task_type continuation_delimiter example_delimiter "
  "has_categories"
).split()
BROKEN = (  # what reading a file of other values than ours comes to
  OSError,
  EOFError,
  zlib.error,
  LookupError,
  ValueError,
  TypeError,
  AttributeError,
  RecursionError,
)


@dataclass(frozen=True)
class Question:
  """Choice i is contexts[i] followed by answers[i]; `gold` is the right one."""

  contexts: tuple[str, ...]
  answers: tuple[str, ...]
  gold: int

  @property
  def solved(self) -> str:
    return self.contexts[self.gold] + self.answers[self.gold]


def parted(question: str, delimiter: str, answer: str) -> tuple[str, str]:
  """Context and answer: the blanks before an answer are its own."""
  context = (question + delimiter).rstrip()
  return context, (question + delimiter)[len(context) :] + answer


def question_of(
  questions: Sequence[str], delimiter: str, answers: Sequence[str], gold: int
) -> Question:
  """Of as many questions as answers. TypeError for a gold that is no number."""
  if type(gold) is not int:
    raise TypeError(f"gold {gold!r:.80} must be a whole number")
  pairs = [parted(q, delimiter, a) for q, a in zip(questions, answers, strict=True)]
  return Question(tuple(c for c, _ in pairs), tuple(a for _, a in pairs), gold)


def with_shots(
  task: str, questions: Sequence[Question], shots: int, first: str = "", between: str = "\n\n"
) -> list[Document]:
  """Every question behind `shots` solved others. DataError if there are not as many."""
  documents = []
  for number, question in enumerate(questions):
    draw = random.Random(f"{task}/{number}")
    order = draw.sample(range(len(questions)), min(len(questions), 4 * shots + 4)) if shots else []
    others = [questions[i] for i in order if questions[i].contexts != question.contexts][:shots]
    if len(others) < shots:
      raise DataError(f"task {task}: {shots} examples are wanted, item {number} has {len(others)}")
    prompt = first + "".join(other.solved + between for other in others)
    whole = {context: prompt + context for context in question.contexts}  # once, of all choices
    contexts = tuple(whole[context] for context in question.contexts)
    documents.append(
      Document(str(number), contexts, question.answers, question.gold, shots=len(prompt))
    )
  return documents


def read_bigbench(path: Path) -> dict[str, Task]:
  """The tasks of suites.BIGBENCH from the source distribution, read as a tar file."""
  wanted = {f"{BLOCK}{part}/task.json": task for task, parts in BIGBENCH.items() for part in parts}
  questions: dict[str, list[Question]] = {task: [] for task in BIGBENCH}
  prefixes, missing = {}, set(wanted)
  try:
    with tarfile.open(path) as tar:
      for member in tar:
        name = member.name.partition("/")[2]
        if name in wanted and (stream := tar.extractfile(member)) is not None:
          table, task = json.loads(stream.read()), wanted[name]
          prefixes[task] = table.get("task_prefix", "") if len(BIGBENCH[task]) == 1 else ""
          questions[task] += [_bigbench(table, task, one) for one in table["examples"]]
          missing.discard(name)
          if not missing:
            break
  except (*BROKEN, tarfile.TarError) as error:
    raise DataError(f"{path} is not the sdist of bigbench 1.0.0 ({error!r})") from error
  if missing:
    raise DataError(f"{path} is not the sdist of bigbench 1.0.0: it has no {min(missing)}")
  return {
    task: Task(with_shots(task, asked, SHOTS, prefixes[task], "\n"), _primary(asked))
    for task, asked in questions.items()
  }


def _bigbench(table: dict[str, Any], task: str, example: dict[str, Any]) -> Question:
  """An example; of all tasks but one the best answer alone counts, as in CORE."""
  first = table.get("task_prefix", "") if len(BIGBENCH[task]) > 1 else ""
  text = first + table.get("example_input_prefix", "\nQ: ") + example["input"]
  after = table.get("example_output_prefix", "\nA: ")
  scores = example.get("target_scores")
  if task == "bigbench_language_identification":
    answers = list(scores)
    text += "".join(f"\n  choice: {answer}" for answer in answers)
    gold = max(range(len(answers)), key=lambda i: scores[answers[i]])
    return question_of([text] * len(answers), after, answers, gold)
  target = max(scores, key=scores.__getitem__) if scores else example["target"]
  best = target[0] if isinstance(target, list) else target
  return question_of([text], after, [best], 0)


def read_bundle(folder: Path) -> dict[str, Task]:
  """The tasks of CORE under the names of suites.CORE, each with the chance that the bundle says.

  The texts are those of nanochat's core_eval.py, with a blank line between examples where
  core.yaml has no example_delimiter; the answer is the whole choice, as in llm-foundry, which DCLM
  runs. That one has a line break there, no blanks around a query, a context and a continuation of
  the data, and of jeopardy the mean of the means of its categories. Raises DataError for what is
  missing, or of a kind that is not known.
  """
  absent = [name for name in FILES if not (folder / name).exists()]
  if absent:
    inside = [path.parent.name for path in folder.glob(f"*/{FILES[0]}")]
    remedy = f"name the folder {inside[0]} in it" if inside else "is it DCLM's evaluation bundle?"
    raise DataError(f"{folder} has no {', '.join(absent)}; {remedy}")
  try:
    listed = yaml.safe_load((folder / FILES[0]).read_text(encoding="utf-8"))["icl_tasks"]
    with (folder / FILES[1]).open(encoding="utf-8", newline="") as stream:
      chances = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(stream)}
    ours = {label: entry for entry in listed if f"core_{(label := entry['label'])}" in CORE}
    if not ours:
      raise ValueError(
        f"{FILES[0]} lists none of CORE's tasks: the first is {listed[0]['label']!r:.80}"
      )
    return {
      f"core_{label}": _bundled(folder / FILES[2], entry, chances[label])
      for label, entry in ours.items()
    }
  except (*BROKEN, yaml.YAMLError) as error:
    raise DataError(
      f"{folder}: {type(error).__name__}: {error}; fetch DCLM's evaluation bundle again"
    ) from error


def _bundled(data: Path, entry: dict[str, Any], percent: str) -> Task:
  task, path = f"core_{entry['label']}", data / entry["dataset_uri"]
  if unknown := entry.keys() - set(KEYS):
    raise ValueError(f"task {task}: {', '.join(sorted(unknown))} not known; known are {KEYS}")
  kind, delimiter = entry["icl_task_type"], entry.get("continuation_delimiter", " ")
  lines = path.read_text(encoding="utf-8").split("\n")
  questions = [_question(kind, delimiter, json.loads(line), path) for line in lines if line.strip()]
  if not questions:
    raise ValueError(f"{path} has no items")
  match entry["num_fewshot"]:
    case [int(shots)] if shots >= 0:
      between = entry.get("example_delimiter", "\n\n")
      documents = with_shots(task, questions, shots, between=between)
    case other:
      raise ValueError(f"task {task}: num_fewshot {other!r:.80} must be one number in a list")
  if not 0 <= float(percent) < 100:
    raise ValueError(f"task {task}: a random baseline {percent} is none of 0 to less than 100")
  return Task(documents, _primary(questions), float(percent) / 100)


def _question(kind: str, delimiter: str, item: dict[str, Any], path: Path) -> Question:
  if kind == "multiple_choice":
    choices = item["choices"]
    if not isinstance(choices, list):
      raise TypeError(f"{path}: choices {choices!r:.80} must be a list")
    return question_of([item["query"]] * len(choices), delimiter, choices, item["gold"])
  if kind == "schema":
    options = item["context_options"]
    return question_of(options, delimiter, [item["continuation"]] * len(options), item["gold"])
  if kind == "language_modeling":
    return question_of([item["context"].strip()], delimiter, [item["continuation"]], 0)
  raise DataError(f"{path}: items of kind {kind!r} cannot be scored without generation")


def _primary(questions: Sequence[Question]) -> str:
  """As CORE has it: of choices the lowest mean loss per token, else the greedy answer."""
  return "acc_token" if len(questions[0].answers) > 1 else "acc"
