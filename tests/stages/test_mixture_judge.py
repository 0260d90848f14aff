"""The judge of mixtures on synthetic losses, whose best mixture is known."""

import numpy as np
import pytest

from stages.judge.mixture import Law, capped, fit_law, minimise, propose, swarm

NATURAL = np.array([0.6, 0.3, 0.1])
OPEN = np.ones(3)


def drawn(rng, noise=0.01, count=32):
  """A problem of three sources: each learns most from itself; losses of a swarm with noise."""
  laws = []
  for s in range(3):
    slope = rng.uniform(-0.5, 0.2, 3)
    slope[s] -= rng.uniform(0.5, 2.0)
    laws.append(Law(rng.uniform(0.5, 2), rng.uniform(-0.5, 0.5), tuple(slope)))
  shares = swarm(NATURAL, OPEN, count, int(rng.integers(1 << 30)))
  clean = np.stack([law(shares) for law in laws], axis=1)
  return laws, shares, clean + noise * rng.normal(size=clean.shape)


def true(laws, objective, r):
  return sum(w * law(r[None])[0] for w, law in zip(objective, laws, strict=True))


def lattice(caps, n=60):
  """Every mixture of three sources in steps of 1 / n, within the caps."""
  points = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n
  return points[(points <= caps + 1e-9).all(1)]


def test_1000_draws_propose_within_two_sd():
  """Regret against the best of the truth in units of a run's noise: within 2 in 95 %."""
  rng = np.random.default_rng(0)
  grid = lattice(OPEN)
  regrets = []
  for _ in range(1000):
    objective = rng.dirichlet(np.full(3, 2.0))
    laws, shares, losses = drawn(rng, count=24)
    own = [fit_law(shares, losses[:, s]) for s in range(3)]
    best = minimise(own, objective, OPEN)
    lowest = sum(w * law(grid) for w, law in zip(objective, laws, strict=True)).min()
    sd = 0.01 * np.linalg.norm(objective)
    regrets.append((true(laws, objective, best) - lowest) / sd)
  assert np.mean(np.array(regrets) <= 2) >= 0.95


def test_the_law_is_found_without_noise():
  rng = np.random.default_rng(1)
  laws, shares, losses = drawn(rng, noise=0.0, count=40)
  fresh = rng.dirichlet(np.ones(3), 50)
  for s, law in enumerate(laws):
    np.testing.assert_allclose(fit_law(shares, losses[:, s])(fresh), law(fresh), atol=0.02)


def test_minimise_agrees_with_a_lattice():
  rng = np.random.default_rng(2)
  for caps in (OPEN, np.array([0.5, 0.4, 0.6])):
    for _ in range(20):
      laws, *_ = drawn(rng)
      objective = rng.dirichlet(np.ones(3))
      grid = lattice(caps)
      lowest = min(true(laws, objective, r) for r in grid)
      found = minimise(laws, objective, caps)
      assert found.sum() == pytest.approx(1) and (found <= caps + 1e-9).all()
      assert true(laws, objective, found) <= lowest + 2e-3


def test_planted_answers():
  """One source's loss alone: at its cap. Two sources alike, each its own: between them."""
  rng = np.random.default_rng(3)
  laws = [Law(1, 0, (-2.0, 0, 0)), Law(1, 0, (0, -2.0, 0)), Law(1, 0, (0.3, 0.3, -0.2))]
  shares = swarm(NATURAL, OPEN, 32, 0)
  losses = np.stack([law(shares) for law in laws], axis=1) + 0.005 * rng.normal(size=(32, 3))
  caps = np.array([0.8, 1.0, 1.0])
  corner = propose(shares, losses, np.array([1.0, 0, 0]), caps, 0.01, NATURAL)
  assert corner.shares[0] == pytest.approx(0.8, abs=0.01)
  inside = propose(shares, losses, np.array([0.5, 0.5, 0]), OPEN, 0.01, NATURAL)
  assert 0.3 < inside.shares[0] < 0.7 and 0.3 < inside.shares[1] < 0.7
  assert inside.models["log-linear"].skill > inside.models["linear"].skill
  assert inside.models["constant"].skill < 0 < inside.divergence


def test_shuffled_losses_have_no_proposal():
  rng = np.random.default_rng(4)
  _, shares, losses = drawn(rng)
  proposals = [
    propose(shares, rng.permutation(losses), np.full(3, 1 / 3), OPEN, 0.01, NATURAL)
    for _ in range(10)
  ]
  assert all(p.shares is None for p in proposals)
  assert any("no better than the mean" in p.reason for p in proposals)


def test_a_swarm_keeps_within_its_caps():
  caps = np.array([0.9, 0.5, 0.15])
  found = swarm(NATURAL, caps, 32, 0)
  assert found.shape == (32, 3)
  np.testing.assert_allclose(found.sum(1), 1)
  assert (found <= caps + 1e-9).all()
  np.testing.assert_allclose(found[0], NATURAL)
  with pytest.raises(ValueError, match="caps sum to 0.9"):
    capped(NATURAL, np.array([0.3, 0.3, 0.3]))
