"""The learning rate schedule: warm-up, sustain, decay, counted in tokens.

arXiv 2404.06395 section 4.2 (WSD) and 2405.18392 section 3 (the 1 - sqrt decay).
"""

from __future__ import annotations

import math

from nmoe.config.sections import ScheduleConfig


def lr_factor(tokens: int, config: ScheduleConfig) -> float:
  """The factor on the peak learning rate of the step that starts after `tokens` tokens.

  A step stands at the middle of its own tokens, t = tokens + batch_tokens / 2, so that neither the
  first nor the last step has a rate of zero, and linear phases of whole batches sum to their area.
  t / warmup_tokens while t < warmup_tokens; 1 up to total_tokens - decay_tokens; then, with x the
  share of decay_tokens behind t, final_ratio + (1 - final_ratio) · g(x): g is 1 - x ("linear")
  or 1 - sqrt(x) ("sqrt"). Beyond its end a schedule with a decay stays at final_ratio. The end is
  that of the last whole batch in total_tokens: tokens short of a batch are not trained.
  """
  t = tokens + config.batch_tokens / 2
  if t < config.warmup_tokens:
    return t / config.warmup_tokens
  start = config.trained_tokens - config.decay_tokens
  if config.decay_tokens == 0 or t <= start:
    return 1.0
  x = min(1.0, (t - start) / config.decay_tokens)
  g = 1 - x if config.decay == "linear" else 1 - math.sqrt(x)
  return config.final_ratio + (1 - config.final_ratio) * g
