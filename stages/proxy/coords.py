"""The coordinate check: a few steps at several widths and depths, and how each effect grows.

The effect of a tensor is the RMS of (W_t − W_0) · x_t over the inputs x_t that it meets after t
steps (the refined check of arXiv 2605.14200); what ends a residual branch counts times the layers'
ratio. Under a right rule no effect depends on width or depth: its slope, log2 of the effect against
log2 of the factor, is near 0. A loss can hide a wrong rate where a slope cannot.

The change of an output W x, as of router logits, has two parts: (W_t − W_0) · x_t, the effect of
its rate, and W_0 · (x_t − x_0), which its rate does not make. W_0 has entries of size 1 / n: their
sum over n inputs falls with n^-1/2 where inputs move independently of W_0, and is flat where they
move along it. So the slope of the whole says how large the parts are, not whether a rate is right.
What is measured is each by itself: the effect, the change of the inputs, both flat, and W_0 · x_0.

A right rule's slopes are not 0 at small widths: what AdamW's change does to n inputs by chance
falls with n^-1/2, and with experts of 64 is half of it. So ±0.25 is the limit, halfway to ±0.5, the
least slope of a factor that is missing, and the interval over seeds decides: a class is out where
all of it is beyond the limit; where it reaches twice the limit, the check "cannot tell" and does
not pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from nmoe.config import file as configs
from nmoe.config.cut import ONE_CPU, few_steps
from nmoe.config.sections import Config, fingerprint
from nmoe.errors import RunError
from nmoe.machine.target import select
from nmoe.model.decoder import Experts, Linear, Mlp, Model
from nmoe.model.router import Router
from nmoe.train.optim import Optimizer
from nmoe.wording import counted
from stages.judge.intervals import Interval, interval_of
from stages.proxy.file import AXES, GROUPS, SweepFile, check_keys, load_sweep, with_rule
from stages.text import plain
from stages.workbench import Workbench

SEQ_LEN = 32
LIMITS = {  # of what is not flat: outputs start at n^-1/2, n terms of size 1 / n
  "router logits at init": (-0.65, -0.35),
  "logits at init": (-0.65, -0.35),
}
AXES_OF_CHECK = ("width", "depth")
STYLES = {"ok": "green", "out": "red", "cannot tell": "yellow"}
SAMPLE = 4  # experts of a layer that are measured


@dataclass(frozen=True)
class Slope:
  """A class of tensors over one axis with one optimizer; `limits` are those of its slope."""

  optimizer: str
  axis: str
  name: str
  interval: Interval
  limits: tuple[float, float]

  @property
  def state(self) -> Literal["ok", "out", "cannot tell"]:
    (low, high), i = self.limits, self.interval
    if i.low > high or i.high < low:
      return "out"
    room = (high - low) / 2
    return "ok" if low - room < i.low and i.high < high + room else "cannot tell"

  @property
  def sentence(self) -> str:
    (low, high), i = self.limits, self.interval
    of = f"over {self.axis} with {self.optimizer}"
    shown = f"slope {i.mean:+.2f} [{i.low:+.2f}, {i.high:+.2f}], required {low:+g} to {high:+g}"
    if math.isnan(i.mean):
      shown = "an effect is 0 or not finite"
    said = "is out" if self.state == "out" else "cannot be told"
    return f"{self.name} {said} {of}: {shown}"

  def as_dict(self) -> dict[str, Any]:
    return {**asdict(self), "out": self.state != "ok"}


def run(path: Path, console: Console) -> int:
  """Check the rule at the file's widths and depths, with both optimizers; 1 unless all are ok."""
  file = load_sweep(path)
  found = [slope for kind in ("adamw", "muon") for slope in check(file, kind)]
  console.print(_table(found))
  failed = failures(found)
  for sentence in failed:
    console.print(plain(sentence, STYLES["out"]))
  if not failed:
    console.print(f"all {len(found)} slopes pass")
  return 1 if failed else 0


def failures(slopes: Sequence[Slope]) -> list[str]:
  """A sentence for each class that is out, and one for all that cannot be told, with the widest."""
  said = [s.sentence for s in slopes if s.state == "out"]
  if unknown := [s for s in slopes if s.state == "cannot tell"]:
    widest = max(unknown, key=lambda s: -math.inf if math.isnan(s.interval.sd) else s.interval.sd)
    said.append(
      f"{counted(len(unknown), 'slope')} of {len(slopes)} cannot be told from a fault's at "
      f"{counted(widest.interval.n, 'seed')}: raise coords.seeds or coords.sequences, or widen the "
      f"range of coords.widths and coords.depths. The widest: {widest.sentence}"
    )
  return said


