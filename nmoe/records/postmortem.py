"""Why ranks ended: their last words from the logs, gathered into one file that names a suspect.

Each rank of a production run writes {root}/logs/RUN/attempt_N/HOST/attempt_K/LOCAL/stderr.log,
K being the restart of its host's agent. A rank that hangs leaves the stacks of its threads there
(nmoe.train.watchdog), and so does one that waits for a lost one until its agent ends it; one that
fails leaves its traceback, one that is killed nothing. Who waits for others is not at fault: the
odd one out is the suspect (as in ByteRobust, arXiv 2509.16293).

Beside them a host's agent leaves what its GPUs said then (nmoe.machine.gpus), and where rank 0 asks
for it, because a rank has become slow, in {root}/runs/RUN/attempt_N.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmoe import files
from nmoe.records.root import Root

LAST = 20  # lines of a log that are kept
GPUS = "gpus.json"  # of a host, beside the logs of a restart
ME = re.compile(r"^rank (\d+) of (\d+) on (\S+)$", re.MULTILINE)
FRAME = re.compile(r'^  File "(.+)", line (\d+),? in (\S+)$', re.MULTILINE)
EXIT = re.compile(r"^local rank (\d+), pid (\d+): exit status (-?\d+)$", re.MULTILINE)
WAITING = (
  "torch/distributed/",
  "nmoe/distributed/",
  "reference/exchange.py",
)  # who is there waits for others


@dataclass(frozen=True)
class LastWords:
  """Of a rank: the frames of its main thread, innermost first, as "file:line function"; the last
  lines of its log.
  """

  rank: int
  host: str
  stack: tuple[str, ...]
  log: tuple[str, ...]

  @property
  def silent(self) -> bool:
    """Neither a stack nor one of our errors (nmoe.train.loop.told)."""
    return not self.stack and not any(line.startswith("error: ") for line in self.log)

  @property
  def waits(self) -> bool:
    return any(place in self.stack[0] for place in WAITING) if self.stack else False


@dataclass(frozen=True)
class PostMortem:
  """suspect: a rank, -1 if none stands out. exits: (local rank, exit status, pid) that the agent
  saw, over the whole attempt. hosts: what their GPUs said (nmoe.machine.gpus.Look); none on a CPU.
  """

  suspect: int
  why: str
  ranks: tuple[LastWords, ...]
  exits: tuple[tuple[int, int, int], ...]
  hosts: tuple[dict[str, Any], ...] = ()


def write(root: Path, run_id: str, attempt: int, before: int = 0) -> tuple[Path, PostMortem] | None:
  """The post-mortem of the newest ranks of an attempt, or of those that `before` restarts ended;
  its file, {root}/runs/RUN/attempt_N/post_mortem_K.json. None if there are no logs.
  """
  folder = Root(root).logs(run_id) / f"attempt_{attempt}"
  logs = sorted(log for host in folder.glob("*") for log in _of(host, before))
  if not logs:
    return None
  ranks = sorted((last_words(log.read_text(errors="replace")) for log in logs), key=_place)
  agent = Root(root).logs(run_id) / "agent.txt"
  text = agent.read_text(errors="replace") if agent.exists() else ""
  exits = tuple((int(m[1]), int(m[3]), int(m[2])) for m in EXIT.finditer(text))
  restarts = sorted({log.parents[1] for log in logs})
  hosts = tuple(filter(None, map(_gpus, restarts)))
  rank, why = suspect(ranks)
  found = PostMortem(rank, why + "".join(map(xids, hosts)), tuple(ranks), exits, hosts)
  restart = restarts[0].name.removeprefix("attempt_")
  path = Root(root).prod(run_id) / f"attempt_{attempt}" / f"post_mortem_{restart}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  files.replace(path, json.dumps(asdict(found), indent=1))
  return path, found


def written(root: Path, run_id: str, attempt: int, before: int = 0) -> dict[str, Any]:
  """`write`, and what an event tells of it."""
  made = write(root, run_id, attempt, before)
  if made is None:
    return {}
  path, found = made
  return {"post_mortem": str(path), "suspect": found.suspect, "why": found.why}


def xids(host: dict[str, Any]) -> str:
  """What the driver told of a host's GPUs, for a sentence; "" if nothing."""
  told = {f"Xid {one['code']} of {one['bus']}": one["text"] for one in host["xids"]}
  return "".join(f"; {host['host']}: {what} ({text})" for what, text in told.items())


