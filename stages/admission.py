"""What is wrong with a run and can be told at once: before it is recorded, without torch."""

from __future__ import annotations

import os
from pathlib import Path

from nmoe.config.parameters import num_parameters
from nmoe.config.sections import Config
from nmoe.data import prepared
from nmoe.data.tokenizer import get as get_tokenizer
from nmoe.errors import ConfigError
from nmoe.evals.requests import find_task
from nmoe.evals.suites import suite_of
from nmoe.machine import driver
from nmoe.model.imported import imported_config
from nmoe.records.root import Root


def admit(config: Config, root: Root) -> None:
  """What the data have no part in: the machine (unless an engine finds others), the tokenizer's
  ids, imported weights, a suite's items. Raises the error that a rank would.
  """
  if config.launch.engine == "local":
    driver.check(config.target.arch)
    check_memory(config)
  prepared.check_vocabulary(config, get_tokenizer(config.data.tokenizer))
  if config.model.init != "seed":
    imported_config(config, root)
  if config.eval.suite != "none":
    for task in suite_of(config.eval.suite).tasks:
      find_task(root.evals, task)


def check_memory(config: Config) -> None:
  """ConfigError if the cpu's memory does not hold the weights, let alone what training adds."""
  need = num_parameters(config) * (4 if config.target.dtype == "fp32" else 2)
  have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if config.target.arch == "cpu" and need > have:
    raise ConfigError(
      f"the model's weights take {need / 2**30:,.1f} GiB, this machine has {have / 2**30:,.1f} GiB "
      "of memory; lower model.vocab_size, model.dim, model.num_layers or the experts' numbers"
    )


def admit_with_data(config: Config, root: Root, folder: Path) -> None:
  """The same, and whether the run can read the prepared data."""
  admit(config, root)
  prepared.check(config, prepared.open_data(folder, verify=False))
