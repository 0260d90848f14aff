"""Which mixture of sources is best, from a swarm of small runs: a fit, its skill, a proposal.

Losses follow L(r) = c + exp(a + A · r) over shares r of the sources (data mixing laws, arXiv
2403.16952; the most consistent regressor of 2602.12237). For a fixed c, log(L − c) is linear, so c
is a search in one dimension around a ridge solution. A proposal minimises the fit on the simplex
under caps; there is none where the fit, left one out, predicts no better than the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RIDGE = 1e-3  # in units of the mean square of the centred shares
FLOORS = 40  # values of c that are tried
STEPS = 400  # of exponentiated gradient
MAX_ERROR = 2.0  # left-one-out RMSE over the seeds' sd, above which there is no proposal
MARGIN = 0.7  # of a mixture that leans on one source


@dataclass(frozen=True)
class Law:
  """L(r) = floor + exp(start + slope · r)."""

  floor: float
  start: float
  slope: tuple[float, ...]

  def __call__(self, shares: np.ndarray) -> np.ndarray:
    return self.floor + np.exp(self.start + shares @ np.array(self.slope))


def fit_law(shares: np.ndarray, losses: np.ndarray) -> Law:
  """The law of least squares in L over shares [n, S] and losses [n]."""
  low, spread = losses.min(), max(losses.max() - losses.min(), 1e-9)
  best: tuple[float, Law] | None = None
  for gap in spread * np.geomspace(0.02, 50, FLOORS):
    floor = low - gap
    start, slope = _line(shares, np.log(losses - floor), weights=losses - floor)
    law = Law(float(floor), start, tuple(slope.tolist()))
    error = float(((law(shares) - losses) ** 2).sum())
    if best is None or error < best[0]:
      best = error, law
  assert best is not None
  return best[1]


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
  """Ridge regression, each point weighted by what an error of its logarithm is in L."""
  w = (weights / weights.mean())[:, None]
  middle, level = np.average(x, 0, w[:, 0] ** 2), np.average(y, weights=w[:, 0] ** 2)
  centred = (x - middle) * w
  penalty = RIDGE * np.square(centred).mean() * len(x) * np.eye(x.shape[1])
  slope = np.linalg.solve(centred.T @ centred + penalty, centred.T @ ((y - level) * w[:, 0]))
  return float(level - middle @ slope), slope


@dataclass(frozen=True)
class Skill:
  """Left-one-out: RMSE, 1 − RMSE² / variance, and the rank correlation with what was seen."""

  rmse: float
  skill: float
  rank: float


@dataclass(frozen=True)
class Proposal:
  """shares: None where there is none, and `reason` says why. models: of each its skill."""

  shares: tuple[float, ...] | None
  reason: str
  predicted: float
  noise: float
  models: dict[str, Skill] = field(default_factory=dict)
  divergence: float = math.nan  # KL of the proposal from the natural mixture
  left_out: tuple[tuple[float, float], ...] = ()  # of each mixture: predicted by the others, seen

  def as_dict(self) -> dict[str, Any]:
    return asdict(self)


def propose(
  shares: np.ndarray,
  losses: np.ndarray,
  objective: np.ndarray,
  caps: np.ndarray,
  noise: float,
  natural: np.ndarray,
) -> Proposal:
  """The best mixture by a law of each source's loss, weighted.

  shares [n, S]; losses [n, S] of the sources' held-out sets; objective [S] weighs them, sums to 1;
  caps [S] bound the shares; noise: sd over seeds of the weighted loss.
  """
  seen = losses @ objective
  said = _left_out(shares, losses, objective)
  pairs = tuple(zip(said.tolist(), seen.tolist(), strict=True))
  models = {
    "log-linear": _skill(said, seen),
    "linear": _skill(_left_out_linear(shares, seen), seen),
    "constant": _skill(np.array([np.delete(seen, i).mean() for i in range(len(seen))]), seen),
  }
  own = models["log-linear"]
  if own.skill <= 0:
    reason = f"Left one out, the fit predicts no better than the mean: skill {own.skill:.2f}."
    return Proposal(None, reason, math.nan, noise, models, left_out=pairs)
  if own.rmse > MAX_ERROR * noise:
    reason = (
      f"Left one out, the fit errs by {own.rmse:.3g}, more than {MAX_ERROR:g} sd of seeds "
      f"({noise:.3g}); run more mixtures."
    )
    return Proposal(None, reason, math.nan, noise, models, left_out=pairs)
  laws = [fit_law(shares, losses[:, s]) for s in range(losses.shape[1])]
  best = minimise(laws, objective, caps)
  predicted = sum(w * float(law(best[None])[0]) for w, law in zip(objective, laws, strict=True))
  kl = float((best * np.log(np.maximum(best, 1e-12) / natural)).sum())
  reason = f"Skill {own.skill:.2f}, rank correlation {own.rank:.2f}."
  return Proposal(tuple(best.tolist()), reason, predicted, noise, models, kl, pairs)


def minimise(laws: Sequence[Law], objective: np.ndarray, caps: np.ndarray) -> np.ndarray:
  """Σ_s objective_s · L_s(r) over the simplex with r ≤ caps, by exponentiated gradient: convex,
  so the best point is the only one.
  """
  slopes = np.array([law.slope for law in laws])
  starts = np.array([law.start for law in laws])
  r = capped(caps / caps.sum(), caps)
  best, lowest = r, math.inf
  for step in range(STEPS):
    each = objective * np.exp(starts + slopes @ r)
    if each.sum() < lowest:
      best, lowest = r, float(each.sum())
    gradient = each @ slopes
    size = np.abs(gradient - gradient.mean()).max()
    if size < 1e-12:
      break
    r = capped(r * np.exp(-(gradient - gradient.mean()) / size / math.sqrt(1 + step / 8)), caps)
  return best


def capped(weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
  """The shares min(cap, t · weight) that sum to 1. ValueError if the caps sum to less."""
  if caps.sum() < 1 - 1e-9:
    raise ValueError(f"caps sum to {caps.sum():.3g}, less than 1: the sources hold too few tokens")
  r, free = np.zeros_like(weights), np.ones(len(weights), dtype=bool)
  weights = np.maximum(weights, 1e-300)
  for _ in range(len(weights) + 1):
    room = 1 - caps[~free].sum()
    r = np.where(free, weights * room / max(weights[free].sum(), 1e-300), caps)
    over = free & (r > caps)
    if not over.any():
      break
    free &= ~over
  return r / r.sum()


def _left_out(shares: np.ndarray, losses: np.ndarray, objective: np.ndarray) -> np.ndarray:
  """The weighted loss of each mixture by laws fitted to the others."""
  found = np.empty(len(shares))
  for i in range(len(shares)):
    rest = np.arange(len(shares)) != i
    laws = [fit_law(shares[rest], losses[rest, s]) for s in range(losses.shape[1])]
    found[i] = sum(
      w * float(law(shares[i : i + 1])[0]) for w, law in zip(objective, laws, strict=True)
    )
  return found


def _left_out_linear(shares: np.ndarray, seen: np.ndarray) -> np.ndarray:
  found = np.empty(len(seen))
  for i in range(len(seen)):
    rest = np.arange(len(seen)) != i
    start, slope = _line(shares[rest], seen[rest], np.ones(rest.sum()))
    found[i] = start + shares[i] @ slope
  return found


def _skill(predicted: np.ndarray, seen: np.ndarray) -> Skill:
  rmse = float(np.sqrt(np.square(predicted - seen).mean()))
  variance = float(seen.var())
  ranks = [np.argsort(np.argsort(x)) for x in (predicted, seen)]
  rank = float(np.corrcoef(*ranks)[0, 1]) if len(seen) > 2 else math.nan
  return Skill(rmse, 1 - rmse**2 / variance if variance > 0 else 0.0, rank)


def swarm(natural: np.ndarray, caps: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Mixtures [count, S]: natural, uniform, centroid of what the caps allow, one leaning on each
  source, the rest Dirichlet around natural with strengths spaced over 0.3 … 5, within the caps.
  """
  n, rng = len(natural), np.random.default_rng(seed)
  uniform = np.full(n, 1 / n)
  fixed = [natural, uniform, caps / caps.sum()]
  for s in range(n):
    fixed.append(np.where(np.arange(n) == s, MARGIN, (1 - MARGIN) / max(n - 1, 1)))
  found = [capped(r, caps) for r in fixed][:count]
  for strength in np.geomspace(0.3, 5, max(count - len(found), 0)):
    drawn = rng.dirichlet(np.maximum(natural * n * strength, 1e-3))
    for _ in range(1000):
      if (drawn <= caps).all():
        break
      drawn = rng.dirichlet(np.maximum(natural * n * strength, 1e-3))
    found.append(capped(drawn, caps))
  return np.array(found)
