"""What is read out of NVIDIA's tools and of the compiler's host code."""

import shutil
import struct
from collections import Counter

import pytest

from kernels.ops import KernelError
from kernels.tools import inspect

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/         {         HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8] ;
        /*0030*/         @UP0 UTCOMMA.2CTA.4X gdesc[UR4], gdesc[UR6] ;
        /*0040*/                   STL [R1+0x4], R3 ;
"""
HOST = """
  llvm.func @first(%arg0: !llvm.ptr) {
    %8 = llvm.mlir.constant(7 : i64) : i64
  llvm.func @launch(%arg0: !llvm.ptr) {
    %8 = llvm.mlir.constant(2560 : i64) : i64
    %17 = llvm.getelementptr %11[0, 2] : (!llvm.ptr) -> !llvm.ptr, \
!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>
    llvm.store %8, %17 : i64, !llvm.ptr
    %18 = llvm.getelementptr %11[0, 2] : (!llvm.ptr) -> !llvm.ptr, !llvm.struct<(i32, i64)>
"""


def test_opcodes_of_sass():
  found = [name for _, name in inspect.OPCODE.findall(SASS)]
  assert found == ["LDC", "LDG.E.128", "HGMMA.64x256x16.F32.BF16"[:8], "UTCOMMA.2CTA.4X", "STL"]
  assert [bool(inspect.MMA.match(name)) for name in found] == [False, False, True, True, False]


def test_opcodes_of_several_kernels_in_one_run(monkeypatch):
  """Instructions of 16 bytes; what is disassembled is all code, one after the other."""
  codes, seen = [b"a" * 32, b"", b"b" * 16, b"c" * 32], []

  def run(name, *arguments):
    with open(arguments[-1], "rb") as file:
      seen.append((name, arguments[:-1], file.read()))
    return SASS

  monkeypatch.setattr(inspect, "_run", run)
  found = inspect.opcodes(codes, "sm_90a")
  assert seen == [("nvdisasm", ("-b", "SM90a", "-ndf"), b"".join(codes))]
  assert found == [
    Counter(["LDC", "LDG.E.128"]),
    Counter(),
    Counter(["HGMMA.64"]),
    Counter(["UTCOMMA.2CTA.4X", "STL"]),
  ]
  assert inspect.opcodes([], "sm_90a") == [] and len(seen) == 1


def test_the_code_of_a_cubin():
  """Of an ELF file with sections of data, code, notes marked executable, and more code."""
  body = b"datacodeNOTEmore"
  sections = [(1, 2, 0, 4), (1, 6, 4, 4), (7, 4, 8, 4), (1, 4, 12, 4)]  # type, flags, start, length
  table = [struct.pack("<IIQQQQ24x", 0, k, f, 0, 64 + at, n) for k, f, at, n in sections]
  header = bytearray(64)
  struct.pack_into("<Q", header, 0x28, 64 + len(body))
  struct.pack_into("<HH", header, 0x3A, 64, len(table))
  assert inspect.code(bytes(header) + body + b"".join(table)) == b"codemore"


def test_dynamic_shared_memory_of_the_launch():
  assert inspect.dynamic_shared(HOST) == 2560
  assert inspect.dynamic_shared("llvm.func @none() {") == 0


def test_names_lose_hashes_and_types():
  symbol = "kernel_cutlass_kernel_mGemmMod_act_epi_09a23a1700ff08b2_sm9_object_at__tensor_f32_0"
  assert inspect.short_name(symbol) == "mGemmMod_act_epi_sm9"


def test_usage_line():
  text = " Function kernel_x_0:\n  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:592"
  assert inspect.USAGE.search(text).groups() == ("kernel_x_0", "168", "0", "1024")


def test_a_missing_tool_is_named(monkeypatch):
  monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
  with pytest.raises(KernelError, match="pip install nvidia-cuda-nvdisasm"):
    inspect.tool("nvdisasm")
