"""`nmoe export`: a run's weights as a folder that transformers, vLLM, SGLang and lm-eval load."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nmoe.config.plan import parameters
from nmoe.config.sections import Config
from nmoe.errors import CheckpointError, ConfigError, RecordError
from nmoe.files import clear_unfinished, sha256
from nmoe.model.export import Source, compare_tensors, unfinished, write_folder, write_json
from nmoe.records import checkpoint
from nmoe.records.experiments import Experiments
from nmoe.records.provenance import REPO
from nmoe.records.reader import Export, Reader
from nmoe.records.root import Root
from nmoe.wording import counted
from stages.checkpoints import DTYPES, exportable
from stages.text import plain

Level = Literal["full", "layers", "tensors"]
FEW = 3  # layers of the check by layers: a dense one and two of experts in most models
LOGITS = 1e-4  # largest difference in fp32, of logits of at most 1 or relative to the largest
LATENTS = 1e-3  # largest relative error that the fixed eps of the latent norms may make


def run(
  name: str,
  out: Path,
  step: int | None,
  dtype: str | None,
  shard_gb: float,
  level: Level | None,
  root: Path,
  console: Console,
) -> None:
  """Write the folder, check it and say what was checked; nothing stays of one that fails."""
  began = time.monotonic()
  path = exportable(name, out, step, dtype, level, root)
  for left in clear_unfinished(out.parent, out.name):
    console.print(plain(f"removed {left}: a killed export had left it"), soft_wrap=True)
  source = Source.open(path, DTYPES[dtype])
  with unfinished(out) as folder, console.status(plain(f"writing {out}")) as status:
    writer = write_folder(source, folder, int(shard_gb * 1e9))
    status.update("comparing tensors")
    check: dict[str, Any] = {"tensors": compare_tensors(source, folder)}
    check["rounded"] = source.rounds
    check |= check_logits(source, folder, level, status.update)
    facts = facts_of(path, source, root)
    (folder / "README.md").write_text(card(source, facts, check), encoding="utf-8")
    hashes = {"files": writer.files, "tensors": writer.sha256}
    write_json(folder / "nmoe.json", {**facts, "check": check, "sha256": hashes})
  recorded(out, facts, check, root)
  for line in check_lines(check):
    console.print(plain(line), soft_wrap=True)
  size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
  shown = f"{size / 1e3:.2f} GB" if size >= 100 else f"{size:.1f} MB"
  console.print(plain(f"{out}: {shown} in {time.monotonic() - began:.0f} s"), soft_wrap=True)


def check_logits(
  source: Source, folder: Path, level: Level | None, say: Callable[[str], None]
) -> dict[str, Any]:
  """Compare with transformers as far as it is installed and memory reaches, or at `level`.

  Raises CheckpointError where the two differ.
  """
  if level == "tensors":
    return {"level": "tensors"}
  if importlib.util.find_spec("transformers") is None:
    if level is not None:
      raise ConfigError(f"--check {level} needs transformers; run `pip install 'nmoe[hf]'`")
    return {"level": "tensors", "why": "transformers is not installed (pip install 'nmoe[hf]')"}
  layers, why = layers_to_check(source.config, level)
  if not layers:
    return {"level": "tensors", "why": why}
  say(f"comparing {counted(layers, 'layer')} with transformers")
  command = [sys.executable, "-m", "nmoe.model.agreement", "--layers", str(layers)]
  command += [
    "--folder",
    str(folder.resolve()),
    "--checkpoint",
    str(source.path.resolve()),
    "--dtype",
    source.dtype,
  ]
  done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
  if done.returncode:
    raise CheckpointError(f"the check of {folder} failed:\n{done.stderr.strip()[-2000:]}")
  found = json.loads(done.stdout.splitlines()[-1])
  judge(found)
  return found | ({"why": why} if why else {})


def layers_to_check(config: Config, level: Level | None) -> tuple[int, str]:
  """How many layers of both models fit into the memory that is free, and why not all."""
  count = config.model.num_layers
  free = available_bytes()
  few = min(count, max(FEW, config.model.num_dense_layers + 2))
  for layers in [count, few] if level != "layers" else [few]:
    need = 2 * 4 * 1.15 * parameters_of(config, layers)
    if level == "full" or need < free:
      return layers, "" if layers == count else f"{few} of {count} layers fit into memory or asked"
  return 0, f"{few} layers twice in fp32 need {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def parameters_of(config: Config, layers: int) -> int:
  """Parameters of a model's first layers, embedding and head."""
  whole = parameters(config)
  ends = whole.embedding + whole.head
  return ends + (whole.total - ends) * layers // config.model.num_layers


