"""Keyed pseudo-random functions and permutations of any size, with O(1) work an element."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 3  # each turns both halves once
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: int | str) -> np.uint64:
  """64 bits from any parts; different parts give unrelated keys."""
  digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
  return np.uint64(int.from_bytes(digest, "little"))


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of uint64."""
  x = x + _GOLDEN
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """The image of each index under the permutation of range(size) that its key selects.

  All three are uint64 arrays of one shape, 0 <= index < size < 2^52. A generalised Feistel network
  on a · b >= size points (Black and Rogaway, CT-RSA 2002), walked along its cycle until the image
  is below size; a · b - size < a ≈ sqrt(size), so a second walk is rare.
  """
  a = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
  b = (size + a - np.uint64(1)) // a
  out = _feistel(index, a, b, keys)
  outside = np.flatnonzero(out >= size)
  while len(outside):
    out[outside] = _feistel(out[outside], a[outside], b[outside], keys[outside])
    outside = outside[out[outside] >= size[outside]]
  return out


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
  left, right = x // b, x % b
  for _ in range(ROUNDS):
    keys = mix(keys)
    left = (left + mix(right ^ keys) % a) % a
    keys = mix(keys)
    right = (right + mix(left ^ keys) % b) % b
  return left * b + right
