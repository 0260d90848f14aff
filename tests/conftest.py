"""For all tests: hypothesis without a deadline, since cores are shared; the browser, if any.

Tests marked `browser` need Chromium or Chrome; without one they are deselected and counted.
"""

import shutil

import pytest
from hypothesis import settings

settings.register_profile("nmoe", deadline=None)
settings.load_profile("nmoe")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def pytest_report_header():
  return f"browser: {BROWSER or 'none of ' + ', '.join(BROWSERS) + '; its tests are deselected'}"


def pytest_collection_modifyitems(config, items):
  out = [item for item in items if item.get_closest_marker("browser") and BROWSER is None]
  if out:
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture
def browser():
  return BROWSER
