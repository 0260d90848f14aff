"""Device code of the block-scaled formats' arithmetic; kernels.formats defines it.

Every fp32 operation is one PTX instruction with round-to-nearest and subnormals, so that no
compiler flag can change a bit, and the same code runs on every architecture.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint16, Uint32, const_expr

from kernels.cuda.jit import ARCH
from kernels.formats import SMALLEST_ROW_SCALE

FINITE = 0x7F800000  # magnitudes below it are finite
E4M3_NAN = 0x7F
TWO_23 = 8388608.0


def _binary(op: str, a: Float32, b: Float32, rounding: str = "rn") -> Float32:
  ptx = f"{op}.{rounding}.f32 {{$w0}}, {{$r0}}, {{$r1}};"
  return cute.arch.inline_ptx(ptx, write_only_types=[Float32], read_only_args=[a, b])


def divide(a: Float32, b: Float32) -> Float32:
  """a / b, correctly rounded."""
  return _binary("div", Float32(a), Float32(b))


def multiply(a: Float32, b: Float32) -> Float32:
  """a · b, correctly rounded and never fused."""
  return _binary("mul", a, b)


def add(a: Float32, b: Float32) -> Float32:
  """a + b, correctly rounded and never fused."""
  return _binary("add", a, b)


def subtract(a: Float32, b: Float32) -> Float32:
  """a - b, correctly rounded and never fused."""
  return _binary("sub", a, b)


def magnitude_bits(value: Float32) -> Int32:
  """The bits of |value|: they order like the magnitude, infinity and NaN above all numbers."""
  return value.bitcast(Int32) & 0x7FFFFFFF


@cute.jit
def largest_bits(rX: cute.Tensor) -> Int32:
  """The bits of the largest magnitude of fp32 numbers."""
  largest = magnitude_bits(rX[0])
  for e in cutlass.range_constexpr(1, cute.size(rX)):
    largest = cutlass.max(largest, magnitude_bits(rX[e]))
  return largest


def e4m3_pair(low: Float32, high: Float32) -> Uint32:
  """The E4M3 codes of two numbers in the low 16 bits: nearest even, saturating, NaN 0x7F."""
  ptx = "cvt.rn.satfinite.e4m3x2.f32 {$w0}, {$r0}, {$r1};"
  pair = cute.arch.inline_ptx(ptx, write_only_types=[Uint16], read_only_args=[high, low])
  return Uint32(pair)


@cute.jit
def e4m3_value(code: Uint32) -> Float32:
  """The value of a non-negative E4M3 code; NaN of 0x7F."""
  field = Int32(code >> 3)
  q = Int32(code & 7)
  if field > 0:
    q += 8
  exponent = field - 10 if field > 0 else Int32(-9)
  value = multiply(Float32(q), ((exponent + 127) << 23).bitcast(Float32))
  return Float32(float("nan")) if code == E4M3_NAN else value


@cute.jit
def e8m0_code(amax_bits: Int32) -> Int32:
  """2^ceil(log2(amax / 448)) as an E8M0 code; 255 where amax is not finite."""
  code = Int32(0xFF)
  if amax_bits < FINITE:
    bits = divide(amax_bits.bitcast(Float32), 448.0).bitcast(Int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    exact = mantissa <= 0x400000 if exponent == 0 else mantissa == 0
    code = exponent if exact else exponent + 1
  return code


@cute.jit
def e8m0_factor(code: Int32) -> Float32:
  """1 / 2^(code - 127), or 1 for NaN's code."""
  exponent = Int32(127) if code == 0xFF else 254 - code
  return (exponent << 23).bitcast(Float32)


@cute.jit
def e8m0_value(code: Int32) -> Float32:
  """2^(code - 127); NaN of 255."""
  bits = code << 23 if code > 0 else Int32(1 << 22)
  return Float32(float("nan")) if code == 0xFF else bits.bitcast(Float32)


@cute.jit
def nvfp4_encode(tensor_amax: Float32) -> Float32:
  """What brings the tensor's largest magnitude to 6 · 448; 1 where it can't."""
  encode = divide(2688.0, tensor_amax)
  bits = encode.bitcast(Int32)
  return encode if bits > 0 and bits < FINITE else Float32(1.0)


@cute.jit
def nvfp4_scale(amax_bits: Int32, encode: Float32, tensor_scale: Float32):
  """(E4M3 code of a block's scale, what its elements are multiplied by)."""
  code, factor = Uint32(E4M3_NAN), Float32(1.0)
  if amax_bits < FINITE:
    scale = multiply(divide(amax_bits.bitcast(Float32), 6.0), encode)
    code = e4m3_pair(scale, Float32(0.0)) & 0xFF
    step = e4m3_value(code)
    factor = Float32(0.0)
    if code > 0:
      factor = divide(1.0, multiply(step, tensor_scale))
  return code, factor


