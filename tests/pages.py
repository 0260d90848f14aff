"""A root that fills every page of the dashboard, and a server of it."""

import threading
import time
from contextlib import closing
from itertools import product
from pathlib import Path
from unittest.mock import patch

import duckdb
import numpy as np
import uvicorn
from roots import add_loads, curves, fill, start_run

from nmoe.config import file as configs
from nmoe.evals.measure import Items, write_items
from nmoe.records import attempts
from nmoe.records.experiments import Experiments
from nmoe.records.live import Live
from nmoe.records.reader import ArmRecord, Evaluation, Hypothesis
from nmoe.records.root import Root
from stages.judge.transfer import Limits, Scale, judge
from stages.viz.server import Server

REPO = Path(__file__).resolve().parents[1]
STEPS = np.arange(1, 201) * 10
LAYERS, EXPERTS, RANKS = 4, 16, 4


def start(records, experiment, arm, seed, base, **keys):
  toml = configs.to_toml(configs.changed(base, {"train.seed": seed, **keys}))
  return start_run(records, experiment.id, arm, seed, toml=toml, fingerprint=arm).id


def make(root):
  """Ids of an ablation by arm and seed; beside it a sweep, a production run and links."""
  base = configs.load(REPO / "configs/moonlet/cpu.toml", env={})
  records = Experiments(root)
  claim = Hypothesis("A higher rate learns faster.", "val/bpb", "lower", 0.005)
  experiment = records.create("rate", "ablate", [claim])
  ids = {}
  for seed in range(3):
    for arm, shift in (("baseline", 0.0), ("variant", -0.05)):
      rate = 3e-3 if arm == "baseline" else 5e-3
      run = start(records, experiment, arm, seed, base, **{"optim.dense_lr": rate})
      values = curves(STEPS, seed, shift, LAYERS)
      values["val/bpb"] = values["train/bpb"]
      right = np.random.default_rng(seed + (7 if arm == "variant" else 0)).random(40) < 0.6
      values |= evaluated(right) | of_ranks(values)
      fill(root, run, 0, STEPS, values)
      resumed(root, run, step=1000, lost=30)
      add_loads(root, run, STEPS, LAYERS, EXPERTS)
      add_experts(root, run, STEPS[::20], LAYERS, EXPERTS)
      answer(root, run, 2000, right)
      bpb = (3.0 + shift + 0.01 * seed) / 2.6
      records.update_run(run, status="completed", results={"val/bpb": bpb})
      ids[arm, seed] = run
  records.conclude(experiment.id, "confirmed", {"reason": "variant − baseline = −0.019"})
  results = {"eval/asked/acc": 0.6, "eval/asked/acc_se": 0.08, "eval/asked/bpb": 1.1}
  results["eval/mine/acc"] = 0.6
  records.add_evaluation(run, Evaluation(2000, "mine", "d", "cpu fp32", results, 1.0))
  again = records.create("again", "ablate", [claim])
  records.link(again.id, experiment.id, "repeats", "elsewhere")
  wider = records.create("wider", "proxy", [claim])
  records.link(wider.id, experiment.id, "supports", "rates")
  sweep(records, base, claim)
  records.close()
  production(root, ids["variant", 1])
  report = Root(root).report(experiment.id)
  report.mkdir(parents=True)
  (report / "index.html").write_text("<h1>the report</h1>")
  return ids


def of_ranks(values):
  """What rank 0 logs of all: rank 2 is 20 % slower in every phase, rank 1 gets the most rows."""
  noise = np.random.default_rng(4)
  of = {}
  for rank in range(RANKS):
    slow = 1.2 if rank == 2 else 1.0
    of |= {f"rank/{rank}/{k[5:]}": slow * v for k, v in values.items() if k[:5] == "time/"}
    of[f"rank/{rank}/rows"] = 1000.0 * (1 + 0.3 * (rank == 1)) + 40 * noise.random(len(STEPS))
    of[f"rank/{rank}/rounds"] = np.full(len(STEPS), 1.0 + (rank == 1))
  return of


def production(root, run):
  """Two attempts of a thousand seconds: the first crashed, in both a rank was killed."""
  startup = {"imports": 4.0, "kernels": 9.0, "ranks_and_data": 2.0, "model": 6.0}
  with patch.object(attempts, "time") as clock, closing(attempts.Attempts(root)) as history:
    for number, outcome in enumerate(("crashed", "completed"), start=1):
      begun, step = time.time() - 2100 + 1050 * (number - 1), 1000 * (number - 1)
      clock.time.return_value = begun
      place = {"engine": "slurm", "job_id": str(70 + number), "nodes": ["a", "b"], "commit": "c"}
      history.begin(run, **place, step=step)
      clock.time.return_value = begun + 40
      history.started(run, number, step, "a", {"startup": startup})
      clock.time.return_value = begun + 540
      detail = {"startup": startup, "reached": step + 450, "reached_at": begun + 500}
      history.started(run, number, step + 400, "a", detail)
      clock.time.return_value = begun + 1000
      history.end(run, number, outcome=outcome, exit_status=0, step=step + 1000)


