"""MXFP8 and NVFP4 against numpy oracles: tables of values, search of the nearest, ties even.

One file: both formats share their codes, scales, rounding and rotation, and the tables of them.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels import formats
from kernels.ops import KernelError
from kernels.reference import blockscale as bs
from kernels.reference import quantize


def table(exponent_bits, mantissa_bits, bias):
  """The non-negative values by code, from the definition; exact in float64."""
  values = []
  for field in range(1 << exponent_bits):
    for m in range(1 << mantissa_bits):
      fraction = m / (1 << mantissa_bits)
      normal = field > 0
      values.append((normal + fraction) * 2.0 ** (max(field, 1) - bias))
  return np.array(values)


E4M3 = table(4, 3, 7)[:127]  # the last code is NaN
E2M1 = table(2, 1, 1)
KINDS = {"E4M3": (formats.E4M3, E4M3, 0x80), "E2M1": (formats.E2M1, E2M1, 0x08)}


def nearest(values, positive):
  """Codes without sign: nearest value, ties to the even code, saturating."""
  middle = (positive[1:] + positive[:-1]) / 2
  code = np.searchsorted(middle, values, side="left")
  tie = (code < len(middle)) & (np.append(middle, np.inf)[code] == values)
  return code + (tie & (code % 2 == 1))


def signed(values, positive, sign):
  return (nearest(np.abs(values), positive) | np.where(np.signbit(values), sign, 0)).astype(
    np.uint8
  )


def encode(values, kind, random=None):
  return bs.encode(torch.from_numpy(np.asarray(values, np.float32)), kind, random).numpy()


def test_the_tables_are_the_formats():
  assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  assert E4M3[[1, 8, 126]].tolist() == [2.0**-9, 2.0**-6, 448.0]


@pytest.mark.parametrize("name", KINDS)
def test_every_code_decodes_to_its_value_and_back(name):
  kind, positive, sign = KINDS[name]
  codes = torch.arange(2 * sign, dtype=torch.uint8)
  values = formats.decode(codes, kind).numpy()
  expected = np.append(positive, [np.nan] * (sign - len(positive)))
  np.testing.assert_array_equal(values[:sign], expected.astype(np.float32))
  np.testing.assert_array_equal(values[sign:], -expected.astype(np.float32))
  np.testing.assert_array_equal(
    bs.encode(torch.from_numpy(values), kind).numpy()[:sign], codes[:sign]
  )
  assert np.signbit(values[sign])
  numbers = ~np.isnan(values)
  np.testing.assert_array_equal(encode(values[numbers], kind), codes.numpy()[numbers])


@pytest.mark.parametrize("name", KINDS)
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearest(name):
  kind, positive, sign = KINDS[name]
  middle = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
  assert np.array_equal(encode(middle, kind) % 2, np.zeros(len(middle)))
  values = np.concatenate([np.nextafter(middle, np.float32(x)) for x in (-1, 1e9)] + [middle])
  values = np.concatenate([values, -values])
  np.testing.assert_array_equal(encode(values, kind), signed(values, positive, sign))


def test_the_ties_of_e2m1_by_hand():
  ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
  assert E2M1[encode(ties, formats.E2M1)].tolist() == [0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_encoding_is_the_nearest_value(name, numbers):
  kind, positive, sign = KINDS[name]
  values = np.array(numbers, np.float32)
  np.testing.assert_array_equal(encode(values, kind), signed(values.astype(float), positive, sign))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=100)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50))
def test_encoding_is_the_nearest_value_near_one(name, numbers):
  kind, positive, sign = KINDS[name]
  values = np.array(numbers, np.float32)
  np.testing.assert_array_equal(encode(values, kind), signed(values.astype(float), positive, sign))


def test_saturation_infinities_and_nan():
  values = np.array([448, 449, 1e30, np.inf, -np.inf, -1e9, np.nan], np.float32)
  assert encode(values, formats.E4M3).tolist() == [0x7E] * 4 + [0xFE] * 2 + [0x7F]
  assert encode(values, formats.E2M1).tolist() == [7] * 4 + [15] * 2 + [7]


def test_e4m3_agrees_with_torch_s_cast_where_that_is_finite():
  values = (
    torch.randn(100_000, generator=torch.Generator().manual_seed(0)).mul(4).exp().clamp(max=448)
  )
  cast = values.to(torch.float8_e4m3fn).view(torch.uint8)
  assert torch.equal(bs.encode(values, formats.E4M3), cast)


def test_every_e8m0_code():
  codes = torch.arange(256, dtype=torch.uint8)
  values = formats.decode_e8m0(codes)
  assert values[:255].double().tolist() == [2.0 ** (c - 127) for c in range(255)]
  assert values[255].isnan()


@settings(max_examples=300)
@given(st.floats(0, width=32, allow_nan=False, allow_infinity=False))
@example(448.0)
@example(448.0 * 2.0**-127)
@example(2.0**-149)
@example(3.4028234663852886e38)
def test_mxfp8_s_scale_is_the_smallest_power_that_saturates_nothing(amax):
  scale = Fraction(float(formats.decode_e8m0(formats.scale_e8m0(torch.tensor([amax])))))
  assert Fraction(amax) <= 448 * scale
  assert scale == Fraction(2) ** -127 or Fraction(amax) > 448 * scale / 2


def blocks(shape, size, axis, square):
  """Slices of the last two dimensions that share a scale."""
  rows, columns = (size, size) if square else ((1, size) if axis == -1 else (size, 1))
  for i in range(0, shape[0], rows):
    for j in range(0, shape[1], columns):
      yield (i // rows, j // columns), (slice(i, i + rows), slice(j, j + columns))


def mxfp8(x, axis):
  """Codes and E8M0 codes of a matrix, block by block, with exact exponents."""
  codes = np.zeros(x.shape, np.uint8)
  scales = {}
  for place, block in blocks(x.shape, 32, axis, False):
    ratio = Fraction(float(np.abs(x[block]).max())) / 448
    exponent = -127
    while Fraction(2) ** exponent < ratio:
      exponent += 1
    scales[place] = exponent + 127
    codes[block] = signed(x[block].astype(float) * 2.0**-exponent, E4M3, 0x80)
  return codes, scales


def nvfp4(x, axis, square, tensor_amax=None):
  """Codes, E4M3 codes and the tensor's scale of a matrix, with fp32 operations."""
  f = np.float32
  amax = np.abs(x).max() if tensor_amax is None else f(tensor_amax)
  with np.errstate(over="ignore", divide="ignore"):
    encode_scale = f(2688) / amax
  encode_scale = encode_scale if np.isfinite(encode_scale) else f(1)
  tensor_scale = f(1) / encode_scale
  codes, scales = np.zeros(x.shape, np.uint8), {}
  for place, block in blocks(x.shape, 16, axis, square):
    scales[place] = nearest(float(np.abs(x[block]).max() / f(6) * encode_scale), E4M3)
    step = f(E4M3[scales[place]])
    with np.errstate(over="ignore", divide="ignore"):
      factor = np.minimum(f(1) / (step * tensor_scale), np.finfo(f).max) if step else f(0)
    codes[block] = signed((x[block] * factor).astype(float), E2M1, 0x08)
  return codes, scales, tensor_scale


