"""What all tests share.

Property tests have no deadline, since the machine may be busy. Tests marked `browser` need
Chromium or Chrome; without one they are deselected and counted.
"""

import shutil

import pytest
from hypothesis import settings

settings.register_profile("nmoe", deadline=None)
settings.load_profile("nmoe")

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


def pytest_report_header():
  return f"browser: {BROWSER or 'none of ' + ', '.join(NAMES) + '; its tests are deselected'}"


def pytest_collection_modifyitems(config, items):
  out = [item for item in items if item.get_closest_marker("browser") and BROWSER is None]
  if out:
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture
def browser():
  return BROWSER