def ask(root: Path, run_id: str, attempt: int, step: int) -> str:
  """Have the agents of all hosts write what their GPUs say now; the files, by a pattern."""
  request = Root(root).look_request(run_id)
  request.parent.mkdir(parents=True, exist_ok=True)
  files.replace(request, json.dumps({"attempt": attempt, "step": step}))
  return str(look_file(root, run_id, attempt, step, "*"))


def asked(root: Path, run_id: str) -> tuple[int, int]:
  """(attempt, step) of the newest `ask`; (0, 0): there was none, or its file is damaged."""
  try:
    found = json.loads(Root(root).look_request(run_id).read_text())
    return found["attempt"], found["step"]
  except (FileNotFoundError, ValueError, TypeError, KeyError):
    return 0, 0


def look_file(root: Path, run_id: str, attempt: int, step: int, host: str) -> Path:
  return Root(root).prod(run_id) / f"attempt_{attempt}" / f"gpus_step_{step}_{host}.json"


def _gpus(restart: Path) -> dict[str, Any]:
  """What a host's GPUs said when a restart's ranks ended; {} if nobody asked."""
  path = restart / GPUS
  return json.loads(path.read_text()) if path.exists() else {}


def _of(host: Path, before: int) -> list[Path]:
  """The logs of a host's ranks, of the newest restart or of one before."""
  restarts = sorted(
    host.glob("attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_"))
  )
  return list(restarts[-1 - before].glob("*/stderr.log")) if len(restarts) > before else []


def _place(words: LastWords) -> int:
  return words.rank


def last_words(text: str) -> LastWords:
  """What a rank's log comes to."""
  me = ME.search(text)
  lines = tuple(text.strip().split("\n")[-LAST:])
  stack = tuple(f"{file}:{line} {name}" for file, line, name in _frames(text))
  return LastWords(int(me[1]) if me else -1, me[3] if me else "", stack, lines)


def _frames(text: str) -> list[tuple[str, str, str]]:
  """Innermost first: of the main thread, the last in a dump of all; else of the last traceback."""
  dump = text.rpartition("(most recent call first):")
  if dump[1]:
    return FRAME.findall(dump[2])
  return FRAME.findall(text.rpartition("Traceback (most recent call last):")[2])[::-1]


def suspect(ranks: Sequence[LastWords]) -> tuple[int, str]:
  """The rank at fault and why; -1 if none stands out."""
  if len(ranks) == 1:
    return ranks[0].rank, f"the only rank: {_told(ranks[0])}"
  silent = [one for one in ranks if one.silent]
  if len(silent) == 1:
    return silent[0].rank, "it ended without a word, the others say why they ended"
  spoke = [one for one in ranks if one.stack]
  busy = [one for one in spoke if not one.waits]
  if len(busy) == 1 and len(spoke) > 1:
    return busy[0].rank, f"the others wait for it; it was at {busy[0].stack[0]}"
  places = Counter(one.stack[0] for one in spoke)
  odd = [one for one in spoke if places[one.stack[0]] == 1]
  if len(odd) == 1 and len(spoke) > 2:
    return odd[0].rank, f"it alone was at {odd[0].stack[0]}"
  return -1, "no rank stands out"


def _told(one: LastWords) -> str:
  if one.silent:
    return "it ended without a word"
  return f"it was at {one.stack[0]}" if one.stack else one.log[-1]
