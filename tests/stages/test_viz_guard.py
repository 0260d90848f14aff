"""The dashboard's server: whom it answers, whom it refuses, and what its files are."""

import hashlib
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import resources
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from dashboard import client_of

from nmoe.errors import RunError
from nmoe.records.live import Live
from nmoe.records.root import Root
from stages.viz.guard import COOKIE
from stages.viz.server import PAGES, listening, serve

TOKEN = "0123456789abcdef0123456789abcdef"
TEXT = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
VENDORED = {  # uPlot 1.6.32 (MIT); htm 3.1.1 with Preact inside (Apache-2.0, MIT), as published
  "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
  "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
  "preact-htm.js": "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7",
}


def test_the_report_is_served_in_a_sandbox_and_not_through_a_link(client, root):
  folder = Root(root).report("topk-1")
  folder.mkdir(parents=True)
  (folder / "index.html").write_text("<title>the report</title>")
  answer = client.get("/report/topk-1")
  policy = answer.headers["content-security-policy"]
  assert "the report" in answer.text and policy.startswith("sandbox allow-scripts;")
  assert client.get("/api/experiment/topk-1").json()["report"] is True
  (folder / "index.html").unlink()
  (root.parent / "secret.html").write_text("secret")
  (folder / "index.html").symlink_to(root.parent / "secret.html")
  assert client.get("/report/topk-1").status_code == 404


@pytest.mark.parametrize(
  "path",
  [
    "/api/run/..%2f..%2fetc%2fpasswd",
    "/api/run/../../etc/passwd",
    "/api/run/nothing",
    "/report/..%2f..",
    "/static/..%2fserver.py",
    "/static/server.py",
    "/static/%2e%2e/server.py",
    "/api/experiment/topk",
    "/api/series?tag=x",
    "/api/series?run=..&tag=x",
    "/api/experts?run=.",
    "/etc/passwd",
  ],
)
def test_no_request_leads_to_a_path(client, path):
  assert client.get(path).status_code == 404


@pytest.mark.parametrize("query", ["px=0", "px=1e9", "px=-1", "px=٣", "x=speed", "from=a"])
def test_wrong_numbers_are_refused(client, ids, query):
  path = f"/api/series?run={ids['baseline', 0]}&tag=val/bpb&{query}"
  answer = client.get(path)
  assert answer.status_code == 400 and "must be" in answer.text


def test_only_its_own_name_is_answered(client):
  for host in ("127.0.0.1:8790", "localhost:8790", "[::1]:8790", "localhost"):
    assert client.get("/api/runs", headers={"host": host}).status_code == 200, host
  for host in ("evil.example:8790", "127.0.0.1.evil.example", "", "10.0.0.1:8790"):
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 421 and "topk" not in answer.text, host
  assert client.post("/api/runs").status_code == 405


def test_where_others_can_reach_it_a_token_is_asked_for(root, ids, tmp_path):
  client = client_of(root, tmp_path, host="0.0.0.0", token=TOKEN, base="http://10.0.0.7:8790")
  for path in (*PAGES, "/api/runs", "/static/index.html", "/api/runs?token=wrong"):
    assert client.get(path).status_code == 403, path
  entered = client.get(f"/compare?a=1&token={TOKEN}&b=2")
  assert (entered.status_code, entered.headers["location"]) == (303, "/compare?a=1&b=2")
  cookie = entered.headers["set-cookie"]
  assert cookie.startswith(f"{COOKIE}={TOKEN};")
  assert "HttpOnly" in cookie and "SameSite=strict" in cookie
  assert client.get("/api/runs").status_code == 200, "the cookie lets in"
  assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 421


def test_an_address_is_announced_once_it_is_one(root, tmp_path):
  """A port that is taken and a host of another machine are refused in words, before that."""
  told = []
  with listening("127.0.0.1", 0) as other:
    port = other.getsockname()[1]
    with pytest.raises(RunError, match=f"127.0.0.1 port {port}: .*in use; choose another --port"):
      serve(Live(root, tmp_path / "cache"), "127.0.0.1", port, told.append)
  with pytest.raises(RunError, match="cannot listen on 203.0.113.7 port 8790"):
    serve(Live(root, tmp_path / "cache"), "203.0.113.7", 8790, told.append)
  assert told == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_end_of_the_server_is_quiet_though_a_page_is_open(root, ids, tmp_path, number, code):
  """Ctrl-C, or SIGTERM, while a browser holds a stream: no word, and the streams end."""
  command = [sys.executable, "-m", "stages.cli", "viz", "--root", root, "--cache", tmp_path / "c"]
  with listening("127.0.0.1", 0) as other:
    port = other.getsockname()[1]
  server = subprocess.Popen([*command, "--port", str(port)], **TEXT)
  assert server.stdout.readline() == f"http://127.0.0.1:{port}/\n"
  for _ in range(100):
    with suppress(URLError):
      stream = urlopen(f"http://127.0.0.1:{port}/api/events", timeout=20)
      break
    time.sleep(0.1)
  assert stream.readline().startswith(b"data: ")
  server.send_signal(number)
  _, error = server.communicate(timeout=20)
  assert (server.returncode, error) == (code, "") and stream.read() == b"\n"


def test_every_answer_carries_its_headers(client):
  for path in ("/", "/api/runs", "/static/index.html", "/nothing"):
    headers = client.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'self';"), path
    assert headers["x-content-type-options"] == "nosniff"


def test_vendored_files_are_as_published_and_have_their_licences():
  folder = resources.files("stages.viz")
  for name, digest in VENDORED.items():
    assert hashlib.sha256((folder / "static" / name).read_bytes()).hexdigest() == digest, name
  texts = {path.name: path.read_text() for path in (folder / "licenses").iterdir()}
  assert texts.keys() == {"uPlot", "htm", "preact"}
  assert "MIT License" in texts["uPlot"] and "Apache License" in texts["htm"]
  assert "Jason Miller" in texts["preact"]


def test_pages_load_nothing_from_elsewhere():
  for path in (resources.files("stages.viz") / "static").iterdir():
    if path.name not in VENDORED:
      text = path.read_text().replace("http://www.w3.org/2000/svg", "")
      assert "http:" not in text and "https:" not in text, path.name
