"""Documents of the HuggingFace Hub, at a commit, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
from datasets.exceptions import DatasetsError

from nmoe.data.mixture import HuggingFaceSource
from nmoe.data.sources import Documents, text_of
from nmoe.data.sources_files import BATCH_ROWS, binary, missing
from nmoe.errors import DataError

_FAILURES = (DatasetsError, pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError)


def identity(source: HuggingFaceSource, hash_of: Callable[[Path], str]) -> list[str]:
  """The dataset and its commit."""
  return [source.dataset, source.revision]


def documents(source: HuggingFaceSource) -> Documents:
  """Rows are streamed in batches. Raises DataError when the text field is missing or not text."""
  where = (
    f"source {source.name!r}: dataset {source.dataset} at {source.revision}, split {source.split!r}"
  )
  first = 1
  try:
    rows = datasets.load_dataset(
      source.dataset,
      split=source.split,
      streaming=True,
      name=source.config,
      revision=source.revision,
    )
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
      if source.text_field not in table.column_names:
        raise DataError(f"{where}: {missing(source.text_field, table.column_names)}")
      column = binary(table[source.text_field], source.text_field, where)
      for place, data in enumerate(column, first):
        yield text_of(data, f"row {place}")
      first += len(column)
  except StopIteration:  # what the json builder raises for a dataset without rows
    return
  except _FAILURES as error:
    raise DataError(
      f"{where} cannot be read ({type(error).__name__}: {error}); check the name, the network and "
      "the split"
    ) from error
