"""The transfer rule against a table written by hand, and its fold against explicit multipliers."""

import math

import pytest
import ranks
import torch
from model_configs import tiny

from kernels import reference
from nmoe.config import scaling
from nmoe.config.parameters import owned_rows, parameter_shapes
from nmoe.errors import ConfigError
from nmoe.model.decoder import Model, matrix_blocks
from nmoe.train.optim import UPDATE_RMS as RMS
from nmoe.train.optim import Optimizer

BASE = {
  "scaling__rule": "completep-moe",
  "scaling__base_dim": 32,
  "scaling__base_heads": 4,
  "scaling__base_layers": 3,
  "scaling__base_kv_rank": 16,
}
# dim 4×, layers 2×, kv rank 4× or as it was, dense 4×, expert 2× or as it was
GROWN = {
  "model__dim": 128,
  "model__num_heads": 16,
  "model__num_layers": 6,
  "model__dense_dim": 192,
  "scaling__base_dense_dim": 48,
}
CASES = {
  "all with the width": {"model__kv_lora_rank": 64, "moe__expert_dim": 80, "base_expert": 20},
  "rank and experts fixed": {"model__kv_lora_rank": 16, "moe__expert_dim": 20, "base_expert": 20},
}
# (std, AdamW's rate) by hand at n = 4, L = 2
ADAMW = {
  "all with the width": {
    "embed": (1, 1),
    "norm": (1, 1),
    "attention_norm": (1, 1),
    "attention.q": (0.5, 0.25),
    "attention.kv_a": (0.5, 0.25),
    "attention.kv_norm": (1, 1),
    "attention.kv_b": (0.5, 0.25),
    "attention.o": (0.25, 0.125),
    "mlp.w13": (0.5, 0.25),
    "mlp.w2": (0.25, 0.125),  # √4 / (4 · 2), 1 / (4 · 2)
    "moe.router": (0.25, 0.25),
    "moe.experts.w13": (0.5, 0.25),
    "moe.experts.w2": (0.25, 0.125),
    "moe.shared.w13": (0.5, 0.25),
    "moe.shared.w2": (0.25, 0.125),
    "head": (0.25, 0.25),
  },
  "rank and experts fixed": {
    "attention.kv_a": (0.5, 0.25),
    "attention.kv_b": (1, 1),
    "moe.experts.w13": (0.5, 0.25),
    "moe.experts.w2": (1, 0.5),  # √4 / (1 · 2), 1 / (1 · 2)
    "moe.shared.w2": (1, 0.5),
  },
}
# Muon's factor: n^-1/2 where out and in grow, 1/n where out is fixed, 1 where in is, all over L
MUON = {
  "all with the width": {
    "attention.q": 0.5,
    "attention.kv_a": 0.5,
    "attention.kv_b": 0.5,
    "attention.o": 0.25,
    "mlp.w13": 0.5,
    "mlp.w2": 0.25,
    "moe.experts.w13": 0.5,
    "moe.experts.w2": 0.25,
  },
  "rank and experts fixed": {
    "attention.kv_a": 0.25,
    "attention.kv_b": 1,
    "moe.experts.w13": 0.25,
    "moe.experts.w2": 0.5,
  },
}


def grown(case, **more):
  values = dict(CASES[case])
  values["scaling__base_expert_dim"] = values.pop("base_expert")
  return tiny(**{**BASE, **GROWN, **values, **more})


def roles(config):
  return {role.name: role for role in scaling.roles(config)}


@pytest.mark.parametrize("case", CASES)
def test_every_row_of_the_table(case):
  config = grown(case, optim__embed_lr=0.5, model__embed_std=3.0)
  found = roles(config)
  for name, (std, lr) in ADAMW[case].items():
    role = found[name]
    norm = len(role.shape) == 1
    base_std = 1.0 if norm else 3.0 if name == "embed" else config.model.init_std
    base_lr = 0.5 if name in ("embed", "head") else 1e-3
    decay = 0.0 if norm or name == "moe.router" else 0.1 / lr
    assert role.std == pytest.approx(base_std * std), name
    assert role.lr == pytest.approx(base_lr * lr), name
    assert role.weight_decay == pytest.approx(decay), name
    assert role.muon is None
  if case == "all with the width":
    assert set(found) == {*ADAMW[case], "mlp_norm"}