def matrix(rows, columns):
  """Matrices of fp32 over many magnitudes, zeros and whole rows of nothing included."""
  number = st.floats(-8, 8, width=32).map(lambda v: v if abs(v) > 1e-3 else 0.0)
  values = hnp.arrays(np.float32, st.tuples(rows, columns), elements=number)
  scale = st.lists(st.integers(-30, 30), min_size=1, max_size=4)
  return st.tuples(values, scale).map(
    lambda p: p[0] * np.exp2(np.resize(p[1], len(p[0]))).astype(np.float32)[:, None]
  )


@settings(max_examples=40)
@given(matrix(st.integers(1, 40), st.integers(1, 70)), st.sampled_from([-1, -2]))
def test_mxfp8_follows_its_definition(x, axis):
  q = quantize(torch.from_numpy(x), "fp8", axis=axis)
  codes, scales = mxfp8(x, axis)
  np.testing.assert_array_equal(q.data.view(torch.uint8).numpy(), codes)
  for place, code in scales.items():
    assert q.scale.view(torch.uint8)[place] == code


@settings(max_examples=40)
@given(
  matrix(st.integers(1, 20).map(lambda n: 2 * n), st.integers(1, 20).map(lambda n: 2 * n)),
  st.sampled_from([(-1, False), (-2, False), (-1, True)]),
  st.sampled_from([None, 2.0, 1000.0]),
)
def test_nvfp4_follows_its_definition(x, how, tensor_amax):
  axis, square = how
  amax = None if tensor_amax is None else torch.tensor(tensor_amax)
  q = quantize(torch.from_numpy(x), "nvfp4", axis=axis, square=square, tensor_amax=amax)
  codes, scales, tensor_scale = nvfp4(x, axis, square, tensor_amax)
  np.testing.assert_array_equal(formats.unpack(q.data, axis).numpy(), codes)
  for place, code in scales.items():
    assert q.scale.view(torch.uint8)[place] == code
  assert np.float32(q.tensor_scale.item()) == tensor_scale


