"""The loader's promises: pure, exact proportions, no repeats, independent of ranks."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_cases import in_memory, two_sources

from nmoe.data.loader import Loader, Prefetcher
from nmoe.data.mixture import Phase, phases
from nmoe.data.permutation import key, permute
from nmoe.data.prepared import (
  CYCLE,
  cycle_counts,
  open_data,
  shares,
)
from nmoe.data.shards import Stream
from nmoe.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return two_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(folder):
  return open_data(folder)


# --- permutations and streams ---


@given(size=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_permute_is_a_bijection(size, seed):
  image = permute(
    np.arange(size, dtype=np.uint64),
    np.full(size, size, dtype=np.uint64),
    np.full(size, key(seed), dtype=np.uint64),
  )
  assert sorted(image.tolist()) == list(range(size))


@given(start=st.integers(0, 2**50 - 2000), extra=st.integers(1000, 2**50), seed=st.integers(0, 99))
def test_permute_stays_in_large_ranges_without_repeats(start, extra, seed):
  index = np.arange(start, start + 1000, dtype=np.uint64)
  size = np.full(1000, start + extra, dtype=np.uint64)
  image = permute(index, size, np.full(1000, key(seed), dtype=np.uint64))
  assert (image < size).all() and len(set(image.tolist())) == 1000


@pytest.mark.parametrize("size", [2, 3, 7, 24])
def test_permute_is_even_over_keys(size):
  """Where each index goes is uniform over keys: χ² of its images is not far in the tail."""
  keys = np.array([key("even", i) for i in range(6000)], dtype=np.uint64)
  sizes = np.full(len(keys), size, dtype=np.uint64)
  for index in range(size):
    image = permute(np.full(len(keys), index, dtype=np.uint64), sizes, keys)
    counts = np.bincount(image.astype(int), minlength=size)
    chi2 = ((counts - len(keys) / size) ** 2 / (len(keys) / size)).sum()
    freedom = size - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 25


@given(
  sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
  offset=st.integers(0, 60),
  length=st.integers(1, 100),
)
def test_stream_is_the_circle_of_its_shards(sizes, offset, length):
  whole = np.arange(sum(sizes))
  stream = Stream(np.split(whole, np.cumsum(sizes)[:-1]))
  out = np.empty(length, dtype=np.int64)
  stream.read(offset % len(whole), out)
  assert out.tolist() == [(offset + i) % len(whole) for i in range(length)]


# --- proportions ---


positive = st.floats(1e-7, 1e3)


@given(st.lists(positive, min_size=1, max_size=9))
def test_cycle_counts_are_shares_rounded(weights):
  share = np.array(weights) / sum(weights)
  counts = cycle_counts(share)
  assert counts.sum() == CYCLE and (counts >= 1).all()
  assert (np.abs(counts - share * CYCLE) < 1 + len(weights)).all()
  if (share * CYCLE >= 1).all():
    assert (np.abs(counts - share * CYCLE) < 1 + 1e-6).all()


@settings(max_examples=50)
@given(
  weights=st.lists(positive, min_size=1, max_size=6),
  first=st.integers(0, 3 * CYCLE),
  length=st.one_of(st.just(CYCLE), st.integers(1, 2 * CYCLE)),
)
def test_any_run_of_samples_has_its_proportions(weights, first, length):
  """A cycle of samples exactly, wherever it starts; fewer to the stated error."""
  loader = Loader(in_memory([1000] * len(weights), weights), seq_len=8, seed=0)
  source, _, _ = loader.locate(np.arange(first, first + length))
  part = cycle_counts(np.array(list(shares(loader.data).values()))) / CYCLE
  error = np.abs(np.bincount(source, minlength=len(weights)) - length * part)
  assert (error <= (length != CYCLE) * (1 + len(weights) * part) + 1e-9).all()


def test_temperature_follows_its_definition():
  tokens = np.array([100.0, 400.0, 1600.0])
  for tau in (1.0, 2.0, 3.33):
    expected = tokens ** (1 / tau) / (tokens ** (1 / tau)).sum()
    found = shares(in_memory([100, 400, 1600], temperature=tau))
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)
  uniform = shares(in_memory([100, 400, 1600], temperature=math.inf))
  np.testing.assert_allclose(list(uniform.values()), [1 / 3] * 3, rtol=1e-12)


def test_weights_of_the_mixture_and_of_the_caller():
  data = in_memory([100, 400], weights=[3.0, 1.0])
  assert shares(data) == {"a": 0.75, "b": 0.25}
  assert shares(data, {"b": 4, "a": 0}) == {"a": 0.0, "b": 1.0}
  loader = Loader(data, seq_len=8, seed=0, weights={"a": 0, "b": 1})
  assert set(loader.locate(np.arange(1000))[0].tolist()) == {1}
  with pytest.raises(ConfigError, match="weights name .*'c'.*sources are"):
    shares(data, {"a": 1, "c": 1})
  with pytest.raises(ConfigError, match="finite sum > 0"):
    shares(data, {"a": 0, "b": 0})


# --- order ---


@settings(max_examples=60)
@given(
  length=st.integers(9, 700),
  seq_len=st.integers(1, 8),
  seed=st.integers(0, 2**31),
  epoch=st.integers(0, 500),
)
def test_no_input_repeats_within_an_epoch(length, seq_len, seed, epoch):
  loader = Loader(in_memory([length]), seq_len=seq_len, seed=seed)
  windows = length // seq_len
  rows = loader.samples(np.arange(epoch * windows, (epoch + 1) * windows))
  assert len(np.unique(rows[:, :-1])) == windows * seq_len > length - seq_len
  assert ((rows - rows[:, :1]) % length == np.arange(seq_len + 1)).all()


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(20, 400), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_no_input_repeats_within_an_epoch_of_a_mixture(lengths, seed):
  loader = Loader(in_memory(lengths, temperature=2.0), seq_len=7, seed=seed)
  source, epoch, offset = loader.locate(np.arange(2000))
  for s, length in enumerate(lengths):
    windows = length // 7
    assert epoch[source == s].tolist() == [i // windows for i in range((source == s).sum())]
    for e in range(int(epoch[source == s].max()) + 1):
      starts = offset[(source == s) & (epoch == e)].astype(int)
      inputs = (starts[:, None] + np.arange(7)) % length
      assert len(np.unique(inputs)) == inputs.size


def test_epochs_and_seeds_differ_in_order_and_in_cuts():
  def starts(seed, epoch):
    source, epochs, offset = Loader(in_memory([8001]), seq_len=8, seed=seed).locate(
      np.arange(CYCLE)
    )
    return offset[epochs == epoch].astype(int)

  first, second, other = starts(0, 0), starts(0, 1), starts(1, 0)
  for a, b in ((first, second), (first, other)):
    assert set((a % 8).tolist()) != set((b % 8).tolist())  # cut elsewhere
    assert np.abs(np.corrcoef(a, b)[0, 1]) < 0.2  # visited in another order
  assert np.abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.2


def test_a_source_keeps_its_order_when_others_join():
  alone = Loader(in_memory([5000]), seq_len=8, seed=3)
  joined = Loader(in_memory([5000, 700]), seq_len=8, seed=3)

  def by_place(loader):
    source, epoch, offset = loader.locate(np.arange(CYCLE))
    mine = (source == 0) & (epoch == 0)
    return set(offset[mine].tolist())

  assert by_place(alone) == by_place(joined)


@settings(max_examples=60)
@given(
  seed=st.integers(0, 2**31),
  step=st.integers(0, 10**7),
  local=st.integers(1, 6),
  ranks=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_ranks_divide_one_global_batch(data, seed, step, local, ranks):
  loader = Loader(data, seq_len=24, seed=seed)
  size = local * ranks
  tokens, targets = loader.batch(step, size)
  parts = [Loader(data, seq_len=24, seed=seed).batch(step, size, r, ranks) for r in range(ranks)]
  assert np.array_equal(np.concatenate([p[0] for p in parts]), tokens)
  assert np.array_equal(np.concatenate([p[1] for p in parts]), targets)
  assert tokens.dtype == targets.dtype == np.int64 and tokens.shape == (size, 24)
  assert np.array_equal(tokens[:, 1:], targets[:, :-1])


@settings(max_examples=60)
@given(ids=st.lists(st.integers(0, 10**12), min_size=1, max_size=20), seed=st.integers(0, 2**31))
def test_a_sample_depends_on_seed_and_n_alone(data, ids, seed):
  """Asked together, alone, in another order or of another loader: the same."""
  loader = Loader(data, seq_len=24, seed=seed)
  together = loader.samples(np.array(ids))
  for n, row in reversed(list(zip(ids, together, strict=True))):
    assert np.array_equal(Loader(data, seq_len=24, seed=seed).samples(np.array([n])), row[None])
    assert np.array_equal(loader.batch(n, 1)[0][0], row[:-1])


def test_samples_are_the_text(folder, data):
  """Every window is found in the shards as they lie on disk."""
  loader = Loader(data, seq_len=40, seed=5)
  ids = np.arange(300)
  source, _, offset = loader.locate(ids)
  streams = [
    np.concatenate([np.load(s.folder / e["file"]) for e in s.manifest["train"]["shards"]])
    for s in data.sources
  ]
  assert all(len(s.manifest["train"]["shards"]) > 1 for s in data.sources)
  for row, s, o in zip(loader.samples(ids), source, offset, strict=True):
    at = (int(o) + np.arange(41)) % len(streams[s])
    assert np.array_equal(row, streams[s][at])


def test_an_epoch_is_as_many_samples_as_a_source_has_windows():
  loader = Loader(in_memory([8000, 1000], weights=[1.0, 3.0]), seq_len=8, seed=0)
  source, epoch, _ = loader.locate(np.arange(CYCLE))
  for s, windows in enumerate((1000, 125)):
    count = int((source == s).sum())
    np.testing.assert_array_equal(epoch[source == s], np.arange(count) // windows)


def test_a_source_shorter_than_a_window_is_named():
  with pytest.raises(DataError, match="source 'b' has 64 training tokens.* needs 65"):
    Loader(in_memory([1000, 64]), seq_len=64, seed=0)
  Loader(in_memory([1000, 64]), seq_len=64, seed=0, weights={"a": 1, "b": 0})


def test_a_batch_that_ranks_do_not_divide():
  with pytest.raises(ConfigError, match="10 samples is not divisible by 4 ranks"):
    Loader(in_memory([1000]), seq_len=8, seed=0).batch(0, 10, 1, 4)


# --- weights by tokens ---


PHASES = (
  Phase(0, {"a": 1.0, "b": 3.0, "c": 0.0}),
  Phase(8 * 500 - 3, {"a": 2.0, "b": 1.0, "c": 1.0}),  # in the middle of a sample: from the next
  Phase(8 * (CYCLE + 700), {"a": 0.0, "b": 0.0, "c": 1.0}),
)


def phased(seed=0, fraction=1.0):
  data = in_memory([4000, 900, 70_000])
  return Loader(data, seq_len=8, seed=seed, weights=PHASES, fraction=fraction)


def test_a_phase_begins_at_its_tokens_and_has_its_shares():
  loader = phased()
  starts = [0, 500, CYCLE + 700, CYCLE + 3000]
  for phase, first, stop in zip(PHASES, starts, starts[1:], strict=False):
    source, _, _ = loader.locate(np.arange(first, stop))
    share = np.array(list(phase.weights.values()))
    expected = (stop - first) * share / share.sum()
    assert (np.abs(np.bincount(source, minlength=3) - expected) <= 2 + 3 * share).all()


def test_every_source_reads_on_where_it_was():
  """Counted by hand, sample by sample: the k-th sample of a source is the k-th that it would give
  alone, whatever phases lie between.
  """
  loader = phased(seed=3)
  source, epoch, offset = loader.locate(np.arange(CYCLE + 5000))
  for s, name in enumerate("abc"):
    one = {other: float(other == name) for other in "abc"}
    alone = Loader(loader.data, seq_len=8, seed=3, weights=one)
    count = int((source == s).sum())
    _, expected_epoch, expected_offset = alone.locate(np.arange(count))
    np.testing.assert_array_equal(epoch[source == s], expected_epoch)
    np.testing.assert_array_equal(offset[source == s], expected_offset)


def test_constant_weights_keep_the_samples_of_earlier_runs():
  """A digest of what was read before there were phases."""
  data = in_memory([8000, 1000], weights=[1.0, 3.0])
  rows = Loader(data, seq_len=8, seed=5).samples(np.array([0, 1, 2, 3, 1000, 65535, 65536, 10**9]))
  assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "30d7de2a9a1bf2f5"


def test_before_a_change_the_samples_are_those_without_it():
  ids = np.arange(500)
  plain = Loader(phased().data, seq_len=8, seed=0, weights=PHASES[0].weights)
  assert np.array_equal(plain.samples(ids), phased().samples(ids))
  assert not np.array_equal(plain.samples(ids + 500), phased().samples(ids + 500))


@settings(max_examples=40)
@given(step=st.integers(0, 20_000), ranks=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_a_batch_of_phases_depends_on_seed_and_step_alone(step, ranks, seed):
  tokens, _ = phased(seed).batch(step, 8)
  parts = [phased(seed).batch(step, 8, r, ranks)[0] for r in range(ranks)]
  assert np.array_equal(np.concatenate(parts), tokens)
  one_by_one = [phased(seed).samples(np.array([8 * step + i])) for i in reversed(range(8))]
  assert np.array_equal(np.concatenate(one_by_one[::-1])[:, :-1], tokens)


def test_a_fraction_is_the_first_tokens_and_repeats_them():
  """A tenth of the text is read through ten times as often."""
  tenth = phased(fraction=0.1)
  ids = np.arange(CYCLE)
  rows, (source, epoch, _) = tenth.samples(ids), tenth.locate(ids)
  np.testing.assert_array_equal(source, phased().locate(ids)[0])
  for s, length in enumerate((400, 90, 7000)):
    assert rows[source == s].max() == length - 1
    count = int((source == s).sum())
    np.testing.assert_array_equal(epoch[source == s], np.arange(count) // (length // 8))
  with pytest.raises(DataError, match="source 'b' has 8 training tokens.*raise data.fraction"):
    phased(fraction=0.008)


def test_phases_of_the_keys():
  found = phases(("a", "b"), (), ((100.0, 1.0, 3.0), (200.0, 1.0, 0.0)))
  assert found == (Phase(0), Phase(100, {"a": 1, "b": 3}), Phase(200, {"a": 1, "b": 0}))
  with pytest.raises(ConfigError, match="data.weights_from has 1 weights, the mixture 2 sources"):
    phases(("a", "b"), (0.5, 0.5), ((100.0, 1.0),))
  with pytest.raises(ConfigError, match="data.weights has 3 weights"):
    phases(("a", "b"), (0.5, 0.5, 1.0), ())


# --- prefetching ---


def test_prefetcher_gives_the_loaders_batches(data):
  loader = Loader(data, seq_len=24, seed=1)
  for start in (0, 5):  # a resumed run: the rest of the same batches
    batches = list(Prefetcher(loader, 6, start=start, stop=9, rank=1, ranks=2))
    assert len(batches) == 9 - start
    for step, (tokens, targets) in zip(range(start, 9), batches, strict=True):
      expected = loader.batch(step, 6, 1, 2)
      assert torch.equal(tokens, torch.from_numpy(expected[0]))
      assert torch.equal(targets, torch.from_numpy(expected[1]))


def test_prefetcher_raises_what_the_loader_raises(data):
  batches = Prefetcher(Loader(data, seq_len=24, seed=1), 5, start=0, stop=3, ranks=2)
  with pytest.raises(ConfigError, match="not divisible"):
    next(batches)


def test_prefetcher_counts_the_time_waited(data):
  batches = Prefetcher(Loader(data, seq_len=24, seed=1), 4, start=0, stop=3)
  list(batches)
  waited = batches.wait_s()
  assert waited > 0 and batches.wait_s() == 0
