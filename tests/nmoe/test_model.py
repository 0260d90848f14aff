"""The model against HuggingFace's DeepSeek-V3 with the same weights, and its own invariants.

One file: every test asks one tiny model, of which one key differs.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from model_configs import tiny
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kernels import reference
from nmoe.config.sections import Config
from nmoe.config.yarn import softmax_mscale
from nmoe.errors import ConfigError
from nmoe.model.decoder import (
  Model,
  _Embedding,
  matrix_blocks,
  parameter_group,
  rope_tables,
)
from nmoe.model.hf_config import hf_config
from nmoe.model.names import to_hf
from nmoe.model.router import balance_loss, update_bias

ORACLE = {
  "plain": {},
  "q_lora": {"model__q_lora_rank": 24},
  "groups": {"moe__num_groups": 4, "moe__topk_groups": 2},
  "yarn": {"yarn__factor": 4.0, "yarn__original_seq_len": 8, "yarn__mscale_all_dim": 0.707},
  "tied": {"model__tie_embeddings": True},
  "unnormalised": {"moe__normalize": False, "moe__num_shared": 1, "moe__top_k": 1},
  "dense": {"model__num_dense_layers": 3},
  "all": {
    "model__q_lora_rank": 24,
    "model__num_dense_layers": 0,
    "moe__num_groups": 2,
    "moe__topk_groups": 1,
    "yarn__factor": 40.0,
    "yarn__original_seq_len": 16,
  },
}


def build(config: Config, seed: int = 0) -> Model:
  model = Model(config, reference)
  model.init_weights(seed)
  return model


def batch(config: Config, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
  generator = torch.Generator().manual_seed(seed)
  shape = (config.train.micro_batch, config.data.seq_len + 1)
  tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
  targets = tokens[:, 1:].clone()
  targets[0, 5] = targets[1, -1] = -1
  return tokens[:, :-1], targets


def perturb(model: Model) -> None:
  """Norms away from 1 and router biases away from 0, so that forgetting either shows."""
  generator = torch.Generator().manual_seed(2)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.uniform_(0.5, 1.5, generator=generator)
    for router in model.routers:
      router.bias.uniform_(0, 0.2, generator=generator)


def fuse(hf: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
  """On-disk names to the fused expert tensors that transformers 5 holds in memory."""
  fused = {name: tensor for name, tensor in hf.items() if ".experts." not in name}
  for prefix in {name.split("experts.")[0] for name in hf if ".experts." in name}:

    def stack(part: str, prefix: str = prefix) -> torch.Tensor:
      names = [f"{prefix}experts.{e}.{part}_proj.weight" for e in range(num_experts)]
      return torch.stack([hf[name] for name in names])

    fused[f"{prefix}experts.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], dim=1)
    fused[f"{prefix}experts.down_proj"] = stack("down")
  return fused


def oracle(config: Config, state: dict[str, torch.Tensor]) -> DeepseekV3ForCausalLM:
  hf = DeepseekV3ForCausalLM(
    DeepseekV3Config(**hf_config(config, 96, "float32"), attn_implementation="eager")
  ).float()
  hf.set_experts_implementation("eager")
  missing, unexpected = hf.load_state_dict(fuse(to_hf(state), config.moe.num_experts), strict=False)
  tied = ["lm_head.weight"] if config.model.tie_embeddings else []
  assert (missing, unexpected) == (tied, [])
  return hf


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
  return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", ORACLE)
def test_logits_and_gradients_equal_huggingface(name):
  config = tiny(moe__balance_alpha=0.0, **ORACLE[name])
  model = build(config)
  perturb(model)
  hf = oracle(config, model.state_dict())
  tokens, targets = batch(config)
  theirs = hf(tokens, use_cache=False).logits
  loss = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
  loss.backward()
  out = model(tokens, targets)
  out.loss_sum.backward()

  assert relative(model.logits(tokens), theirs) < 1e-4
  assert out.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
  grads = {key: parameter.grad for key, parameter in model.named_parameters()}
  found = fuse(to_hf(grads), config.moe.num_experts)
  wanted = {key: parameter.grad for key, parameter in hf.named_parameters()}
  assert found.keys() == wanted.keys()
  errors = {key: relative(found[key], wanted[key]) for key in wanted}
  assert max(errors.values()) < 1e-4, errors


def test_loss_per_token_ignores_minus_one_and_sums_to_the_loss():
  config = tiny()
  model = build(config)
  tokens, targets = batch(config)
  out = model(tokens, targets)
  logp = model.logits(tokens).double().log_softmax(-1).flatten(0, 1)
  kept = targets.flatten() >= 0
  wanted = torch.where(kept, -logp.gather(1, targets.flatten().clamp(min=0)[:, None])[:, 0], 0)
  torch.testing.assert_close(out.loss_T.double(), wanted, rtol=1e-5, atol=1e-5)
  assert out.loss_sum.item() == pytest.approx(wanted.sum().item(), rel=1e-6)
  assert not out.loss_T.requires_grad
  rows = config.moe.top_k * tokens.numel()
  assert out.count_LE.dtype == torch.int32 and out.count_LE.shape == (2, 8)
  assert out.count_LE.sum(1).tolist() == [rows, rows]


def test_a_token_does_not_see_the_future():
  config = tiny()
  model = build(config)
  tokens, _ = batch(config)
  changed = tokens.clone()
  changed[:, 13] = (changed[:, 13] + 1) % config.model.vocab_size
  before, after = model.logits(tokens), model.logits(changed)
  torch.testing.assert_close(before[:, :13], after[:, :13], rtol=0, atol=1e-5)
  assert (before[:, 13:] - after[:, 13:]).abs().amax(-1).min() > 1e-4


def test_shorter_sequences_are_prefixes_and_longer_ones_are_refused():
  config = tiny()
  model = build(config)
  tokens, _ = batch(config)
  whole, part = model.logits(tokens)[:, :7], model.logits(tokens[:, :7])
  torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
  with pytest.raises(ConfigError, match="48 tokens, but data.seq_len is 24"):
    model.logits(tokens.repeat(1, 2))


def test_blocks_tell_when_their_gradients_are_final():
  """From the last block to the first, each after its parameters' gradients; never without any."""
  config = tiny()
  model, told = build(config), []
  tokens, targets = batch(config)

  def final(block: int) -> None:
    done = {name for name, p in model.named_parameters() if p.grad is not None}
    told.append((block, done))

  model.on_final = final
  with torch.no_grad():
    model(tokens, targets)
  assert told == []
  model(tokens, targets).loss_sum.backward()
  assert [block for block, _ in told] == [2, 1, 0]
  for block, done in told:
    behind = [f"layers.{i}." for i in range(block, 3)]
    assert {n for n, _ in model.named_parameters() if n.startswith(tuple(behind))} <= done


