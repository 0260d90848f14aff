"""Weights under HuggingFace's names for DeepSeek's classes, and back.

The names are those of the files on disk: one matrix per expert and projection; experts fused into
one tensor [E, …], as transformers holds them in memory, are read too. Our w13 interleaves the rows
of gate and up; theirs are two matrices. RoPE pairs are interleaved on both sides
(`rope_interleave`). The maps are linear, so gradients pass through them too.

Our experts come whole (`layers.3.moe.experts.w13` [E, 2F, D], as in a model of one rank) or one by
one under their global ids (`layers.3.moe.experts.17.w13`, as in a checkpoint).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nmoe.config.parameters import parameter_shapes
from nmoe.config.sections import Config
from nmoe.errors import CheckpointError
from nmoe.wording import counted

TOP = {
  "embed.weight": "model.embed_tokens.weight",
  "norm.weight": "model.norm.weight",
  "head.weight": "lm_head.weight",
}
RENAMED = {
  "attention_norm.weight": "input_layernorm.weight",
  "mlp_norm.weight": "post_attention_layernorm.weight",
  "attention.q.weight": "self_attn.q_proj.weight",
  "attention.q_a.weight": "self_attn.q_a_proj.weight",
  "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
  "attention.q_b.weight": "self_attn.q_b_proj.weight",
  "attention.kv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
  "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
  "attention.kv_b.weight": "self_attn.kv_b_proj.weight",
  "attention.o.weight": "self_attn.o_proj.weight",
  "moe.router.weight": "mlp.gate.weight",
  "moe.router.bias": "mlp.gate.e_score_correction_bias",
}
BLOCKS = {"mlp": "mlp", "moe.shared": "mlp.shared_experts", "moe.experts": "mlp.experts"}
PAIR = ("gate", "up")
_EXPERT = re.compile(r"moe\.experts\.(\d+)")
_MTP = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")  # it joins two states
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Weights and router biases under HuggingFace's names; shares memory with them."""
  hf = {}
  for name, tensor in state.items():
    if name in TOP:
      hf[TOP[name]] = tensor
      continue
    prefix, part = _layer(name)
    if part in RENAMED:
      hf[prefix + RENAMED[part]] = tensor
      continue
    block, _, weight = part.rpartition(".")
    if one := _EXPERT.fullmatch(block):
      hf.update(_projections(f"{prefix}{BLOCKS['moe.experts']}.{one[1]}.", weight, tensor))
    elif block == "moe.experts":
      for expert, matrix in enumerate(tensor):
        hf.update(_projections(f"{prefix}{BLOCKS[block]}.{expert}.", weight, matrix))
    else:
      hf.update(_projections(f"{prefix}{BLOCKS[block]}.", weight, tensor))
  return hf


def from_hf(
  hf: Mapping[str, Tensor], config: Config, without_bias: bool = False
) -> Iterator[tuple[str, Tensor]]:
  """The state of `Model(config)`, one tensor after the other, from HuggingFace's names.

  hf reads a tensor when it is asked for. What `computed` names is left out. Experts of several
  types come in the one that holds them all. without_bias: the files have no selection biases; they
  are 0. Raises CheckpointError for a missing, an unexpected, or a
  wrongly shaped tensor; for an unexpected one after the last.
  """
  left = set(hf) - set(computed(hf, config))
  if config.model.tie_embeddings:
    _check_tied(hf)
    left.discard(TOP["head.weight"])
  for name, shape in state_shapes(config).items():
    if without_bias and name.endswith("router.bias"):
      tensor = torch.zeros(shape)
    else:
      tensor = _gather(name, shape, hf, left)
    if tuple(tensor.shape) != shape:
      raise CheckpointError(f"{name} would be {tuple(tensor.shape)}, the model needs {shape}")
    yield name, tensor
  if left:
    raise CheckpointError(
      f"no place in this model for {counted(len(left), 'tensor')}, the first is {min(left)!r}; "
      "is it another architecture?"
    )


def _check_tied(hf: Mapping[str, Tensor]) -> None:
  """A head that is there all the same must be the embedding: theirs is else not tied."""
  head, embedding = TOP["head.weight"], TOP["embed.weight"]
  if head not in hf or embedding not in hf:
    return
  own, shared = hf[head], hf[embedding]
  if not own.is_meta and not torch.equal(own, shared.to(own.dtype)):
    raise CheckpointError(
      f"config.json says tie_word_embeddings, but {head!r} differs from {embedding!r}; set it to "
      "false"
    )


