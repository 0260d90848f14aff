"""What every request passes: the host that it names, the token, the method; headers on the answer.

A page of the web can make a browser send requests here. It cannot name our host (a name that it
had resolve to 127.0.0.1 is its own, RFC 9110 section 7.4: 421), and where other machines can reach
us it has no cookie.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "nmoe_viz"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
  "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
  "form-action 'none'; frame-ancestors 'self'"
)


def new_token(host: str) -> str:
  """128 random bits where other machines can reach `host`, else ""."""
  return "" if host in LOOPBACK else secrets.token_hex(16)


class Guard:
  """ASGI middleware. `host` is what the server listens on; token "": none is asked for."""

  def __init__(self, app: ASGIApp, host: str, token: str):
    self.app, self.token = app, token
    self.exposed = host not in LOOPBACK
    self.names = {*LOOPBACK, host}
    if self.exposed:
      self.names |= {socket.gethostname(), socket.getfqdn()}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    refusal = self._refusal(scope)
    return await (refusal or self.app)(scope, receive, _with_headers(send))

  def _refusal(self, scope: Scope) -> PlainTextResponse | RedirectResponse | None:
    headers = Headers(scope=scope)
    name = _host(headers.get("host", ""))
    if name not in self.names and not (self.exposed and _is_address(name)):
      text = f"this server is not {name!r}: open it as 127.0.0.1, or start it with --host {name}"
      return PlainTextResponse(text, 421)
    if scope["method"] not in ("GET", "HEAD"):
      return PlainTextResponse("read only: GET", 405)
    if not self.token:
      return None
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    if self._same(dict(query).get("token", "")):
      rest = urlencode([pair for pair in query if pair[0] != "token"])
      entered = RedirectResponse(scope["path"] + ("?" + rest if rest else ""), 303)
      entered.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
      return entered
    if self._same(cookie_parser(headers.get("cookie", "")).get(COOKIE, "")):
      return None
    return PlainTextResponse("open the address with ?token= that `nmoe viz` printed", 403)

  def _same(self, token: str) -> bool:
    return secrets.compare_digest(token.encode(), self.token.encode())


def _with_headers(send: Send) -> Send:
  async def sending(message: Message) -> None:
    if message["type"] == "http.response.start":
      headers = MutableHeaders(scope=message)
      headers.setdefault("content-security-policy", POLICY)
      headers.setdefault("cache-control", "no-store")
      headers["x-content-type-options"] = "nosniff"
      headers["referrer-policy"] = "no-referrer"
    await send(message)

  return sending


def _host(header: str) -> str:
  """The name of a Host header, without its port and an IPv6 address's brackets."""
  name = header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header
  return name.strip("[]").lower()


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True
