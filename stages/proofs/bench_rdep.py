"""`nmoe bench rdep`: RDEP's rows and its MoE layer, measured by child processes, one a rank.

This parent never imports torch. What is measured, and how, is in nmoe.bench.rdep.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nmoe.config import file as configs
from nmoe.config.cut import few_steps
from nmoe.config.sections import Config
from nmoe.errors import ConfigError
from nmoe.files import check_out
from nmoe.wording import counted
from stages.judge.table import Judgement
from stages.launch.display import Display
from stages.launch.local import Job
from stages.proofs.shortened import claim, named
from stages.runs import carrying
from stages.workbench import Arm, Workbench

STATEMENT = "What an MoE layer costs over several ranks."
NO_DATA = Path("")  # inputs are drawn, no mixture is read
REPEATS = 20
SHAPES = {  # D, K, E, F and shared experts of a model's MoE layer, as published
  "moonlight": (2048, 6, 64, 1408, 2),
  "deepseek": (7168, 8, 256, 2048, 1),
  "qwen3-30b": (2048, 8, 128, 768, 0),  # LigerCute's too (Liger-Kernel, pull request 1355)
  "qwen3-235b": (4096, 8, 128, 1536, 0),
}
SHAPED = ("model.dim", "moe.top_k", "moe.num_experts", "moe.expert_dim", "moe.num_shared")


def rdep(
  path: Path,
  ranks: int | None,
  tokens: int | None,
  shape: str | None,
  console: Console,
  out: Path | None = None,
  repeats: int = REPEATS,
) -> dict[str, Any]:
  """Measure the configuration's MoE layer over `ranks` ranks with `tokens` tokens each.

  None stands for what the configuration says; shape is one of SHAPES. Prints a table and writes
  the same numbers to `out`. ConfigError if it cannot be measured, RunError if a rank fails.
  """
  check_out(out)
  config = layer_config(configs.load(path), path, ranks, tokens, shape)
  with Workbench.open(config.run.root, console, anew=True) as bench:
    found = _measured(bench, config, path, repeats)
  mark = "+" if bench.patch else ""
  found |= {"commit": bench.commit + mark, "config": path.name, "arch": config.target.arch}
  if out is not None:
    out.write_text(json.dumps(found, indent=1))
  _show(found, console)
  return found


def layer_config(
  config: Config, path: Path, ranks: int | None, tokens: int | None, shape: str | None
) -> Config:
  """The configuration with one batch of one sequence of `tokens` tokens a rank."""
  ranks = ranks or config.node_ranks
  tokens = tokens or config.rank_tokens
  if ranks < 2:
    raise ConfigError(f"{path}: one rank sends nothing; measure 2 or more: --ranks 2")
  if not config.rdep.peer_access:
    raise ConfigError(f"{path}: the bench writes to peers; set rdep.peer_access = true")
  if config.rdep.payload != "bf16":
    raise ConfigError(
      f"{path}: all_to_all_single and the peer copy move rows as they are, but rdep.payload is "
      f'"{config.rdep.payload}"; set it to "bf16"'
    )
  if shape is not None and shape not in SHAPES:
    raise ConfigError(f"--shape {shape} is unknown; choose from {', '.join(SHAPES)}")
  values: dict[str, Any] = {
    **few_steps(config, 1, tokens * ranks),
    "launch.engine": "local",
    "launch.ranks": ranks,
    "launch.ranks_per_node": 0,
    "rdep.group": 0,
    "data.seq_len": tokens,
    "train.micro_batch": 1,
    "train.cuda_graph": False,
  }
  if shape is not None:
    values |= dict(zip(SHAPED, SHAPES[shape], strict=True))
  return configs.changed(config, values)


def _measured(bench: Workbench, config: Config, path: Path, repeats: int) -> dict[str, Any]:
  """What the ranks measured, recorded as an experiment of stage "bench"; RunError if one fails."""
  arm = Arm(path.stem, config, NO_DATA)
  asked = (named("bench-rdep", path), claim(STATEMENT, config), [arm], [config.train.seed])
  with carrying(bench, "bench", *asked) as work:
    run = work.start(arm, config.train.seed)
    job = Job(run.id, config, "nmoe.bench.rdep", options=("--repeats", str(repeats)))
    with Display(bench.console) as display:
      done = work.execute(job, display)
    work.check([done])
    reason = (
      f"{counted(len(done.results), 'measurement')} over {counted(config.launch.ranks, 'rank')}."
    )
    work.conclude(Judgement("measured", reason, done.results), [done])
  return done.results


def _show(found: dict[str, Any], console: Console) -> None:
  shape = ", ".join(f"{name} {size}" for name, size in found["shape"].items())
  where = f"{counted(found['ranks'], 'rank')} on {found['devices']} x {found['device']}"
  console.print(f"{where}, {found['dtype']}, torch {found['torch']}, commit {found['commit'][:12]}")
  table = Table(title=f"each rank: {shape}")
  for column in ("what", "tokens", "ms (median)", "spread (p10–p90)", "GB/s", "SMs"):
    table.add_column(column, justify="left" if column == "what" else "right")
  for row in found["rows"]:
    rate = "" if row["gb_s"] is None else f"{row['gb_s']:.2f}"
    sms = "" if row["sms"] is None else str(row["sms"])
    spread = f"{row['ms_p10']:.3f}–{row['ms_p90']:.3f}"
    table.add_row(row["what"], str(row["tokens"]), f"{row['ms']:.3f}", spread, rate, sms)
  console.print(table)
  console.print(
    f"of a plain peer copy's bandwidth: dispatch {found['dispatch_of_copy']:.1%}, "
    f"return {found['return_of_copy']:.1%}"
  )
  console.print(
    f"layer, forward + backward: {found['speedup']:.2f} x all_to_all_single ({found['backend']}); "
    f"{found['over_longer_part']:.2f} x the longer of communication and computation alone"
  )
  if found["as_graph"] is not None:
    more = found["as_graph"]
    console.print(
      f"as a CUDA graph: {found['speedup'] / more:.2f} x all_to_all_single; "
      f"{found['over_longer_part'] * more:.2f} x the longer part"
    )
  gains = ", ".join(f"{what} {gain:.2f} x" for what, gain in found["fused_return"].items())
  console.print(f"rows returned by the product's kernel, against product and return: {gains}")
  worst = max(found["deviation"], key=found["deviation"].get)
  console.print(
    f"RDEP and all_to_all_single differ by at most {found['deviation'][worst]:.1e} ({worst})"
  )
