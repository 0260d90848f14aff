"""YaRN's numbers (arXiv 2309.00071), for the model and for its HuggingFace configuration. Does not
import torch.
"""

from __future__ import annotations

import math

from nmoe.config.sections import ModelConfig, YarnConfig


def softmax_mscale(yarn: YarnConfig) -> float:
  """YaRN's attention temperature; the softmax scale gets its square (2412.19437 section 4.3)."""
  return 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0


def yarn_range(m: ModelConfig, yarn: YarnConfig) -> tuple[int, int]:
  """Dimensions below the first turn as they did, from the second on they are slowed by the factor.

  The second is less than the first where all turn less than beta_slow times.
  """

  def dim_of(rotations: float) -> float:
    wavelength = yarn.original_seq_len / (2 * math.pi * rotations)
    return m.qk_rope_dim // 2 * math.log(wavelength) / math.log(m.rope_theta)

  low = max(math.floor(dim_of(yarn.beta_fast)), 0)
  return low, min(math.ceil(dim_of(yarn.beta_slow)), m.qk_rope_dim - 1)