def test_forced_balance_spreads_rows_evenly_and_keeps_gradients():
  config = tiny(moe__forced_balance=True, train__micro_batch=1, moe__num_experts=7)
  model = build(config)
  tokens, targets = (t[:1] for t in batch(tiny()))
  out = model(tokens, targets)
  rows = torch.arange(24 * 3) % 7
  assert out.count_LE.tolist() == [rows.bincount().tolist()] * 2
  out.loss_sum.backward()
  assert all(router.weight.grad.norm() > 0 for router in model.routers)


def test_forced_balance_gates_are_those_of_the_scores():
  config = tiny(moe__forced_balance=True)
  router = build(config).layers[1].moe.router
  routing = router(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
  scores = routing.score_TE.double()
  for t in range(16):
    expert = [(3 * t + k) % 8 for k in range(3)]
    assert routing.expert_TK[t].tolist() == expert
    wanted = 2.5 * scores[t, expert] / scores[t, expert].sum()
    torch.testing.assert_close(routing.gate_TK[t].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("forced", [False, True])
def test_experts_and_shared_experts_read_what_the_router_passes_on(forced, monkeypatch):
  """With x passed on as zeros, nothing of it reaches the layer's output."""
  moe = build(tiny(moe__forced_balance=forced)).layers[1].moe
  x_BSD = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
  assert moe.shared is not None and moe(x_BSD)[0].abs().sum() > 0
  route = reference.route

  def zeros(*args):
    routing = route(*args)
    return routing._replace(x_TD=torch.zeros_like(routing.x_TD))

  monkeypatch.setattr(moe.router, "ops", SimpleNamespace(route=zeros))
  assert moe(x_BSD)[0].abs().sum() == 0


def test_forced_balance_gradients_are_those_of_the_definition():
  router = build(tiny(moe__forced_balance=True)).layers[1].moe.router
  generator = torch.Generator().manual_seed(0)
  x_TD, factor_TK = (torch.randn(16, n, generator=generator) for n in (32, 3))
  (router(x_TD).gate_TK * factor_TK).sum().backward()
  weight = router.weight.detach().double().requires_grad_()
  scores = torch.sigmoid(x_TD.double() @ weight.T)
  chosen = torch.stack([scores[t, [(3 * t + k) % 8 for k in range(3)]] for t in range(16)])
  (2.5 * chosen / chosen.sum(1, keepdim=True) * factor_TK).sum().backward()
  torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_balance_loss_equals_its_definition_sequence_by_sequence():
  generator = torch.Generator().manual_seed(0)
  score_LTE = torch.rand(3, 10, 6, generator=generator, dtype=torch.float64).requires_grad_()
  wanted = []
  for score_TE in score_LTE:
    losses = []
    for sequence in score_TE.split(5):  # 2412.19437 Eq 17-20, T = 5, K = 2, N_r = 6
      share = (sequence / sequence.sum(1, keepdim=True)).mean(0)
      top = [set(row.argsort(descending=True)[:2].tolist()) for row in sequence.detach()]
      load = torch.tensor([sum(i in chosen for chosen in top) for i in range(6)]) * 6 / (2 * 5)
      losses.append((load * share).sum())
    wanted.append(sum(losses) / 2)
  wanted = torch.stack(wanted)
  found = balance_loss(score_LTE, num_sequences=2, top_k=2)
  torch.testing.assert_close(found, wanted)
  weight_L = torch.tensor([1.0, 2.0, 3.0])
  grads = [torch.autograd.grad((weight_L * loss).sum(), score_LTE)[0] for loss in (found, wanted)]
  torch.testing.assert_close(*grads)


def test_balance_loss_is_one_when_even():
  score_LTE = torch.eye(8).repeat(2, 3, 1) + 1e-3
  losses = balance_loss(score_LTE, num_sequences=3, top_k=1).tolist()
  assert losses == pytest.approx([1, 1], rel=1e-6)


def test_balance_loss_of_the_model_is_alpha_times_the_layers_sum():
  losses = []
  for alpha in (0.0, 0.01, 0.03):
    config = tiny(moe__balance_alpha=alpha)
    losses.append(build(config)(*batch(config)).balance_loss.item())
  assert losses[0] == 0
  assert losses[2] == pytest.approx(3 * losses[1], rel=1e-6)
  assert 0.01 * 2 < losses[1] < 0.01 * 2 * 2  # two layers, each a little above 1


def test_bias_update_moves_load_towards_the_mean():
  config = tiny()
  model = build(config)
  count_LE = torch.tensor([[10, 20, 30, 20, 20, 20, 20, 20], [0, 0, 0, 0, 0, 0, 0, 8]])
  update_bias(model.routers, count_LE, 0.5)
  update_bias(model.routers, count_LE, 0.5)
  assert model.routers[0].bias.tolist() == [1, 0, -1, 0, 0, 0, 0, 0]
  assert model.routers[1].bias.tolist() == [1] * 7 + [-1]


def test_initial_weights_depend_on_seed_name_and_global_expert_only():
  wide, narrow = build(tiny()), build(tiny(moe__num_experts=4, moe__top_k=2))
  other = build(tiny(), seed=1)
  ours, theirs = dict(wide.named_parameters()), dict(narrow.named_parameters())
  for name, weight in theirs.items():
    if parameter_group(name) != "router":
      assert torch.equal(ours[name][: len(weight)], weight), name
  w13 = ours["layers.1.moe.experts.w13"]
  assert not torch.equal(w13[0], w13[1])
  assert not torch.equal(w13, other.layers[1].moe.experts.w13)
  assert not torch.equal(w13, ours["layers.2.moe.experts.w13"])


def test_initial_weights_are_normal_with_the_configured_std():
  config = tiny(model__vocab_size=20011, model__init_std=0.02)
  weight = build(config).embed.weight.detach().double() / 0.02
  n = weight.numel()
  assert abs(weight.mean()) < 4 / math.sqrt(n)
  assert abs(weight.square().mean() - 1) < 4 * math.sqrt(2 / n)
  assert abs(weight.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
  inside = (weight.abs() < 1).double().mean().item()
  assert inside == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.003)
  neighbours = (weight.flatten()[1:] * weight.flatten()[:-1]).mean()
  assert abs(neighbours) < 4 / math.sqrt(n)


def test_meta_device_then_to_empty_gives_the_same_model():
  config = tiny()
  with torch.device("meta"):
    model = Model(config, reference)
  model.to_empty(device="cpu")
  model.init_weights(0)
  tokens, targets = batch(config)
  assert torch.equal(model(tokens, targets).loss_T, build(config)(tokens, targets).loss_T)


def test_bf16_parameters_with_an_fp32_router():
  config = tiny(target__dtype="bf16")
  model = build(config)
  dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
  assert {dtypes[n] for n in dtypes if "router" in n} == {torch.float32}
  assert {dtypes[n] for n in dtypes if "router" not in n} == {torch.bfloat16}
  exact = build(tiny())(*batch(config)).loss_sum.item()
  assert model(*batch(config)).loss_sum.item() == pytest.approx(exact, rel=0.01)


def test_recipes_follow_the_precision_section():
  config = tiny(
    target__dtype="nvfp4",
    target__emulate_blockscale=True,
    moe__expert_dim=32,
    precision__linears=("q", "shared", "dense"),
    precision__bf16_last_layers=1,
  )
  model = Model(config, reference)
  first, middle, last = model.layers
  quantized = [first.attention.q, first.mlp, middle.attention.q, middle.moe.experts]
  quantized.append(middle.moe.shared)
  plain = [first.attention.o, middle.attention.kv_b, last.attention.q, last.moe.experts]
  assert {m.recipe.format for m in quantized} == {"nvfp4"}
  assert {m.recipe.format for m in plain} == {"bf16"}
  assert not any(m.recipe.forward_only_bf16 for m in quantized)
  model.set_forward_bf16(True)
  assert all(m.recipe.forward_only_bf16 and m.recipe.emulate for m in quantized)


def test_rope_tables_without_yarn_are_the_powers_of_theta():
  config = tiny()
  cos, sin = rope_tables(config.model, config.yarn, 5)
  angle = 3 * 10000.0 ** (-2 / 8)
  assert cos[3, 1].item() == pytest.approx(math.cos(angle), rel=1e-6)
  assert sin[3, 1].item() == pytest.approx(math.sin(angle), rel=1e-6)
  assert softmax_mscale(config.yarn) == 1


def test_deepseek_v3_softmax_mscale():
  assert softmax_mscale(tiny(yarn__factor=40.0).yarn) == pytest.approx(1.3689, abs=1e-4)


def test_matrix_blocks_are_the_matrices_of_the_equations():
  config = tiny(model__q_lora_rank=24)
  m = config.model
  model = build(config)
  weights = {name: p.detach() for name, p in model.named_parameters()}

  def matrices(name: str) -> list[torch.Tensor]:
    weight = weights[name]
    blocks = matrix_blocks(name, tuple(weight.shape), config)
    return [block.view(weight).flatten(-3, -2) for block in blocks]

  kv_b = weights["layers.1.attention.kv_b.weight"].view(m.num_heads, -1, m.kv_lora_rank)
  w_uk, w_uv = matrices("layers.1.attention.kv_b.weight")
  assert torch.equal(w_uk, kv_b[:, : m.qk_nope_dim].flatten(0, 1))
  assert torch.equal(w_uv, kv_b[:, m.qk_nope_dim :].flatten(0, 1))
  gate, up = matrices("layers.1.moe.experts.w13")
  assert torch.equal(gate, weights["layers.1.moe.experts.w13"][:, 0::2])
  assert torch.equal(up, weights["layers.1.moe.experts.w13"][:, 1::2])
  latent, rope = matrices("layers.0.attention.kv_a.weight")
  assert latent.shape == (16, 32) and rope.shape == (8, 32)
  assert [w.shape for w in matrices("layers.0.attention.q_b.weight")] == [(32, 24), (32, 24)]
  assert torch.equal(matrices("layers.0.mlp.w2")[0], weights["layers.0.mlp.w2"])


def test_every_row_of_a_hidden_matrix_is_in_one_block_and_the_rest_is_adamw():
  config = tiny()
  for name, weight in build(config).named_parameters():
    blocks = matrix_blocks(name, tuple(weight.shape), config)
    adamw = weight.ndim == 1 or name.startswith(("embed", "head")) or "router" in name
    assert bool(blocks) != adamw, name
    touched = torch.zeros(weight.shape)
    for block in blocks:
      block.view(touched).add_(1)
    assert adamw or touched.eq(1).all(), name


def test_parameter_groups():
  names = [name for name, _ in build(tiny()).named_parameters()]
  groups = {name: parameter_group(name) for name in names}
  assert groups["layers.1.moe.experts.w2"] == "expert"
  assert groups["layers.1.moe.router.weight"] == "router"
  assert groups["layers.1.moe.shared.w2"] == groups["embed.weight"] == "dense"


@pytest.mark.parametrize("vocab", [4, 5000], ids=["small", "more than tokens"])
@pytest.mark.parametrize("several", [False, True])
def test_the_embedding_gradient_of_a_frequent_token_loses_nothing_in_bf16(
  several: bool, vocab: int
) -> None:
  generator = torch.Generator().manual_seed(0)
  token = torch.randint(0, 3, (2, 2048), generator=generator)
  dy = torch.rand(2, 2048, 8, generator=generator).bfloat16()
  weight = torch.zeros(vocab, 8, dtype=torch.bfloat16, requires_grad=True)
  weight.grad_dtype = torch.float32 if several else torch.bfloat16
  exact = torch.zeros(vocab, 8, dtype=torch.float64).index_add_(
    0, token.flatten(), dy.double().flatten(0, 1)
  )
  for times in (1, 2):
    _Embedding.apply(token, weight).backward(dy)
    if several:
      torch.testing.assert_close(weight.grad.double(), times * exact, rtol=1e-5, atol=0)
  if not several:
    torch.testing.assert_close(weight.grad.double(), 2 * exact, rtol=2**-8, atol=0)