@cute.jit
def nvfp4_row_code(amax_bits: Int32) -> Int32:
  """The scale of a row with this largest magnitude, a power of two, as an E8M0 code."""
  code = Int32(127)
  if amax_bits < FINITE:
    sixth = divide(amax_bits.bitcast(Float32), 6.0)
    code = cutlass.max(e8m0_code(sixth.bitcast(Int32)), Int32(SMALLEST_ROW_SCALE))
  return code


def e4m3_codes(low: Float32, high: Float32, low_factor: Float32, high_factor: Float32) -> Uint32:
  """The E4M3 codes of two products value · factor, with the values' signs, in the low 16 bits."""
  magnitudes = (
    multiply(magnitude_bits(value).bitcast(Float32), factor)
    for value, factor in ((low, low_factor), (high, high_factor))
  )
  sign_low = (low.bitcast(Uint32) >> 24) & 0x80
  sign_high = (high.bitcast(Uint32) >> 16) & 0x8000
  return (e4m3_pair(*magnitudes) & 0x7F7F) | sign_low | sign_high


def e4m3_values(pair: Uint32):
  """The values of the two E4M3 codes in the low 16 bits, exact."""
  ptx = (
    "{ .reg .b16 pair, low, high; .reg .b32 both; cvt.u16.u32 pair, {$r0}; "
    "cvt.rn.f16x2.e4m3x2 both, pair; mov.b32 {low, high}, both; "
    "cvt.f32.f16 {$w0}, low; cvt.f32.f16 {$w1}, high; }"
  )
  return cute.arch.inline_ptx(ptx, write_only_types=[Float32, Float32], read_only_args=[pair])


