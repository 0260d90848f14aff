"""The forward and backward passes of a step, over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nmoe.data.loader import Loader
from nmoe.train.clock import Clock
from nmoe.train.flight import FlightRecorder
from nmoe.train.graph import Graph
from nmoe.train.routing import RoutingRecorder
from nmoe.train.session import Session, TrainState


class Passes:
  """passes(tokens, targets) leaves a step's gradients in the model, whose parameters have none.

  `graph` is the CUDA graph that queues them, if there is one; `flight` measures what quantization
  loses in them, `routing` where tokens went.
  """

  def __init__(self, session: Session, state: TrainState, clock: Clock, loader: Loader):
    self.config, self.ranks, self.device = session.config, session.parallel, session.target.device
    self.state, self.clock = state, clock
    self.counted_LE: Tensor | None = None  # of the step, where its micro-batches are counted before
    self.flight = FlightRecorder(state.model, self.config.train.flight_every)
    c, ranks = self.config, self.ranks
    self.routing = RoutingRecorder(
      state.model,
      loader,
      c.train.routing_every if ranks.rank == 0 else 0,
      local=c.sequences // ranks.ranks,
    )
    self.graph = Graph(state.model, self._all, ranks) if self.config.train.cuda_graph else None

  def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's sum of losses, tokens per expert [MoE layers, E], and the losses [T] of the last
    micro-batch. tokens, targets: int64 [sequences of this rank's batch, S].
    """
    self.state.model.set_forward_bf16(self.config.finishing(self.state.tokens))
    self._count_step(tokens)
    self.flight.start(self.state.step + 1)
    seen = self.state.tokens // self.config.data.seq_len
    self.routing.start(self.state.step + 1, seen)
    if self.graph is None:
      return self._all(tokens, targets)
    self.clock.start("graph")
    return self.graph(tokens, targets, self._forgetter(gradients=True))

  def _count_step(self, tokens: Tensor) -> None:
    """Tell the model how the step's tokens are counted over experts, if a loss asks for it.

    Of one micro-batch a rank it has them, and sums them over the ranks. Of several it needs them
    before the first one's backward pass, and where some ranks may repeat the passes without the
    others no sum may be inside: all go forward once more, which costs a third of a step.
    """
    c, model, ranks, micros = self.config, self.state.model, self.ranks, self.config.micro_batches
    if not c.moe.global_balance_alpha:
      return
    if micros == 1 and not ranks.apart:
      model.step_counts = lambda count_LE: ranks.sum(count_LE.long())
      return
    self.clock.start("forward")
    total_LE = 0
    with torch.no_grad():
      for micro, x in enumerate(tokens.chunk(micros)):
        model.set_draw(self.state.step, micro, ranks.rank)
        total_LE = total_LE + torch.stack(model.hidden(x)[2]).long()
    if self.counted_LE is None:  # stays where it is, for a graph
      self.counted_LE = torch.empty_like(total_LE)
    self.counted_LE.copy_(ranks.sum(total_LE))
    model.step_counts = lambda _: self.counted_LE

  def _all(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, model, ranks, micros = self.config, self.state.model, self.ranks, self.config.micro_batches
    loss, counts = torch.zeros((), device=self.device), 0
    for micro, (x, y) in enumerate(zip(tokens.chunk(micros), targets.chunk(micros), strict=True)):
      self.clock.start("forward")
      model.set_draw(self.state.step, micro, ranks.rank)
      last = micro == micros - 1
      model.on_final = ranks.reduce_final(model) if last else None
      out = ranks.run(partial(model, x, y), self._forgetter(gradients=False), last=last)
      mean = out.loss_sum / c.schedule.batch_tokens + out.balance_loss / (micros * ranks.ranks)
      self.clock.start("backward")
      mean.backward()
      loss += out.loss_sum.detach()
      counts = counts + out.count_LE
    return loss, counts, out.loss_T

  def _forgetter(self, *, gradients: bool) -> Callable[[], None]:
    """What undoes the passes from here on, before they run again. A forward pass leaves no
    gradients.
    """
    flight, routing = self.flight.mark(), self.routing.mark()

    def forget() -> None:
      if gradients:
        self.state.model.zero_grad()
      self.flight.forget(flight)
      self.routing.forget(routing)

    return forget
