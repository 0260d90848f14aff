"""A folder against transformers: the same logits, the same greedy text with its key-value cache.

`python -m nmoe.model.agreement --folder F --checkpoint STEP --dtype D [--layers N]` computes both
models in fp32 on the CPU from the same numbers and writes what it found as JSON. With --layers the
first N layers alone are compared, through the same norm and head. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from nmoe.config import file as configs
from nmoe.config.cut import ONE_CPU, few_steps
from nmoe.config.sections import Config
from nmoe.data import tokenizer
from nmoe.errors import NmoeError
from nmoe.machine.target import select
from nmoe.model.decoder import Model, Norm
from nmoe.model.export import Source, write_json
from nmoe.model.hf_config import LATENT_EPS, positions

ROW = 256  # tokens of a row of compared logits
BEYOND = 64  # tokens past the length that YaRN extends
NEW = 32  # tokens of greedy text
PROMPT = "The first rule of a good experiment is to write the question down before"


def compare(folder: Path, source: Source, layers: int) -> dict[str, Any]:
  """Numbers of the comparison; `judge` of stages.export says what they must be.

  logit_max_abs is with our eps in their latent norms, logit_max_abs_served without.
  """
  config = alone(source.config, layers)
  ours, theirs = _ours(config, source), _theirs(folder, config, source.config)
  rows = rows_of(source.config)
  latents = _measure_latents(ours)
  with torch.no_grad():
    mine = [ours.logits(row[None])[0] for row in rows]
    served = _apart(mine, theirs, rows)
    _set_latent_eps(theirs, config.model.norm_eps)
    worst = _apart(mine, theirs, rows)
    _set_latent_eps(theirs, LATENT_EPS)
  return {
    "level": "full" if layers == source.config.model.num_layers else f"first {layers} layers",
    "layers": layers,
    "tokens": [len(row) for row in rows],
    "logit_max_abs": worst,
    "logit_largest": max(float(x.abs().max()) for x in mine),
    "logit_max_abs_served": served,
    "latent_error": abs(config.model.norm_eps - LATENT_EPS) / (2 * min(latents, default=1.0)),
    **_greedy(ours, theirs, folder, source.config),
  }


def _apart(mine: list[Tensor], theirs: PreTrainedModel, rows: list[Tensor]) -> float:
  """The largest difference of logits, over all rows."""
  pairs = zip(mine, rows, strict=True)
  return max(
    float((x - theirs(row[None], use_cache=False).logits[0]).abs().max()) for x, row in pairs
  )


def _set_latent_eps(theirs: PreTrainedModel, eps: float) -> None:
  """What the class fixes: with our eps the two models must be equal, without it they are served."""
  for name, module in theirs.named_modules():
    if name.endswith(("kv_a_layernorm", "q_a_layernorm")):
      module.variance_epsilon = eps


def alone(config: Config, layers: int) -> Config:
  """The configuration on one CPU in fp32, with its first layers, and positions for the rows."""
  longest = max(*(len(row) for row in rows_of(config)), 2 * NEW + len(PROMPT))
  return configs.changed(
    config,
    {
      **ONE_CPU,
      **few_steps(config, 1, longest),
      "model.num_layers": layers,
      "model.num_dense_layers": min(config.model.num_dense_layers, layers),
      "data.seq_len": longest,
      "train.micro_batch": 1,
    },
  )


def rows_of(config: Config) -> list[Tensor]:
  """Two rows of ids, drawn alike every time; the second passes YaRN's original length."""
  y = config.yarn
  lengths = [min(ROW, positions(config))] * 2
  if y.factor > 1:
    lengths[1] = min(y.original_seq_len + BEYOND, positions(config))
  generator = torch.Generator().manual_seed(0)
  num_ids = min(tokenizer.get(config.data.tokenizer).vocab_size, config.model.vocab_size)
  return [torch.randint(num_ids, (length,), generator=generator) for length in lengths]