@pytest.mark.parametrize("case", CASES)
def test_muons_factors(case):
  found = roles(grown(case, optim__matrices="muon", optim__experts="muon"))
  for name, factor in MUON[case].items():
    assert found[name].muon == pytest.approx(factor), name
    assert (found[name].lr, found[name].weight_decay) == (1e-3, 0.1)
  for name in ("embed", "head", "moe.router", "norm"):
    assert found[name].muon is None


def test_the_rope_rows_of_kv_a_do_not_grow():
  """64 rows at any width: 1 / n once the width is the larger side."""
  config = grown("all with the width")
  assert scaling.muon_factor(config, "layers.0.attention.kv_a.weight", 1, (8, 128)) == 0.25


@pytest.mark.parametrize("rank", [0, 96])
def test_first_blocks_are_those_that_muon_takes(rank):
  config = grown("all with the width", model__q_lora_rank=rank)
  for name, shape in parameter_shapes(config).items():
    if blocks := matrix_blocks(name, shape, config):
      view = blocks[0].view(torch.empty(shape[-2:]))
      assert scaling.first_block(config, name, shape) == tuple(view.flatten(-3, -2).shape), name


def test_ranks_of_q():
  more = {"model__q_lora_rank": 96, "scaling__base_q_rank": 24}
  found = roles(grown("all with the width", **more, optim__matrices="muon"))
  assert found["attention.q_a"].muon == found["attention.q_b"].muon == 0.5
  more = {"model__q_lora_rank": 24, "scaling__base_q_rank": 24}
  found = roles(grown("all with the width", **more))
  assert (found["attention.q_a"].lr, found["attention.q_b"].lr) == (0.25e-3, 1e-3)
  assert found["attention.q_b"].std == pytest.approx(0.1)


def test_batch_and_tokens():
  """s = √4 · 16^-0.3; lr · decay · D / B and the tokens of β₂ stay."""
  config = tiny(
    scaling__rule="completep-moe",
    scaling__base_batch_tokens=48,
    scaling__base_total_tokens=4800,
    schedule__batch_tokens=192,
    schedule__total_tokens=76800,
  )
  s = 2 * 16**-0.3
  for muon in (False, True):
    lr, decay = scaling.rates(config, "layers.0.attention.o.weight", 2, muon)
    assert lr == pytest.approx(1e-3 * s)
    assert lr * decay * 16 / 4 == pytest.approx(1e-3 * 0.1)
  assert scaling.beta2(config) == pytest.approx(0.9)  # 0.95 ** 4 = 0.81, clipped
  config = tiny(scaling__rule="completep-moe", scaling__base_batch_tokens=24)
  assert scaling.beta2(config) == pytest.approx(0.95**2)


def trained(config, steps=2):
  model = Model(config, reference)
  model.init_weights(0)
  optimizer = Optimizer(model, config, reference)
  for seed in range(steps):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
      p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step(1.0, torch.tensor(1.0))
  return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_ratio_of_one_changes_no_bit_and_another_does(kind):
  more = {"optim__matrices": kind, "optim__experts": kind}
  none = trained(tiny(**more))
  one = trained(tiny(**more, **BASE, scaling__base_total_tokens=4800))
  assert all(torch.equal(one[name], p) for name, p in none.items())
  two = trained(tiny(**more, **BASE | {"scaling__base_dim": 16, "scaling__base_heads": 2}))
  same = {name for name, p in none.items() if torch.equal(two[name], p)}
  fixed = ("norm", "embed", "kv_b")  # fan_in: the rank
  assert same == {name for name in none if any(part in name for part in fixed)}