@settings(max_examples=40)
@given(matrix(st.integers(1, 5), st.integers(1, 70)), st.integers(-20, 20))
def test_mxfp8_round_trip(x, shift):
  """Values survive a second quantization, a change of sign and a power of two."""
  x = torch.from_numpy(x)
  once = quantize(x, "fp8").dequantize()
  assert torch.equal(quantize(once, "fp8").dequantize(), once)
  assert torch.equal(quantize(-x, "fp8").dequantize(), -once)
  assert torch.equal(quantize(x * 2.0**shift, "fp8").dequantize(), once * 2.0**shift)
  bound = torch.maximum(x.abs() * 2.0**-4, x.abs().amax() * 2.0**-17)
  assert ((once - x).abs() <= bound).all()


def test_all_values_of_a_block_format_survive():
  """Every E4M3 value beside a 448, and every E2M1 value beside a 6, comes back exactly."""
  values = np.concatenate([E4M3, -E4M3]).astype(np.float32)
  rows = np.stack(
    [np.append(np.resize(values[i : i + 31], 31), np.float32(448)) for i in range(254)]
  )
  assert torch.equal(quantize(torch.from_numpy(rows), "fp8").dequantize(), torch.from_numpy(rows))
  row = torch.from_numpy(np.concatenate([E2M1, -E2M1]).astype(np.float32))[None] * 448
  assert torch.equal(quantize(row, "nvfp4").dequantize(), row)


def test_values_are_exact_in_bf16():
  x = torch.randn(64, 64)
  for format in ("fp8", "nvfp4"):
    q = quantize(x, format)
    assert torch.equal(q.values(torch.bfloat16).float(), q.values(torch.float32))
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


@given(hnp.arrays(np.uint8, (4, 6), elements=st.integers(0, 15)), st.sampled_from([-1, -2]))
def test_packing(codes, axis):
  codes = torch.from_numpy(codes)
  packed = bs.pack(codes, axis)
  assert torch.equal(formats.unpack(packed, axis), codes)
  first = codes[0, :2] if axis == -1 else codes[:2, 0]
  assert packed[0, 0] == first[0] + 16 * first[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format,size", [("fp8", 32), ("nvfp4", 16)])
def test_a_non_finite_element_spoils_its_own_block(format, size, bad):
  x = torch.randn(3, 4 * size, generator=torch.Generator().manual_seed(1))
  x[1, size + 3] = bad
  spoilt = torch.zeros_like(x, dtype=torch.bool)
  spoilt[1, size : 2 * size] = True
  restored = quantize(x, format, tensor_amax=torch.tensor(4.0)).dequantize()
  assert torch.equal(restored.isnan(), spoilt)
  restored = quantize(x, format).dequantize()
  assert torch.equal(restored.isnan(), spoilt)
  assert (restored - x)[~spoilt].abs().max() < 0.6


@pytest.mark.parametrize("amax", [0.0, 2.0**-149, 1e-36, torch.inf, torch.nan])
def test_nvfp4_s_tensor_scale_where_it_has_none(amax):
  q = quantize(torch.zeros(2, 16), "nvfp4", tensor_amax=torch.tensor(amax))
  assert q.tensor_scale == 1.0 and not q.dequantize().any()


def test_tiny_tensors_stay_finite():
  x = torch.full((1, 32), 2.0**-120)
  x[0, :16] = 2.0**-111
  for format in ("fp8", "nvfp4"):
    restored = quantize(x, format).dequantize()
    torch.testing.assert_close(restored[0, :16], x[0, :16], rtol=0.1, atol=0)
    assert restored.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0), (2, 0, 32)])
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_empty_tensors(format, shape):
  assert quantize(torch.zeros(shape), format).dequantize().shape == shape


def bits_by_hand(seed, i):
  """random_bits in plain integers."""

  def mix(h):
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ (h >> 16)

  first = mix((0x9E3779B9 ^ seed) % 2**32)
  second = mix(((first + 0x9E3779B9) % 2**32) ^ 1)
  return mix((mix(i ^ first) + second) % 2**32)


@given(st.integers(0, 2**32 - 1))
def test_random_bits_are_a_function_of_seed_and_index(seed):
  bits = bs.random_bits(seed, torch.Size([3, 5]), torch.device("cpu"))
  assert bits.flatten().tolist() == [bits_by_hand(seed, i) for i in range(15)]


def test_random_bits_are_uniform_and_independent_of_the_neighbouring_seed():
  size = torch.Size([1 << 16])
  a, b = (bs.random_bits(s, size, torch.device("cpu")).double() / 2**32 for s in (1, 2))
  for sample in (a, b):
    counts = torch.histc(sample, 64, 0, 1)
    chi2 = ((counts - 1024) ** 2 / 1024).sum()
    assert 20 < chi2 < 130  # 63 degrees of freedom: beyond 6 standard deviations otherwise
  assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.02
  assert torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1].abs() < 0.02


