import pytest
import torch

from kernels.ops import KernelError, Rows
from kernels.reference import adamw, muon
from kernels.reference.newton_schulz import newton_schulz

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def through_svd(g, steps):
  """U p(S) Vᵀ where p iterates the quintic on the singular values, in float64."""
  u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
  s = s / (torch.linalg.vector_norm(g.double(), dim=(-2, -1))[..., None] + 1e-7)
  for _ in range(steps):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (3, 6, 10), (2, 2, 10, 6), (1, 5)])
def test_newton_schulz_acts_on_the_singular_values(shape):
  g = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
  torch.testing.assert_close(newton_schulz(g, 5), through_svd(g, 5), rtol=1e-9, atol=1e-9)
  torch.testing.assert_close(
    newton_schulz(g.float(), 5).double(), through_svd(g, 5), rtol=1e-3, atol=1e-4
  )


def test_newton_schulz_is_nearly_orthogonal_and_keeps_dtype():
  g = torch.randn(16, 64).bfloat16()
  out = newton_schulz(g, 5)
  assert out.dtype == torch.bfloat16
  singular = torch.linalg.svdvals(out.float())
  assert singular.min() > 0.5 and singular.max() < 1.5


def test_newton_schulz_of_zero_is_zero():
  assert not newton_schulz(torch.zeros(4, 6), 5).any()


def state(dtype=torch.float32, moments=torch.float32):
  generator = torch.Generator().manual_seed(5)
  masters = [torch.randn(s, generator=generator) for s in [(5, 7), (11,), (2, 3, 4)]]
  params = masters if dtype == torch.float32 else [m.to(dtype) for m in masters]
  zeros = [[torch.zeros_like(m, dtype=moments) for m in masters] for _ in range(2)]
  return params, masters, *zeros


def gradients(step):
  generator = torch.Generator().manual_seed(100 + step)
  return [torch.randn(s, generator=generator) for s in [(5, 7), (11,), (2, 3, 4)]]


def test_adamw_agrees_with_torch():
  params, masters, m, v = state()
  other = [torch.nn.Parameter(p.double()) for p in masters]
  optimizer = torch.optim.AdamW(other, **SETTINGS)
  for step in range(1, 8):
    grads = gradients(step)
    adamw(params, grads, masters, m, v, step=step, grad_scale=torch.tensor(0.5), **SETTINGS)
    for p, g in zip(other, grads, strict=True):
      p.grad = g.double() * 0.5
    optimizer.step()
  for p, q in zip(params, other, strict=True):
    torch.testing.assert_close(p.double(), q.detach(), rtol=1e-5, atol=1e-6)


def test_adamw_keeps_fp32_masters_of_bf16_parameters():
  params, masters, m, v = state(torch.bfloat16)
  _, expected, m32, v32 = state()
  for step in range(1, 4):
    grads = [g.bfloat16() for g in gradients(step)]
    scale = torch.tensor(1.0)
    adamw(params, grads, masters, m, v, step=step, grad_scale=scale, **SETTINGS)
    wide = [g.float() for g in grads]
    adamw(expected, wide, expected, m32, v32, step=step, grad_scale=scale, **SETTINGS)
  for param, master, reference in zip(params, masters, expected, strict=True):
    assert torch.equal(master, reference) and torch.equal(param, reference.bfloat16())


def test_adamw_with_bf16_moments_stays_close():
  params, masters, m, v = state(moments=torch.bfloat16)
  _, expected, m32, v32 = state()
  start = [p.clone() for p in params]
  for step in range(1, 6):
    scale = torch.tensor(1.0)
    adamw(params, gradients(step), masters, m, v, step=step, grad_scale=scale, **SETTINGS)
    adamw(expected, gradients(step), expected, m32, v32, step=step, grad_scale=scale, **SETTINGS)
  assert m[0].dtype == v[0].dtype == torch.bfloat16
  moved = torch.cat([(a - b).flatten() for a, b in zip(expected, start, strict=True)])
  error = torch.cat([(a - b).flatten() for a, b in zip(expected, params, strict=True)])
  assert error.norm() < 2**-7 * moved.norm()


def test_adamw_changes_nothing_when_the_scale_is_nan():
  params, masters, m, v = state()
  before = [t.clone() for t in (*params, *m, *v)]
  adamw(params, gradients(1), masters, m, v, step=1, grad_scale=torch.tensor(torch.nan), **SETTINGS)
  assert all(torch.equal(a, b) for a, b in zip(before, (*params, *m, *v), strict=True))


def test_adamw_refuses_step_zero_and_uneven_lists():
  params, masters, m, v = state()
  scale = torch.tensor(1.0)
  with pytest.raises(KernelError, match="step 0"):
    adamw(params, gradients(1), masters, m, v, step=0, grad_scale=scale, **SETTINGS)
  with pytest.raises(KernelError, match="different lengths"):
    adamw(params, gradients(1)[:2], masters, m, v, step=1, grad_scale=scale, **SETTINGS)


MUON = {"blocks": (Rows(2, 0, 1), Rows(2, 1, 2)), "sizes": (0.5, 2.0), "steps": 5, "lr": 0.01}
MUON |= {"momentum": 0.9, "weight_decay": 0.1, "experts": True}


def expert_state(dtype=torch.float32, momentum=torch.float32):
  """(params, grads, masters, momenta) of two weights of three experts."""
  generator = torch.Generator().manual_seed(6)
  masters, grads, momenta = (
    [torch.randn(3, 8, 6, generator=generator) for _ in range(2)] for _ in range(3)
  )
  params = masters if dtype == torch.float32 else [m.to(dtype) for m in masters]
  return params, grads, masters, [m.to(momentum) for m in momenta]


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16])
def test_muon_is_its_formula_expert_by_expert(momentum):
  """Through the singular values of every expert's gate and up matrices; one expert has no token."""
  params, grads, masters, momenta = expert_state(torch.bfloat16, momentum)
  grads[1][2] = 0
  old = [[t.clone().double() for t in group] for group in (grads, masters, momenta)]
  muon(params, grads, masters, momenta, grad_scale=torch.tensor(0.5), **MUON)
  for weight, (g, w, m) in enumerate(zip(*old, strict=True)):
    for e in range(3):
      if g[e].any():
        m[e] += 0.1 * (0.5 * g[e] - m[e])
        point = 0.5 * g[e] + 0.9 * (m[e] - 0.5 * g[e])
        for row, size in ((0, 0.5), (1, 2.0)):
          w[e, row::2] = 0.999 * w[e, row::2] - 0.01 * size * through_svd(point[row::2], 5)
    torch.testing.assert_close(masters[weight].double(), w, rtol=1e-5, atol=1e-5)
    rtol = 2**-8 if momentum == torch.bfloat16 else 1e-6
    torch.testing.assert_close(momenta[weight].double(), m, rtol=rtol, atol=1e-6)
    assert torch.equal(params[weight], masters[weight].bfloat16())


def test_muon_changes_nothing_when_the_scale_is_nan():
  state = expert_state()
  before = [t.clone() for group in state for t in group]
  muon(*state, grad_scale=torch.tensor(torch.nan), **MUON)
  after = [t for group in state for t in group]
  assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_muon_refuses_uneven_lists():
  params, grads, masters, momenta = expert_state()
  with pytest.raises(KernelError, match="different lengths"):
    muon(params, grads[:1], masters, momenta, grad_scale=torch.tensor(1.0), **MUON)
