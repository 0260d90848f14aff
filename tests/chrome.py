"""Headless Chromium through its DevTools protocol: open, ask, type, wait, take a picture."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from websockets.sync.client import connect

FLAGS = (
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
  "--disable-background-networking --disable-component-update --hide-scrollbars "
  "--remote-debugging-port=0 --disable-dev-shm-usage --js-flags=--expose-gc"
)
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # no name leads off the machine
KEYS = {"Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38}


class Page:
  """One tab. `requests`: every address that it asked for; `errors`: what its console reported."""

  def __init__(self, socket):
    self._socket, self._number = socket, 0
    self.requests: list[str] = []
    self.errors: list[str] = []
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.send(f"{domain}.enable")

  def send(self, method: str, **parameters: object) -> dict:
    """One command, and its answer; events on the way are taken down."""
    self._number += 1
    self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
    while True:
      message = json.loads(self._socket.recv(timeout=60))
      if message.get("id") == self._number:
        assert "error" not in message, message["error"]
        return message["result"]
      self._take_down(message)

  def _take_down(self, message: dict) -> None:
    method, of = message["method"], message["params"]
    if method == "Network.requestWillBeSent":
      self.requests.append(of["request"]["url"])
    elif method == "Runtime.exceptionThrown":
      details = of["exceptionDetails"]
      self.errors.append(details.get("exception", {}).get("description", details["text"]))
    elif method == "Log.entryAdded" and of["entry"]["level"] == "error":
      self.errors.append(f"{of['entry']['text']} {of['entry'].get('url', '')}")

  def size(self, width: int, height: int) -> None:
    self.send(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )

  @contextmanager
  def slow(self, milliseconds: int) -> Iterator[None]:
    """Inside, each request takes so much longer."""
    rest = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
    self.send("Network.emulateNetworkConditions", latency=milliseconds, **rest)
    try:
      yield
    finally:
      self.send("Network.emulateNetworkConditions", latency=0, **rest)

  def open(self, address: str) -> None:
    self.send("Page.navigate", url=address)

  def ask(self, expression: str) -> object:
    """The value of an expression of JavaScript, awaited."""
    answer = self.send(
      "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
    )
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def wait(self, expression: str, seconds: float = 30.0) -> float:
    """Seconds until an expression is true; AssertionError with the page's text if it never is."""
    began = time.monotonic()
    safe = f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"
    while time.monotonic() - began < seconds:
      if self.ask(safe):  # a page on its way in has no body yet
        return time.monotonic() - began
      time.sleep(0.05)
    text = self.ask("document.body?.innerText.slice(0, 2000)")
    raise AssertionError(f"never {expression}; errors {self.errors}; the page:\n{text}")

  def press(self, key: str) -> None:
    named = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
    text = {"text": "\r"} if key == "Enter" else {} if key in KEYS else {"text": key}
    self.send("Input.dispatchKeyEvent", type="keyDown", **named, **text)
    self.send("Input.dispatchKeyEvent", type="keyUp", **named)

  def picture(self, path: Path, whole: bool = False) -> None:
    """A PNG of the window, or of the page to its end."""
    answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chrome(browser: str, profile: Path) -> Iterator[Page]:
  """A browser of its own with an empty page; it ends with the block."""
  command = [browser, *FLAGS.split(), ALONE, f"--user-data-dir={profile}", "about:blank"]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    port = _port(profile)
    with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
      target = next(t for t in json.load(answer) if t["type"] == "page")
    with connect(
      target["webSocketDebuggerUrl"], max_size=None, proxy=None, ping_interval=None
    ) as socket:
      yield Page(socket)
  finally:
    process.terminate()
    process.wait(timeout=20)


def _port(profile: Path) -> int:
  file = profile / "DevToolsActivePort"
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    if file.exists() and (lines := file.read_text().splitlines()):
      return int(lines[0])
    time.sleep(0.05)
  raise AssertionError("Chromium did not start")
