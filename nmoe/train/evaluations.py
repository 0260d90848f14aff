"""What a run measures of its model, and when: the held-out set, and a suite if [eval] names one."""

from __future__ import annotations

from collections.abc import Callable

from nmoe.config.sections import Config
from nmoe.data.loader import Validation
from nmoe.data.prepared import PreparedData
from nmoe.distributed.parallel import Parallel
from nmoe.evals.downstream import Downstream, Outcome
from nmoe.evals.heldout import evaluate
from nmoe.evals.measure import write_items
from nmoe.evals.suites import ITEMS, suite_of
from nmoe.model.decoder import Model
from nmoe.records.root import Root


class Evaluations:
  """Opened before the first step, so that missing or unfit items stop a run before it trains."""

  def __init__(
    self,
    config: Config,
    parallel: Parallel,
    data: PreparedData,
    root: Root,
    run_id: str,
  ):
    self.config, self.parallel = config, parallel
    self.root, self.run_id = root, run_id
    c = config.data
    self.validation = Validation(data, seq_len=c.seq_len, tokens=c.val_tokens)
    self.downstream = None
    if config.eval.suite != "none":
      suite = suite_of(config.eval.suite, config.eval.limit)
      self.downstream = Downstream(suite, root.evals, config, data.tokenizer)

  def due(self, step: int, last: int) -> bool:
    """Whether anything is measured after this step; after the last one all is."""
    return due(step, self.config.train.eval_every, last) or self._suite_due(step, last)

  def values(
    self, step: int, last: int, model: Model, alive: Callable[[], None] = lambda: None
  ) -> dict[str, float]:
    """By tag, all that is due after this step; every rank calls it. A suite's items are written.
    alive: called at each batch.
    """
    values = {}
    if due(step, self.config.train.eval_every, last):
      micro_batch = self.config.train.micro_batch
      values |= evaluate(model, self.validation, micro_batch, self.parallel, alive)
    if self._suite_due(step, last):
      outcome = self.downstream.run(model, self.parallel, lambda *_: alive())
      values |= logged(outcome)
      if self.parallel.rank == 0:
        suite = self.downstream.suite.asked
        write_items(self.root.eval_items(self.run_id, step, suite), outcome.items)
    return values

  @property
  def items(self) -> dict[str, str]:
    """Which items the suite's measures are of, for a run's results; {} without a suite."""
    return {} if self.downstream is None else {ITEMS: self.downstream.digest}

  def _suite_due(self, step: int, last: int) -> bool:
    return self.downstream is not None and due(step, self.config.eval.every, last)


def due(step: int, every: int, last: int) -> bool:
  """Whether what is done at every so many steps, and after the last, is due; every 0: never."""
  return step == last or (every > 0 and step % every == 0)


def logged(outcome: Outcome) -> dict[str, float]:
  """The values of a suite and the seconds that it took."""
  return outcome.values | {"eval/seconds": outcome.seconds}
