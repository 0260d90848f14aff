"""A tokenizer as the files that HuggingFace's fast tokenizers load: byte-level BPE, the same ids.

Text is cut by the tokenizer's own pattern, a piece that is a token is taken whole, and other pieces
are merged in the order of ranks, as tiktoken does. One difference stays: HuggingFace reads
`<|endoftext|>` inside a text as the separator unless asked for `split_special_tokens=True`; ours
never does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from nmoe.data.hf_tokenizer import HfTokenizer, byte_letters
from nmoe.data.tokenizer import O200K_PATTERN, O200K_RANKS, O200K_VOCAB, Tokenizer
from nmoe.errors import ConfigError

EOT = "<|endoftext|>"
O200K_NAMES = {  # of o200k_harmony's special ids; the others are reserved
  199998: "<|startoftext|>",
  199999: EOT,
  200002: "<|return|>",
  200003: "<|constrain|>",
  200005: "<|channel|>",
  200006: "<|start|>",
  200007: "<|end|>",
  200008: "<|message|>",
  200012: "<|call|>",
}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, positions: int) -> None:
  """tokenizer.json and tokenizer_config.json. positions: the longest text that the model reads."""
  path, end = folder / "tokenizer.json", EOT
  if isinstance(tokenizer, HfTokenizer):
    tokenizer.save(path)
    end = tokenizer.end
  else:
    fast(tokenizer).save(str(path))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": end,
    "pad_token": end,
    "clean_up_tokenization_spaces": False,
    "model_max_length": positions,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fast(tokenizer: Tokenizer) -> Fast:
  """One of our own by HuggingFace's library. Raises ConfigError for one of another kind."""
  if tokenizer.name == "byte":
    pieces, splits = {i: bytes([i]) for i in range(256)}, []
    special = {tokenizer.eot: EOT}
  elif tokenizer.name == "o200k_harmony":
    pieces = tokenizer.pieces()
    splits = [pre_tokenizers.Split(Regex(O200K_PATTERN), "isolated")]
    special = {i: O200K_NAMES.get(i, f"<|reserved_{i}|>") for i in range(O200K_RANKS, O200K_VOCAB)}
  else:
    raise ConfigError(f"tokenizer {tokenizer.name!r} has no form as a fast tokenizer")
  letters = byte_letters()
  names = {i: "".join(letters[b] for b in piece) for i, piece in pieces.items()}
  merges = [(names[a], names[b]) for a, b in merges_of(pieces)]
  vocab = {name: i for i, name in names.items()}
  made = Fast(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
  level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([AddedToken(special[i], normalized=False) for i in sorted(special)])
  return made


def merges_of(pieces: dict[int, bytes]) -> list[tuple[int, int]]:
  """The merges that build every token, by ascending rank: of each the pair that is left when all
  merges of lower ranks are done.
  """
  ranks = {piece: rank for rank, piece in pieces.items()}
  merges = []
  for rank in sorted(pieces):
    if len(pieces[rank]) > 1:
      pair = _merged([pieces[rank][i : i + 1] for i in range(len(pieces[rank]))], ranks, rank)
      assert len(pair) == 2, f"token {rank} cannot be reached by merges"
      merges.append((ranks[pair[0]], ranks[pair[1]]))
  return merges


def _merged(parts: list[bytes], ranks: dict[bytes, int], below: int) -> list[bytes]:
  """The parts after all merges of ranks lower than `below`, lowest first."""
  while len(parts) > 2:
    pairs = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:], strict=False)]
    best = min(pairs)
    if best >= below:
      break
    i = pairs.index(best)
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  return parts
