"""Moves of experts' rows against loops."""

from itertools import pairwise

import pytest
import torch

from kernels.ragged import gather, moved

BEGIN = [0, 5, 5, 69, 102]  # some rows, none, more, and rows that no expert owns after them


def by_loops(x, begin, place, size):
  out = torch.zeros(size, *x.shape[1:], dtype=x.dtype)
  for (a, b), to in zip(pairwise(begin), place, strict=False):
    out[to : to + b - a] = x[a:b]
  return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rows", [102, 110])
@pytest.mark.parametrize(
  "place, size", [([0, 32, 32, 96, 160], 224), ([0, 6, 7, 72, 106], 114), (BEGIN, 102)]
)
def test_every_row_arrives(dtype, rows, place, size):
  x = torch.randint(1, 200, (rows, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
  to = gather(torch.tensor(BEGIN).int(), torch.tensor(place).int(), size)
  out = moved(x, to)
  assert out.dtype == dtype and torch.equal(out, by_loops(x, BEGIN, place, size))
  assert int(to.inside.sum()) == BEGIN[-1]
  swapped = moved(x[None].mT.contiguous(), to, 2)  # [1, 3, rows]
  assert torch.equal(swapped, out[None].mT)


def test_no_rows():
  to = gather(torch.zeros(4).int(), torch.tensor([0, 4, 8, 8]).int(), 12)
  assert torch.equal(moved(torch.ones(0, 2), to), torch.zeros(12, 2))
  assert torch.equal(moved(torch.ones(5, 2), to), torch.zeros(12, 2))  # rows without an expert
