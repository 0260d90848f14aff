"""The optimizer against torch's own AdamW and Muon, its groups, its clip and its state.

One file: both optimizers are asked the same of the same small model.
"""

import copy
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import _muon

from kernels import reference
from kernels.reference.newton_schulz import newton_schulz
from nmoe.config.file import changed, load
from nmoe.config.parameters import owners
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.model.decoder import Model, matrix_blocks, parameter_group
from nmoe.train import optim
from nmoe.train.optim import GROUPS, UPDATE_RMS, Optimizer, clip_factor

ONE = torch.tensor(1.0)
TINY = {
  "optim.matrices": "adamw",
  "model.dim": 32,
  "model.num_layers": 3,
  "model.dense_dim": 48,
  "model.num_heads": 2,
  "model.q_lora_rank": 24,
  "model.kv_lora_rank": 16,
  "model.qk_nope_dim": 8,
  "model.qk_rope_dim": 4,
  "model.v_dim": 8,
  "moe.num_experts": 4,
  "moe.top_k": 2,
  "moe.expert_dim": 16,
  "data.seq_len": 32,
  "train.micro_batch": 4,
  "schedule.batch_tokens": 128,
  "optim.dense_lr": 1e-2,
  "optim.router_lr": 2e-2,
  "optim.expert_lr": 3e-2,
  "optim.dense_weight_decay": 0.1,
  "optim.router_weight_decay": 0.0,
}


def config(**values) -> Config:
  return changed(load("configs/moonlet/cpu.toml", env={}), TINY | values)


def build(c: Config) -> tuple[Model, Optimizer]:
  model = Model(c, reference)
  model.init_weights(seed=0)
  return model, Optimizer(model, c, reference)


def fill_grads(model: nn.Module, seed: int, size: float = 1.0) -> None:
  """Random gradients, in the dtype that a backward pass would give them."""
  generator = torch.Generator().manual_seed(seed)
  for p in model.parameters():
    noise = torch.randn(p.shape, generator=generator) * size
    p.grad = noise.to(p.grad_dtype)


def run(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
  for seed in seeds:
    fill_grads(model, seed)
    optimizer.step(0.5, torch.tensor(0.25))


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
  return copy.deepcopy({**model.state_dict(), **optimizer.state_dict()})


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def labelled(name: str) -> Callable[[str], str]:
  return lambda message: f"{name}: {message}"


def torch_adamw(params: dict[str, torch.Tensor], c: Config) -> torch.optim.AdamW:
  """The same groups in torch's AdamW: the oracle."""
  o = c.optim
  groups = []
  for name, p in params.items():
    group = parameter_group(name)
    lr = {"dense": o.dense_lr, "router": o.router_lr, "expert": o.expert_lr}[group]
    decay = {"dense": 0.1, "router": 0.0, "expert": 0.2}[group] if p.ndim > 1 else 0.0
    groups.append({"params": [p], "lr": lr * 0.5, "weight_decay": decay})
  return torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)


def test_adamw_equals_torch_in_float64():
  """20 steps with three rates and decays stay within fp32's rounding of torch in float64."""
  c = config(**{"optim.expert_weight_decay": 0.2})
  model, optimizer = build(c)
  oracle = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
  theirs = torch_adamw(oracle, c)
  for seed in range(20):
    fill_grads(model, seed)
    for name, p in model.named_parameters():
      oracle[name].grad = p.grad.double() * 0.25
    optimizer.step(0.5, torch.tensor(0.25))
    theirs.step()
  for name, p in model.named_parameters():
    torch.testing.assert_close(p.double(), oracle[name], rtol=2e-5, atol=2e-6, msg=labelled(name))


class Plain(nn.Module):
  """One attention output matrix under its real name, so that matrix_blocks takes it whole."""

  def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.float32):
    super().__init__()
    self.o = nn.Module()
    generator = torch.Generator().manual_seed(5)
    self.o.weight = nn.Parameter(torch.randn(rows, columns, generator=generator).to(dtype))


MUON = sys.modules[reference.muon.__module__]


