"""The parameters of a configuration: names, shapes, groups, dtype, bytes, and who owns which rows.

Of what several ranks hold, the owner alone keeps the fp32 masters and the moments and computes the
update (ZeRO, arXiv 1910.02054). Matrices have one owner, so that Muon needs no other rank (as in
distributed Muon, arXiv 2502.16982); everything else is cut by rows: embedding, head and routers,
which AdamW updates element by element, and routed experts, each row of which is a whole matrix. A
norm's vector stays whole: its elements begin at addresses that no kernel takes. Imports neither
torch nor kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal

from nmoe.config.sections import Config

Span = tuple[int, int]  # of rows: start, stop
BUCKET = 16 * 2**20  # elements of one collective (nmoe.distributed.buckets): 64 MiB in fp32


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every parameter of Model(config) with all experts, in its order."""
  m, e = config.model, config.moe
  shapes = {"embed.weight": (m.vocab_size, m.dim)}
  for layer in range(m.num_layers):
    block = _attention_shapes(config)
    if layer < m.num_dense_layers:
      block |= _mlp_shapes("mlp.", m.dim, m.dense_dim)
    else:
      block["moe.router.weight"] = (e.num_experts, m.dim)
      block |= _mlp_shapes("moe.experts.", m.dim, e.expert_dim, (e.num_experts,))
      if e.num_shared:
        block |= _mlp_shapes("moe.shared.", m.dim, e.num_shared * e.expert_dim)
    shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
  shapes["norm.weight"] = (m.dim,)
  if not m.tie_embeddings:
    shapes["head.weight"] = (m.vocab_size, m.dim)
  return shapes