def evidence(file: SweepFile, bench: Workbench) -> dict[str, Any]:
  """The slopes that stand behind a sweep, with its optimizers: of an earlier call of the same code
  on the same base, or measured now. RunError unless every class is ok.
  """
  kinds = sorted({file.base.optim.matrices, file.base.optim.experts})
  asked = [
    fingerprint(file.base),
    bench.code_version,
    {k: list(v) if isinstance(v, tuple) else v for k, v in vars(file.coords).items()},
  ]
  for known in bench.experiments.list():
    before = known.conclusion.get("coords", {}) if known.name == file.sweep.name else {}
    if before.get("asked") == asked:
      return before
  with bench.console.status("coordinate check"):
    slopes = [slope for kind in kinds for slope in check(file, kind)]
  if failed := failures(slopes):
    raise RunError(
      f"{file.path}: the coordinate check does not pass, so that no rate is known to transfer; "
      "nothing was run:\n" + "\n".join(failed)
    )
  return {"asked": asked, "slopes": [s.as_dict() for s in slopes]}


def check(file: SweepFile, optimizer: str, axes: Sequence[str] = AXES_OF_CHECK) -> list[Slope]:
  """Every slope over widths and depths, with Student's interval over seeds."""
  return [slope for axis in axes for slope in _over(file, optimizer, axis)]


def _over(file: SweepFile, optimizer: str, axis: str) -> Iterator[Slope]:
  c = file.coords
  factors = c.widths if axis == "width" else c.depths
  by_seed = [
    [_measured(_config(file, axis, f, optimizer), seed, c.steps) for f in factors]
    for seed in range(c.seeds)
  ]
  for name in by_seed[0][0]:
    if axis == "depth" and name in LIMITS:
      continue
    slopes = [_slope(factors, [measured[name] for measured in each]) for each in by_seed]
    limits = LIMITS.get(name, (-c.limit, c.limit))
    yield Slope(optimizer, axis, name, _interval(np.array(slopes)), limits)


def _interval(slopes: np.ndarray) -> Interval:
  """Over all seeds, and NaN where one of them has no slope."""
  finite = np.isfinite(slopes).all()
  return interval_of(slopes, 0.95) if finite else Interval(len(slopes), *[math.nan] * 4)


def _slope(factors: Sequence[float], values: Sequence[float]) -> float:
  """NaN where an effect is 0 or not finite."""
  if not all(0 < value < math.inf for value in values):
    return math.nan
  return float(np.polyfit(np.log2(factors), np.log2(values), 1)[0])


def _config(file: SweepFile, axis: str, factor: int, optimizer: str) -> Config:
  """The base at a factor, on the cpu in fp32 and on short sequences, all rates the check's."""
  c, base = file.coords, file.base
  base = configs.changed(
    base,
    {
      **ONE_CPU,
      **check_keys(c, base),
      **few_steps(base, c.steps, SEQ_LEN * c.sequences),
      "data.seq_len": SEQ_LEN,
      "train.micro_batch": c.sequences,
      "optim.matrices": optimizer,
      "optim.experts": optimizer,
      "optim.eps": 1e-12,
      "moe.balance_alpha": 0.0,
      **dict.fromkeys((f"optim.{group}" for group in GROUPS), c.lr or base.optim.dense_lr),
    },
  )
  return with_rule(configs.changed(base, _times(base, axis, factor)), base)


def _times(base: Config, axis: str, factor: int) -> dict[str, Any]:
  from_axis = AXES[axis]
  known = {key: getattr(getattr(base, key.split(".")[0]), key.split(".")[1]) for key in from_axis}
  return {key: value * factor for key, value in known.items()}


def _measured(config: Config, seed: int, steps: int) -> dict[str, float]:
  """Class -> effect after the steps; "… at init" -> RMS before the first, "…, change" -> of what
  changed since.
  """
  target = select(config, 0)
  model = Model(config, target.ops)
  model.init_weights(seed)
  tokens = _tokens(config, seed)
  before = {name: p.detach().clone() for name, p in model.named_parameters()}
  first = _inputs(model, tokens)
  found = {f"{name} at init": _rms(out) for name, out in _outputs(model, first).items()}
  optimizer = Optimizer(model, config, target.ops)
  for _ in range(steps):
    output = model(tokens[:, :-1], tokens[:, 1:])
    (output.loss_sum / tokens[:, 1:].numel()).backward()
    optimizer.step(1.0, torch.ones(()))
  last = _inputs(model, tokens)
  routers = [name for name, module in model.named_modules() if isinstance(module, Router)]
  for name, of in {"router inputs": routers, "head inputs": ["head"]}.items():
    found[f"{name}, change"] = _rms(torch.stack([last[n][0] - first[n][0] for n in of]))
  return found | _effects(model, before, last, tokens)


