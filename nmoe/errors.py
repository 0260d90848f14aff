"""The errors a user can meet. Each message says what was found, what is required and what to do."""


class NmoeError(Exception):
  """Base of every error that nmoe raises on purpose; the CLI prints its message without a
  traceback.
  """


class ConfigError(NmoeError):
  """A configuration file, key, value or environment override is wrong."""


class TargetError(NmoeError):
  """The machine is not what the configuration's [target] asks for."""


class DataError(NmoeError):
  """A data set, mixture, shard or manifest is missing, unreadable or corrupt."""


class CheckpointError(NmoeError):
  """A checkpoint cannot be written, or what is read is missing, corrupt or of another run."""


class CorruptError(CheckpointError):
  """A file of a checkpoint is missing or is not what its manifest says; an older may be whole."""


class DiskFullError(CheckpointError):
  """A checkpoint found no space: what was saved before is whole, and space can be freed."""


class CommError(NmoeError):
  """Ranks failed to communicate: a peer is missing, late or dead."""


class RecordError(NmoeError):
  """The experiment or metrics database cannot be read or written."""


class OtherCodeError(RecordError):
  """A process has imported other code, or finds other libraries, than the run's record says."""


class RunError(NmoeError):
  """A run stopped: a non-finite loss, two processes on one run, or a failed child process."""


class FencedError(RunError):
  """A newer attempt of the run has begun: this one may write nothing any more."""


class DivergedError(RunError):
  """The loss or a gradient is not finite: an outcome of the configuration, not a fault of the
  machine.
  """