def _ours(config: Config, source: Source) -> Model:
  ops = select(config).ops
  with torch.device("meta"):
    model = Model(config, ops)
  model.to_empty(device="cpu")
  model.init_weights(0)
  for part in source.parts():
    layer = part[0].split(".")[1]
    if part[0].startswith("layers.") and int(layer) >= config.model.num_layers:
      continue
    model.load_state_dict({n: x.float() for n, x in source.read(part).items()}, strict=False)
  return model


def _theirs(folder: Path, config: Config, whole: Config) -> PreTrainedModel:
  """transformers' model of the folder, with its first layers, in fp32."""
  options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
  options["experts_implementation"] = "eager"  # its grouped product wants strides of 16 bytes
  with tempfile.TemporaryDirectory() as made:
    for file in folder.resolve().iterdir():
      (Path(made) / file.name).symlink_to(file)
    if config.model.num_layers < whole.model.num_layers:
      table = json.loads((folder / "config.json").read_text())
      table["num_hidden_layers"] = config.model.num_layers
      table["first_k_dense_replace"] = config.model.num_dense_layers
      (Path(made) / "config.json").unlink()
      write_json(Path(made) / "config.json", table)
    model, report = AutoModelForCausalLM.from_pretrained(made, **options)
  kinds = ["missing_keys", "mismatched_keys"]
  if config.model.num_layers == whole.model.num_layers:
    kinds.append("unexpected_keys")
  wrong = {kind: sorted(report[kind])[:3] for kind in kinds if report[kind]}
  if wrong:
    raise NmoeError(f"{folder}: transformers finds {wrong}")
  return model.eval()


def _measure_latents(model: Model) -> list[float]:
  """A list that every forward pass fills with the smallest mean square of each layer's latents."""
  found: list[float] = []

  def note(_: Norm, inputs: tuple[Tensor, ...]) -> None:
    found.append(max(float(inputs[0].float().square().mean(-1).min()), 1e-30))

  for block in model.layers:
    block.attention.kv_norm.register_forward_pre_hook(note)
    if block.attention.model.q_lora_rank:
      block.attention.q_norm.register_forward_pre_hook(note)
  return found


def _greedy(ours: Model, theirs: PreTrainedModel, folder: Path, config: Config) -> dict[str, Any]:
  """Their greedy text after a prompt, and whether each of its tokens is also our first choice.

  greedy_margin: how far a token that is not lies below ours, at most.
  """
  prompt = torch.from_numpy(tokenizer.get(config.data.tokenizer).encode(PROMPT).astype("int64"))
  prompt = prompt[: max(1, min(len(prompt), positions(config) - NEW))]
  theirs.generation_config.eos_token_id = None
  options = {"do_sample": False, "max_new_tokens": NEW, "use_cache": True}
  mask = torch.ones(1, len(prompt), dtype=torch.int64)
  text = theirs.generate(prompt[None], attention_mask=mask, **options)[0]
  with torch.no_grad():
    logits = ours.logits(text[None, :-1])[0, len(prompt) - 1 :]
  new = text[len(prompt) :]
  margin = logits.max(-1).values - logits.gather(1, new[:, None])[:, 0]
  shown = AutoTokenizer.from_pretrained(folder).decode(new)
  return {
    "greedy_tokens": len(new),
    "greedy_equal": int((margin == 0).sum()),
    "greedy_margin": float(margin.max()),
    "greedy_text": shown,
  }


def main() -> int:
  p = argparse.ArgumentParser(prog="python -m nmoe.model.agreement")
  p.add_argument("--folder", type=Path, required=True)
  p.add_argument("--checkpoint", type=Path, required=True, help="verified by the caller")
  p.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
  p.add_argument("--layers", type=int)
  o = p.parse_args()
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  try:
    source = Source.open(o.checkpoint, o.dtype, verified=True)
    found = compare(o.folder, source, o.layers or source.config.model.num_layers)
  except NmoeError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1
  sys.stdout.write(json.dumps(found) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
