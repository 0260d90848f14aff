"""What needs no torch is refused without it: its import takes two seconds, a refusal half a one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from labs import write_files, write_variant

pytestmark = pytest.mark.faults
REPO = Path(__file__).parents[2]
RUN = "20260101-000000-0000"  # that no root has
LONG = "x" * 300  # no file system takes it
COMMANDS = [  # FILE.toml is not there, lost.toml is a configuration whose mixture is not
  "research run FILE.toml",
  "research run lost.toml",
  f"research run tiny.toml --from {RUN}",
  "ablate FILE.toml tiny.toml",
  "ablate tiny.toml lost.toml",
  "ablate tiny.toml tiny.toml",
  "proxy coords FILE.toml",
  "proxy coords tiny.toml",
  "proxy sweep FILE.toml",
  "proxy sweep sweep.toml",
  "proxy sweep dear.toml",
  "proxy sweep --plan FILE.toml",
  "proxy sweep --plan dear.toml",
  "proxy sweep --build sweep.toml",
  "proxy mix FILE.toml",
  "proxy mix mix.toml",
  "plan FILE.toml",
  "config show FILE.toml",
  "config diff tiny.toml FILE.toml",
  "prep-mixture FILE.toml",
  "prep-mixture mixture.toml --tokenizer bite",
  "report nothing",
  "viz --root nowhere",
  f"watch {RUN}",
  "watch --root loop",
  "viz --root loop",
  f"rerun {RUN}",
  "prep-evals FILE.jsonl",
  f"eval {RUN}",
  "import nowhere out.toml",
  "import empty out.toml",
  "import other out.toml",
  "import lost out.toml",
  "import other tiny.toml",
  "import whole nowhere/out.toml",
  f"export {RUN} out",
  f"export {LONG} out",
  f"export {RUN} out --dtype fp8",
  "doctor FILE.toml",
  "experiments show nothing",
  "bench step FILE.toml",
  "bench step lost.toml",
  "bench step tiny.toml --out nowhere/x",
  "bench rdep FILE.toml",
  "bench rdep tiny.toml --out nowhere/x",
  "bench kernels --arch sm_100a --out nowhere/x",
  "bench rdep tiny.toml --ranks 3",
  "bench kernels --arch sm_80",
  "check resume FILE.toml",
  "check resume lost.toml",
  "check resume tiny.toml --ranks 3",
  "check ep FILE.toml",
  "check ep lost.toml",
  "check ep tiny.toml --ranks 1,3",
  "prod plan FILE.toml",
  "prod plan tiny.toml --tokens-per-s nan",
  "prod plan tiny.toml --tokens-per-s inf",
  "prod plan tiny.toml --tokens-per-s -5",
  "prod launch FILE.toml",
  "prod launch lost.toml --without-evidence test",
  "prod check FILE.toml",
  f"prod status {RUN}",
  f"prod stop {RUN}",
  f"prod amend {RUN} FILE.toml",
  "kernels build FILE.toml",
  "kernels build tiny.toml",
]
CALLS = """
import contextlib, importlib.abc, io, json, os, sys

class NoTorch(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name == "torch":
      raise AssertionError("torch is imported")

sys.meta_path.insert(0, NoTorch())
from stages.cli import app
told = {}
for words in json.loads(sys.argv.pop()):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      app(words.split())
      status = 0
    except SystemExit as left:
      status = left.code
    except BaseException as error:
      status = repr(error)
  told[words] = [status, err.getvalue()]
print(json.dumps(told))
"""
SWEEP = """[sweep]
name = "rates"
statement = "The best rates stay."
base = "BASE"
points = 3
[[scale]]
width = 2
[budget]
runs = RUNS
"""
MIX = """[mix]
name = "mix"
statement = "A mixture."
base = "lost.toml"
target_tokens = 1000000
objective = [1.0, 1.0]
[budget]
runs = 100
"""
DECAYS = "[schedule]\ntotal_tokens = 20480\ndecay_tokens = 12288\n"
MODEL = {"model_type": "deepseek_v3"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  """Command -> its status and what it said, all in one process in which torch is out of reach."""
  folder = tmp_path_factory.mktemp("refusals")
  tiny = write_files(folder)
  (folder / "loop").symlink_to("loop")
  lost = '[data]\nmixture = "nowhere.toml"\n'
  write_variant(tiny, "lost", lost + DECAYS)
  write_variant(tiny, "long", DECAYS)
  (folder / "sweep.toml").write_text(SWEEP.replace("BASE", "lost.toml").replace("RUNS", "99"))
  (folder / "dear.toml").write_text(SWEEP.replace("BASE", "long.toml").replace("RUNS", "9"))
  (folder / "mix.toml").write_text(MIX)
  for name, config in (("empty", None), ("other", {"model_type": "llama"}), ("lost", MODEL)):
    (folder / name).mkdir()
    if config:
      (folder / name / "config.json").write_text(json.dumps(config))
  done = subprocess.run(
    [sys.executable, "-c", CALLS, json.dumps(COMMANDS)],
    cwd=folder,
    env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "NMOE_ROOT": str(folder / "root")},
    stdout=subprocess.PIPE,
    text=True,
    timeout=120,
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_refusal_needs_no_torch(told, command):
  status, said = told[command]
  assert status == 1, said
  assert said.startswith("error: ") and said.count("\n") == 1
