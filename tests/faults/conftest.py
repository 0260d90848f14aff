"""For the faults: how undisturbed runs end, and that nothing is left behind."""

import fcntl
from pathlib import Path

import productions
import pytest

SHARED = Path("/dev/shm")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
  """The final state of an undisturbed run."""
  return productions.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def undisturbed_hosts(tmp_path_factory):
  """The same with all experts on each rank: as on two hosts."""
  return productions.undisturbed(tmp_path_factory.mktemp("hosts"), rdep__group=1)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
  """No process, no shared memory of ours and no held lock outlives a test that kills."""
  before = set(SHARED.iterdir())
  yield
  root = tmp_path / "root"
  for folder in (root / "runs").glob("*"):
    assert list(productions.processes(folder.name)) == []
  for path in [*(root / "locks").glob("*"), *(root / "runs").glob("*/launch.lock")]:
    with path.open("a") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  left = [path.name for path in set(SHARED.iterdir()) - before if path.name.startswith("nmoe")]
  assert left == []
