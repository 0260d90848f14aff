"""Which checkpoints of a production run are kept for good: the others give way to newer ones."""

from __future__ import annotations

from nmoe.config.sections import Config


def permanent(tokens: int, config: Config) -> str:
  """Why the state after `tokens` tokens is kept, "" if it is not: a pure function of both.

  The first after every prod.permanent_tokens, and the last before the rates decay.
  """
  schedule, every = config.schedule, config.prod.permanent_tokens
  before = tokens - schedule.batch_tokens
  if every and tokens // every > before // every:
    return f"every {every} tokens"
  decays = schedule.trained_tokens - schedule.decay_tokens
  if schedule.decay_tokens and tokens <= decays < tokens + schedule.batch_tokens:
    return "before the rates decay"
  return ""
