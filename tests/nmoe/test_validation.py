"""The held-out set that a run is evaluated on, and bits per byte over it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prepared_cases import BYTE, in_memory, two_sources

from nmoe.data.loader import Validation, bits_per_byte, unigram_bpb
from nmoe.data.prepared import (
  open_data,
  shares,
)
from nmoe.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return two_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(folder):
  return open_data(folder)


def collect(validation, batch_size, ranks=1):
  """All windows in order: the ranks' batches put together, padding removed."""
  parts = [list(validation.batches(batch_size, r, ranks)) for r in range(ranks)]
  assert len({len(p) for p in parts}) == 1
  joined = [torch.cat([p[i][j] for i in range(len(parts[0])) for p in parts]) for j in range(3)]
  whole = joined[1][:, 0] >= 0
  assert (joined[1][~whole] == -1).all() and not joined[2][~whole].any()
  return [t[whole] for t in joined]


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (7, 1), (4, 2), (3, 5), (64, 2)])
def test_validation_is_frozen(data, batch_size, ranks):
  validation = Validation(data, seq_len=32, tokens=1500)
  expected = collect(validation, 1)
  found = collect(Validation(data, seq_len=32, tokens=1500), batch_size, ranks)
  assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
  tokens, targets, num_bytes = found
  assert tokens.numel() == 1500 // 32 * 32
  assert torch.equal(tokens[:, 1:], targets[:, :-1])
  assert torch.equal(num_bytes, (targets != BYTE.eot).int())


@given(
  heldout=st.lists(st.integers(0, 250), min_size=1, max_size=4).filter(lambda h: max(h) > 16),
  tokens=st.integers(1, 900),
)
def test_validation_windows_are_distinct_and_in_proportion(heldout, tokens):
  data = in_memory([1000] * len(heldout), heldout=heldout)
  validation = Validation(data, seq_len=16, tokens=tokens)
  have = np.array([max(0, h - 1) // 16 for h in heldout])
  expected = min(max(1, tokens // 16), have.sum())
  take = np.bincount(validation.source_W, minlength=len(heldout))
  assert take.sum() == expected and (take <= have).all()
  assert (np.abs(take - expected * have / have.sum()) < 1).all()
  inputs = collect(validation, 1)[0].numpy()
  assert (inputs < np.array(heldout)[validation.source_W][:, None]).all()
  places = inputs + 1000 * validation.source_W[:, None]
  assert len(np.unique(places)) == places.size


def test_validation_ignores_weights_and_shares_nothing_with_training(data):
  for source in data.sources:
    train, heldout = (np.load(source.folder / f"{s}-hashes.npy") for s in ("train", "heldout"))
    assert len(heldout) and not np.intersect1d(train, heldout).size


def test_too_little_held_out_is_named():
  data = in_memory([1000, 1000], heldout=[16, 0])
  with pytest.raises(DataError, match="'a': 16, .*needs 17; raise mixture.holdout"):
    Validation(data, seq_len=16, tokens=100)


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight(data):
  tokens, targets, num_bytes = collect(Validation(data, seq_len=32, tokens=1500), 4)
  nats = (num_bytes > 0) * math.log(256)
  assert bits_per_byte(nats.sum().item(), num_bytes.sum().item()) == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("tokens", [100, 1500, 1 << 40])
def test_unigram_bpb_against_its_definition(data, tokens):
  """Counted anew from the tokens on disk, token by token, in float64: over the very targets that a
  model's bits per byte is of, however few of the held-out tokens they are.
  """

  def tokens_of(source, split):
    return [
      t
      for e in source.manifest[split]["shards"]
      for t in np.load(source.folder / e["file"]).tolist()
    ]

  share = shares(data)
  probability = dict.fromkeys(range(257), 0.0)
  for source in data.sources:
    train = tokens_of(source, "train")
    for v in probability:
      probability[v] += share[source.name] * (train.count(v) + 1) / (len(train) + 257)
  validation = Validation(data, seq_len=32, tokens=tokens)
  windows = [t for _, y, _ in validation.batches(1) for t in y.flatten().tolist()]
  assert len(windows) <= tokens
  bits = [-math.log2(probability[t]) for t in windows if t != BYTE.eot]
  assert unigram_bpb(data, validation) == pytest.approx(math.fsum(bits) / len(bits), rel=1e-12)
