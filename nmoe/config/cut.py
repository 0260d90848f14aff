"""A configuration cut down, for proofs and benches: its first steps, or one rank on the cpu."""

from __future__ import annotations

from typing import Any

from nmoe.config.sections import Config

ONE_CPU: dict[str, Any] = {  # one rank on the cpu in fp32; the model is as it was
  "target.arch": "cpu",
  "target.dtype": "fp32",
  "target.emulate_blockscale": False,
  "precision.bf16_first_layers": 0,
  "precision.bf16_last_layers": 0,
  "train.cuda_graph": False,
  "launch.ranks": 1,
  "launch.ranks_per_node": 0,
  "rdep.group": 0,
  "rdep.payload": "bf16",
  "rdep.peer_access": True,
  "rdep.alignment": 1,
}


def few_steps(config: Config, steps: int, batch_tokens: int) -> dict[str, Any]:
  """The keys of a run of so many batches at full rates: what no step of it reaches is left out."""
  total, finish = steps * batch_tokens, config.precision.finish_tokens
  return {
    "schedule.batch_tokens": batch_tokens,
    "schedule.total_tokens": total,
    "schedule.warmup_tokens": 0,
    "schedule.decay_tokens": 0,
    "precision.finish_tokens": finish if finish <= total else 0,
    "data.weights_from": [row for row in config.data.weights_from if row[0] < total],
  }
