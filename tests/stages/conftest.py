"""What tests of the stages share: a browser's page of the usual size, the dashboard of a root that
fills it, a report that costs nothing, the records of a lab's attempts.
"""

import pytest
from chrome import chrome
from dashboard import client_of
from dashboard import make as ablation
from pages import Served, make

from nmoe.records.attempts import Attempts
from stages import runs


@pytest.fixture
def page(browser, tmp_path):
  with chrome(browser, tmp_path / "profile") as page:
    page.size(1280, 1000)
    yield page


@pytest.fixture
def root(tmp_path):
  (tmp_path / "root").mkdir()
  return tmp_path / "root"


@pytest.fixture
def ids(root):
  return ablation(root)


@pytest.fixture
def client(root, ids, tmp_path):
  return client_of(root, tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(root, ids of an ablation by arm and seed): what `pages.make` makes."""
  root = tmp_path_factory.mktemp("viz") / "root"
  return root, make(root)


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
  """Where the dashboard of `made` answers."""
  server = Served(made[0], tmp_path_factory.mktemp("cache"))
  yield server.address
  server.stop()


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