def sweep(records, base, claim):
  """Two scales, two controls, as stages.proxy.sweep records them; each line has its optimum."""
  optima = {("joint", "base"): 0.2, ("joint", "width 2"): 0.6}
  optima |= {("off", "width 2"): -1.3, ("embed_only", "width 2"): -0.6}
  grids = {line: {} for line in optima}
  arms = [
    ArmRecord(f"{g} {s} {x:+d}", {"group": g, "scale": s, "ratio": 1.0, "log2_rate": float(x)}, "")
    for (g, s), x in product(optima, range(-3, 4))
  ]
  experiment = records.create("sweep", "proxy", [claim], arms)
  for arm in arms:
    run = start(records, experiment, arm.name, 0, base)
    at = optima[arm.point["group"], arm.point["scale"]]
    bpb = 1.3 + 0.03 * (arm.point["log2_rate"] - at) ** 2 + 0.002 * (arm.point["log2_rate"] % 2)
    records.update_run(run, status="completed", results={"val/bpb": bpb})
    grids[arm.point["group"], arm.point["scale"]][arm.point["log2_rate"]] = bpb
  of = {line: Scale(line[1], 1.0, {0: grid}) for line, grid in grids.items()}
  base, wide, off, embed = of.values()
  controls = {"off": [base, off], "embed_only": [base, embed]}
  judged = judge({"joint": [base, wide]}, controls, Limits())
  records.conclude(experiment.id, judged.verdict, {"reason": judged.reason} | judged.as_dict())


def evaluated(right):
  """The tags of a task in the loop, with standard errors."""
  acc = right.mean() * (0.5 + 0.5 * STEPS / STEPS[-1])
  error = np.full(len(STEPS), 0.05)
  return {"eval/t/acc": acc, "eval/t/acc_se": error, "eval/t/bpb": 2 - acc, "eval/t/bpb_se": error}


def answer(root, run, step, right):
  """The items of task t of which `right` are right: two choices each, the first is gold."""
  n = len(right)
  gold = np.tile([True, False], n)
  nats = np.where(np.repeat(right, 2) == gold, 1.0, 2.0)
  of, one = np.repeat(np.arange(n), 2), np.ones(2 * n, np.int64)
  items = Items(of, np.tile([0, 1], n), gold, nats, one, one, one, gold)
  write_items(Root(root).eval_items(run, step, "mine"), {"t": items})


def resumed(root, run, step, lost):
  """Two starts: the first, and one after `step`, `lost` steps back."""
  with duckdb.connect(str(Root(root).metrics(run, 0))) as db:
    for at, values in ((10, {}), (step + 10, {"startup/rewound_steps": lost})):
      (when,) = db.execute("SELECT min(time) FROM metrics WHERE step = ?", [at]).fetchone()
      for tag, value in (values | {"startup/first_step_s": 8.0}).items():
        db.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?)", [at, 1000 * at, tag, value, when])


def add_experts(root, run, steps, layers, experts):
  """Biases that spread, and two sources of which one has favourites."""
  noise = np.random.default_rng(2)
  sql = (
    "CREATE TABLE IF NOT EXISTS experts (step BIGINT, layer INTEGER, name VARCHAR, value FLOAT[])"
  )
  taste = {"bias": noise.standard_normal(experts) / 20, "gate": 0.5 + noise.random(experts)}
  taste |= {"source prose": np.ones(experts), "source code": np.exp(noise.standard_normal(experts))}
  with duckdb.connect(str(Root(root).metrics(run, 0))) as db:
    db.execute(sql)
    rows = [
      (int(step), layer, name, (of * (step / 2000 if name == "bias" else 1000)).tolist())
      for step, layer, (name, of) in product(steps, range(layers), taste.items())
    ]
    db.executemany("INSERT INTO experts VALUES (?, ?, ?, ?)", rows)


class Served:
  """A server in a thread of this process, on a free port of loopback."""

  def __init__(self, root, cache):
    app = Server(Live(root, cache)).app()
    self.server = uvicorn.Server(
      uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
    )
    self.thread = threading.Thread(target=self.server.run)
    self.thread.start()
    deadline = time.monotonic() + 30
    while not self.server.started and time.monotonic() < deadline:
      time.sleep(0.02)
    (socket,) = self.server.servers[0].sockets
    self.address = f"http://127.0.0.1:{socket.getsockname()[1]}"

  def stop(self):
    self.server.should_exit = True
    self.thread.join(timeout=20)