def available_bytes() -> int:
  """Host memory that is free (Linux: MemAvailable)."""
  lines = Path("/proc/meminfo").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def judge(found: dict[str, Any]) -> None:
  """CheckpointError if more differs than rounding and the latent norms' eps explain."""
  error = found["latent_error"]
  if error > LATENTS:
    raise CheckpointError(
      f"HuggingFace's latent norms have eps 1e-6; with this model.norm_eps their relative error is "
      f"up to {error:.1e}, above {LATENTS:.0e}: train with model.norm_eps = 1e-6"
    )
  allowed = LOGITS * max(1.0, found["logit_largest"])
  margin = 2 * max(allowed, found["logit_max_abs_served"])
  if not found["logit_max_abs"] <= allowed or not found["greedy_margin"] <= margin:
    raise CheckpointError(
      f"transformers computes other logits: {found['logit_max_abs']:.1e} apart of "
      f"{found['logit_largest']:.1f}, {allowed:.1e} allowed; of the greedy text "
      f"{found['greedy_equal']} of {found['greedy_tokens']} tokens are equal"
    )


def check_lines(check: dict[str, Any]) -> list[str]:
  """What was checked, a line each."""
  rounded = ", rounded to bf16" if check["rounded"] else ""
  lines = [f"tensors: {check['tensors']} read again, bit-equal to the checkpoint{rounded}"]
  if "logit_max_abs" in check:
    lines += [
      f"logits ({check['level']}, fp32, {' + '.join(map(str, check['tokens']))} tokens): "
      f"{check['logit_max_abs']:.1e} from transformers', of {check['logit_largest']:.2f}",
      f"greedy text with key-value cache: {check['greedy_equal']} of {check['greedy_tokens']} "
      "tokens equal",
    ]
    if check["latent_error"]:
      error = f"{check['latent_error']:.1e}"
      served = f"{check['logit_max_abs_served']:.1e}"
      lines.append(
        f"latent norms: HuggingFace's eps is 1e-6, a relative error of at most {error}; it moves "
        f"logits by up to {served}, not counted in the logits above"
      )
  if "why" in check:
    lines.append(f"not checked further: {check['why']}")
  return lines


def facts_of(path: Path, source: Source, root: Path) -> dict[str, Any]:
  """What the folder says of its origin, from the checkpoint's manifest and the records."""
  manifest = checkpoint.manifest(path)
  facts = {key: manifest.get(key) for key in ("run", "step", "fingerprint")}
  facts["dtype"] = source.dtype
  if not Root(root).experiments_db.is_file():
    return facts
  reader = Reader(root)
  try:
    run = reader.run(manifest["run"])
    experiment = reader.find(run.experiment_id)
  except RecordError:
    return facts
  finally:
    reader.close()
  facts |= {"data": run.data_digest, "seed": run.seed, "commit": run.commit}
  facts |= {"experiment": experiment.id, "statement": experiment.headline.statement}
  return facts | {"verdict": experiment.verdict, "val/bpb": run.results.get("val/bpb")}


def recorded(out: Path, facts: dict[str, Any], check: dict[str, Any], root: Path) -> None:
  """Tell the records of the run, where the root has it."""
  if "experiment" not in facts:
    return
  digest = sha256(out / "nmoe.json")
  with closing(Experiments(root)) as records:
    records.add_export(Export(facts["run"], facts["step"], str(out.resolve()), digest, check))


def card(source: Source, facts: dict[str, Any], check: dict[str, Any]) -> str:
  """README.md of the folder."""
  c, counts = source.config, parameters(source.config)
  served = "transformers"
  if c.model.kv_lora_rank == 512 and c.model.qk_rope_dim == 64:
    served += ", vLLM, SGLang (shapes of their MLA kernels; read in their sources, not run)"
  else:
    served += " only: vLLM's and SGLang's MLA kernels want kv_lora_rank 512 and qk_rope_dim 64"
  told = "\n".join(f"- {key}: {value}" for key, value in facts.items() if value not in (None, ""))
  checked = "\n".join(f"- {line}" for line in check_lines(check))
  return CARD.format(
    title=f"{c.experiment.name}, step {facts['step']}",
    total=f"{counts.total:,}",
    active=f"{counts.active:,}",
    facts=told,
    checks=checked,
    served=served,
    tokenizer=c.data.tokenizer,
  )


CARD = """# {title}

A DeepSeek-shaped mixture of experts of {total} parameters, {active} active per token, exported by
nmoe.

## Origin
{facts}

## Checks
{checks}

## Use
Served by: {served}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (c.from_pretrained(".") for c in (AutoModelForCausalLM, AutoTokenizer))
```

```sh
pip install 'lm-eval[hf]'
lm_eval --model hf --model_args pretrained=. --tasks arc_easy
```

Tokenizer: {tokenizer}. It was trained on documents that a separator (eos) precedes: begin a prompt
with it. A base model without a chat template. `<|endoftext|>` inside a text is read as the
separator unless the tokenizer is asked for `split_special_tokens=True`.
"""
