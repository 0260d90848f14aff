"""Quantized copies of weights: made once for each change of a weight, and never of another one."""

import copy
from dataclasses import replace

import pytest
import torch

from kernels.copies import Copies
from kernels.ops import Recipe
from kernels.reference import grouped_mlp, linear, mlp, products, quantize

FP8, NVFP4 = Recipe("fp8", emulate=True), Recipe("nvfp4", emulate=True, seed=11, draw=5)


def get(copies, weight, key="fprop_w"):
  """(the copy's values, whether it was made by this call)."""
  made = []

  def make():
    made.append(True)
    return weight.detach().clone()

  return copies.get(key, weight, make), bool(made)


def weights(*shapes):
  generator = torch.Generator().manual_seed(3)
  return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def add(weight):
  weight.add_(1)


def rows(weight):
  weight.detach()[1:2].copy_(torch.zeros(1, *weight.shape[1:]))


def foreach(weight):
  torch._foreach_copy_([weight.view(-1)[:5]], [torch.zeros(5)])


def raw(weight):
  """What a kernel does that writes through a pointer."""
  weight.detach().numpy()[0] = 7
  torch.autograd.graph.increment_version([weight.detach()])


def set_data(weight):
  weight.data = torch.zeros_like(weight)


@pytest.mark.parametrize("change", [add, rows, foreach, raw, set_data])
def test_a_copy_is_made_anew_after_a_change_and_only_then(change):
  (weight,), copies = weights((4, 6)), Copies()
  assert get(copies, weight)[1]
  assert not get(copies, weight)[1] and not get(copies, weight.detach())[1]
  before = weight.detach().clone()
  with torch.no_grad():
    change(weight)
  assert not torch.equal(weight, before)
  found, made = get(copies, weight)
  assert made and torch.equal(found, weight)
  assert not get(copies, weight)[1]


def test_keys_do_not_share_a_copy():
  (weight,), copies = weights((4, 6)), Copies()
  assert get(copies, weight, "a")[1] and get(copies, weight, "b")[1]
  assert not get(copies, weight, "a")[1]


def test_another_tensor_is_another_weight():
  """Also with the same number of writes, of another shape over the same memory, or a deep copy."""
  (a, b), copies = weights((4, 6), (4, 6)), Copies()
  get(copies, a)
  found, made = get(copies, b)
  assert made and torch.equal(found, b)
  assert get(copies, b.view(6, 4))[1] and get(copies, b.mT)[1]
  get(copies, b)
  other, theirs = copy.deepcopy((b, copies))
  with torch.no_grad():
    other.add_(1)
  found, made = get(theirs, other)
  assert made and torch.equal(found, other)
  assert not get(copies, b)[1]


def test_a_copy_keeps_its_weight_s_address():
  """A tensor that replaces a freed one often gets its memory, and the same number of writes."""
  copies = Copies()
  for seed in range(20):
    weight = torch.full((64, 64), float(seed))
    found, made = get(copies, weight)
    assert made and torch.equal(found, weight)
    del weight, found


def test_copies_written_with_their_weight_are_of_it():
  (a, b), copies = weights((4, 6), (4, 6)), Copies()
  for key, weight in (("a", a), ("a too", a), ("b", b)):
    get(copies, weight, key)
  assert copies.current(a).keys() == {"a", "a too"} and copies.current(b).keys() == {"b"}
  with torch.no_grad():
    a.add_(1)
  assert copies.current(a) == {}
  copies.renew(["a"], a.detach())
  assert copies.current(a).keys() == {"a"} and not get(copies, a, "a")[1]
  assert get(copies, a, "a too")[1]
  assert copies.current(b[:2]) == {}


@pytest.fixture
def quantized(monkeypatch):
  """The shapes that the reference's products quantize, in order."""
  seen = []

  def counted(x, *args, **kwargs):
    seen.append(tuple(x.shape))
    return quantize(x, *args, **kwargs)

  monkeypatch.setattr(products, "quantize", counted)
  return seen


def run(recipe, w13, w2, micro_batches):
  """Results and gradients of the inputs of several micro-batches; the weights' add up."""
  found, offset = [], torch.tensor([0, 40, 40, 65], dtype=torch.int32)
  for x, dy in micro_batches:
    x = x.requires_grad_()
    y = grouped_mlp(x, offset, w13, w2, recipe)
    y.backward(dy)
    found += [y.detach(), x.grad]
    x.grad = None
  return found


def micro_batches():
  generator = torch.Generator().manual_seed(4)
  return [torch.randn(2, 70, 96, generator=generator).unbind() for _ in range(3)]


@pytest.mark.parametrize("recipe", [FP8, NVFP4, replace(FP8, forward_only_bf16=True)])
def test_micro_batches_share_the_copies_and_no_bit_changes(recipe, quantized):
  shapes = (3, 128, 96), (3, 96, 64)
  once, anew = weights(*shapes), weights(*shapes)
  want = run(recipe, *anew, micro_batches())
  assert [quantized.count(s) for s in shapes] == [3 if recipe.forward_only_bf16 else 6] * 2
  quantized.clear()
  recipe = replace(recipe, copies=Copies())
  got = run(recipe, *once, micro_batches())
  assert [quantized.count(s) for s in shapes] == [1 if recipe.forward_only_bf16 else 2] * 2
  got += [w.grad for w in once]
  want += [w.grad for w in anew]
  assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
  assert all(w.grad.any() for w in once)


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_a_changed_weight_multiplies_with_its_new_values(recipe):
  """One of two weights, between micro-batches and between a forward pass and the next."""
  kept = replace(recipe, copies=Copies())
  shapes = (3, 128, 96), (3, 96, 64)
  once, anew = weights(*shapes), weights(*shapes)
  first = [run(r, *w, micro_batches()[:1]) for r, w in ((kept, once), (recipe, anew))]
  for w in (once, anew):
    with torch.no_grad():
      w[1].mul_(-3)
  second = [run(r, *w, micro_batches()[:1]) for r, w in ((kept, once), (recipe, anew))]
  for got, want in (first, second):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
  assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize("recipe", [FP8, NVFP4])
def test_dense_products_share_them_too(recipe, quantized):
  kept = replace(recipe, copies=Copies())
  x = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(5))
  w, w13, w2 = weights((64, 96), (128, 96), (96, 64))
  wanted = linear(x, w, recipe), mlp(x, w13, w2, recipe)
  quantized.clear()
  for _ in range(2):
    assert torch.equal(linear(x, w, replace(recipe, copies=kept.copies)), wanted[0])
  assert quantized.count((1, 64, 96)) == 1
  quantized.clear()
  for _ in range(2):
    assert torch.equal(mlp(x, w13, w2, kept), wanted[1])
  assert quantized.count((1, 128, 96)) == quantized.count((1, 96, 64)) == 1


def test_an_observer_sees_a_weight_in_every_micro_batch():
  seen = []
  recipe = replace(FP8, copies=Copies(), observe=lambda operand: seen.append(operand.leg))
  run(recipe, *weights((3, 128, 96), (3, 96, 64)), micro_batches()[:2])
  assert seen.count("fprop_w") == seen.count("dgrad_w") == 4


def test_formats_do_not_share_a_copy():
  copies = Copies()
  x, (w,) = torch.randn(8, 96), weights((64, 96))
  for recipe in (FP8, NVFP4, FP8):
    got = linear(x, w, replace(recipe, copies=copies))
    assert torch.equal(got, linear(x, w, recipe))
