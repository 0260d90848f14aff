"""Which held-out set a run is evaluated on, read from manifests: losses are compared on one set."""

from __future__ import annotations

from pathlib import Path

from nmoe.data.shards import digest, read_manifest

EVERYTHING = "everything"


def heldout_set(folder: Path, seq_len: int, tokens: int) -> dict[str, str]:
  """What decides the set of nmoe.data.loader.Validation over a prepared mixture: configuration key
  -> its value, of data.mixture a digest of the held-out documents.

  Equal values mean equal windows, whatever else the mixtures' training text and weights are.
  Raises DataError.
  """
  manifest = read_manifest(folder)
  sources = [read_manifest(folder.parent / "sources" / e["source"]) for e in manifest["sources"]]
  held = [source for source in sources if source["heldout"]["documents"]]
  have = sum(max(0, source["heldout"]["tokens"] - 1) // seq_len for source in held)
  return {
    "data.mixture": digest([source["files"]["heldout-hashes.npy"]["sha256"] for source in held]),
    "data.tokenizer": manifest["tokenizer"],
    "data.seq_len": str(seq_len),
    "data.val_tokens": EVERYTHING if have * seq_len <= tokens else str(tokens // seq_len * seq_len),
  }


def differences(metric: str, a: dict[str, str], b: dict[str, str]) -> list[str]:
  """The keys in which two sets differ so that the metric must not be compared.

  Bits per byte know no tokenizer, as long as both have all the documents.
  """
  keys = [key for key in a if a[key] != b[key]]
  bytes_alone = metric.endswith("bpb") and a["data.val_tokens"] == EVERYTHING
  return [key for key in keys if key != "data.tokenizer" or not bytes_alone]
