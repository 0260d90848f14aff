"""GPU architectures and the environment that their compilers read. Imports neither torch nor a
CUDA package.

CuTeDSL and QuACK read their settings once, when they are imported. So a launcher puts
`environment(...)` into the environment of the process that will import `kernels.cuda`; no other
code touches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arch:
  name: str  # what ptxas compiles for
  capability: tuple[int, int]  # what torch.cuda.get_device_capability() says of such a GPU
  num_sms: int  # of the product that carries it (B200, H100 and H200)
  block_scaled: bool  # it has block-scaled tensor cores


CUBLAS = (4096, 8)  # KiB and number of a workspace's buffers, fixed, so that it is deterministic
ARCHS = {
  "sm_90a": Arch("sm_90a", (9, 0), 132, False),
  "sm_100a": Arch("sm_100a", (10, 0), 148, True),
}


def environment(arch: str, cache_root: str | Path) -> dict[str, str]:
  """The variables a process needs before it imports `kernels.cuda` for `arch`, one of ARCHS.

  The compiled kernels are kept in `cache_root/arch`: one folder per architecture, because the names
  of QuACK's cached objects do not all say which architecture they were compiled for.
  """
  info, cache = ARCHS[arch], str(Path(cache_root).absolute() / arch)
  major, minor = info.capability
  return {
    "CUTE_DSL_ARCH": arch,
    "QUACK_ARCH": f"{major}{minor}",
    "QUACK_CACHE_ENABLED": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":{}:{}".format(*CUBLAS),
    "NVSHMEM_DISABLE_NVLS": "1",  # RDEP needs no multicast, and some hosts fail to set it up
    "NVSHMEM_DISABLE_NCCL": "1",  # nor NVSHMEM's collectives: communicators of 1.6 GiB a GPU
    "NVSHMEM_MAX_TEAMS": "32",  # NVSHMEM makes a few, RDEP none; room for its usual 256 is 1.2 GiB
    "NVSHMEM_CUMEM_GRANULARITY": str(64 << 20),  # pieces of the heap; usually 512 MiB
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_ALGO": "Ring",  # one order of sums, whatever the machine's links
    "QUACK_CACHE_DIR": cache,
    "FLASH_ATTENTION_ARCH": arch.removesuffix("a"),
    "FLASH_ATTENTION_NUM_SMS": str(info.num_sms),
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(Path(cache, "flash_attention")),
  }
