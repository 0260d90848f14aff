"""Reads the plots of a report back: values from pixels."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np


def panels(html: str, name: str) -> list[tuple[str, Element]]:
  """Of each panel of a figure its title and its inside."""
  start = html.index(f'<div class="figure" id="{name}">')
  whole, depth = html[start:], 0
  for tag in re.finditer(r"<(/?)div\b", whole):
    depth += -1 if tag[1] else 1
    if depth == 0:
      break
  found = ElementTree.fromstring(whole[: tag.end()] + ">")
  shown = found.findall("./div[@class='panels']/svg")
  return [(svg.find("./text[@class='title']").text or "", svg.find("svg")) for svg in shown]


def points(plot: Element, line: Element) -> tuple[np.ndarray, np.ndarray]:
  """The values of a line's points."""
  at = np.array([pair.split(",") for pair in line.get("points").split()], float)
  left, right, low, high = map(float, plot.get("data-range").split())
  x = left + at[:, 0] / float(plot.get("width")) * (right - left)
  return x, high - at[:, 1] / float(plot.get("height")) * (high - low)
