"""What a model thinks of answers: nats of every choice, and whether greedy decoding gives it.

Shapes are fixed, and no batch size can be chosen: rows are padded on the right to a width of 128,
256, … up to the model's context, T / width rows a batch, where T is training's micro-batch in
tokens, so that memory, RDEP's buffers and kernels are those of training. Rows are sorted before
they are cut into batches, batch i belongs to rank i mod R, and missing batches are padding: what a
row computes depends neither on the order of requests nor on the number of ranks.

Of the last states only those before an answer's token meet the head, POSITIONS at a time, in fp32
and over blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nmoe.distributed.parallel import Parallel
from nmoe.evals.requests import Row
from nmoe.model.decoder import Model

NARROWEST = 128
POSITIONS = 512  # states that meet the head at once
VOCABULARY = 16384  # ids of a block of the head


@dataclass(frozen=True)
class Batch:
  """tokens int64 [rows, width]. `position` in the flattened batch comes before answer token
  `target`, which is number `place` of all answer tokens; all int64 [answer tokens of the batch].
  """

  tokens: np.ndarray
  position: np.ndarray
  target: np.ndarray
  place: np.ndarray


def width_of(row: Row, longest: int) -> int:
  """The width of the batches that a row belongs to."""
  width = NARROWEST
  while width < len(row.ids) - 1:
    width *= 2
  return min(width, longest)


def batches(rows: Sequence[Row], order: Sequence[int], longest: int, tokens: int) -> list[Batch]:
  """All batches, of `tokens` each at most; rows in this order within their width.

  Answer tokens are numbered row by row as `rows` has them.
  """
  first = np.concatenate([[0], np.cumsum([len(r.ids) - r.start for r in rows])])
  by_width: dict[int, list[int]] = {}
  for i in order:
    by_width.setdefault(width_of(rows[i], longest), []).append(i)
  made = []
  for width, members in sorted(by_width.items()):
    size = max(1, tokens // width)
    for begin in range(0, len(members), size):
      made.append(_batch(rows, members[begin : begin + size], first, size, width))
  return made


def _batch(
  rows: Sequence[Row], members: Sequence[int], first: np.ndarray, size: int, width: int
) -> Batch:
  tokens = np.zeros((size, width), dtype=np.int64)
  position, target, place = [], [], []
  for at, i in enumerate(members):
    row = rows[i]
    tokens[at, : len(row.ids) - 1] = row.ids[:-1]
    position.append(at * width + np.arange(row.start - 1, len(row.ids) - 1))
    target.append(row.ids[row.start :])
    place.append(np.arange(first[i], first[i + 1]))
  return Batch(tokens, *(np.concatenate(x) for x in (position, target, place)))


@torch.no_grad()
def score(
  model: Model, parallel: Parallel, made: Sequence[Batch], total: int
) -> tuple[np.ndarray, np.ndarray]:
  """float64 [total] nats, and bool [total] whether it is the first choice, of every answer token.

  Every rank calls it with the same batches and gets the same answer.
  """
  device = model.head_weight.device
  found = torch.zeros(2, total, dtype=torch.float64, device=device)
  for batch in _share(made, parallel):
    x_TD = model.hidden(torch.from_numpy(batch.tokens).to(device))[0].flatten(0, 1)
    for begin in range(0, len(batch.position), POSITIONS):
      part = slice(begin, begin + POSITIONS)
      count = len(batch.place[part])
      position, target = (_padded(x[part], device) for x in (batch.position, batch.target))
      nats, hits = nats_of(x_TD[position], model.head_weight, target)
      place = torch.from_numpy(batch.place[part]).to(device)
      found[0, place], found[1, place] = nats[:count].double(), hits[:count].double()
  nats_A, hits_A = parallel.sum(found).cpu().numpy()
  return nats_A, hits_A > 0.5


def _share(made: Sequence[Batch], parallel: Parallel) -> Iterator[Batch]:
  """This rank's batches; every rank has as many of each shape, since experts live on all."""
  shapes = sorted({batch.tokens.shape for batch in made})
  for shape in shapes:
    alike = [batch for batch in made if batch.tokens.shape == shape]
    none = np.zeros(0, dtype=np.int64)
    empty = Batch(np.zeros(shape, dtype=np.int64), none, none, none)
    for begin in range(0, len(alike), parallel.ranks):
      mine = begin + parallel.rank
      yield alike[mine] if mine < len(alike) else empty


def _padded(values: np.ndarray, device: torch.device) -> Tensor:
  out = np.zeros(POSITIONS, dtype=np.int64)
  out[: len(values)] = values
  return torch.from_numpy(out).to(device)


def nats_of(x_AD: Tensor, head_VD: Tensor, target_A: Tensor) -> tuple[Tensor, Tensor]:
  """-ln p(target) fp32 [A] (fp64 of fp64 states), and whether no other id is more probable."""
  x_AD = x_AD if x_AD.dtype == torch.float64 else x_AD.float()
  chosen, total, best = x_AD.new_full((3, len(x_AD)), -torch.inf)
  first = torch.zeros_like(target_A)
  for begin in range(0, head_VD.shape[0], VOCABULARY):
    block = x_AD @ head_VD[begin : begin + VOCABULARY].to(x_AD.dtype).T
    inside = (target_A >= begin) & (target_A < begin + block.shape[1])
    at = (target_A - begin).clamp(0, block.shape[1] - 1)
    chosen = torch.where(inside, block.gather(1, at[:, None])[:, 0], chosen)
    highest, where = block.max(-1)
    first = torch.where(highest > best, where + begin, first)
    best = torch.maximum(best, highest)
    total = torch.logaddexp(total, block.logsumexp(-1))
  return total - chosen, first == target_A