def torch_newton_schulz(g: torch.Tensor, steps: int) -> torch.Tensor:
  coefficients = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
  return torch.stack(
    [_muon._zeropower_via_newtonschulz(x, coefficients, steps, _muon.EPS) for x in g.flatten(0, -3)]
  ).view_as(g)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_equals_torch_on_a_plain_matrix(shape, monkeypatch):
  """With torch's own Newton-Schulz in our place, 10 steps agree to fp32 rounding."""
  c = config(**{"optim.matrices": "muon"})
  ours, theirs = Plain(*shape), Plain(*shape)
  monkeypatch.setattr(MUON, "newton_schulz", torch_newton_schulz)
  optimizer = Optimizer(ours, c, reference)
  oracle = torch.optim.Muon(
    theirs.parameters(), lr=c.optim.dense_lr * 0.5, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
  )
  for seed in range(10):
    fill_grads(ours, seed)
    theirs.o.weight.grad = ours.o.weight.grad * 0.25
    optimizer.step(0.5, torch.tensor(0.25))
    oracle.step()
  torch.testing.assert_close(ours.o.weight, theirs.o.weight, rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_logical_block():
  """The update of every block equals Muon of that block alone, experts one by one."""
  c = config(**{"optim.matrices": "muon", "optim.experts": "muon", "optim.dense_weight_decay": 0.0})
  c = changed(c, {"optim.expert_weight_decay": 0.0, "optim.muon_momentum": 0.0})
  model, optimizer = build(c)
  before = copy.deepcopy(model.state_dict())
  fill_grads(model, 1)
  grads = {name: p.grad for name, p in model.named_parameters()}
  optimizer.step(1.0, ONE)
  for name, p in model.named_parameters():
    lr = c.optim.expert_lr if parameter_group(name) == "expert" else c.optim.dense_lr
    update = (before[name] - p.detach()) / lr
    for block in matrix_blocks(name, tuple(p.shape), c):
      steps, inputs = (block.view(t).flatten(-3, -2) for t in (update, grads[name]))
      size = steps.shape[-2:]
      for step, grad in zip(steps.reshape(-1, *size), inputs.reshape(-1, *size), strict=True):
        want = newton_schulz(grad, 5) * UPDATE_RMS * math.sqrt(max(size))
        torch.testing.assert_close(step, want, rtol=1e-3, atol=1e-4, msg=labelled(name))
        assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25), name


