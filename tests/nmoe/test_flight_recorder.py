"""The flight recorder: its tags and values, nothing when off, and the same training when on."""

import math

import pytest
import torch
from model_configs import tiny

from kernels import reference
from kernels.reference import quantize
from nmoe.config.file import changed, to_toml
from nmoe.data.mixture import FilesSource, Mixture
from nmoe.data.prepare import prepare
from nmoe.data.prepared import open_data
from nmoe.data.tokenizer import get
from nmoe.distributed import parallel
from nmoe.distributed.meeting import Meeting
from nmoe.machine.target import select
from nmoe.model.decoder import Model
from nmoe.records import metrics
from nmoe.records.checkpoint import Writer
from nmoe.records.metrics import Metrics
from nmoe.records.root import Root
from nmoe.train.evaluations import Evaluations
from nmoe.train.flight import FlightRecorder
from nmoe.train.loop import build, parts_of, resume, train
from nmoe.train.session import Session

LINEARS = ("q", "kv_a", "kv_b", "o", "dense", "shared")
LEGS = {"fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_x", "wgrad_dy"}


def config_of(dtype, **values):
  values = {"precision__linears": LINEARS, "moe__expert_dim": 32, "target__dtype": dtype} | values
  return tiny(target__emulate_blockscale=True, **values)


def model_of(config):
  model = Model(config, reference)
  model.init_weights(config.train.seed)
  return model


def batches(config, num, vocab=97):
  """`num` pairs of tokens and targets."""
  generator = torch.Generator().manual_seed(7)
  shape = (num, 2, config.train.micro_batch, config.data.seq_len)
  return torch.randint(vocab, shape, generator=generator).unbind()


def forward_backward(model, pairs):
  """The sum of the losses; gradients accumulate."""
  total = 0.0
  for x, y in pairs:
    out = model(x, y)
    (out.loss_sum / 50 + out.balance_loss).backward()
    total += out.loss_sum.item()
  return total


def measured(config, num=1):
  model = model_of(config)
  recorder = FlightRecorder(model, 3)
  recorder.start(6)
  forward_backward(model, batches(config, num))
  return model, recorder.stop()


def sqnr(pairs):
  """dB from (exact, quantized) in float64."""
  signal = sum(x.double().square().sum().item() for x, _ in pairs)
  noise = sum((x.double() - q.double()).square().sum().item() for x, q in pairs)
  return 10 * math.log10(signal / noise)


def captured(config, num, name):
  """The inputs, and for the experts their routing, that a plain module hook sees."""
  seen, model = [], model_of(config)
  model.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args))
  for x, y in batches(config, num):
    model(x, y)
  return model, seen


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_a_linear_s_input_and_weight_over_two_micro_batches(dtype):
  config = config_of(dtype)
  _, values = measured(config, 2)
  model, seen = captured(config, 2, "layers.1.attention.kv_b")
  rows = [x.detach().flatten(0, 1) for (x,) in seen]
  expected = sqnr([(x, quantize(x, dtype).dequantize()) for x in rows])
  assert values["flight/1/kv_b/fprop_x/sqnr_db"] == pytest.approx(expected, rel=1e-5)
  w = model.layers[1].attention.kv_b.weight.detach()
  expected = sqnr([(w, quantize(w, dtype, square=dtype == "nvfp4").dequantize())])
  assert values["flight/1/kv_b/fprop_w/sqnr_db"] == pytest.approx(expected, rel=1e-5)
  assert values["flight/1/kv_b/fprop_x/underflow"] == 0


def test_every_expert_s_rows():
  """nvfp4's tensor scale is that of all experts' rows together."""
  config = config_of("nvfp4")
  _, values = measured(config)
  _, ((x, expert_TK, _, _),) = captured(config, 1, "layers.2.moe.experts")
  x, amax = x.detach(), x.detach().abs().max().float()
  each = {}
  for e in range(config.moe.num_experts):
    rows = x[(expert_TK == e).any(1)]
    if len(rows):
      each[e] = sqnr([(rows, quantize(rows, "nvfp4", tensor_amax=amax).dequantize())])
  where = "flight/2/experts/w13.fprop_x"
  assert len(each) > 3
  for e, db in each.items():
    assert values[f"{where}/{e}/sqnr_db"] == pytest.approx(db, rel=1e-5)
  for name, f in (("min", min), ("max", max)):
    assert values[f"{where}/sqnr_db_{name}"] == pytest.approx(f(each.values()), rel=1e-5)
  assert min(each.values()) < values[f"{where}/sqnr_db"] < max(each.values())


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_the_tags_are_those_of_the_recipe(dtype):
  config = config_of(dtype, precision__linears=("o", "dense"), precision__bf16_last_layers=1)
  model, values = measured(config)
  assert set(model.quantized) == {(0, "o"), (0, "dense"), (1, "o"), (1, "experts")}
  two = {f"{w}.{leg}" for w in ("w13", "w2") for leg in LEGS}
  wanted = {("0", "o"): LEGS, ("1", "o"): LEGS, ("0", "dense"): two, ("1", "experts"): two}
  found = {tuple(tag.split("/")[1:4]) for tag in values}
  assert found == {(*place, leg) for place, legs in wanted.items() for leg in legs}
  kinds = {tag.split("/", 4)[4] for tag in values if "/o/" in tag}
  assert kinds == {"sqnr_db", "saturated", "underflow"}
  dbs = [v for tag, v in values.items() if tag.endswith("/sqnr_db")]
  low, high = (24, 45) if dtype == "fp8" else (8, 35)
  assert all(low < db < high for db in dbs), (min(dbs), max(dbs))


