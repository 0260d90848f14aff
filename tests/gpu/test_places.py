import pytest
import torch

from kernels.cuda.places import places
from kernels.ops import KernelError
from kernels.places import places as definition

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize(("ranks", "experts"), [(1, 1), (2, 64), (4, 256), (8, 64), (3, 999)])
def test_places_are_the_definition(ranks: int, experts: int, alignment: int) -> None:
  generator = torch.Generator("cuda").manual_seed(0)
  host = torch.zeros(1, dtype=torch.int64, pin_memory=True)
  full = torch.tensor([host.data_ptr()]).cuda()
  for most in (1, 2, 5000):  # none at all, few, many
    count_RE = torch.randint(
      most, (ranks, experts), generator=generator, device="cuda", dtype=torch.int32
    )
    for capacity in (most_rows := int(definition(count_RE, alignment).end_R.max()), most_rows - 1):
      host.zero_()
      copy, found = places(count_RE, alignment, capacity, full)
      torch.cuda.synchronize()
      assert int(host) == int(most_rows > capacity)
    assert torch.equal(copy, count_RE.long())
    assert all(
      torch.equal(a, b) for a, b in zip(found, definition(count_RE, alignment), strict=True)
    )


def test_ranks_that_do_not_divide_the_experts() -> None:
  with pytest.raises(KernelError, match="65 experts cannot lie on 2 ranks"):
    full = torch.zeros(1, dtype=torch.int64, device="cuda")
    places(torch.zeros(2, 65, dtype=torch.int32, device="cuda"), 1, 1, full)
