"""What tests of the stages share: a browser's page of the usual size, a report that costs nothing,
the records of a lab's attempts.
"""

import pytest
from chrome import chrome

from nmoe.records.attempts import Attempts
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


@pytest.fixture
def records(lab):
  found = Attempts(lab.root)
  yield found
  found.close()
