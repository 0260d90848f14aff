"""Compile the CUDA kernels of a configuration ahead of a run, in a child process. Imports no CUDA
package.

The child needs no GPU: a login node or CI can fill the cache folder that a GPU host then reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.arch import environment
from kernels.errors import KernelError


@dataclass(frozen=True)
class Shapes:
  """What the kernels of a run depend on. The fields are those of nmoe.config's sections; E is per
  rank.
  """

  batch: int
  seq_len: int
  dim: int
  vocab_size: int
  num_heads: int
  qk_nope_dim: int
  qk_rope_dim: int
  v_dim: int
  kv_lora_rank: int
  q_lora_rank: int
  dense_dim: int
  num_experts: int
  ranks: int
  expert_dim: int
  num_shared: int
  top_k: int
  num_groups: int
  topk_groups: int
  score: str
  normalize: bool
  route_scale: float
  loss_chunk: int
  dtype: str  # "bf16", "fp8" or "nvfp4"
  emulate_blockscale: bool
  moments: str  # "fp32" or "bf16"
  muon: bool
  payload: str  # of RDEP's dispatched rows: "bf16" or "mxfp8"

  @classmethod
  def of(cls, config) -> Shapes:
    """The shapes of a configuration (an object with the sections of nmoe.config.Config)."""
    sections = (config.model, config.moe, config.data, config.launch, config.target, config.optim)
    sections += (config.rdep,)
    named = {key: value for section in sections for key, value in vars(section).items()}
    named |= {"batch": config.train.micro_batch, "loss_chunk": config.train.loss_chunk}
    named["muon"] = "muon" in (config.optim.matrices, config.optim.experts)
    return cls(**{name: named[name] for name in cls.__dataclass_fields__})


def build(
  shapes: Shapes,
  arch: str,
  cache_root: str | Path,
  env: Mapping[str, str],
  *,
  inspect: bool = False,
) -> list[dict]:
  """Fill cache_root/arch with the kernels of these shapes; one record per kernel compiled.

  env is the environment that the child starts from. Records hold the kernel's job, name and compile
  seconds; with `inspect` the cache is left alone, every kernel is compiled, and the records also
  hold registers, spills, shared memory and tensor-core instructions. Raises KernelError with the
  child's last lines if it fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    given, out = Path(folder, "shapes.json"), Path(folder, "records.json")
    given.write_text(json.dumps([asdict(one) for one in shapes]))
    child = {**env, **environment(arch, cache_root)}
    if inspect:
      child |= {"QUACK_CACHE_ENABLED": "0", "CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": folder}
    command = [sys.executable, "-m", "kernels.cuda.build", str(given), str(out)]
    done = subprocess.run(command, env=child, capture_output=True, text=True)
    if done.returncode:
      tail = "\n".join(done.stderr.splitlines()[-15:])
      raise KernelError(f"building the kernels for {arch} failed (exit {done.returncode}):\n{tail}")
    return json.loads(out.read_text())
