"""Every kernel, compiled for both architectures without a GPU, against the committed table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import table

from kernels.arch import ARCHS, environment
from kernels.tools.build import build, start

pytestmark = pytest.mark.compile

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = 228 * 1024  # bytes per thread block, on both: 227 KiB and 1 KiB of the system
SPILLS: dict[tuple[str, str, str], str] = {}  # (arch, job, kernel): why it may spill
PRODUCT = re.compile("Gemm|FlashAttention(Forward|Backward)Sm")
INSTRUCTIONS = {
  "sm_90a": {"HGMMA"},
  "sm_100a": {"UTCHMMA", "UTCQMMA", "UTCOMMA"},  # bf16, MXFP8, NVFP4
}


@pytest.fixture(scope="module")
def rows(compiled):
  return compiled.rows


def test_table_is_current(rows):
  now, committed = ([",".join(row.values()) for row in part] for part in (rows, table.read()))
  changed = sorted(set(now) ^ set(committed))
  assert not changed, "\n".join(
    ["rows differ; if that is meant: PYTHONPATH=. python tests/compile/table.py", *changed]
  )


def test_nothing_spills(rows):
  found = {
    (row["arch"], row["job"], row["kernel"])
    for row in rows
    if (row["stores"], row["loads"]) != ("0", "0")
  }
  assert found == set(SPILLS)


def test_shared_memory_fits(rows):
  assert max(int(row["shared"]) for row in rows) <= SHARED_LIMIT


@pytest.mark.parametrize("arch", ARCHS)
def test_products_run_on_the_tensor_cores(rows, arch):
  found = {True: set(), False: set()}
  for row in rows:
    if row["arch"] == arch:
      found[bool(PRODUCT.search(row["kernel"]))].add(row["mma"])
  assert found == {True: INSTRUCTIONS[arch], False: {""}}


def test_the_cache_is_filled_once(compiled):
  """Each kernel has a place of its own there, and none is compiled again."""
  rows = [row for row in compiled.rows if row["arch"] == "sm_90a"]
  objects = set((compiled.cache / "sm_90a").rglob("*.o"))
  assert len(objects) == len(rows) > 30
  assert build([table.MOONLET], "sm_90a", compiled.cache, os.environ) == []
  assert set((compiled.cache / "sm_90a").rglob("*.o")) == objects
  assert start(table.MOONLET, "sm_90a", compiled.cache, os.environ, Path(os.devnull)) is None


def child(env):
  """What importing kernels.cuda in a fresh process prints on stderr."""
  command = [sys.executable, "-c", "import kernels.cuda"]
  bare = {k: v for k, v in os.environ.items() if not k.startswith(("QUACK_", "CUTE_DSL_"))}
  done = subprocess.run(command, cwd=ROOT, env=bare | env, capture_output=True, text=True)
  assert done.returncode != 0
  return done.stderr


def test_a_process_without_the_environment_is_told():
  assert "KernelError: kernels.cuda: QUACK_CACHE_DIR is None" in child({})


def test_an_architecture_that_disagrees_with_its_folder_is_told(tmp_path):
  env = environment("sm_90a", tmp_path) | {"CUTE_DSL_ARCH": "sm_100a"}
  assert "say sm_100a (9, 0)" in child(env)