def test_off_means_no_observer_and_bf16_has_nothing_to_observe():
  for config, every, step in (
    (config_of("fp8"), 0, 6),
    (config_of("fp8"), 4, 6),
    (tiny(target__dtype="bf16"), 1, 1),
  ):
    model = model_of(config)
    recorder = FlightRecorder(model, every)
    recorder.start(step)
    modules = [m for m in model.modules() if hasattr(m, "recipe")]
    assert modules and all(m.recipe.observe is None for m in modules)
    forward_backward(model, batches(config, 1))
    assert recorder.stop() == {}
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_a_measured_step_leaves_no_observer_behind():
  model, values = measured(config_of("nvfp4"))
  assert values and all(m.recipe.observe is None for m in model.quantized.values())


def test_draws_change_the_gradients_and_only_them():
  """A function of the place alone: the same place repeats its bits, another has other noise."""
  config = config_of("nvfp4")

  def run(*place):
    model = model_of(config)
    model.set_draw(*place)
    loss = forward_backward(model, batches(config, 1))
    assert len({m.recipe.draw for m in model.quantized.values()}) == len(model.quantized)
    return loss, [p.grad for m in model.quantized.values() for p in m.parameters()]

  loss, gradients = run(3, 1, 0)
  again, same = run(3, 1, 0)
  assert loss == again and all(map(torch.equal, gradients, same))
  for place in ((4, 1, 0), (3, 2, 0), (3, 1, 1)):
    other_loss, other = run(*place)
    assert other_loss == loss and not any(map(torch.equal, gradients, other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A root with 80 prepared texts of bytes; returns the root and the prepared folder."""
  root = tmp_path_factory.mktemp("flight")
  for i in range(80):
    (root / f"{i}.txt").write_text(f"text {i}: " + "lorem ipsum dolor " * (1 + i % 5))
  source = FilesSource(name="texts", paths=(str(root / "*.txt"),), format="text")
  return root, prepare(Mixture(sources=(source,), holdout=0.1), get("byte"), root)


class Steps:
  """In the profiler's place: counts steps, and asks the run to stop after `stop` of them."""

  def __init__(self, stop):
    self.left, self.session = stop, None

  def step(self):
    self.left -= 1
    self.session.stop = self.left == 0


def trained(folder, config, name, stop=-1):
  """(the loss of every step, all tags) of a run in this process, from its checkpoint if any."""
  root, data = folder
  target = select(config)
  ranks = parallel.init(config, target, Meeting())
  checkpoints = Writer(root / "checkpoints" / name, config.train.keep_checkpoints)
  meta = {"run": name, "config": to_toml(config)}
  steps, writer = Steps(stop), Metrics(root, name)
  opened = open_data(data)
  session = Session(
    config=config,
    target=target,
    parallel=ranks,
    data=opened,
    metrics=writer,
    checkpoints=checkpoints,
    evaluations=Evaluations(config, ranks, opened, Root(root), name),
    meta=meta,
    profiler=steps,
  )
  state, steps.session = build(config, target, ranks), session
  resume(session, state)
  with checkpoints:
    train(session, state, parts_of(session, state))
  writer.flush()
  logged = metrics.read(root, name)
  return logged["train/loss"][2].tolist(), logged


def six_steps(**values):
  """A configuration of six steps of two micro-batches each, all logged."""
  config = config_of("nvfp4", model__vocab_size=257, schedule__total_tokens=48 * 6, **values)
  return changed(config, {"train.log_every": 1, "train.micro_batch": 1, "launch.threads": 1})


def test_training_has_the_same_bits_with_and_without(folder):
  config = six_steps(train__keep_checkpoints=0)
  plain, without = trained(folder, config, "without")
  config = changed(config, {"train.flight_every": 2})
  watched, logged = trained(folder, config, "with")
  assert plain == watched and len(plain) == 6
  tag = "flight/1/experts/w2.wgrad_dy/sqnr_db"
  assert logged[tag][0].tolist() == [2, 4, 6] and not any(t.startswith("flight") for t in without)


def test_a_resumed_run_repeats_the_stochastic_rounding(folder):
  config = six_steps()
  whole, _ = trained(folder, config, "whole")
  part, _ = trained(folder, config, "part", stop=3)
  both, _ = trained(folder, config, "part")
  assert part == whole[:3] and both == whole and len(whole) == 6