def computed(names: Mapping[str, Tensor], config: Config) -> list[str]:
  """The tensors that a model needs not be given: RoPE's frequencies, and the layers of
  multi-token prediction, behind the model's own.
  """
  joins = [m for m in map(_MTP.fullmatch, names) if m and int(m[1]) >= config.model.num_layers]
  mtp = tuple(f"model.layers.{join[1]}." for join in joins)
  return [name for name in names if name.startswith(mtp) or _COMPUTED.fullmatch(name)]


def state_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Name -> shape of all weights and router biases, with whole experts."""
  shapes = {}
  for name, shape in parameter_shapes(config).items():
    shapes[name] = shape
    if name.endswith("router.weight"):
      shapes[name.replace("weight", "bias")] = shape[:1]
  return shapes


def _layer(name: str) -> tuple[str, str]:
  """("model.layers.3.", "attention.q.weight") from "layers.3.attention.q.weight"."""
  _, layer, part = name.split(".", 2)
  return f"model.layers.{layer}.", part


def _projections(prefix: str, weight: str, matrix: Tensor) -> dict[str, Tensor]:
  if weight == "w2":
    return {f"{prefix}down_proj.weight": matrix}
  return {f"{prefix}gate_proj.weight": matrix[0::2], f"{prefix}up_proj.weight": matrix[1::2]}


def _gather(name: str, shape: tuple[int, ...], hf: Mapping[str, Tensor], left: set[str]) -> Tensor:
  """Our tensor `name`, whose sources are taken out of `left`."""
  if name in TOP:
    return _take(TOP[name], hf, left)
  prefix, part = _layer(name)
  if part in RENAMED:
    return _take(prefix + RENAMED[part], hf, left)
  block, _, weight = part.rpartition(".")
  prefix = f"{prefix}{BLOCKS[block]}."
  if block != "moe.experts":
    return _matrix(prefix, weight, hf, left)
  if f"{prefix}down_proj" in hf:
    return _stacked(prefix, weight, shape, hf, left)
  out = None
  for e in range(shape[0]):
    parts = _parts(f"{prefix}{e}.", weight, hf, left)
    found = (len(parts) * len(parts[0]), parts[0].shape[1])
    if found != shape[1:]:
      raise CheckpointError(f"{prefix}{e}: {weight} would be {found}, the model needs {shape[1:]}")
    if out is None:
      out = parts[0].new_empty(shape)
    for i, part in enumerate(parts):  # no matrix of its own in between
      out = out.to(torch.promote_types(out.dtype, part.dtype))  # as a rule of one type
      out[e, i :: len(parts)] = part
  return out


def _stacked(
  prefix: str, weight: str, shape: tuple[int, ...], hf: Mapping[str, Tensor], left: set[str]
) -> Tensor:
  """From fused experts: gate_up_proj [E, 2F, D], gate rows before up rows; down_proj [E, D, F]."""
  name = f"{prefix}{'down_proj' if weight == 'w2' else 'gate_up_proj'}"
  fused = _take(name, hf, left)
  if tuple(fused.shape) != shape:
    raise CheckpointError(f"{name!r} is {tuple(fused.shape)}, the model needs {shape}")
  if weight == "w2":
    return fused
  gate, up = fused.chunk(2, dim=1)
  return torch.stack([gate, up], dim=2).flatten(1, 2)


def _matrix(prefix: str, weight: str, hf: Mapping[str, Tensor], left: set[str]) -> Tensor:
  parts = _parts(prefix, weight, hf, left)
  return parts[0] if len(parts) == 1 else torch.stack(parts, dim=1).flatten(0, 1)


def _parts(prefix: str, weight: str, hf: Mapping[str, Tensor], left: set[str]) -> list[Tensor]:
  """The matrices of one shape whose rows take turns in ours: gate and up, or down alone."""
  names = [f"{prefix}{part}_proj.weight" for part in (("down",) if weight == "w2" else PAIR)]
  parts = [_take(name, hf, left) for name in names]
  for name, part in zip(names, parts, strict=True):
    if part.ndim != 2:
      raise CheckpointError(f"{name!r} is {tuple(part.shape)}; a matrix is needed")
  if parts[0].shape != parts[-1].shape:
    said = ", ".join(f"{n} is {tuple(p.shape)}" for n, p in zip(names, parts, strict=True))
    raise CheckpointError(f"{said}; they must agree")
  return parts


def _take(name: str, hf: Mapping[str, Tensor], left: set[str]) -> Tensor:
  if name not in left:
    near = difflib.get_close_matches(name, left, n=1)
    found = f"; the nearest is {near[0]!r}" if near else ""
    raise CheckpointError(f"{name!r} is missing among {len(hf)} tensors{found}")
  left.remove(name)
  return hf[name]