def loss(x, w, target, branch=1.0, logits=1.0):
  """A residual branch with its factor, and a head with its own; fp64."""
  h = x + branch * torch.tanh(x @ w["mlp.w13"].T) @ w["mlp.w2"].T
  return torch.nn.functional.cross_entropy(logits * h @ w["head"].T, target)


def polar(x):
  """U·Vᵀ, which Newton-Schulz approximates, exactly."""
  u, _, v = torch.linalg.svd(x, full_matrices=False)
  return u @ v


def steps_of(kind, weights, updates, decays, **multipliers):
  """Three steps on fixed data; updates: name -> rate (times Muon's factor, its matrices)."""
  generator = torch.Generator().manual_seed(1)
  w = {name: p.clone().requires_grad_() for name, p in weights.items()}
  groups = [
    {"params": [p], "lr": updates[name], "weight_decay": decays[name]}
    for name, p in w.items()
    if kind == "adamw" or name == "head"
  ]
  adamw = torch.optim.AdamW(groups, eps=1e-30)
  for _ in range(3):
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (16,), generator=generator)
    adamw.zero_grad()
    gradients = torch.autograd.grad(loss(x, w, target, **multipliers), list(w.values()))
    for p, g in zip(w.values(), gradients, strict=True):
      p.grad = g
    adamw.step()
    if kind == "muon":
      for name in ("mlp.w13", "mlp.w2"):
        step = updates[name] * polar(w[name].grad) + 1e-3 * 0.1 * w[name]
        w[name] = (w[name] - step).detach().requires_grad_()
  return {name: p.detach() for name, p in w.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_fold_equals_explicit_multipliers(kind):
  """1 / L on the branch and 1 / n on the logits, in the forward pass or in std and rate."""
  both = {"optim__matrices": kind, "optim__experts": kind}
  config = grown("all with the width", **both)
  n, depth, std = 4.0, 2.0, config.model.init_std
  names = {"mlp.w13": "layers.0.mlp.w13", "mlp.w2": "layers.0.mlp.w2", "head": "head.weight"}
  shapes = {"mlp.w13": (12, 8), "mlp.w2": (8, 12), "head": (5, 8)}
  matrices = {"mlp.w13": (192, 128), "mlp.w2": (128, 192)}
  generator = torch.Generator().manual_seed(0)
  unit = {
    name: torch.randn(shape, generator=generator, dtype=torch.float64)
    for name, shape in shapes.items()
  }
  explicit_std = {"mlp.w13": std * n**-0.5, "mlp.w2": std * n**-0.5, "head": std}
  adam = {"mlp.w13": 1e-3 / n, "mlp.w2": 1e-3 / n, "head": 1e-3}
  muon = {"mlp.w13": 1e-3 * n**-0.5, "mlp.w2": 1e-3 * n**-0.5, "head": 1e-3}
  explicit = steps_of(
    kind,
    {name: explicit_std[name] * x for name, x in unit.items()},
    adam if kind == "adamw" else muon,
    {name: 0.1 * 1e-3 / adam[name] for name in unit},  # rate · decay as at the base
    branch=1 / depth,
    logits=1 / n,
  )
  weights, updates, decays = {}, {}, {}
  for name, x in unit.items():
    own = kind == "muon" and name != "head"
    weights[name] = scaling.initial_std(config, names[name]) * x
    updates[name], decays[name] = scaling.rates(config, names[name], 2, own)
    if own:
      updates[name] *= scaling.muon_factor(config, names[name], 0, matrices[name])
  folded = steps_of(kind, weights, updates, decays)
  factor = {"mlp.w13": 1.0, "mlp.w2": 1 / depth, "head": 1 / n}
  for name, x in explicit.items():
    if kind == "muon" and name != "head":
      assert decays[name] == 0.1  # as steps_of has it: Muon's factor is on O alone
    torch.testing.assert_close(folded[name], factor[name] * x, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizer_takes_the_rule(kind):
  """One step from zero moments: AdamW moves every weight by its rate, Muon by its norm."""
  more = {"dense_weight_decay": 0.0, "expert_weight_decay": 0.0, "eps": 1e-20}
  config = grown(
    "rank and experts fixed",
    optim__matrices=kind,
    optim__experts=kind,
    **{f"optim__{key}": value for key, value in more.items()},
  )
  model = Model(config, reference)
  model.init_weights(0)
  before = {name: p.detach().clone() for name, p in model.named_parameters()}
  optimizer = Optimizer(model, config, reference)
  for p in model.parameters():
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
  optimizer.step(1.0, torch.tensor(1.0))
  moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
  rate = ADAMW["rank and experts fixed"]
  assert moved["layers.1.moe.router.weight"].abs().max().item() == pytest.approx(2.5e-4, rel=1e-3)
  w2 = moved["layers.1.moe.experts.w2"]
  if kind == "adamw":
    assert w2.abs().mean().item() == pytest.approx(1e-3 * rate["moe.experts.w2"][1], rel=1e-3)
  else:
    spectral = torch.linalg.matrix_norm(w2[0], 2).item()
    want = 1e-3 * RMS * math.sqrt(128) * MUON["rank and experts fixed"]["moe.experts.w2"]
    assert spectral == pytest.approx(want, rel=0.25)  # Newton-Schulz' singular values: 0.7 … 1.2


def updated(group, config):
  """What this rank's optimizer made of the rows that it owns: parameter -> (start, rows)."""
  shapes = parameter_shapes(config)
  model = Model(config, reference)
  model.init_weights(0)
  owned = {}
  for members in owned_rows(config).values():
    owned |= members[group.rank() * len(members) // group.size()]
  owned = {n: s for n, s in owned.items() if ".experts." not in n or len(shapes[n]) == 3}
  optimizer = Optimizer(model, config, reference, owned)
  for p in model.parameters():
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
  optimizer.step(1.0, torch.tensor(1.0))
  weights = dict(model.named_parameters())
  return {n: (a, weights[n][a:b].detach().numpy()) for n, (a, b) in owned.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_ranks_update_as_one(kind):
  config = grown("all with the width", optim__matrices=kind, optim__experts=kind)
  whole = updated_alone(config)
  config = grown(
    "all with the width",
    optim__matrices=kind,
    optim__experts=kind,
    launch__ranks=2,
    rdep__group=1,
    train__micro_batch=1,
  )
  seen = 0
  for owned in ranks.run(updated, 2, config):
    for name, (start, rows) in owned.items():
      assert torch.equal(torch.from_numpy(rows), whole[name][start : start + len(rows)]), name
      seen += rows.size
  assert seen == sum(p.numel() for p in whole.values())


def updated_alone(config):
  model = Model(config, reference)
  model.init_weights(0)
  optimizer = Optimizer(model, config, reference)
  for p in model.parameters():
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
  optimizer.step(1.0, torch.tensor(1.0))
  return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"model__tie_embeddings": True}, "scaling.rule = 'completep-moe' has no form for tied"),
    ({"scaling__base_dim": 24}, "scaling.base_dim = 24 neither divides model.dim 32"),
    ({"scaling__base_dim": 16}, r"base_heads = 4 gives 1 times the heads at 2 times the width"),
    ({"scaling__base_q_rank": 8}, "base_q_rank = 8 but model.q_lora_rank is 0"),
  ],
)
def test_what_the_rule_refuses(values, message):
  with pytest.raises(ConfigError, match=message):
    tiny(**BASE | values)
  tiny(**values)  # rule = "none"


def test_the_embedding_alone():
  """The control: 4 times the width is 4 times the embedding's rate, and nothing else differs."""
  values = {"scaling__rule": "embed-only"}
  control = roles(grown("all with the width", **values, optim__embed_lr=0.5))
  none = roles(grown("all with the width", scaling__rule="none", optim__embed_lr=0.5))
  assert control["embed"].lr == 4 * none["embed"].lr == 2.0
  assert control["embed"].weight_decay == none["embed"].weight_decay / 4
  assert [r for name, r in control.items() if name != "embed"] == [
    r for name, r in none.items() if name != "embed"
  ]
