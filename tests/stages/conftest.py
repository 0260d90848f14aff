"""For tests of what a browser shows a page of its own, of the usual size; for others no report."""

import pytest
from chrome import chrome

from stages import runs


@pytest.fixture
def page(browser, tmp_path):
  with chrome(browser, tmp_path / "profile") as page:
    page.size(1280, 1000)
    yield page


@pytest.fixture
def no_page(lab, monkeypatch):
  """A report that costs nothing."""
  page = lab.root / "reports" / "index.html"
  monkeypatch.setattr(runs, "write_report", lambda root, experiment: page)
