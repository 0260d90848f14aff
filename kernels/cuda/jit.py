"""What every kernel of ours shares: the architecture, the compile cache, fake tensors and vector
access.

A kernel file compiles through `cached`: the function takes what the code depends on (dtypes, static
sizes) and returns `compile_kernel(...)`. The object is kept in memory and in the architecture's
folder on disk, under a key of the module, the function, its arguments and the text of all sources
here and in QuACK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from pathlib import Path

import cutlass
import cutlass.cute as cute
import quack.cache
import torch
from cutlass import BFloat16, Float32, Int64
from cutlass.cutlass_dsl import CuTeDSL
from quack.cute_dsl_utils import get_device_capacity
from torch import Tensor

from kernels.arch import ARCHS, Arch
from kernels.ops import KernelError, check

VECTOR_BYTES = 16
DTYPES = {torch.bfloat16: BFloat16, torch.float32: Float32}


def _process_arch() -> Arch:
  """The architecture this process compiles for, from the environment that kernels.arch.environment
  gives.
  """
  remedy = "start the process with kernels.arch.environment(arch, cache_root) in its environment"
  folder = quack.cache.CACHE_DIR
  if folder is None or Path(folder).name not in ARCHS:
    raise KernelError(
      f"kernels.cuda: QUACK_CACHE_DIR is {folder!r}, no architecture's folder; {remedy}"
    )
  arch = ARCHS[Path(folder).name]
  found = (CuTeDSL._get_dsl().envar.arch, get_device_capacity())
  if found != (arch.name, arch.capability):
    raise KernelError(
      f"kernels.cuda: the cache folder {folder} is of {arch.name} {arch.capability}, but "
      f"CUTE_DSL_ARCH and QUACK_ARCH say {found[0]} {found[1]}; {remedy}"
    )
  return arch


ARCH = _process_arch()
quack.cache.EXTRA_SOURCE_DIRS.append(Path(__file__).parent)


_COMPILING: ContextVar[bool] = ContextVar("compiling", default=False)


def compiling() -> bool:
  """Whether kernels are compiled and not launched (kernels.tools.compiler)."""
  return _COMPILING.get()


@contextmanager
def compile_mode() -> Iterator[None]:
  """Inside, operations take meta tensors, compile what they would launch, and launch nothing."""
  token = _COMPILING.set(True)
  try:
    yield
  finally:
    _COMPILING.reset(token)


def check_device(device: torch.device) -> None:
  """KernelError unless `device` is a GPU of the architecture this process compiles for."""
  if not (compiling() and device.type == "meta"):
    _check_gpu(device)


@lru_cache
def _check_gpu(device: torch.device) -> None:
  """Asked once a device: the question takes longer than a launch."""
  check(device.type == "cuda", f"kernels.cuda got a tensor on {device}; move it to a CUDA device")
  found = torch.cuda.get_device_capability(device)
  check(
    found == ARCH.capability,
    f"{device} is {torch.cuda.get_device_name(device)}, capability {found}, but the process "
    f"compiles for {ARCH.name} {ARCH.capability}; set target.arch to the machine's",
  )


def _launch_nothing(*_args) -> None:
  pass


def cached(compile_fn: Callable) -> Callable:
  """quack.cache.jit_cache with the module in the key, which QuACK's own key leaves out."""
  compile_fn.__qualname__ = f"{compile_fn.__module__}.{compile_fn.__qualname__}"
  cached_fn = quack.cache.jit_cache(compile_fn)

  @wraps(compile_fn)
  def compiled(*key):
    function = cached_fn(*key)
    return _launch_nothing if compiling() else function

  return compiled


def compile_kernel(kernel: Callable, *args):
  """Compile a @cute.jit callable for fake arguments; the stream, its last parameter, is torch's
  current one.
  """
  stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
  return cute.compile(kernel, *args, stream, options="--enable-tvm-ffi")


def fake(dtype: type, *shape, align: int = VECTOR_BYTES):
  """A contiguous tensor argument: ints are static sizes, None any size; `align` in bytes."""
  sizes = tuple(cute.sym_int64() if size is None else size for size in shape)
  order = tuple(range(len(sizes)))[::-1]
  return cute.runtime.make_fake_compact_tensor(
    dtype, sizes, stride_order=order, assumed_align=align
  )


def vector_width(dtype: torch.dtype, size: int, what: str) -> int:
  """Elements per 16-byte access; KernelError unless rows of `size` elements are whole accesses."""
  check(dtype in DTYPES, f"{what} is {dtype}; use torch.bfloat16 or torch.float32")
  width = VECTOR_BYTES // dtype.itemsize
  check(
    size % width == 0,
    f"{what} has rows of {size} {dtype} elements; make them a multiple of {width} (16 bytes)",
  )
  return width


def contiguous(**tensors: Tensor | None) -> None:
  """KernelError for the first tensor that isn't contiguous and 16-byte aligned."""
  for name, t in tensors.items():
    if t is not None:
      check(
        t.is_contiguous(),
        f"{name} has strides {t.stride()} for shape {tuple(t.shape)}; make it contiguous",
      )
      check(
        t.data_ptr() % VECTOR_BYTES == 0,
        f"{name} starts at an address that 16 does not divide; copy it",
      )


@cute.jit
def vector_at(mX: cute.Tensor, offset: Int64, width: cutlass.Constexpr[int]) -> cute.Tensor:
  """`width` neighbouring elements of a contiguous global tensor from element `offset` on.

  The address must be a multiple of their bytes, or of 16 when they are more.
  """
  size = cutlass.const_expr(mX.element_type.width // 8)
  align = cutlass.const_expr(min(size * width, VECTOR_BYTES))
  address = mX.iterator.toint() + offset * size
  pointer = cute.make_ptr(mX.element_type, address, cute.AddressSpace.gmem, assumed_align=align)
  return cute.make_tensor(pointer, cute.make_layout(width))


@cute.jit
def load_vector(mX: cute.Tensor, offset: Int64, width: cutlass.Constexpr[int]) -> cute.Tensor:
  """Registers holding elements offset : offset + width, in accesses of up to 16 bytes."""
  rX = cute.make_rmem_tensor(width, mX.element_type)
  cute.autovec_copy(vector_at(mX, offset, width), rX)
  return rX


@cute.jit
def store_vector(mX: cute.Tensor, offset: Int64, value) -> None:
  """Round the values to the tensor's type and store them from element `offset` on."""
  width = cutlass.const_expr(cute.size(value.shape))
  rX = cute.make_rmem_tensor(width, mX.element_type)
  rX.store(value.to(mX.element_type))
  cute.autovec_copy(rX, vector_at(mX, offset, width))
