"""The one error of the kernels; nmoe's own are in nmoe.errors."""


class KernelError(RuntimeError):
  """An operation cannot run as asked: an unsupported shape, dtype, layout or device."""
