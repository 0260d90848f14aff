"""Initial weights as a function of (seed, name, position) alone.

The same bits come out on every device, for every number of ranks, and in every model that holds a
parameter of that name and shape. A 64-bit mix of a counter (the finaliser of SplitMix64, Steele et
al. 2014) yields four 16-bit words; each picks one of 65536 quantiles of the normal distribution.
Integers and a table lookup only, so a GPU fills billions of weights in seconds and agrees with a
CPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

LEVELS = 1 << 16  # quantiles; the outermost lie at 4.33 standard deviations
CHUNK = 1 << 24  # weights made at a time: bounds the temporaries to about 1 GB


class NormalInit:
  """Fills tensors with normal weights from named streams of a seed."""

  def __init__(self, seed: int, device: torch.device):
    middle = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    quantile = torch.special.ndtri(middle)
    self.seed, self.device = seed, device
    self.unit = quantile / quantile.square().mean().sqrt()
    self.tables: dict[float, Tensor] = {}  # by standard deviation

  def fill_(self, out: Tensor, name: str, std: float) -> None:
    """Fill a contiguous floating tensor on the device from the stream `name`."""
    if std not in self.tables:
      self.tables[std] = (self.unit * std).float().to(self.device)
    table, stream = self.tables[std], _stream(self.seed, name)
    flat = out.view(-1)
    for start in range(0, flat.numel(), CHUNK):
      part = flat[start : start + CHUNK]
      part.copy_(table[_words(stream, start, part.numel(), out.device)])


def _stream(seed: int, name: str) -> int:
  digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
  return int.from_bytes(digest[:8], "little", signed=True)


def _words(stream: int, start: int, count: int, device: torch.device) -> Tensor:
  """Words start … start + count - 1 of the stream, as int32 below 2^16; start % 4 == 0."""
  first = start // 4
  z = torch.arange(first, first + -(-count // 4), dtype=torch.int64, device=device)
  z.mul_(_signed(0x9E3779B97F4A7C15)).add_(stream)
  z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
  z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
  z.bitwise_xor_(_shift(z, 31))
  return z.view(torch.int16)[:count].int().bitwise_and_(LEVELS - 1)


def _shift(z: Tensor, bits: int) -> Tensor:
  """A logical right shift of int64."""
  return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
  return word - (1 << 64)
