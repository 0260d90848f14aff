"""The coordinate check passes the rule and names each planted fault, once per optimizer."""

from dataclasses import replace
from pathlib import Path

import pytest

from nmoe.config import scaling
from stages.proxy import coords
from stages.proxy.file import load_sweep

FILE = Path(__file__).parents[2] / "configs" / "proxy" / "lr-width-cpu.toml"


@pytest.fixture(scope="module")
def file():
  found = load_sweep(FILE)
  return replace(found, coords=replace(found.coords, widths=(2, 8), depths=(1, 4), seeds=2))


def out(file, optimizer, axis):
  return {s.name for s in coords.check(file, optimizer, (axis,)) if s.out}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("axis", ["width", "depth"])
def test_the_rule_passes(file, optimizer, axis):
  assert out(file, optimizer, axis) == set()


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
