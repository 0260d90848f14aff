"""The forward and backward passes of a step as one CUDA graph: the host queues it with one call.

A small model is not limited by its GPU but by the host, which queues about a thousand kernels a
step, and on several GPUs every layer begins with small ones. A graph queues them at once; it
computes what they compute, bit for bit. On one H200 a step of configs/moonlet/small.toml takes
66.7 ms instead of 68.9; over bytes, without the large head, 23.0 instead of 45.8; and in batches of
8,192 bytes 8.1 instead of 35.8.

Several ranks capture passes of one round a layer, sums of gradients included. Where a layer needs
more (`Rdep.attempt`) what the passes did is undone, and the passes are queued one by one, as are
those of the RESTS steps after one in which a rank ran full. The graph is forgotten, with its
memory: what routing does once it mostly does again. Before a replay all weights have arrived.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nmoe.distributed.parallel import Parallel

RESTS = 16  # steps without a graph after one in which a rank ran full
Passes = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Graph:
  """`passes` of one shape on a GPU: the first call runs it, the second captures it, and from then
  on calls replay the capture.

  passes(tokens, targets) leaves gradients in the parameters of `model`, which have none before, and
  returns tensors. Between calls the host may change weights in place and drop gradients. Results
  and gradients are overwritten by the next call. The memory of the passes stays theirs:
  `idle_bytes` of it are free between calls, and not for others.
  """

  def __init__(self, model: nn.Module, passes: Passes, ranks: Parallel):
    self.params, self.passes, self.ranks = list(model.parameters()), passes, ranks
    self.graph: torch.cuda.CUDAGraph | None = None
    self.warm = False
    self.rests = 0  # steps to come
    self.idle_bytes = 0

  def __call__(
    self, tokens: Tensor, targets: Tensor, forget: Callable[[], None]
  ) -> tuple[Tensor, ...]:
    """forget() undoes what the passes did, for which one round of a layer was not enough."""
    if self.rests:
      return self._without(tokens, targets)
    done, results = self.ranks.attempt(lambda: self._queue(tokens, targets))
    if done:
      return results
    forget()
    self._end()
    return self._without(tokens, targets)

  def _without(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The passes one by one; of several ranks."""
    before = self.ranks.rdep.full
    results = self.passes(tokens, targets)
    self.rests = RESTS if self.ranks.rdep.full > before else max(self.rests - 1, 0)
    return results

  def _queue(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    if not self.warm:  # compiles kernels and lets libraries set themselves up
      self.warm = True
      return self.passes(tokens, targets)
    if self.graph is None:
      self._capture(tokens, targets)
    for static, given in zip(self.inputs, (tokens, targets), strict=True):
      static.copy_(given)
    for param, grad in zip(self.params, self.grads, strict=True):
      param.grad = grad
    with self.ranks.replay():
      self.graph.replay()
    return self.results

  def _capture(self, tokens: Tensor, targets: Tensor) -> None:
    """Record the passes, which computes nothing. Other threads may use the GPU meanwhile."""
    self.ranks.arrive()  # nothing that began before may end inside
    self.inputs = (tokens.clone(), targets.clone())
    self.graph = torch.cuda.CUDAGraph()
    torch.cuda.empty_cache()  # else what the first call left would count as idle before
    before = _idle_bytes()
    with (
      torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
      self.ranks.capture(self.graph),
    ):
      self.results = self.passes(*self.inputs)
    self.grads = [param.grad for param in self.params]
    self.idle_bytes = _idle_bytes() - before
    torch.cuda.reset_peak_memory_stats()  # of the first call, whose memory is free again

  def _end(self) -> None:
    """Give the graph's memory back."""
    self.warm = False
    if self.graph is None:
      return
    self.graph, self.inputs, self.results, self.grads, self.idle_bytes = None, (), (), [], 0
    self.ranks.forget()
    torch.cuda.empty_cache()


def _idle_bytes() -> int:
  """Bytes that torch holds and no tensor uses."""
  return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
