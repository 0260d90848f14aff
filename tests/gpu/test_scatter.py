import pytest
import torch

from gpu.oracle import normal
from kernels.cuda import gemms, scatter
from kernels.ops import KernelError

pytestmark = pytest.mark.gpu
COUNTS = [200, 0, 37, 300, 1, 0]


def offsets(counts):
  return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32).cuda()


def case(counts, inner, outer, transposed):
  """a with 9 rows that no expert owns, w, offsets, where each row goes (-1: nowhere)."""
  torch.manual_seed(0)
  num_rows = sum(counts) + 9
  a = normal(num_rows, inner, grad=False)
  w = normal(len(counts), inner, outer, grad=False)
  w = w.mT if transposed else w.mT.contiguous()
  place = torch.randperm(2 * num_rows, device="cuda")[:num_rows]
  place[torch.rand(num_rows, device="cuda") < 0.2] = -1
  return a, w, offsets(counts), place


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
  "counts, inner, outer",
  [(COUNTS, 96, 200), (COUNTS, 64, 8), ([3000, 0, 1, 5000], 1408, 2048), ([0, 0, 0], 64, 64)],
)
def test_rows_arrive_at_their_addresses_bit_for_bit(counts, inner, outer, transposed):
  a, w, offset, place = case(counts, inner, outer, transposed)
  found = torch.full((2 * len(a), outer), float("nan"), device="cuda", dtype=torch.bfloat16)
  wanted, filled = found.clone(), sum(counts)
  address = torch.where(place < 0, 0, found.data_ptr() + place * outer * 2)
  address[filled:] = -1  # of rows that no expert owns: never read
  kept = place[:filled] >= 0
  wanted[place[:filled][kept]] = gemms.rows(a, w, offset)[:filled][kept]
  scatter.rows(a, w, offset, address)
  assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_rows_repeat_their_bits():
  a, w, offset, place = case([700, 0, 3000], 512, 1024, False)
  found = []
  for _ in range(2):
    out = torch.zeros(2 * len(a), 1024, device="cuda", dtype=torch.bfloat16)
    scatter.rows(a, w, offset, torch.where(place < 0, 0, out.data_ptr() + place * 2048))
    found.append(out)
  assert torch.equal(*found)


@pytest.mark.parametrize("gates", [False, True])
def test_addresses_are_those_of_the_origins(gates):
  ranks, items, row_bytes = 3, 50, 4096
  back = [torch.zeros(items, row_bytes, dtype=torch.uint8, device="cuda") for _ in range(ranks)]
  back_gate = [torch.full((items,), -1.0, device="cuda") for _ in range(ranks)]
  tables = [torch.tensor([t.data_ptr() for t in part]).cuda() for part in (back, back_gate)]
  origin = torch.randperm(ranks * items, device="cuda").int()[:120]
  origin[::7] = -1
  gate = torch.rand(len(origin), device="cuda") if gates else None
  found = torch.empty(len(origin), dtype=torch.int64, device="cuda")
  scatter.addresses(origin, *tables, gate, items, row_bytes, found)
  address = found.tolist()
  want = [torch.full((items,), -1.0) for _ in range(ranks)]
  for row, place in enumerate(origin.tolist()):
    source, item = divmod(place, items)
    assert address[row] == (0 if place < 0 else back[source].data_ptr() + item * row_bytes)
    if gates and place >= 0:
      want[source][item] = gate[row]
  assert all(torch.equal(a.cpu(), b) for a, b in zip(back_gate, want, strict=True))


def test_no_rows_store_nothing():
  w, none = normal(2, 64, 32, grad=False), torch.empty(0, dtype=torch.int64, device="cuda")
  scatter.rows(normal(0, 32, grad=False), w, offsets([0, 0]), none)


def test_errors_name_what_is_wrong():
  w, address = normal(2, 64, 32, grad=False), torch.zeros(5, dtype=torch.int64, device="cuda")
  with pytest.raises(KernelError, match=r"int64 \(4,\)"):
    scatter.rows(normal(4, 32, grad=False), w, offsets([4, 0]), address)
  with pytest.raises(KernelError, match="rows of 60"):
    scatter.rows(normal(5, 32, grad=False), w[:, :60], offsets([4, 0]), address)
