"""Numbers of things in a message."""

import pytest

from nmoe.wording import counted


@pytest.mark.parametrize(
  ("number", "said"),
  [(0, "0 ranks"), (1, "1 rank"), (2, "2 ranks"), (4096, "4,096 ranks"), (1.0, "1 rank")]
  + [(0.5, "0.5 ranks"), (1.25, "1.25 ranks")],
)
def test_one_is_singular(number, said):
  assert counted(number, "rank") == said