def _tokens(config: Config, seed: int) -> Tensor:
  """Sequences [B, S + 1] whose token frequencies fall as 1 / rank, as text's do."""
  generator = torch.Generator().manual_seed(seed)
  weights = 1 / torch.arange(1, config.model.vocab_size + 1)
  count = config.train.micro_batch * (SEQ_LEN + 1)
  drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
  return drawn.view(-1, SEQ_LEN + 1)


@torch.no_grad()
def _inputs(model: Model, tokens: Tensor) -> dict[str, tuple]:
  """Those of every module that multiplies, and of the head."""
  inputs: dict[str, tuple] = {}
  with _recording(model, inputs):
    hidden = model.hidden(tokens[:, :-1])[0]
  return inputs | {"head": (hidden.flatten(0, 1),)}


@torch.no_grad()
def _outputs(model: Model, inputs: dict[str, tuple]) -> dict[str, Tensor]:
  """Router logits of all layers, and logits."""
  routers = [
    inputs[name][0] @ module.weight.T
    for name, module in model.named_modules()
    if isinstance(module, Router)
  ]
  logits = inputs["head"][0] @ model.head_weight.T
  return {"router logits": torch.stack(routers), "logits": logits}


@contextmanager
def _recording(model: Model, inputs: dict[str, tuple]) -> Iterator[None]:
  def keep(name: str) -> Callable[[Module, tuple], None]:
    return lambda _, given: inputs.__setitem__(name, given)

  hooks = [
    module.register_forward_pre_hook(keep(name))
    for name, module in model.named_modules()
    if isinstance(module, (Linear, Mlp, Experts, Router))
  ]
  try:
    yield
  finally:
    for hook in hooks:
      hook.remove()


@torch.no_grad()
def _effects(
  model: Model, before: dict[str, Tensor], inputs: dict[str, tuple], tokens: Tensor
) -> dict[str, float]:
  """RMS over layers of each class's effect."""
  config = model.config
  depth = config.model.num_layers / config.scaling.base_layers
  squares: dict[str, list[float]] = defaultdict(list)
  for name, module in model.named_modules():
    if name not in inputs:
      continue
    change = {
      key: p.detach() - before[f"{name}.{key}"] for key, p in module.named_parameters(recurse=False)
    }
    kind = name.rpartition(".")[2]
    if isinstance(module, (Linear, Router)) or name == "head":
      effect = inputs[name][0] @ change["weight"].T
      squares[kind].append(_rms(effect * (depth if kind == "o" else 1)) ** 2)
    elif isinstance(module, Mlp):
      _mlp(
        squares,
        kind,
        inputs[name][0].flatten(0, -2),
        module.w13,
        change["w13"],
        change["w2"],
        depth,
      )
    else:
      x_TD, expert_TK = inputs[name][:2]
      counts = torch.bincount(expert_TK.flatten().long(), minlength=len(module.w13))
      for e in counts.topk(SAMPLE).indices.tolist():
        rows = x_TD[(expert_TK == e).any(1)]
        _mlp(squares, kind, rows, module.w13[e], change["w13"][e], change["w2"][e], depth)
  found = {name: math.sqrt(sum(s) / len(s)) for name, s in squares.items()}
  embed = model.embed.weight.detach() - before["embed.weight"]
  return found | {"embed": _rms(F.embedding(tokens[:, :-1], embed))}


def _mlp(
  squares: dict, kind: str, x: Tensor, w13: Tensor, up: Tensor, down: Tensor, depth: float
) -> None:
  squares[f"{kind}.w13"].append(_rms(x @ up.T) ** 2)
  both = x @ w13.T
  squares[f"{kind}.w2"].append(_rms(F.silu(both[:, 0::2]) * both[:, 1::2] @ down.T * depth) ** 2)


def _rms(x: Tensor) -> float:
  return x.double().square().mean().sqrt().item()


def _table(slopes: Sequence[Slope]) -> Table:
  table = Table(title="Slopes of effects, 95 % interval over seeds", title_justify="left")
  for column in ("optimizer", "over", "tensor"):
    table.add_column(column)
  for column in ("slope", "interval", "required", ""):
    table.add_column(column, justify="right")
  for s in slopes:
    i, mark = s.interval, plain(s.state, STYLES[s.state])
    span = f"{i.low:+.2f} … {i.high:+.2f}"
    required = f"{s.limits[0]:+.2f} … {s.limits[1]:+.2f}"
    table.add_row(s.optimizer, s.axis, s.name, f"{i.mean:+.3f}", span, required, mark)
  return table
