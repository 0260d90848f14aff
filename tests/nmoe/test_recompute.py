"""train.recompute: the same bits with less kept, on one rank and on two; what plan says of it."""

from __future__ import annotations

import gc
import weakref
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from model_configs import tiny
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import reference
from kernels.ops import Recipe
from kernels.reference import symmetric
from nmoe.config.file import changed, load, to_toml
from nmoe.config.file import loads as loaded
from nmoe.config.fit import fits
from nmoe.config.plan import DEVICES, _kept_per_token, plan
from nmoe.config.sections import Config
from nmoe.distributed.rdep import Rdep
from nmoe.errors import ConfigError
from nmoe.model.decoder import Model
from nmoe.model.recompute import Forgotten, Kept

CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = ("norm", "qkv", "swiglu")
CHOICES = [list(chosen) for n in (1, 2, 3) for chosen in combinations(PARTS, n)]
SHAPES = {
  "plain": {},
  "q_lora": {"model__q_lora_rank": 24},
  "bf16": {"target__dtype": "bf16"},
  "softmax": {"moe__score": "softmax", "moe__num_shared": 0},
  "fp8": {"target__dtype": "fp8", "target__emulate_blockscale": True, "moe__expert_dim": 32}
  | {"precision__linears": ["q", "kv_a", "kv_b", "o"], "model__kv_lora_rank": 32},
}


def batches(config: Config) -> list[tuple[Tensor, Tensor]]:
  generator = torch.Generator().manual_seed(3)
  shape = (config.train.micro_batch, config.data.seq_len + 1)
  made = [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(2)]
  return [(tokens[:, :-1], tokens[:, 1:]) for tokens in made]


def passes(model: Model) -> dict[str, Tensor]:
  """The losses and all gradients of two micro-batches, added."""
  found = {}
  for i, (tokens, targets) in enumerate(batches(model.config)):
    model.set_draw(0, i)
    out = model(tokens, targets)
    (out.loss_sum + out.balance_loss).backward()
    found |= {f"loss {i}": out.loss_T, f"balance {i}": out.balance_loss.detach()}
  return found | {name: p.grad for name, p in model.named_parameters()}


def built(config: Config, rdep: Rdep | None = None) -> Model:
  model = Model(config, reference, rdep)
  model.init_weights(0)
  return model


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits(shape, parts):
  config = tiny(**SHAPES[shape])
  if shape == "fp8":
    parts = [part for part in parts if part != "swiglu"]
  wanted = passes(built(config))
  found = passes(built(changed(config, {"train.recompute": parts})))
  different = [name for name in wanted if not torch.equal(wanted[name], found[name])]
  assert different == [] and found.keys() == wanted.keys()
  assert all(t.isfinite().all() and t.any() for name, t in wanted.items() if "norm" in name)


class Alive(TorchDispatchMode):
  """The storages that operations made inside, or returned of others than `model`'s, while they
  live.
  """

  def __init__(self, model: Model):
    super().__init__()
    self.others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    self.made: dict[int, tuple[StorageWeakRef, int]] = {}

  def __torch_dispatch__(self, function, types, args=(), kwargs=None):
    out = function(*args, **(kwargs or {}))
    for t in tree_leaves(out):
      if isinstance(t, Tensor):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.others:
          self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
    return out

  def nbytes(self) -> int:
    gc.collect()
    return sum(size for ref, size in self.made.values() if not ref.expired())


WIDE = {
  "model__dim": 128,
  "model__dense_dim": 200,
  "model__kv_lora_rank": 64,
  "model__qk_nope_dim": 32,
  "model__qk_rope_dim": 16,
  "model__v_dim": 48,  # the plain attention pads narrower values
  "moe__expert_dim": 72,
  "data__seq_len": 250,
  "schedule__batch_tokens": 500,
  "schedule__total_tokens": 500,
}


def kept(config: Config) -> int:
  """Bytes that a forward pass leaves for backward, results and copies of weights among them."""
  model = built(config)
  tokens = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.int64)
  with Alive(model) as alive:
    out = model(tokens, tokens)
  assert out.loss_sum.requires_grad
  return alive.nbytes()


