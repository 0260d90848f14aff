"""For tests of what a browser shows: a page of its own, of the usual size."""

import pytest
from chrome import chrome


@pytest.fixture
def page(browser, tmp_path):
  with chrome(browser, tmp_path / "profile") as page:
    page.size(1280, 1000)
    yield page
