"""A profile's parts, against a line drawn by hand and against a count of its moments."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.proofs.timeline import (
  IDLE,
  OTHER,
  PARTS,
  divided,
  kernel_name,
  length,
  part_of,
  timeline,
)

GEMM = "kernel_cutlass_kernel_quackgemm_default_epiGemmDefaultSm90_object_at__tensor"
SEND = "kernel_cutlass_kernel_kernelscudaexchangeSend_object_at__tensor"
WAIT = "kernel_cutlass_kernel_kernelscudasignalsWait_object_at__tensor"
NAMES = {
  GEMM: "products",
  "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
  "kernel_cutlass_kernel_quackgemm_symmetricGemmSymmetricSm90_object_at_": "products",
  "kernel_cutlass_kernel_quackepiloguefrontendGemmMod_scatter_epilogue__none_sm9": "products",
  "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_": "attention",
  "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage)": "collectives",
  WAIT: "waits for peers",
  SEND: OTHER,
  "kernel_cutlass_kernel_kernelscudacombineCombineForward_object_at_": OTHER,
  "void at::native::vectorized_elementwise_kernel<4>": OTHER,
  "Memcpy DtoD (Device -> Device)": OTHER,
}


def event(name: str, begin: float, end: float, kind: str = "kernel") -> dict:
  return {"cat": kind, "name": name, "ts": 1e6 + begin, "dur": end - begin}


def test_kernels_belong_to_parts():
  assert {name: part_of(name) for name in NAMES} == NAMES


def test_a_line_drawn_by_hand(tmp_path):
  """Two steps of 10 ms: a send half under a product, a collective that sticks out, a wait, gaps."""
  one = [
    event(GEMM, 0, 4000),
    event(SEND, 3000, 5000),
    event("flash_attn", 5000, 6000),
    event("ncclDevKernel_AllGather", 5500, 6500),
    event(WAIT, 6200, 8000),
    event("Memcpy DtoD", 9000, 10000, "gpu_memcpy"),
    event("cudaEventSynchronize", 100, 200, "cuda_runtime"),
    event("cudaLaunchKernel", 300, 310, "cuda_runtime"),
    event("aten::mm", 0, 20000, "cpu_op"),
  ]
  two = [e | {"ts": e["ts"] + 10000} for e in one]
  steps = [event(f"ProfilerStep#{n}", 0, 100, "user_annotation") for n in (12, 13)]
  (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [*two, *steps, *one, {}]}))
  found = timeline(tmp_path / "trace.json")
  assert found.ms == pytest.approx(10)
  assert found.parts == pytest.approx(
    {
      "products": 4,
      "attention": 1,
      OTHER: 2,
      "collectives": 0.5,
      "waits for peers": 1.5,
      IDLE: 1,
    }
  )
  assert list(found.parts) == [*PARTS, IDLE]
  assert found.exposed == pytest.approx({SEND: 1, "Memcpy DtoD": 1})
  assert found.kernels == 6 and found.host_waits == 1


@pytest.mark.parametrize(
  ("kernel", "name"),
  [  # as a profile of H200s had them, cut where a line is full
    (
      "kernel_cutlass_kernel_kernelscudaexchangeSend_object_at__tensorptrbf16",
      "kernelscudaexchangeSend",
    ),
    (
      "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::"
      "addcmul_cuda_kernel(at::TensorIteratorBase&, c10::Scalar const&)::{lambda()#2}>",
      "elementwise_kernel (addcmul_cuda_kernel)",
    ),
    (
      "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>"
      ", std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>)",
      "vectorized_elementwise_kernel (CUDAFunctor_add)",
    ),
    (
      "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, at::native::"
      "func_wrapper_t<float, at::native::sum_functor<float, float, float>::operator()(at::Tensor"
      "Iterator&)",
      "reduce_kernel (sum_functor)",
    ),
    ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
  ],
  ids=["ours", "torch", "functor", "reduction", "copy"],
)
def test_a_kernel_s_name_fits_a_line(kernel, name):
  assert kernel_name(kernel) == name


def test_a_profile_without_a_gpu_is_none():
  assert (
    divided([event("aten::mm", 0, 5, "cpu_op"), event("ProfilerStep#1", 0, 9, "user_annotation")])
    is None
  )


@given(st.lists(st.tuples(st.sampled_from(list(NAMES)), st.integers(0, 60), st.integers(0, 20))))
def test_parts_are_a_count_of_moments(drawn):
  """Each whole microsecond goes to the first part at work in it, and all add up."""
  events = [event(name, begin, begin + dur) for name, begin, dur in drawn]
  found = divided([*events, event("ProfilerStep#1", 0, 9, "user_annotation")])
  if not drawn:
    assert found is None
    return
  begin, end = min(b for _, b, _ in drawn), max(b + d for _, b, d in drawn)
  counts = dict.fromkeys([*PARTS, IDLE], 0)
  for moment in range(begin, end):
    at_work = {part_of(name) for name, b, d in drawn if b <= moment < b + d}
    counts[next((part for part in PARTS if part in at_work), IDLE)] += 1
  assert {part: ms * 1e3 for part, ms in found.parts.items()} == pytest.approx(counts)
  assert sum(found.parts.values()) == pytest.approx(found.ms)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20))
def test_the_length_of_a_union(drawn):
  covered = np.zeros(60, bool)
  for begin, size in drawn:
    covered[begin : begin + size] = True
  assert length([(begin, begin + size) for begin, size in drawn]) == covered.sum()
