"""`nmoe viz`: the routes, and the server that answers them.

Only GET. A request names runs and experiments by ids that the records hold, and files by names that
this module lists; no path is made of what a request says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import resources
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server, gethostname
from socket import socket as Socket

import numpy as np
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
  HTMLResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from nmoe.errors import NmoeError, RunError
from nmoe.records.live import Live, Logged
from nmoe.records.metrics import COUNT
from nmoe.records.reader import Experiment, Run
from nmoe.records.snapshot import Snapshot
from stages.interrupts import Terminated
from stages.viz import answers, flips, ranks, sweeps
from stages.viz.columns import Panel, framed, pack
from stages.viz.guard import LOOPBACK, Guard, new_token

TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
PAGES = (
  "/",
  "/run/{id}",
  "/run/{id}/router",
  "/run/{id}/ranks",
  "/compare",
  "/experiments",
  "/experiment/{id}",
  "/sweep/{id}",
  "/prod/{id}",
)
REPORT_POLICY = (  # a report is one file with its scripts inside, and loads nothing
  "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
  "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)
MAX_RUNS, MAX_TAGS, MAX_PIXELS = 400, 400, 4000
X = ("step", "tokens", "time")


class Server:
  """The routes of one root. `every_s`: seconds between two looks at its files; `ended`: whether
  who serves them is about to end, and open streams with it.
  """

  def __init__(self, live: Live, every_s: float = 1.0, ended: Callable[[], bool] = lambda: False):
    self.live, self.every_s, self.ended = live, every_s, ended
    self.static = _static()

  def app(self, host: str = LOOPBACK[0], token: str = "") -> Starlette:
    """The ASGI application behind its guard."""
    json_routes = {
      "/api/runs": lambda seen, request: answers.runs(self.live),
      "/api/run/{id}": lambda seen, request: answers.run(self.live, seen, _run(seen, request)),
      "/api/compare": self._compare,
      "/api/troubles": self._troubles,
      "/api/tags": self._tags,
      "/api/flips": self._flips,
      "/api/sweep/{id}": lambda seen, request: sweeps.sweep(
        seen, _experiment(seen, request), dict(request.query_params)
      ),
      "/api/experiment/{id}": lambda seen, request: answers.experiment(
        self.live, seen, _experiment(seen, request)
      ),
      "/api/prod/{id}": lambda seen, request: answers.production(
        self.live, seen, _run(seen, request)
      ),
    }
    routes = [Route(path, self._page) for path in PAGES]
    routes += [Route(path, self._json(answer)) for path, answer in json_routes.items()]
    routes += [
      Route("/api/series", self._threaded(self._series)),
      Route("/api/experts", self._threaded(self._experts)),
      Route("/api/ranks", self._threaded(self._ranks)),
      Route("/api/events", self._events),
      Route("/report/{id}", self._threaded(self._report)),
      Route("/static/{name}", self._file),
    ]
    guard = Middleware(Guard, host=host, token=token)
    handlers = {NmoeError: _refused, 404: self._missing}
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)

  async def _page(self, request: Request) -> Response:
    return self._named("index.html")

  async def _missing(self, request: Request, error: HTTPException) -> Response:
    """In words: those of the pages where no page, answer or file was asked for by name."""
    if request.url.path.startswith(("/api/", "/static/", "/report/")):
      return PlainTextResponse(error.detail, 404)
    return HTMLResponse(self.static["index.html"], 404)

  async def _file(self, request: Request) -> Response:
    return self._named(request.path_params["name"])

  def _named(self, name: str) -> Response:
    if name not in self.static:
      raise HTTPException(404, f"no file {name!r}")
    headers = {"cache-control": "no-cache"}
    return Response(self.static[name], media_type=TYPES[Path(name).suffix], headers=headers)

  def _json(self, answer: Callable[[Snapshot, Request], object]) -> Callable:
    def respond(request: Request) -> Response:
      return JSONResponse(answer(self.live.snapshot(), request))

    return self._threaded(respond)

  def _threaded(self, answer: Callable[[Request], Response]) -> Callable:
    async def endpoint(request: Request) -> Response:
      return await to_thread.run_sync(answer, request)

    return endpoint

  def _compare(self, seen: Snapshot, request: Request) -> object:
    a, b = (_runs(seen, request.query_params.get(side, "").split(",")) for side in "ab")
    return answers.compare(self.live, a, b)

  def _flips(self, seen: Snapshot, request: Request) -> object:
    a, b = (_runs(seen, request.query_params.get(side, "").split(",")) for side in "ab")
    return flips.flips(self.live, answers.pairs_of(a, b))

  def _troubles(self, seen: Snapshot, request: Request) -> object:
    """Run -> why it shows no curve, or not all; of the runs that are named and have trouble."""
    runs = _runs(seen, request.query_params.getlist("run"))
    return {run.id: why for run in runs if (why := self.live.trouble(run))}

  def _tags(self, seen: Snapshot, request: Request) -> object:
    """Every tag that one of the named runs logged, in order of name."""
    runs = _runs(seen, request.query_params.getlist("run"))
    return {"tags": sorted(set().union(*(self.live.file(run.id).tags() for run in runs)))}

  def _series(self, request: Request) -> Response:
    """run, tag: each as often as wanted; x: of X; px: width; from, to: of x; apart: a panel a run,
    not all runs of a tag on one x.
    """
    query = request.query_params
    runs = _runs(self.live.snapshot(), query.getlist("run"))
    tags = query.getlist("tag")[:MAX_TAGS]
    pixels = _number(query.get("px", "600"), 1, MAX_PIXELS)
    kind = query.get("x", "tokens")
    if kind not in X:
      raise HTTPException(400, f"x={kind!r} must be one of {', '.join(X)}")
    ends = [_float(query.get(end)) for end in ("from", "to")]
    logged = {run.id: self.live.file(run.id).read(tags) for run in runs}
    parts = [{key: rows} for key, rows in logged.items()] if query.get("apart") else [logged]
    panels = [_panel(tag, part, kind, ends) for part in parts for tag in tags]
    return Response(pack(panels, pixels), media_type="application/octet-stream")

  def _experts(self, request: Request) -> Response:
    """A map of the experts of one MoE layer: header {n, experts}, steps float64 [n], values float32
    [n, experts]; of: tokens ("count"), "bias", and what else was logged.
    """
    (run,) = _runs(self.live.snapshot(), [request.query_params.get("run", "")])
    layer = _number(request.query_params.get("layer", "0"), 0, 1 << 20)
    pixels = _number(request.query_params.get("px", "600"), 1, MAX_PIXELS)
    found = self.live.file(run.id).experts(layer, request.query_params.get("of", COUNT), pixels)
    if found is None:
      return Response(framed({"n": 0, "experts": 0}, []), media_type="application/octet-stream")
    steps, values = found
    columns = [steps.astype("<f8").tobytes(), values.astype("<f4").tobytes()]
    body = framed({"n": len(steps), "experts": values.shape[1]}, columns)
    return Response(body, media_type="application/octet-stream")

  def _ranks(self, request: Request) -> Response:
    """What all ranks of a run told the first; see stages.viz.ranks."""
    (run,) = _runs(self.live.snapshot(), [request.query_params.get("run", "")])
    pixels = _number(request.query_params.get("px", "300"), 1, MAX_PIXELS)
    found = self.live.file(run.id).of_ranks(pixels)
    body = ranks.answer(found, answers.expert_share(run.toml))
    return Response(body, media_type="application/octet-stream")

  async def _events(self, request: Request) -> Response:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(self._changes(), media_type="text/event-stream", headers=headers)

  async def _changes(self) -> AsyncIterator[str]:
    """One line whenever the records or the metrics of runs changed: the ids of those runs."""
    known: dict[str, int] = {}
    seen: Snapshot | None = None
    beats = 0
    while not self.ended():
      now = await to_thread.run_sync(self.live.snapshot)
      ids = {run.id for run in now.runs}
      stamps = await to_thread.run_sync(self.live.stamps, ids)
      changed = [run_id for run_id, stamp in stamps.items() if known.get(run_id) != stamp]
      changed += self.live.locked() if beats % 5 == 4 else []
      if seen is None or now is not seen or changed:
        event = {"records": now is not seen, "runs": [] if seen is None else changed}
        yield f"data: {json.dumps(event)}\n\n"
      elif beats % 15 == 14:
        yield ": alive\n\n"
      beats += 1
      seen, known = now, stamps
      await asyncio.sleep(self.every_s)

  def _report(self, request: Request) -> Response:
    e = _experiment(self.live.snapshot(), request)
    path = self.live.paths.report(e.id) / "index.html"
    if not path.is_file() or not path.resolve().is_relative_to(self.live.root):
      raise HTTPException(404, f"no report of {e.id}: `nmoe report {e.id}` writes it")
    headers = {"content-security-policy": REPORT_POLICY}
    return HTMLResponse(path.read_bytes(), headers=headers)


def serve(live: Live, host: str, port: int, announce: Callable[[str], None]) -> None:
  """Answer until Ctrl-C, which is its end as it should be. `announce` gets the address to open,
  once there is one. RunError if there can be none.
  """
  token = new_token(host)
  with listening(host, port) as socket:
    name = gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    announce(f"http://{name}:{port}/{f'?token={token}' if token else ''}")
    server = Server(live, ended=lambda: web.should_exit)
    settings = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 3}
    web = uvicorn.Server(uvicorn.Config(server.app(host, token), **settings))
    try:
      web.run(sockets=[socket])
    except Terminated:
      raise
    except KeyboardInterrupt:
      pass


def listening(host: str, port: int) -> Socket:
  """RunError where another process listens, or the host is none of this machine."""
  try:
    return create_server((host, port), family=AF_INET6 if ":" in host else AF_INET)
  except OSError as error:
    why = str(error.strerror).partition(" (while")[0]
    raise RunError(
      f"cannot listen on {host} port {port}: {why}; choose another --port, or a --host "
      "that is an address of this machine"
    ) from error


async def _refused(request: Request, error: NmoeError) -> Response:
  """A file of the root that cannot be read, in words."""
  return PlainTextResponse(str(error), 503)


def _static() -> dict[str, bytes]:
  """Name -> bytes of the files of the pages."""
  folder = resources.files("stages.viz") / "static"
  files = (path for path in folder.iterdir() if Path(path.name).suffix in TYPES)
  return {path.name: path.read_bytes() for path in files}


def _panel(
  tag: str,
  logged: dict[str, dict[str, Logged]],
  kind: str,
  ends: Sequence[float | None],
) -> Panel:
  """A tag of every run that has it."""
  names, curves = [], []
  for run_id, rows in logged.items():
    if tag in rows:
      x = _x(rows[tag], kind)
      within = (x >= (ends[0] or -np.inf)) & (x <= (np.inf if ends[1] is None else ends[1]))
      names.append({"run": run_id})
      curves.append((x[within], rows[tag].value[within]))
  return Panel(tag, names, curves)


def _x(rows: Logged, kind: str) -> np.ndarray:
  if kind == "time":
    return rows.time - rows.time[0]
  return (rows.step if kind == "step" else rows.tokens).astype(float)


def _run(seen: Snapshot, request: Request) -> Run:
  return _runs(seen, [request.path_params["id"]])[0]


def _runs(seen: Snapshot, ids: Sequence[str]) -> list[Run]:
  by_id = {run.id: run for run in reversed(seen.runs)}
  unknown = [run_id for run_id in ids if run_id not in by_id]
  if unknown or not ids:
    raise HTTPException(404, f"no run {unknown[0]!r}" if unknown else "name a run")
  if len(ids) > MAX_RUNS:
    raise HTTPException(400, f"{len(ids)} runs: at most {MAX_RUNS} in one request")
  return [by_id[run_id] for run_id in dict.fromkeys(ids)]


def _experiment(seen: Snapshot, request: Request) -> Experiment:
  found = seen.experiment(request.path_params["id"])
  if found is None:
    raise HTTPException(404, f"no experiment {request.path_params['id']!r}")
  return found


def _number(text: str, low: int, high: int) -> int:
  if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
    raise HTTPException(400, f"{text!r} must be a whole number from {low} to {high}")
  return int(text)


def _float(text: str | None) -> float | None:
  try:
    return None if text is None else float(text)
  except ValueError:
    raise HTTPException(400, f"{text!r} must be a number") from None
