"""The MoE layer beside SonicMoE's (PyPI sonic-moe 0.1.2.post1), which is installed for this alone:
python -m kernels.tools.bench_sonic [--rest MS].

Both layers get the same tokens, weights and output gradients and route them by themselves:
SonicMoE by a bf16 softmax router, ours by an fp32 sigmoid one with a bias. Rows as in
kernels.tools.bench, interleaved with the dense peak; then the bytes that each keeps for backward.

SonicMoE's first call of a shape tries QuACK's tiles, for minutes. Here it tries those that
kernels.cuda.gemms chooses from, of all kinds: whatever won in its own full search (one H100, T
32768, E 64) is among them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial

import torch
from quack import gemm_interface
from quack.gemm_config import GemmConfig
from quack.gemm_runtime import autotune
from sonicmoe.enums import ActivationType
from sonicmoe.functional import moe_TC_softmax_topk_layer
from torch import Tensor

from kernels.cuda.gemms import CHOICES
from kernels.cuda.jit import ARCH
from kernels.tools.bench import arguments, how, report
from kernels.tools.benches.moe import MOES, MoeLayer, kept
from kernels.tools.rates import Case, rows


class Sonic:
  """SonicMoE's layer on a MoeLayer's inputs and weights, with experts as the last dimension."""

  def __init__(self, layer: MoeLayer):
    self.layer = layer
    self.w13, self.w2 = (
      w.detach().permute(1, 2, 0).requires_grad_() for w in (layer.w13, layer.w2)
    )
    self.router = layer.router.detach().bfloat16().requires_grad_()

  def forward(self, i: int) -> Tensor:
    stream = torch.cuda.current_stream().cuda_stream
    weights = (self.router, self.w13, None, self.w2, None)
    top_k, activation = self.layer.moe.top_k, ActivationType.SWIGLU
    return moe_TC_softmax_topk_layer(self.layer.x[i], *weights, top_k, stream, activation)[0]

  def step(self, i: int) -> None:
    self.w13.grad = self.w2.grad = self.router.grad = self.layer.x[i].grad = None
    self.forward(i).backward(self.layer.dy[i])


def tile(config: GemmConfig) -> tuple:
  return config.tile_m, config.tile_n, config.pingpong, config.cluster_m, config.cluster_n


def offer_tiles() -> None:
  """Leave QuACK's search the tiles of kernels.cuda.gemms."""
  known = {tile(choice.config) for kind in CHOICES[ARCH.name].values() for choice in kind}
  offered = autotune.get_all_configs
  autotune.get_all_configs = lambda **how: [c for c in offered(**how) if tile(c) in known]
  tuner = gemm_interface.gemm_tuned
  tuner.configs = [c for c in tuner.configs if tile(c.kwargs["config"]) in known]


def main() -> None:
  timed = how(arguments(__doc__).parse_args())
  offer_tiles()
  for moe in (m for m in MOES if m.skew == 1.0):
    layer = MoeLayer(moe)
    other = Sonic(layer)
    steps = {"nmoe": layer.step, "SonicMoE": other.step}
    cases = [Case(name, step, moe.flops, asdict(moe)) for name, step in steps.items()]
    report(rows(cases, "TFLOP/s", timed))
    layer.clear()
    layers = {"nmoe": layer, "SonicMoE": other}
    found = {f"{name} keeps": kept(partial(one.forward, 0)) for name, one in layers.items()}
    sys.stdout.write(json.dumps(found) + "\n")
    del layer, other, layers, steps, cases
    torch.cuda.empty_cache()


if __name__ == "__main__":
  main()
