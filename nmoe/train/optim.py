"""The optimizer: AdamW and Muon over every parameter, with fp32 masters and rates per group.

Groups are "dense", "router" and "expert" (nmoe.config.parameters.parameter_group); each has its own
learning rate and weight decay, embedding and head may have their own rate, and nmoe.config.scaling
says what of them a tensor gets; 1-D parameters (norms) have no decay. Router biases are buffers:
nothing here touches them. Matrices go to Muon where the configuration says so, one logical block at
a time (nmoe.model.decoder.matrix_blocks); torch.optim.Muon takes whole 2-D parameters only, so the
update is ours, and equals torch's on a plain matrix.

Where ranks share a parameter, each keeps and updates the rows it owns (nmoe.config.parameters).

No method synchronises with the host. Gradients are read from `.grad`; when several micro-batches
make a step, bf16 parameters get fp32 gradients (`Tensor.grad_dtype`), so small terms are not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.copies import Copies
from kernels.ops import Ops, Rows
from nmoe.config import scaling
from nmoe.config.parameters import Span, parameter_group
from nmoe.config.sections import Config
from nmoe.errors import RunError
from nmoe.model.decoder import copies_of, matrix_blocks
from nmoe.records.checkpoint import Part

GROUPS = ("dense", "router", "expert")
UPDATE_RMS = 0.2  # of a Muon step before the learning rate: AdamW's usual size (arXiv 2502.16982)
MUON_BATCH = 1 << 27  # elements orthogonalised at a time (one parameter may exceed it)


@dataclass
class Slot:
  """Rows of one parameter with what a step needs of them. fp32 rows are their own master."""

  name: str
  group: str  # of GROUPS
  param: nn.Parameter
  rows: slice  # those that this rank owns
  data: Tensor  # the rows without autograd
  master: Tensor  # fp32; `data` itself if that is fp32
  moments: dict[str, Tensor]  # exp_avg and exp_avg_sq, or momentum; of the rows' shape
  copies: Copies | None  # where the parameter is kept quantized

  @property
  def grad(self) -> Tensor:
    if self.param.grad is None:
      raise RunError(
        f"{self.name} has no gradient at the optimizer step; every parameter must take part in "
        "the loss: remove it from the model or use its output"
      )
    return self.param.grad[self.rows]


@dataclass
class Batch:
  """Slots that one call updates: same group and decay, and for Muon the same shape and blocks."""

  lr: float
  weight_decay: float
  blocks: tuple[Rows, ...]  # () for AdamW
  sizes: tuple[float, ...]  # of Muon's update of each block before the rate
  slots: list[Slot] = field(default_factory=list)

  @property
  def rule(self) -> tuple:
    return self.lr, self.weight_decay, self.blocks, self.sizes


class Optimizer:
  """The parameters of a model, on one device.

  owned: the rows of each parameter that this rank updates; None: every row. The order of a step:
  backward, `grad_norms`, `step`, and `.grad` is None again.
  """

  def __init__(
    self,
    model: nn.Module,
    config: Config,
    ops: Ops,
    owned: Mapping[str, Span] | None = None,
  ):
    self.config, self.ops, self.whole = config.optim, ops, config
    self.beta2 = scaling.beta2(config)
    self.params = list(model.parameters())
    self.steps = torch.zeros((), dtype=torch.int64, device="cpu")
    self.slots: dict[str, list[Slot]] = {group: [] for group in GROUPS}
    self.adamw: dict[tuple, Batch] = {}
    self.muon: list[Batch] = []
    copies = copies_of(model)
    for name, param in model.named_parameters():
      if config.micro_batches > 1:  # whose gradients are summed
        param.grad_dtype = torch.float32
      if owned is None or name in owned:
        rows = slice(0, len(param)) if owned is None else slice(*owned[name])
        self._add(name, param, rows, self._blocks(name, param, config), copies.get(name))

  def _blocks(self, name: str, param: Tensor, config: Config) -> tuple[Rows, ...]:
    """The blocks that Muon orthogonalises, or () for AdamW."""
    expert = parameter_group(name) == "expert"
    chosen = self.config.experts if expert else self.config.matrices
    return matrix_blocks(name, tuple(param.shape), config) if chosen == "muon" else ()

  def _add(
    self,
    name: str,
    param: nn.Parameter,
    rows: slice,
    blocks: tuple[Rows, ...],
    copies: Copies | None,
  ) -> None:
    group, data = parameter_group(name), param.detach()[rows]
    dtype = torch.bfloat16 if self.config.moments == "bf16" else torch.float32
    names = ("momentum",) if blocks else ("exp_avg", "exp_avg_sq")
    moments = {n: torch.zeros_like(data, dtype=dtype) for n in names}
    slot = Slot(name, group, param, rows, data, data.float(), moments, copies)
    self.slots[group].append(slot)
    self._batch(group, slot, blocks).slots.append(slot)

  def _batch(self, group: str, slot: Slot, blocks: tuple[Rows, ...]) -> Batch:
    """The batch that takes the slot: an open one, or a new one."""
    lr, decay = scaling.rates(self.whole, slot.name, slot.param.ndim, bool(blocks))
    if not blocks:
      return self.adamw.setdefault((group, lr, decay), Batch(lr, decay, (), ()))
    matrices = [block.view(slot.data).flatten(-3, -2).shape[-2:] for block in blocks]
    sizes = tuple(
      UPDATE_RMS * math.sqrt(max(m)) * scaling.muon_factor(self.whole, slot.name, n, tuple(m))
      for n, m in enumerate(matrices)
    )
    key = (lr, decay, blocks, sizes, slot.data.shape)
    for batch in self.muon:
      first = batch.slots[0].data
      room = (len(batch.slots) + 1) * first.numel() <= MUON_BATCH
      if room and (*batch.rule, first.shape) == key:
        return batch
    self.muon.append(Batch(lr, decay, blocks, sizes))
    return self.muon[-1]

  @torch.no_grad()
  def squared_norms(self) -> Tensor:
    """Squared gradient norms of this rank's rows, fp32 [3] in the order of GROUPS.

    Sums are fp32 whatever the gradients' dtype. Every row has one owner, so squares add up over
    ranks to those of the whole model.
    """
    sums = torch.zeros(len(GROUPS), device=self.params[0].device)
    for total, slots in zip(sums, self.slots.values(), strict=True):
      if slots:
        norms = torch._foreach_norm([slot.grad for slot in slots], 2, dtype=torch.float32)
        total.copy_(torch.stack(norms).square().sum())
    return sums

  def grad_norms(
    self, reduce: Callable[[Tensor], Tensor] = lambda squared: squared
  ) -> dict[str, Tensor]:
    """L2 norms as 0-d fp32 tensors on the device: {"all", "dense", "router", "expert"}.

    `reduce` makes the [3] squared norms of one rank those of the whole model.
    """
    squared = reduce(self.squared_norms())
    norms = torch.cat([squared.sum().reshape(1), squared]).sqrt()
    return dict(zip(("all", *GROUPS), norms.unbind(), strict=True))

  @torch.no_grad()
  def step(self, lr_factor: float, grad_scale: Tensor) -> None:
    """Update the rows of this rank and drop all gradients.

    lr_factor multiplies the learning rates (nmoe.train.schedule). grad_scale, 0-d fp32 on the
    device, multiplies the gradients (`clip_factor`); if it is NaN, parameters and moments stay as
    they are, and only the count of steps goes on: the host, which learns of it later, drops this
    state. A step to leave out is no `step` but a `zero_grad`, so that it counts for nothing.
    """
    self.steps += 1
    for batch in self.adamw.values():
      self._adamw(batch, lr_factor, grad_scale)
    for batch in self.muon:
      self._muon(batch, lr_factor, grad_scale)
    self.zero_grad()

  def zero_grad(self) -> None:
    """Free the gradients, so that the next backward pass writes instead of adding."""
    for param in self.params:
      param.grad = None

  def _adamw(self, batch: Batch, lr_factor: float, grad_scale: Tensor) -> None:
    slots, o = batch.slots, self.config
    self.ops.adamw(
      [slot.data for slot in slots],
      [slot.grad for slot in slots],
      [slot.master for slot in slots],
      [slot.moments["exp_avg"] for slot in slots],
      [slot.moments["exp_avg_sq"] for slot in slots],
      step=int(self.steps),
      lr=batch.lr * lr_factor,
      betas=(o.beta1, self.beta2),
      eps=o.eps,
      weight_decay=batch.weight_decay,
      grad_scale=grad_scale,
      copies=[slot.copies for slot in slots],
    )

  def _muon(self, batch: Batch, lr_factor: float, grad_scale: Tensor) -> None:
    """W -= lr · (0.2 · sqrt(max(A, B)) · O + decay · W), O of each block [A, B] (2502.16982).

    An expert that got no token in the step, whose gradient is zero, is left alone: no update, no
    decay, and its momentum stays, as for a parameter that has no gradient in torch's optimizers. O
    does not shrink with a fading momentum: it would move the expert on, in a stale direction, by
    nearly its own norm. (AdamW's step fades by itself, and stays as torch's is.)
    """
    slots, o = batch.slots, self.config
    self.ops.muon(
      [slot.data for slot in slots],
      [slot.grad for slot in slots],
      [slot.master for slot in slots],
      [slot.moments["momentum"] for slot in slots],
      blocks=batch.blocks,
      sizes=batch.sizes,
      steps=o.muon_steps,
      lr=batch.lr * lr_factor,
      momentum=o.muon_momentum,
      weight_decay=batch.weight_decay,
      grad_scale=grad_scale,
      experts=slots[0].group == "expert",
    )

  def state_dict(self) -> dict[str, Tensor]:
    """The live state, so that filling these tensors in place loads it.

    "{parameter}.master" (not of fp32 parameters, whose own value it is), "{parameter}.exp_avg" and
    ".exp_avg_sq" or ".momentum", each of the parameter's shape, or the Part of it that this rank
    owns; "optimizer.steps", int64 on CPU.
    """
    return {"optimizer.steps": self.steps, **dict(self._tensors())}

  def masters(self) -> dict[str, Tensor]:
    """The live masters of parameters that are not fp32, under the names of these."""
    tensors = self.state_dict().items()
    return {n.removesuffix(".master"): x for n, x in tensors if n.endswith(".master")}

  def _tensors(self) -> Iterator[tuple[str, Tensor]]:
    for slots in self.slots.values():
      for slot in slots:
        own = {} if slot.data is slot.master else {"master": slot.master}
        for name, tensor in (own | slot.moments).items():
          whole = len(slot.param)
          part = tensor if len(tensor) == whole else Part.of(tensor, slot.rows.start, whole)
          yield f"{slot.name}.{name}", part


def clip_factor(norm: Tensor, limit: float) -> Tensor:
  """min(1, limit / norm), the scale that brings `norm` to at most `limit`; on norm's device."""
  return (limit / norm).clamp(max=1.0)
