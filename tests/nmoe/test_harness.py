"""`nmoe eval` against lm-eval, which scores the exported folder by itself through transformers."""

from __future__ import annotations

import importlib
import json
import random

import numpy as np
import pytest
from rich.console import Console

from nmoe.data.tokenizer import get
from nmoe.distributed.parallel import Parallel
from nmoe.evals.downstream import Downstream
from nmoe.evals.measure import per_document
from nmoe.evals.sources import prepare
from nmoe.evals.suites import Suite
from nmoe.machine.target import select
from nmoe.records.root import Root
from nmoe.train.evaluate import load_model
from stages import export

pytestmark = pytest.mark.harness
EOT = "<|endoftext|>"  # ours begins every prompt with the separator, lm-eval with nothing
WORDS = "etaoin shrdlu tone rain shed in on tools nude the".split()
TASK = {
  "task": "mine",
  "dataset_path": "json",
  "test_split": "test",
  "output_type": "multiple_choice",
  "doc_to_text": EOT + "{{context}}",
  "doc_to_choice": "choices",
  "doc_to_target": "gold",
  "target_delimiter": "",
  "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def write_items(path):
  chance = random.Random(3)
  with path.open("w") as stream:
    for i in range(40):
      context = " ".join(chance.choices(WORDS, k=4))
      choices = [" " + " ".join(chance.choices(WORDS, k=chance.randint(1, 2))) for _ in range(3)]
      item = {"task": "mine", "name": str(i), "context": context, "choices": choices}
      stream.write(json.dumps(item | {"gold": i % 3}) + "\n")
  return path


def test_lm_eval_finds_the_same_on_the_exported_folder(lab, tmp_path):
  """Nats of every choice, greedy hits, acc, and acc_norm, which is ours per character."""
  run = lab.record()
  lab.attempt(run)
  out = tmp_path / "hf"
  export.run(run, out, None, None, 5.0, "tensors", lab.root, Console(quiet=True))
  source = write_items(tmp_path / "items.jsonl")
  prepare(source, lab.root)
  evals = Root(lab.root).evals
  mine = Downstream(Suite("mine", ("mine",), 0), evals, lab.config, get("byte"))
  model = load_model(lab.config, select(lab.config), Parallel(), lab.checkpoints(run), 12)
  items = mine.run(model, Parallel()).items["mine"]
  names = [d.name for d in mine.documents["mine"]]

  harness = importlib.import_module("lm_eval")
  task = importlib.import_module("lm_eval.api.task")
  hf = importlib.import_module("lm_eval.models.huggingface")
  asked = task.ConfigurableTask(
    config=TASK | {"dataset_kwargs": {"data_files": {"test": str(source)}}}
  )
  theirs = hf.HFLM(str(out), dtype="float32", device="cpu", batch_size=4, max_length=64)
  told = harness.simple_evaluate(theirs, tasks=[asked], bootstrap_iters=0)
  samples = {sample["doc"]["name"]: sample["filtered_resps"] for sample in told["samples"]["mine"]}
  nats = np.array([-nll for name in names for nll, _ in samples[name]])
  hits = np.array([greedy for name in names for _, greedy in samples[name]])
  assert np.abs(nats - items.nats).max() < 1e-4
  assert np.array_equal(hits, items.hit)
  found = per_document(items)
  assert told["results"]["mine"]["acc,none"] == found["acc"].mean()
  assert told["results"]["mine"]["acc_norm,none"] == found["acc_char"].mean()
