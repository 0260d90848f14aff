"""`nmoe check ep` in bf16 over NVSHMEM ranks of this machine's GPUs, or of its one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from kernels.arch import ARCHS
from stages.proofs import check_ep as parity

pytestmark = pytest.mark.gpu
SMALL = Path(__file__).parents[2] / "configs" / "moonlet" / "small.toml"

CONFIG = """
extends = "{small}"
[experiment]
name = "parity"
[run]
root = "{root}"
[target]
arch = "{arch}"
[model]
vocab_size = 384
num_layers = 3
[data]
tokenizer = "byte"
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_what_one_rank_trains(ranks: int, tmp_path: Path) -> None:
  found = torch.cuda.get_device_capability()
  arch = next(a.name for a in ARCHS.values() if a.capability == found)
  path = tmp_path / "parity.toml"
  path.write_text(CONFIG.format(small=SMALL, root=tmp_path, arch=arch))
  claims = parity.ep(path, [1, ranks], 3, Console(width=120))
  assert {claim.ranks for claim in claims} == {str(ranks)}
  assert not [claim for claim in claims if not claim.holds]