def test_muon_batches_same_shaped_matrices(monkeypatch):
  """One call per block of each shape, and the memory limit does not change the result."""
  c = config(**{"optim.matrices": "muon", "optim.experts": "muon"})
  calls = []

  def counted(g, steps):
    calls.append(tuple(g.shape))
    return newton_schulz(g, steps)

  monkeypatch.setattr(MUON, "newton_schulz", counted)
  model, one_by_one = Model(c, reference), Model(c, reference)
  for m in (model, one_by_one):
    m.init_weights(0)
    fill_grads(m, 2)
  Optimizer(model, c, reference).step(1.0, ONE)
  kinds = {
    (p.shape, blocks)
    for name, p in model.named_parameters()
    if (blocks := matrix_blocks(name, tuple(p.shape), c))
  }
  assert len(calls) == sum(len(blocks) for _, blocks in kinds)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(optim, "MUON_BATCH", 1)
    optimizer = Optimizer(one_by_one, c, reference)
  assert all(len(batch.slots) == 1 for batch in optimizer.muon)
  optimizer.step(1.0, ONE)
  for a, b in zip(model.parameters(), one_by_one.parameters(), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


IDLE = [  # experts without a token, step by step
  (),
  (1,),
  (1, 2),
  (1,),
  (0, 1, 2, 3),
  (),
]


@pytest.mark.faults
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_muon_leaves_an_expert_without_a_token_alone(micro_batch, monkeypatch):
  """Each expert is as torch's Muon makes it that takes only the steps in which it got tokens: its
  momentum stays, and no decay.
  """
  c = config(
    **{"optim.experts": "muon", "train.micro_batch": micro_batch, "optim.expert_weight_decay": 0.2}
  )
  model, _ = build(c)
  monkeypatch.setattr(MUON, "newton_schulz", torch_newton_schulz)
  optimizer = Optimizer(model, c, reference)
  names = [n for n, _ in model.named_parameters() if n.endswith("experts.w2")]
  params = dict(model.named_parameters())
  oracle, theirs = {}, {}
  for name in names:
    for e in range(4):
      oracle[name, e] = params[name][e].detach().clone().requires_grad_()
      theirs[name, e] = torch.optim.Muon(
        [oracle[name, e]],
        lr=c.optim.expert_lr,
        weight_decay=0.2,
        momentum=c.optim.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
      )
  for seed, idle in enumerate(IDLE):
    fill_grads(model, seed)
    before = snapshot(model, optimizer)
    for name in params:
      if ".experts." in name:
        params[name].grad[list(idle)] = 0
    for name, e in oracle:
      if e not in idle:
        oracle[name, e].grad = params[name].grad[e].clone()
        theirs[name, e].step()
    optimizer.step(1.0, ONE)
    after = snapshot(model, optimizer)
    for key, x in after.items():
      if ".experts." in key:
        for e in range(4):
          assert torch.equal(x[e], before[key][e]) == (e in idle), (seed, key, e)
  for name, e in oracle:
    torch.testing.assert_close(params[name][e], oracle[name, e], rtol=1e-5, atol=1e-6)


@pytest.mark.faults
def test_an_expert_without_a_token_changes_no_bit_of_the_others():
  c = config(**{"optim.experts": "muon"})
  states = []
  for idle in (True, False):
    model, optimizer = build(c)
    for seed in range(3):
      fill_grads(model, seed)
      for name, p in model.named_parameters():
        if idle and ".experts." in name and seed:
          p.grad[1] = 0
      optimizer.step(0.5, torch.tensor(0.25))
    states.append(snapshot(model, optimizer))
  for key, x in states[0].items():
    kept = [0, 2, 3] if ".experts." in key else slice(None)
    assert torch.equal(x[kept], states[1][key][kept]) if x.ndim else x == states[1][key], key


def test_every_parameter_is_in_its_group():
  c = config(**{"optim.matrices": "muon", "optim.experts": "muon"})
  model, optimizer = build(c)
  names = {group: [slot.name for slot in optimizer.slots[group]] for group in GROUPS}
  assert sorted(sum(names.values(), [])) == sorted(name for name, _ in model.named_parameters())
  moe = range(c.model.num_dense_layers, c.model.num_layers)
  assert names["router"] == [f"layers.{i}.moe.router.weight" for i in moe]
  assert names["expert"] == [f"layers.{i}.moe.experts.{w}" for i in moe for w in ("w13", "w2")]
  by_adamw = {slot.name for batch in optimizer.adamw.values() for slot in batch.slots}
  norms = {name for name, p in model.named_parameters() if p.ndim == 1}
  assert by_adamw == norms | {"embed.weight", "head.weight"} | set(names["router"])
  rates = {slot.name: batch.lr for batch in optimizer.muon for slot in batch.slots}
  assert {rates[name] for name in names["expert"]} == {c.optim.expert_lr}
  assert {rates[name] for name in rates if name not in names["expert"]} == {c.optim.dense_lr}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_takes_the_base_rate_and_spares_norms(kind):
  """Under zero gradients a step is W · (1 - lr · decay), and norms stay bit for bit."""
  c = config(**{"optim.matrices": kind, "optim.experts": kind, "optim.expert_weight_decay": 0.3})
  model, optimizer = build(c)
  before = copy.deepcopy(dict(model.named_parameters()))
  for p in model.parameters():
    p.grad = torch.zeros_like(p)
  optimizer.step(0.5, ONE)
  idle = kind == "muon"  # an expert that got no token
  shrink = {"dense": 1 - 0.5e-2 * 0.1, "router": 1.0, "expert": 1.0 if idle else 1 - 1.5e-2 * 0.3}
  for name, p in model.named_parameters():
    factor = shrink[parameter_group(name)] if p.ndim > 1 else 1.0
    if factor == 1.0:
      assert torch.equal(p, before[name]), name
    else:
      torch.testing.assert_close(p, before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norms_per_group_are_those_of_float64(dtype):
  model, optimizer = build(config(**{"target.dtype": dtype}))
  fill_grads(model, 3, size=1e-3)
  want = dict.fromkeys(GROUPS, 0.0)
  for name, p in model.named_parameters():
    want[parameter_group(name)] += p.grad.double().square().sum().item()
  squared = optimizer.squared_norms()
  assert squared.dtype == torch.float32
  assert dict(zip(GROUPS, squared.tolist(), strict=True)) == pytest.approx(want, rel=1e-5)
  norms = {name: norm.item() for name, norm in optimizer.grad_norms().items()}
  assert norms.pop("all") == pytest.approx(math.sqrt(sum(want.values())), rel=1e-5)
  assert norms == pytest.approx({k: math.sqrt(v) for k, v in want.items()}, rel=1e-5)
  doubled = optimizer.grad_norms(lambda squared: squared * 4)
  assert doubled["expert"].item() == pytest.approx(2 * norms["expert"], rel=1e-6)


def test_clip_factor():
  assert clip_factor(torch.tensor(4.0), 1.0).item() == 0.25
  assert clip_factor(torch.tensor(0.5), 1.0).item() == 1.0
  assert clip_factor(torch.tensor(0.0), 1.0).item() == 1.0
  assert clip_factor(torch.tensor(torch.nan), 1.0).isnan()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_scaling_is_clipping_the_gradients(kind):
  """A step under the clip factor equals a step on gradients that torch has clipped."""
  c = config(**{"optim.matrices": kind, "optim.experts": kind})
  (ours, a), (theirs, b) = build(c), build(c)
  for seed in range(3):
    fill_grads(ours, seed)
    fill_grads(theirs, seed)
    a.step(1.0, clip_factor(a.grad_norms()["all"], 1.0))
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    b.step(1.0, ONE)
  for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nan_scale_changes_nothing_but_the_count(kind):
  model, optimizer = build(config(**{"optim.matrices": kind, "optim.experts": kind}))
  run(model, optimizer, range(2))
  before = snapshot(model, optimizer)
  fill_grads(model, 9, size=math.inf)
  optimizer.step(1.0, torch.tensor(torch.nan))
  before["optimizer.steps"] += 1
  assert_bit_equal(snapshot(model, optimizer), before)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
  ("dtype", "moments"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_owners_update_their_rows_as_one_rank_does(ranks, kind, dtype, moments):
  """From the same summed gradients, bit for bit: weights, state, and squares that add up."""
  c = config(**{"optim.matrices": kind, "optim.experts": kind, "optim.moments": moments})
  c = changed(c, {"target.dtype": dtype})
  model, optimizer = build(c)
  shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
  parts = []
  for owned in owners(shapes, ranks):
    copied = Model(c, reference)
    copied.init_weights(seed=0)
    parts.append((owned, copied, Optimizer(copied, c, reference, owned)))
  for seed in range(3):
    for m in (model, *(m for _, m, _ in parts)):
      fill_grads(m, seed)
    squares = sum(o.squared_norms() for *_, o in parts)
    torch.testing.assert_close(squares, optimizer.squared_norms(), rtol=1e-6, atol=0)
    for o in (optimizer, *(o for *_, o in parts)):
      o.step(0.5, torch.tensor(0.25))
  state, seen = optimizer.state_dict(), set()
  for owned, m, o in parts:
    weights = dict(m.named_parameters())
    for name, p in model.named_parameters():
      rows = slice(*owned.get(name, (0, 0)))
      assert torch.equal(weights[name][rows], p[rows]), name
    mine = o.state_dict()
    assert all(int(x) == 3 for x in (mine.pop("optimizer.steps"), state["optimizer.steps"]))
    for key, x in mine.items():
      rows = slice(*owned[key.rpartition(".")[0]])
      assert torch.equal(x.as_subclass(torch.Tensor), state[key][rows]), key
      seen.add(key)
    assert all(p.grad is None for p in m.parameters())
  assert seen == state.keys() - {"optimizer.steps"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
  ("dtype", "moments"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
)
def test_state_round_trip_is_bit_exact(kind, dtype, moments):
  """save → load → steps equals the uninterrupted run bit for bit."""
  c = config(**{"optim.matrices": kind, "optim.experts": kind, "optim.moments": moments})
  c = changed(c, {"target.dtype": dtype})
  model, optimizer = build(c)
  run(model, optimizer, range(3))
  weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
  assert any(key.endswith(".master") for key in state) == (dtype == "bf16")
  run(model, optimizer, range(3, 6))
  again = Model(c, reference)
  again.init_weights(seed=1)
  resumed = Optimizer(again, c, reference)
  again.load_state_dict(weights)
  for key, tensor in resumed.state_dict().items():
    tensor.copy_(state[key])
  run(again, resumed, range(3, 6))
  assert int(resumed.steps) == 6
  assert_bit_equal(snapshot(again, resumed), snapshot(model, optimizer))


def test_filling_the_state_in_place_loads_it():
  c = config(**{"target.dtype": "bf16"})
  model, optimizer = build(c)
  run(model, optimizer, range(2))
  again, resumed = build(c)
  for key, tensor in {**again.state_dict(), **resumed.state_dict()}.items():
    tensor.copy_({**model.state_dict(), **optimizer.state_dict()}[key])
  run(model, optimizer, range(2, 4))
  run(again, resumed, range(2, 4))
  assert_bit_equal(snapshot(again, resumed), snapshot(model, optimizer))


def test_bf16_parameters_follow_fp32_masters():
  """100 steps of 1e-5 move a bf16 weight of 1 by what they sum to; without a master none would."""
  c = config(**{"target.dtype": "bf16", "optim.dense_lr": 1e-4})
  plain = Plain(4, 4, torch.bfloat16)
  nn.init.ones_(plain.o.weight)
  optimizer = Optimizer(plain, changed(c, {"optim.dense_weight_decay": 0.0}), reference)
  for _ in range(100):
    plain.o.weight.grad = torch.ones_like(plain.o.weight)
    optimizer.step(1.0, ONE)
  master = optimizer.state_dict()["o.weight.master"]
  torch.testing.assert_close(master, torch.full((4, 4), 0.99), rtol=1e-5, atol=0)
  assert torch.equal(plain.o.weight, master.bfloat16())


def test_micro_batches_add_up_in_fp32():
  """256 and 64 times 1/64: a sum in bf16 would stay at 256."""
  c = config(**{"target.dtype": "bf16", "train.micro_batch": 1})
  plain = Plain(1, 2, torch.bfloat16)
  Optimizer(plain, c, reference)
  for value in [256.0] + [1 / 64] * 64:
    (plain.o.weight.sum() * value).backward()
  assert plain.o.weight.grad.dtype == torch.float32
  assert plain.o.weight.grad.tolist() == [[257.0, 257.0]]


def test_a_parameter_without_gradient_stops_the_step():
  model, optimizer = build(config())
  fill_grads(model, 0)
  model.layers[1].moe.router.weight.grad = None
  with pytest.raises(RunError, match=r"layers\.1\.moe\.router\.weight has no gradient"):
    optimizer.grad_norms()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_never_reads_the_device(kind):
  """Meta tensors have no values: a host synchronisation would raise."""
  c = config(**{"optim.matrices": kind, "optim.experts": kind, "target.dtype": "bf16"})
  ops = SimpleNamespace(adamw=lambda *_, **__: None, muon=reference.muon)
  with torch.device("meta"):
    model = Model(c, ops)
  optimizer = Optimizer(model, c, ops)
  for p in model.parameters():
    p.grad = torch.empty_like(p, dtype=p.grad_dtype)
  norm = optimizer.grad_norms()["all"]
  assert norm.is_meta
  optimizer.step(0.5, clip_factor(norm, 1.0))
  assert all(p.grad is None for p in model.parameters())
