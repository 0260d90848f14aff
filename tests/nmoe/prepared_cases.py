"""Prepared data for tests: sources in memory, and a folder of two small ones."""

from pathlib import Path

import numpy as np
import pytest

from nmoe.data import tokenizer
from nmoe.data.mixture import FilesSource, Mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import PreparedData, PreparedSource
from nmoe.data.shards import Stream

BYTE = tokenizer.get("byte")


def in_memory(lengths, weights=None, temperature=1.0, heldout=()):
  """Sources a, b, … whose tokens are their own positions, so that a sample shows where it lies."""
  sources = tuple(
    PreparedSource(
      name=chr(ord("a") + i),
      weight=weights[i] if weights else None,
      folder=Path(),
      manifest={},
      train=Stream([np.arange(n, dtype=np.uint32)]),
      heldout=Stream([np.arange(heldout[i] if heldout else 0, dtype=np.uint32)]),
    )
    for i, n in enumerate(lengths)
  )
  return PreparedData("digest", BYTE, temperature, sources)


def two_sources(root):
  """A prepared mixture of two small sources with several shards each."""
  rng = np.random.default_rng(0)
  sources = []
  for name, words in (("plain", ["one ", "two ", "three "]), ("odd", ["ä", "ß ", "¿", "z"])):
    (root / name).mkdir()
    for i in range(200):
      text = "".join(rng.choice(words, size=rng.integers(5, 120)))
      (root / name / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    sources.append(FilesSource(name=name, paths=(str(root / name / "*"),), format="text"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("nmoe.data.shards.SHARD_TOKENS", 8192)
    patch.setattr("nmoe.data.prepare.BATCH_BYTES", 4096)
    return prepare(Mixture(sources=tuple(sources), holdout=0.1), BYTE, root)
