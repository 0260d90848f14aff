"""The router: fp32-accurate logits on bf16 tensor cores, then scores, groups, top-k, gates and
counts in one pass.

Logits. An fp32 weight is the sum of three bf16 numbers w0 + w1 + w2 (24 bits). So one bf16 product
  x [T, D] · [w0; w1; w2]ᵀ -> fp32 [T, 3·P]       (P = E rounded up to 8)
whose three parts are added has exact products and fp32 accumulation: x is read once.

Selection. One warp per token. Scores s = sigmoid or softmax of the logits; selection by s + bias as
an integer key that orders like the float, so that redux.sync finds a maximum in one instruction:
first the best topk_groups groups (by the sum of their best two), then K rounds of (largest key,
lowest index). Gates from the unbiased s. Counts are integer sums. Each token's logits are read
once, its scores, experts and gates written once.

Backward. One warp per token turns dgate and what reached the logits through the scores into
dlogits, written as bf16 parts d0 + d1, so that
  dx = [d0 d1 d0] · [w0; w0; w1]  and  dw = d0ᵀ·x + d1ᵀ·x
are bf16 products as well, of operands with a relative error of 2^-16. The gradient that came to
x_TD is added to the former in fp32, before it is rounded. dw is summed over slices of T, whose
tiles the SMs take at once, in a fixed order.

Kept for backward: x, the weight, the chosen experts and their scores, 8 · T·K bytes. All scores,
4 · T·E bytes, are kept for softmax, whose gates move every logit, and where a loss uses score_TE.
With kernels.cuda.experts (preact 4 · N·F bytes, gate, row and source 4 · N each) an expert layer
keeps 4 · N · (F + 5) + 4 · (E + 1) bytes beside x: 1,111.2 MB at T 32768, F 1408, E 64, K 6.

The product is two thirds of the forward pass's time (kernels/RESULTS.md).

One file: the product, the selection and their gradient are one operation of kernels.ops.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float32, Int32, Uint32, const_expr
from cutlass.memory import SmemAllocator
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cuda import gemms
from kernels.cuda.jit import ARCH, cached, check_device, compile_kernel, fake
from kernels.ops import RouterSpec, Routing, check, check_same_device

THREADS = 256
WARPS = THREADS // 32
PARTS = 3
MAX_EXPERTS = 512
MAX_GROUPS = 32
MAX_TOP_K = 32
MAX_SLICES = 16
CLUSTER_SMS = 2  # of a product for dw, whose clusters have the same rows on every architecture:
CLUSTER_ROWS = 256  # two tiles of 128, or one of 256 by two SMs


def padded(num_experts: int) -> int:
  """Columns of one part: E rounded up to the 8 that a 16-byte row of bf16 needs."""
  return -(-num_experts // 8) * 8


@cute.jit
def _order(value: Float32) -> Uint32:
  """An integer that orders like the float. 0 is below every number, -inf included."""
  bits = value.bitcast(Int32)
  flip = Int32(-0x80000000) | (bits >> 31)
  return Uint32(bits ^ flip)


@cute.jit
def _split(value: Float32, part: cutlass.Constexpr[int]) -> BFloat16:
  """The part-th bf16 of the sum that equals the value."""
  rest = value
  for _ in cutlass.range_constexpr(part):
    rest = rest - rest.to(BFloat16).to(Float32)
  return rest.to(BFloat16)


class SplitWeight:
  """w fp32 [E, D] -> bf16 [len(parts)·P, D]: block i holds part parts[i] of w; rows E to P are
  zero.
  """

  def __init__(self, num_experts: int, parts: tuple[int, ...]):
    self.num_experts, self.parts = num_experts, parts

  @cute.jit
  def __call__(self, mW: cute.Tensor, mParts: cute.Tensor, stream):
    columns = cute.ceil_div(mW.shape[1], THREADS)
    self.kernel(mW, mParts).launch(
      grid=[columns, padded(self.num_experts), 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mW: cute.Tensor, mParts: cute.Tensor):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, expert, _ = cute.arch.block_idx()
    column = bidx * THREADS + tidx
    if column < mW.shape[1]:
      value = Float32(0.0)
      if expert < self.num_experts:
        value = mW[expert, column]
      for i in cutlass.range_constexpr(len(self.parts)):
        mParts[i * padded(self.num_experts) + expert, column] = _split(value, self.parts[i])


class Select:
  """Logit parts [T, 3·P] -> scores [T, E], experts, their scores and gates [T, K], counts [E] added
  to mCount.
  """

  def __init__(self, num_experts: int, spec: RouterSpec):
    self.spec, self.num_experts = spec, num_experts
    self.per_lane = -(-num_experts // 32)
    self.grouped = spec.topk_groups < spec.num_groups

  @cute.jit
  def __call__(
    self, mLogits, mBias, mScore, mExpert, mChosen, mGate, mCount, blocks: Int32, stream
  ):
    self.kernel(mLogits, mBias, mScore, mExpert, mChosen, mGate, mCount).launch(
      grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mLogits, mBias, mScore, mExpert, mChosen, mGate, mCount):
    tidx, _, _ = cute.arch.thread_idx()
    bidx, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    smem = SmemAllocator()
    rows = cute.make_layout((WARPS, self.per_lane * 32), stride=(self.per_lane * 32, 1))
    sCount = smem.allocate_tensor(Int32, cute.make_layout(self.num_experts), 16)
    sScore = smem.allocate_tensor(Float32, rows, 16)[warp, None]
    sBiased = sScore
    if const_expr(self.grouped):
      sBiased = smem.allocate_tensor(Float32, rows, 16)[warp, None]
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      sCount[e] = 0
    cute.arch.sync_threads()
    rKey = cute.make_rmem_tensor(self.per_lane, Uint32)
    for token in cutlass.range(bidx * WARPS + warp, mScore.shape[0], grid * WARPS):
      rScore = self.scores(mLogits, token)
      for j in cutlass.range_constexpr(self.per_lane):
        e = lane + 32 * j
        rKey[j] = Uint32(0)
        if e < self.num_experts:
          biased = rScore[j] + mBias[e]
          mScore[token, e] = rScore[j]
          sScore[e] = rScore[j]
          if const_expr(self.grouped):
            sBiased[e] = biased
          rKey[j] = _order(biased)
      cute.arch.sync_warp()
      if const_expr(self.grouped):
        self.mask_groups(sBiased, rKey)
      expert = self.top_k(rKey)
      score = Float32(0.0)
      if lane < self.spec.top_k:
        score = sScore[expert]
      gate = score
      if const_expr(self.spec.normalize):
        gate = score / (cute.arch.warp_reduction_sum(score) + Float32(1e-20))
      if lane < self.spec.top_k:
        mExpert[token, lane] = expert
        mChosen[token, lane] = score
        mGate[token, lane] = gate * self.spec.scale
        cute.arch.atomic_add(sCount.iterator + expert, Int32(1))
      cute.arch.sync_warp()
    cute.arch.sync_threads()
    for e in cutlass.range(tidx, self.num_experts, THREADS):
      if sCount[e] > 0:
        cute.arch.atomic_add(mCount.iterator + e, sCount[e])

  @cute.jit
  def scores(self, mLogits: cute.Tensor, token: Int32) -> cute.Tensor:
    """The scores of experts lane, lane + 32, … of a token; 0 beyond E."""
    lane = cute.arch.lane_idx()
    rScore = cute.make_rmem_tensor(self.per_lane, Float32)
    for j in cutlass.range_constexpr(self.per_lane):
      e = lane + 32 * j
      rScore[j] = Float32(-Float32.inf)
      if e < self.num_experts:
        logit = Float32(0.0)
        for part in cutlass.range_constexpr(PARTS):
          logit += mLogits[token, (PARTS - 1 - part) * padded(self.num_experts) + e]
        rScore[j] = logit
    if const_expr(self.spec.score == "sigmoid"):
      for j in cutlass.range_constexpr(self.per_lane):
        rScore[j] = Float32(1.0) / (Float32(1.0) + cute.math.exp(-rScore[j]))
    else:
      largest = cute.arch.warp_reduction_max(
        rScore.load().reduce(cute.ReductionOp.MAX, -Float32.inf, 0)
      )
      rScore.store(cute.math.exp(rScore.load() - largest))
      total = cute.arch.warp_reduction_sum(
        rScore.load().reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
      )
      rScore.store(rScore.load() / total)
    return rScore

  @cute.jit
  def mask_groups(self, sBiased: cute.Tensor, rKey: cute.Tensor):
    """Give the experts outside the best topk_groups groups the key of -inf. Lane g owns group g."""
    lane = cute.arch.lane_idx()
    size = const_expr(self.num_experts // self.spec.num_groups)
    key = Uint32(0)
    if lane < self.spec.num_groups:
      best, second = Float32(-Float32.inf), Float32(-Float32.inf)
      for i in cutlass.range(size, unroll=4):
        value = sBiased[lane * size + (i + lane) % size]  # lanes start apart: no bank conflicts
        second = cute.arch.fmax(second, cute.arch.fmin(best, value))
        best = cute.arch.fmax(best, value)
      key = _order(best + second if const_expr(size > 1) else best)
    chosen = Int32(0)
    for _ in cutlass.range_constexpr(self.spec.topk_groups):
      largest = cute.arch.warp_redux_sync(key, "umax")
      holders = cute.arch.vote_ballot_sync(key == largest)
      first = cute.arch.popc((holders & -holders) - 1)
      chosen = chosen | (Int32(1) << first)
      if lane == first:
        key = Uint32(0)
    for j in cutlass.range_constexpr(self.per_lane):
      e = lane + 32 * j
      if e < self.num_experts and ((chosen >> (e // size)) & 1) == 0:
        rKey[j] = _order(Float32(-Float32.inf))

  @cute.jit
  def top_k(self, rKey: cute.Tensor) -> Int32:
    """Lane k gets the k-th best expert. Ties go to the lower index."""
    lane = cute.arch.lane_idx()
    result = Int32(0)
    for k in cutlass.range(self.spec.top_k):
      best, index = Uint32(0), Int32(0)
      for j in cutlass.range_constexpr(self.per_lane):
        if rKey[j] > best:
          best, index = rKey[j], lane + 32 * j
      largest = cute.arch.warp_redux_sync(best, "umax")
      candidate = index if best == largest else Int32(self.num_experts - 1)
      winner = cute.arch.warp_redux_sync(candidate, "min")
      if lane == k:
        result = winner
      for j in cutlass.range_constexpr(self.per_lane):
        if winner == lane + 32 * j:
          rKey[j] = Uint32(0)
    return result


class SelectBackward:
  """dgate [T, K] and dlogit [T, E] (through the scores, or none) -> the bf16 parts [d0 d1 d0] of
  all dlogits, [T, 3·P]. mScore is given for softmax alone.
  """

  def __init__(self, num_experts: int, spec: RouterSpec):
    self.spec, self.num_experts = spec, num_experts
    self.per_lane = -(-padded(num_experts) // 32)

  @cute.jit
  def __call__(self, mChosen, mScore, mExpert, mDgate, mDlogit, mParts, stream):
    self.kernel(mChosen, mScore, mExpert, mDgate, mDlogit, mParts).launch(
      grid=[cute.ceil_div(mParts.shape[0], WARPS), 1, 1], block=[THREADS, 1, 1], stream=stream
    )

  @cute.kernel
  def kernel(self, mChosen, mScore, mExpert, mDgate, mDlogit, mParts):
    bidx, _, _ = cute.arch.block_idx()
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    rows = cute.make_layout((WARPS, self.per_lane * 32), stride=(self.per_lane * 32, 1))
    sGrad = SmemAllocator().allocate_tensor(Float32, rows, 16)[warp, None]
    token = bidx * WARPS + warp
    if token < mParts.shape[0]:
      for j in cutlass.range_constexpr(self.per_lane):
        e = lane + 32 * j
        sGrad[e] = Float32(0.0)
        if const_expr(mDlogit is not None):
          if e < self.num_experts:
            sGrad[e] = mDlogit[token, e]
      cute.arch.sync_warp()
      dlogit = self.gates(mChosen, mDgate, token)
      if lane < self.spec.top_k:
        expert = mExpert[token, lane]
        sGrad[expert] = sGrad[expert] + dlogit
      cute.arch.sync_warp()
      rGrad = cute.make_rmem_tensor(self.per_lane, Float32)
      for j in cutlass.range_constexpr(self.per_lane):
        rGrad[j] = sGrad[lane + 32 * j]
      if const_expr(mScore is not None):
        total = cute.arch.warp_reduction_sum(dlogit)
        for j in cutlass.range_constexpr(self.per_lane):
          e = lane + 32 * j
          if e < self.num_experts:
            rGrad[j] = rGrad[j] - mScore[token, e] * total
      self.write_parts(rGrad, mParts, token)

  @cute.jit
  def gates(self, mChosen, mDgate, token: Int32) -> Float32:
    """Lane k gets what the gates' gradient adds to the k-th chosen logit by its own score; 0 beyond
    K.
    """
    lane = cute.arch.lane_idx()
    score, dgate = Float32(0.0), Float32(0.0)
    if lane < self.spec.top_k:
      score = mChosen[token, lane]
      dgate = mDgate[token, lane] * self.spec.scale
    if const_expr(self.spec.normalize):
      total = cute.arch.warp_reduction_sum(score) + Float32(1e-20)
      mean = cute.arch.warp_reduction_sum(dgate * score) / total
      dgate = (dgate - mean) / total
    dlogit = dgate * score
    if const_expr(self.spec.score == "sigmoid"):
      dlogit = dlogit * (Float32(1.0) - score)
    return dlogit

  @cute.jit
  def write_parts(self, rGrad: cute.Tensor, mParts: cute.Tensor, token: Int32):
    width = const_expr(padded(self.num_experts))
    for j in cutlass.range_constexpr(self.per_lane):
      e = cute.arch.lane_idx() + 32 * j
      if e < width:
        high = _split(rGrad[j], 0)
        mParts[token, e] = high
        mParts[token, width + e] = _split(rGrad[j], 1)
        mParts[token, 2 * width + e] = high


@cached
def compile_split(num_experts: int, parts: tuple[int, ...]):
  w, out = fake(Float32, num_experts, None, align=4), fake(BFloat16, None, None, align=2)
  return compile_kernel(SplitWeight(num_experts, parts), w, out)


@cached
def compile_select(num_experts: int, spec: RouterSpec):
  logits = fake(Float32, None, PARTS * padded(num_experts), align=4)
  bias, count = fake(Float32, num_experts, align=4), fake(Int32, num_experts, align=4)
  score = fake(Float32, None, num_experts, align=4)
  expert, chosen, gate = (
    fake(dtype, None, spec.top_k, align=4) for dtype in (Int32, Float32, Float32)
  )
  kernel = Select(num_experts, spec)
  return compile_kernel(kernel, logits, bias, score, expert, chosen, gate, count, Int32(1))


@cached
def compile_select_backward(num_experts: int, spec: RouterSpec, with_dlogit: bool):
  expert, chosen, dgate = (
    fake(dtype, None, spec.top_k, align=4) for dtype in (Int32, Float32, Float32)
  )
  score, dlogit = (
    fake(Float32, None, num_experts, align=4) if given else None
    for given in (spec.score == "softmax", with_dlogit)
  )
  parts = fake(BFloat16, None, PARTS * padded(num_experts), align=2)
  kernel = SelectBackward(num_experts, spec)
  return compile_kernel(kernel, chosen, score, expert, dgate, dlogit, parts)


def split_weight(weight_ED: Tensor, parts: tuple[int, ...]) -> Tensor:
  """bf16 [len(parts)·P, D]: the named parts (0 the largest) of an fp32 [E, D] weight, P =
  padded(E).
  """
  num_experts, dim = weight_ED.shape
  out = weight_ED.new_empty(len(parts) * padded(num_experts), dim, dtype=torch.bfloat16)
  compile_split(num_experts, parts)(weight_ED, out)
  return out


def logit_parts(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
  """fp32 [T, 3·P]: x times the three parts of the weight; the logits are their sum."""
  parts = split_weight(weight_ED, (0, 1, 2))
  out = x_TD.new_empty(x_TD.shape[0], parts.shape[0], dtype=torch.float32)
  return gemms.product("router, logits", x_TD, parts, out)


def _slices(num_tokens: int, rows: int, columns: int) -> int:
  """Slices of T for dw [rows, columns]: the largest power of two up to 16 that divides T and leaves
  no cluster of SMs with two tiles, if there is one.
  """
  tile = gemms.config("router, weight", rows, columns)
  clusters = -(-rows // CLUSTER_ROWS) * -(-columns // tile.tile_n)
  most = max(ARCH.num_sms // CLUSTER_SMS // clusters, 1)
  return min(MAX_SLICES, 1 << most.bit_length() - 1, num_tokens & -num_tokens)


def weight_grad(parts: Tensor, x_TD: Tensor, num_experts: int) -> Tensor:
  """dw fp32 [E, D] = (d0 + d1)ᵀ · x, a product per slice of T, added in a fixed order."""
  rows, columns = 2 * padded(num_experts), x_TD.shape[1]
  slices = _slices(x_TD.shape[0], rows, columns)
  a = parts[:, :rows].unflatten(0, (slices, -1)).mT
  b = x_TD.unflatten(0, (slices, -1)).mT
  out = x_TD.new_empty(slices, rows, columns, dtype=torch.float32)
  gemms.product("router, weight", a, b, out)
  return out.unflatten(1, (2, -1)).sum((0, 1))[:num_experts]


def input_grad(parts: Tensor, weight_ED: Tensor, dx_TD: Tensor | None) -> Tensor:
  """bf16 [T, D]: [d0 d1 d0] · [w0; w0; w1], and dx added to it."""
  stacked = split_weight(weight_ED, (0, 0, 1))
  out = parts.new_empty(parts.shape[0], weight_ED.shape[1])
  return gemms.product("rows, weight transposed", parts, stacked.mT, out, dx_TD)


class _Route(torch.autograd.Function):
  """The scores' gradient that arrives here is that of the logits: see _Scores."""

  @staticmethod
  def forward(ctx, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, spec: RouterSpec):
    num_tokens, num_experts = x_TD.shape[0], weight_ED.shape[0]
    new = weight_ED.new_empty
    score_TE = new(num_tokens, num_experts)
    expert_TK = new(num_tokens, spec.top_k, dtype=torch.int32)
    chosen_TK, gate_TK = (new(num_tokens, spec.top_k) for _ in range(2))
    count_E = weight_ED.new_zeros(num_experts, dtype=torch.int32)
    if num_tokens:
      logits = logit_parts(x_TD, weight_ED)
      blocks = min(-(-num_tokens // WARPS), 8 * ARCH.num_sms)
      run = compile_select(num_experts, spec)
      run(logits, bias_E, score_TE, expert_TK, chosen_TK, gate_TK, count_E, blocks)
    ctx.spec = spec
    kept_TE = score_TE if spec.score == "softmax" else None
    ctx.save_for_backward(x_TD, weight_ED, expert_TK, chosen_TK, kept_TE)
    ctx.mark_non_differentiable(expert_TK, count_E)
    ctx.set_materialize_grads(False)
    return expert_TK, gate_TK, score_TE, count_E, x_TD.view_as(x_TD)

  @staticmethod
  @once_differentiable
  def backward(ctx, _expert, dgate_TK, dlogit_TE, _count, dx_TD):
    x_TD, weight_ED, expert_TK, chosen_TK, score_TE = ctx.saved_tensors
    num_tokens, num_experts = x_TD.shape[0], weight_ED.shape[0]
    if num_tokens == 0:
      return torch.zeros_like(x_TD), torch.zeros_like(weight_ED), None, None
    if dgate_TK is None and dlogit_TE is None:
      return dx_TD, None, None, None
    dgate_TK = torch.zeros_like(chosen_TK) if dgate_TK is None else dgate_TK.contiguous()
    parts = x_TD.new_empty(num_tokens, PARTS * padded(num_experts))
    run = compile_select_backward(num_experts, ctx.spec, dlogit_TE is not None)
    run(chosen_TK, score_TE, expert_TK, dgate_TK, dlogit_TE, parts)
    dx_TD = None if dx_TD is None else dx_TD.contiguous()
    dx = input_grad(parts, weight_ED, dx_TD) if ctx.needs_input_grad[0] else None
    dw = weight_grad(parts, x_TD, num_experts) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None


class _Scores(torch.autograd.Function):
  """_Route's scores as they are; the gradient goes on to the logits. What this keeps lives only
  where score_TE is used.
  """

  @staticmethod
  def forward(ctx, score_TE: Tensor, score: str) -> Tensor:
    ctx.save_for_backward(score_TE)
    ctx.score = score
    return score_TE.view_as(score_TE)

  @staticmethod
  @once_differentiable
  def backward(ctx, dscore_TE: Tensor):
    (score_TE,) = ctx.saved_tensors
    dscore_TE = dscore_TE.contiguous()
    if ctx.score == "sigmoid":
      return torch.ops.aten.sigmoid_backward(dscore_TE, score_TE), None
    return torch.ops.aten._softmax_backward_data(dscore_TE, score_TE, 1, score_TE.dtype), None


def _check(x: Tensor, weight: Tensor, bias: Tensor, spec: RouterSpec) -> None:
  check_device(check_same_device(x, weight, bias))
  num_experts = weight.shape[0]
  check(
    x.dtype == torch.bfloat16 and weight.dtype == bias.dtype == torch.float32,
    f"route: x {x.dtype}, weight {weight.dtype}, bias {bias.dtype}; need bfloat16, float32 twice",
  )
  check(
    x.ndim == 2 and weight.shape == (num_experts, x.shape[1]) and bias.shape == (num_experts,),
    f"route: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
    "need [T, D], [E, D], [E]",
  )
  check(x.shape[1] % 8 == 0, f"route: D {x.shape[1]} must be a multiple of 8")
  room = num_experts // spec.num_groups * spec.topk_groups
  limits = (num_experts <= MAX_EXPERTS, spec.num_groups <= MAX_GROUPS, spec.top_k <= MAX_TOP_K)
  check(
    all(limits) and 0 < spec.top_k <= room and num_experts % spec.num_groups == 0,
    f"route: top {spec.top_k} of {spec.topk_groups} of {spec.num_groups} groups of {num_experts} "
    f"experts; groups must be equal, top_k at most {room}, and there may be {MAX_EXPERTS} experts, "
    f"{MAX_GROUPS} groups and {MAX_TOP_K} choices at most",
  )
  check(
    spec.score in ("sigmoid", "softmax"), f'route: score {spec.score!r}; use "sigmoid" or "softmax"'
  )


def route(x: Tensor, weight: Tensor, bias: Tensor, spec: RouterSpec) -> Routing:
  """See kernels.ops.Ops.route. x bf16 [T, D]; E up to 512, K up to 32, up to 32 groups."""
  _check(x, weight, bias, spec)
  expert_TK, gate_TK, score_TE, count_E, x_TD = _Route.apply(
    x.contiguous(), weight.contiguous(), bias.contiguous(), spec
  )
  return Routing(expert_TK, gate_TK, _Scores.apply(score_TE, spec.score), count_E, x_TD)