@pytest.mark.parametrize("parts", [[], *CHOICES], ids="+".join)
@pytest.mark.parametrize("shape", ["plain", "q_lora"])
def test_a_forward_pass_whose_results_are_dropped_keeps_nothing(shape, parts):
  """As one of several ranks is, if it overflows (`Rdep.run`)."""
  model = built(tiny(**SHAPES[shape], train__recompute=parts))
  tokens, targets = batches(model.config)[0]
  with Alive(model) as alive:
    out = model(tokens, targets)
  assert alive.nbytes() > 10_000
  del out
  assert alive.nbytes() == 0


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
@pytest.mark.parametrize("values", [{}, {"model__q_lora_rank": 56}], ids=["plain", "q_lora"])
def test_what_is_no_longer_kept_is_what_plan_says(values, parts):
  config = tiny(**WIDE, **values)
  less = changed(config, {"train.recompute": parts})
  planned = [sum(500 * _kept_per_token(c, i) for i in range(3)) for c in (config, less)]
  saved, m = kept(config) - kept(less), config.model
  copies = m.num_layers * 500 * m.num_heads * m.v_dim * 4  # of v: the plain attention's, padded
  expected = planned[0] - planned[1] - copies * ("qkv" in parts)
  assert saved == pytest.approx(expected, rel=0.02)
  assert saved > 0.02 * planned[0]


def two_ranks(group, toml: str) -> tuple[dict[str, np.ndarray], int, int]:
  """Losses and gradients of one rank of two, and the bytes that its forward pass keeps until its
  backward pass, and that it leaves when it is dropped: of the heap, which it returned views of.
  """
  config = loaded(toml, env={})
  rdep = Rdep(config, reference, group, symmetric)
  model = built(config, rdep)
  found = {name: t.numpy().copy() for name, t in passes(model).items()}
  tokens, targets = batches(config)[0]
  with Alive(model) as alive:
    out = model(tokens, targets)
  nbytes = alive.nbytes()
  out.loss_sum.backward()
  with Alive(model) as alive:
    out = model(tokens, targets)
  del out
  rdep.close()
  return found, nbytes, alive.nbytes()


def test_two_ranks_have_the_same_bits_and_keep_less():
  config = tiny(launch__ranks=2, schedule__batch_tokens=96, data__seq_len=24)
  wanted = ranks.run(two_ranks, 2, to_toml(config))
  for parts in ([], ["norm"], ["swiglu"], [*PARTS]):
    again = changed(config, {"train.recompute": parts})
    for (got, nbytes, dropped), (want, most, heap) in zip(
      ranks.run(two_ranks, 2, to_toml(again)), wanted, strict=True
    ):
      assert {name for name in want if not np.array_equal(got[name], want[name])} == set()
      assert nbytes == most if not parts else nbytes < 0.96 * most
      assert dropped == heap < most


class Twice(torch.autograd.Function):
  """2 · x · y, whose gradients need both."""

  @staticmethod
  def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
    ctx.save_for_backward(x, y)
    return 2 * x * y

  @staticmethod
  def backward(ctx, dz: Tensor):
    x, y = ctx.saved_tensors
    return 2 * y * dz, 2 * x * dz


def test_a_forgotten_tensor_is_computed_once_for_all_that_want_it():
  base = torch.arange(12.0).view(3, 4)
  leaf = torch.ones(4, 3, requires_grad=True)
  calls = []

  def compute() -> tuple[Tensor]:
    calls.append(torch.is_grad_enabled())
    return (base + 1,)

  x = base + 1
  forgotten = Forgotten((x,), compute)
  with forgotten.unsaved():
    z = Twice.apply(x.mT, leaf) + Twice.apply(x.T, leaf)  # views of one storage
  gone = weakref.ref(x)
  want = 4 * (x.mT * torch.ones(4, 3)).clone()
  del x
  assert gone() is None and calls == []
  z.sum().backward(retain_graph=True)
  assert calls == [False] and forgotten.values is None
  assert torch.equal(leaf.grad, want)
  z.sum().backward()
  assert torch.equal(leaf.grad, 2 * want)