def owned_rows(config: Config) -> dict[str, list[dict[str, Span]]]:
  """The owners of the parameters of each group: group -> member -> parameter -> rows.

  The members are the ranks that hold the same: of dense parameters and routers all R, of experts
  the R / G replicas. Their rows are the E / G experts of a rank.
  """
  ranks, group = config.launch.ranks, config.expert_ranks
  shapes = parameter_shapes(config)
  for name, shape in shapes.items():
    if parameter_group(name) == "expert":
      shapes[name] = (shape[0] // group, *shape[1:])
  return {
    kind: owners({n: s for n, s in shapes.items() if parameter_group(n) == kind}, members)
    for kind, members in (("dense", ranks), ("router", ranks), ("expert", ranks // group))
  }


def _attention_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  m = config.model
  q_dim = m.num_heads * (m.qk_nope_dim + m.qk_rope_dim)
  shapes = {"attention_norm.weight": (m.dim,)}
  if m.q_lora_rank:
    shapes["attention.q_a.weight"] = (m.q_lora_rank, m.dim)
    shapes["attention.q_norm.weight"] = (m.q_lora_rank,)
    shapes["attention.q_b.weight"] = (q_dim, m.q_lora_rank)
  else:
    shapes["attention.q.weight"] = (q_dim, m.dim)
  shapes["attention.kv_a.weight"] = (m.kv_lora_rank + m.qk_rope_dim, m.dim)
  shapes["attention.kv_norm.weight"] = (m.kv_lora_rank,)
  shapes["attention.kv_b.weight"] = (m.num_heads * (m.qk_nope_dim + m.v_dim), m.kv_lora_rank)
  shapes["attention.o.weight"] = (m.dim, m.num_heads * m.v_dim)
  shapes["mlp_norm.weight"] = (m.dim,)
  return shapes


def _mlp_shapes(
  prefix: str, dim: int, width: int, lead: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
  return {f"{prefix}w13": (*lead, 2 * width, dim), f"{prefix}w2": (*lead, dim, width)}


def num_parameters(config: Config) -> int:
  """Of the whole model, with all experts."""
  return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def parameter_dtype(config: Config) -> Literal["fp32", "bf16"]:
  """Of parameters and activations: fp32 for dtype = "fp32", else bf16 (the optimizer holds fp32
  masters). Routers are fp32.
  """
  return "fp32" if config.target.dtype == "fp32" else "bf16"


def parameter_width(config: Config) -> int:
  """Bytes of an element of a parameter or an activation."""
  return {"fp32": 4, "bf16": 2}[parameter_dtype(config)]


def parameter_group(name: str) -> Literal["dense", "router", "expert"]:
  """The optimizer's group of a parameter (its learning rate and weight decay), from its name."""
  if ".experts." in name:
    return "expert"
  return "router" if ".router." in name else "dense"


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
  """Whether a parameter is a matrix or a stack of them: what Muon may update.

  Norms, embedding, head and routers are not.
  """
  part = name.removesuffix(".weight").rpartition(".")[2]
  return len(shape) > 1 and part not in ("embed", "head", "router")


def checkpoint_bytes(config: Config) -> int:
  """Of a checkpoint's tensors: weights, masters and moments, each once, whatever the ranks."""
  o, width = config.optim, parameter_width(config)
  moment, total = 2 if o.moments == "bf16" else 4, 0
  for name, shape in parameter_shapes(config).items():
    group = parameter_group(name)
    own = 4 if group == "router" else width
    chosen = {"expert": o.experts, "router": "adamw", "dense": o.matrices}[group]
    moments = 1 if chosen == "muon" and is_matrix(name, shape) else 2
    total += math.prod(shape) * (own + 4 * (own < 4) + moments * moment)
  return total


def kept_bytes(config: Config) -> int:
  """Of the checkpoints that lie there at once: those kept, and one that is being written."""
  return checkpoint_bytes(config) * (config.train.keep_checkpoints + 1)


def owners(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> list[dict[str, Span]]:
  """The rows that each rank owns of each parameter; no entry where it owns none.

  A pure function of names, shapes and order. First the matrices, the dearest first, each to the
  rank with the least work so far, counted in Newton-Schulz's multiplications (its products have
  min(A, B)² · max(A, B)); then the rest fills all ranks to the same number of elements. Of each of
  its tensors every rank gets rows as it has room, so that a block's are spread over all buckets of
  a collective alike and none waits for the embedding and the head both; vectors stay whole. A rank
  that matrices alone bring above that level gets no more.
  """
  owned: list[dict[str, Span]] = [{} for _ in range(ranks)]
  work, elements = [0] * ranks, [0] * ranks
  whole = {name: s for name, s in shapes.items() if len(s) == 2 and is_matrix(name, s)}
  for name, (a, b) in sorted(whole.items(), key=lambda item: -math.prod(item[1]) * min(item[1])):
    rank = work.index(min(work))
    owned[rank][name] = (0, a)
    work[rank] += a * b * min(a, b)
    elements[rank] += a * b
  rest = {name: shape for name, shape in shapes.items() if name not in whole}
  level = _level(elements, sum(math.prod(shape) for shape in rest.values()))
  for name, shape in rest.items():
    room = [max(0.0, level - held) for held in elements]
    if len(shape) == 1:
      parts = {elements.index(min(elements)): (0, shape[0])}
    else:
      parts = dict(enumerate(_divided(shape[0], room)))
    for rank, (start, stop) in parts.items():
      if start < stop:
        owned[rank][name] = (start, stop)
        elements[rank] += (stop - start) * math.prod(shape[1:])
  return owned


def _divided(rows: int, room: Sequence[float]) -> list[Span]:
  """The rows [0, rows) in proportion to each one's room, to the nearest row."""
  reached = list(accumulate(room))
  stops = [round(rows * part / reached[-1]) for part in reached]
  return list(pairwise((0, *stops[:-1], rows)))


def _level(elements: list[int], more: int) -> float:
  """To what the ranks with the fewest elements rise when `more` are poured over them."""
  lowest = sorted(elements)
  return min((more + sum(lowest[:k])) / k for k in range(1, len(lowest) + 1))
