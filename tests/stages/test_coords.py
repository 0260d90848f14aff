"""The coordinate check passes the rule and names each planted fault, once per optimizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nmoe.config import scaling
from stages.proxy import coords
from stages.proxy.file import load_sweep

FILE = Path(__file__).parents[2] / "configs" / "proxy" / "lr-width-cpu.toml"


@pytest.fixture(scope="module")
def file():
  found = load_sweep(FILE)
  return replace(found, coords=replace(found.coords, widths=(2, 8), depths=(1, 4), seeds=3))


def out(file, optimizer, axis, states=("out",)):
  return {s.name for s in coords.check(file, optimizer, (axis,)) if s.state in states}


@pytest.mark.parametrize(
  ("slopes", "state"),
  [
    ([0.1, 0.2, 0.15], "ok"),  # 0.15 ± 0.12
    ([0.2, 0.3, 0.28], "ok"),  # 0.26 ± 0.13: the limit lies inside, a missing factor's 0.5 outside
    ([0.2, 0.4, -0.1], "cannot tell"),  # 0.17 ± 0.62
    ([-0.46, -0.24], "cannot tell"),  # -0.35 [-1.75, +1.05], of two seeds
    ([0.5, 0.55, 0.45], "out"),
    ([-1.0, -0.9, -1.1], "out"),
    ([0.27, 0.29, 0.28], "out"),
    ([0.0, 0.1, np.nan], "cannot tell"),
  ],
)
def test_the_whole_interval_decides(slopes, state):
  found = coords.Slope("muon", "width", "q", coords._interval(np.array(slopes)), (-0.25, 0.25))
  assert found.state == state
  assert found.as_dict()["out"] == (state != "ok")
  if state != "ok":
    assert {"out": "q is out over", "cannot tell": "q cannot be told over"}[state] in found.sentence


def test_what_cannot_be_told_is_one_sentence():
  """Of a small model at two seeds 20 classes are unknown, which is one thing to do."""
  known = {
    "q": [0.5, 0.52, 0.48],
    "o": [0.0, 0.1, 0.05],
    "w2": [-2.0, 2.0, 1.0],
    "k": [0.5, -0.5, 0],
  }
  slopes = [
    coords.Slope("adamw", "width", name, coords._interval(np.array(values)), (-0.25, 0.25))
    for name, values in known.items()
  ]
  out, unknown = coords.failures(slopes)
  assert out.startswith("q is out over width with adamw: slope +0.50 [+0.45, +0.55]")
  assert unknown.startswith("2 slopes of 4 cannot be told") and "raise coords.seeds" in unknown
  assert "The widest: w2 cannot be told" in unknown
  assert coords.failures(slopes[1:2]) == []


@pytest.mark.parametrize("effect", [0.0, np.nan, np.inf])
def test_an_effect_that_is_none_has_no_slope(effect):
  assert np.isnan(coords._slope((2, 4), (1.0, effect)))


def test_models_of_a_check_may_have_other_sizes(file):
  """At the base's share of active experts: no factor of the rule is another."""
  other = replace(file, coords=replace(file.coords, experts=16, vocab_size=100))
  made = coords._config(other, "width", 2, "adamw")
  assert (made.moe.num_experts, made.moe.top_k, made.model.vocab_size) == (16, 4, 100)
  right = coords._config(file, "width", 2, "adamw")
  assert (right.moe.num_experts, right.moe.top_k, right.model.vocab_size) == (8, 2, 257)
  rates = [{r.name: (r.std, r.lr) for r in scaling.roles(c)} for c in (made, right)]
  assert rates[0] == rates[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("axis", ["width", "depth"])
def test_the_rule_passes(file, optimizer, axis):
  assert out(file, optimizer, axis, ("out", "cannot tell")) == set()


def plant(monkeypatch, change):
  """Rates of the optimizer changed: change(config, name, muon) -> a factor on the rate."""
  right = scaling.rates

  def rates(config, name, ndim, muon=False):
    lr, decay = right(config, name, ndim, muon)
    return lr * change(config, name, muon), decay

  monkeypatch.setattr(scaling, "rates", rates)


def width(config):
  return scaling.Ratios.of(config).width


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_router_rate_without_its_factor_is_named(file, optimizer, monkeypatch):
  plant(monkeypatch, lambda c, name, _: width(c) if "router" in name else 1)
  assert "router" in out(file, optimizer, "width")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_w13_rate_without_its_factor_is_named(file, optimizer, monkeypatch):
  power = 1 if optimizer == "adamw" else 0.5
  plant(monkeypatch, lambda c, name, _: width(c) ** power if "w13" in name else 1)
  assert {"mlp.w13", "experts.w13", "shared.w13"} <= out(file, optimizer, "width")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_branches_without_their_share_of_the_depth_are_named(file, optimizer, monkeypatch):
  monkeypatch.setattr(scaling, "_depth", lambda name, r: 1.0)
  assert {"o", "mlp.w2", "experts.w2", "shared.w2"} <= out(file, optimizer, "depth")


def test_adams_factor_on_top_of_muons_is_named(file, monkeypatch):
  plant(monkeypatch, lambda c, _, muon: 1 / width(c) if muon else 1)
  found = out(file, "muon", "width")
  assert {"q", "o", "mlp.w13", "mlp.w2", "experts.w13", "experts.w2"} <= found
  assert not {"router", "head", "embed"} & found