def test_what_is_not_forgotten_is_saved_as_ever():
  x, leaf = torch.ones(3), torch.ones(3, requires_grad=True)
  with Forgotten((x,), lambda: (_ for _ in ()).throw(AssertionError("computed"))).unsaved():
    z = Twice.apply(torch.full((3,), 5.0), leaf)
  z.sum().backward()
  assert leaf.grad.tolist() == [10.0] * 3
  with Kept(x).unsaved():
    assert Kept(x).again()[0].equal(x)


def test_a_name_that_is_unknown():
  with pytest.raises(ConfigError, match=r"train.recompute\[1\] = 'qvk' must be one of .* 'qkv'"):
    changed(tiny(), {"train.recompute": ["norm", "qvk"]})
  with pytest.raises(ConfigError, match="names a part twice"):
    changed(tiny(), {"train.recompute": ["qkv", "qkv"]})
  with pytest.raises(ConfigError, match='"swiglu" is for products in bf16.*"fp8"; leave it out'):
    tiny(**SHAPES["fp8"], train__recompute=["swiglu"])


CARD = {  # the comparator's run of this model, on four cards
  "target.arch": "sm_90a",
  "launch.ranks": 4,
  "data.seq_len": 4096,
  "train.micro_batch": 2,
  "optim.moments": "bf16",
  "optim.matrices": "adamw",
  "optim.experts": "adamw",
  "schedule.batch_tokens": 262144,
}


def test_moonlight_fits_80_gb():
  """27 layers on four cards at capacity 1.0; with sequences of 8192 and Muon on eight."""
  card = next(d.memory_bytes for d in DEVICES if d.name == "H100")
  moonlight = load(CONFIGS / "moonlight" / "moonlight.toml", env={})
  for values in ({**CARD, "rdep.capacity": 1.0}, {"target.arch": "sm_90a"}):
    config = changed(moonlight, values)
    assert fits(plan(config), card) is not None
    assert fits(plan(changed(config, {"train.recompute": [*PARTS]})), card) is None


def test_recomputation_is_a_remedy_before_more_ranks():
  config = changed(load(CONFIGS / "moonlight" / "moonlight.toml", env={}), CARD)
  config = changed(config, {"train.micro_batch": 1, "train.loss_chunk": 512, "rdep.capacity": 1.0})
  needed = plan(config).peak_bytes
  for parts in (["norm"], ["qkv"], ["swiglu"], [*PARTS]):
    free = plan(changed(config, {"train.recompute": parts})).peak_bytes
    misfit = fits(plan(config), 2 * needed, free)
    assert (misfit.remedy.key, misfit.remedy.new) == ("train.recompute", parts)
    assert f"set train.recompute = {parts} (now [])" in str(misfit)
  assert fits(plan(config), 2 * needed, needed // 2).remedy.key == "launch.ranks"


def test_operations_keep_no_pre_activation():
  """The halves that RDEP calls: what is kept holds the rows alone."""
  generator = torch.Generator().manual_seed(0)
  x, w13, w2 = (torch.randn(s, generator=generator) for s in ((10, 8), (2, 12, 8), (2, 8, 6)))
  offset = torch.tensor([0, 4, 10], dtype=torch.int32)
  plain, again = (
    reference.grouped_mlp_forward(x, offset, w13, w2, Recipe(recompute=on), True)
    for on in (False, True)
  )
  assert plain[1].h.shape == (10, 12) and again[1].h is None
  dy, gate = torch.randn(10, 8, generator=generator), torch.rand(10, generator=generator)
  results = [reference.grouped_mlp_backward(k, dy, gate, w13, w2) for k in (plain[1], again[1])]
  for a, b in zip(*([*r[0][:1], r[1], *r[2]()] for r in results), strict=True):
    assert torch.equal(a, b)