def test_stochastic_rounding_by_hand():
  values = np.linspace(-6, 6, 97).astype(np.float32)
  random = bs.random_bits(9, torch.Size([97]), torch.device("cpu"))
  codes = encode(values, formats.E2M1, random)
  for i, value in enumerate(np.abs(values)):
    low = int(np.searchsorted(E2M1, value, side="right")) - 1
    high = min(low + 1, 7)
    gap = E2M1[high] - E2M1[low]
    up = gap > 0 and (bits_by_hand(9, i) >> 8) / 2**24 < (value - E2M1[low]) / gap
    assert codes[i] & 7 == (high if up else low)


def test_stochastic_rounding_is_unbiased_and_reproducible():
  """Blocks of 6 · 448 and one repeated value: the mean is within 5 standard errors."""
  for value in (0.1, 0.26, 0.9, 1.3, 2.2, 3.7, 4.4, 5.9):
    x = torch.full((2048, 16), value * 448)
    x[:, 0] = 6 * 448
    a = quantize(x, "nvfp4", seed=3).dequantize()[:, 1:] / 448
    low = E2M1[E2M1 <= value].max()
    high = E2M1[E2M1 >= value].min()
    assert set(a.unique().tolist()) == {low, high}
    deviation = np.sqrt((high - value) * (value - low) / a.numel())
    assert abs(a.double().mean().item() - value) < 5 * deviation
    again = quantize(x, "nvfp4", seed=3).dequantize()[:, 1:] / 448
    other = quantize(x, "nvfp4", seed=4).dequantize()[:, 1:] / 448
    assert torch.equal(a, again) and not torch.equal(a, other)


def test_stochastic_rounding_leaves_representable_values_alone():
  row = torch.from_numpy(np.concatenate([E2M1, -E2M1]).astype(np.float32))[None] * 448
  for seed in range(20):
    assert torch.equal(quantize(row, "nvfp4", seed=seed).dequantize(), row)


def hadamard(seed):
  """diag(signs) · H / 4 from the parity of i & j."""
  parity = [[bin(i & j).count("1") % 2 for j in range(16)] for i in range(16)]
  return np.diag(formats.signs(seed)) @ np.where(parity, -1.0, 1.0) / 4


@pytest.mark.parametrize("axis", [-1, -2])
def test_rotation_is_the_signed_hadamard_matrix(axis):
  x = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(2))
  rotated = formats.rotate(x, 7, axis)
  groups = x.double().movedim(axis, -1).unflatten(-1, (-1, 16)) @ torch.from_numpy(hadamard(7))
  expected = groups.flatten(-2).movedim(-1, axis)
  torch.testing.assert_close(rotated.double(), expected, rtol=1e-5, atol=1e-6)


def test_rotation_keeps_products_and_has_the_run_s_signs():
  a, b = torch.randn(64, 8, dtype=torch.float32), torch.randn(64, 6, dtype=torch.float32)
  product = formats.rotate(a, 5, -2).double().T @ formats.rotate(b, 5, -2).double()
  torch.testing.assert_close(product, a.double().T @ b.double(), rtol=1e-5, atol=1e-5)
  signs = {tuple(formats.signs(seed)) for seed in range(20)}
  assert len(signs) == 20 and {abs(s) for row in signs for s in row} == {1.0}


def test_rotation_spreads_an_outlier():
  x = torch.zeros(16, 1)
  x[3] = 16.0
  assert torch.equal(formats.rotate(x, 0, -2).abs(), torch.full((16, 1), 4.0))


def test_wgrad_scales_are_of_the_rotated_tensor():
  x = torch.randn(32, 4)
  q = quantize(x, "nvfp4", axis=-2, hadamard=1)
  plain = quantize(formats.rotate(x, 1, -2), "nvfp4", axis=-2)
  assert torch.equal(q.data, plain.data) and q.tensor_scale == plain.tensor_scale


@pytest.mark.parametrize(
  "shape,format,arguments,message",
  [
    ((4, 32), "fp4", {}, "'fp4' is unknown"),
    ((4, 32), "fp8", {"axis": 0}, "axis 0 must be -1 or -2"),
    ((32,), "fp8", {}, "needs two dimensions"),
    ((4, 31), "nvfp4", {}, "axis -1 has 31 elements; need even"),
    ((4, 32), "fp8", {"square": True}, "for nvfp4 only"),
    ((4, 32), "fp8", {"seed": 1}, "for nvfp4 only"),
    ((24, 32), "nvfp4", {"axis": -2, "hadamard": 1}, "needs a multiple of 16"),
  ],
)
def test_impossible_requests_are_refused(shape, format, arguments, message):
  with pytest.raises(KernelError, match=message):
    quantize(torch.zeros(shape), format, **arguments)