@cute.jit
def mxfp8_encode(rX: cute.Tensor, block: cutlass.Constexpr[int]):
  """(words of E4M3 codes, E8M0 code) of fp32 numbers; neighbouring lanes together hold a block."""
  size = const_expr(cute.size(rX))
  amax = largest_bits(rX)
  for step in cutlass.range_constexpr((block // size).bit_length() - 1):
    amax = cutlass.max(amax, cute.arch.shuffle_sync_bfly(amax, 1 << step))
  scale = e8m0_code(amax)
  factor = e8m0_factor(scale)
  rCode = cute.make_rmem_tensor(size // 4, Uint32)
  for w in cutlass.range_constexpr(size // 4):
    low = e4m3_codes(rX[4 * w], rX[4 * w + 1], factor, factor)
    rCode[w] = low | (e4m3_codes(rX[4 * w + 2], rX[4 * w + 3], factor, factor) << 16)
  return rCode, scale


@cute.jit
def mxfp8_decode(rCode: cute.Tensor, scale: Int32) -> cute.Tensor:
  """The values of words of E4M3 codes under one E8M0 code, exact."""
  factor = e8m0_value(scale)
  rX = cute.make_rmem_tensor(4 * const_expr(cute.size(rCode)), Float32)
  for p in cutlass.range_constexpr(2 * const_expr(cute.size(rCode))):
    low, high = e4m3_values(rCode[p // 2] >> (p % 2 * 16))
    rX[2 * p], rX[2 * p + 1] = multiply(low, factor), multiply(high, factor)
  return rX


@cute.jit
def _e2m1_nearest(value: Float32) -> Uint32:
  """The E2M1 code of a number, to nearest even: adding 2^23 leaves an integer in the low bits."""
  exponent, q = _e2m1_scaled(value)
  rounded = add(q, Float32(TWO_23)).bitcast(Uint32) & 7
  return _e2m1_signed(value, ((exponent - 127) << 1) + rounded)


@cute.jit
def e2m1_stochastic(value: Float32, random: Uint32) -> Uint32:
  """The E2M1 code of a number, rounded up if the 24 high random bits fall below its fraction."""
  exponent, q = _e2m1_scaled(value)
  shifted = _binary("add", q, Float32(TWO_23), "rm")
  rounded = shifted.bitcast(Uint32) & 7
  fraction = subtract(q, subtract(shifted, Float32(TWO_23)))
  if Float32(Int32(random >> 8)) < multiply(fraction, Float32(2.0**24)):
    rounded += 1
  return _e2m1_signed(value, ((exponent - 127) << 1) + rounded)


def _e2m1_scaled(value: Float32):
  """(biased exponent of the code's binade, magnitude in units of the code's last place)."""
  magnitude = cute.arch.fmin(magnitude_bits(value).bitcast(Float32), Float32(6.0))
  exponent = cutlass.max(magnitude.bitcast(Int32) >> 23, Int32(127))
  return Uint32(exponent), multiply(magnitude, ((255 - exponent) << 23).bitcast(Float32))


@cute.jit
def _e2m1_signed(value: Float32, code: Uint32) -> Uint32:
  bits = value.bitcast(Uint32)
  return code if (bits & 0x7FFFFFFF) > FINITE else code | ((bits >> 28) & 8)


def e2m1_pair(low: Float32, high: Float32) -> Uint32:
  """The E2M1 codes of two numbers in the low 8 bits, to nearest even.

  Where the architecture has the conversion, one instruction; its rules are the same (PTX ISA, cvt).
  """
  if ARCH.block_scaled:
    ptx = (
      "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, {$r0}, {$r1}; cvt.u32.u8 {$w0}, pair; }"
    )
    return cute.arch.inline_ptx(ptx, write_only_types=[Uint32], read_only_args=[high, low])
  return _e2m1_nearest(low) | (_e2m1_nearest(high) << 4)


@cute.jit
def e2m1_words(rX: cute.Tensor, factor: Float32) -> cute.Tensor:
  """The E2M1 codes of fp32 numbers times the factor, to nearest even, eight in a word."""
  size = const_expr(cute.size(rX))
  rCode = cute.make_rmem_tensor(size // 8, Uint32)
  rCode.fill(0)
  for p in cutlass.range_constexpr(size // 2):
    pair = e2m1_pair(multiply(rX[2 * p], factor), multiply(rX[2 * p + 1], factor))
    rCode[p // 4] = rCode[p // 4] | (pair << (p % 4 * 8))
  return rCode


def e2m1_value(code: Uint32) -> Float32:
  """The value of the E2M1 code in the low 4 bits, exact: its fields as the lowest of fp32's."""
  bits = ((code & 7) << 22) | ((code & 8) << 28)
  return multiply(bits.bitcast(Float32), Float32(2.0**126))


@cute.jit
def nvfp4_block_encode(rX: cute.Tensor, row_factor: Float32):
  """(words of E2M1 codes, E4M3 code) of a block of fp32 numbers, times the factor, of a tensor of
  scale 1.
  """
  for e in cutlass.range_constexpr(cute.size(rX)):
    rX[e] = multiply(rX[e], row_factor)
  scale, factor = nvfp4_scale(largest_bits(rX), Float32(1.0), Float32(1.0))
  return e2m1_words(rX, factor), scale


@cute.jit
def nvfp4_block_decode(rCode: cute.Tensor, scale: Uint32, row_scale: Float32) -> cute.Tensor:
  """The values of words of E2M1 codes under one E4M3 code and the row's scale, exact."""
  factor = multiply(e4m3_value(scale), row_scale)
  rX = cute.make_rmem_tensor(8 * const_expr(cute.size(rCode)), Float32)
  for e in cutlass.range_constexpr(8 * const_expr(cute.size(rCode))):
    rX[e] = multiply(e2m1_value(rCode[e // 8] >> (e % 8 * 4)), factor)
  return rX


def _mix(h: Uint32) -> Uint32:
  h = (h ^ (h >> 16)) * Uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * Uint32(0x846CA68B)
  return h ^ (h >> 16)


def random_bits(index: Uint32, key0: Uint32, key1: Uint32) -> Uint32:
  """32 bits for element `index`, with the keys derive(seed) and derive(seed, 1)."""
  return _mix(_mix(index ^ key0) + key1)


@cute.jit
def flip(value: Float32, signs: Uint32, position: cutlass.Constexpr[int]) -> Float32:
  """The value, negated if bit `position` of `signs` is set."""
  bit = (signs << (31 - position)) & Uint32(0x80000000)
  return (value.bitcast(Uint32) ^ bit).bitcast(Float32)


@cute.jit
def butterflies(
  rX: cute.Tensor,
  start: cutlass.Constexpr[int],
  count: cutlass.Constexpr[int],
  step: cutlass.Constexpr[int],
):
  """In place (a + b, a - b) over distances 1, 2, … below `count`, on rX[start + i · step]."""
  distance = 1
  while const_expr(distance < count):
    for i in cutlass.range_constexpr(count):
      if const_expr(i & distance == 0):
        low = const_expr(start + i * step)
        high = const_expr(start + (i + distance) * step)
        a, b = rX[low], rX[high]
        rX[low], rX[high] = add(a, b), subtract(a, b)
    distance *= 2
