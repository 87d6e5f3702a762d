"""Who may look: one token, shown as a bearer header, or once in the address of a page and then as a cookie."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "ratchet_admin"
COOKIE_AGE_S = 12 * 3600
API = "/api/"
DENIED = "This page needs a token: open it once with ?token=..., the value of RATCHET_ADMIN_TOKEN.\n"


class Guard:
    """ASGI middleware: nothing passes without the token, and nothing but reading passes at all."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    def cookie(self) -> str:
        """What the browser keeps: it proves that the token was shown and does not hold it."""
        return hmac.new(self._token, b"ratchet admin cookie", hashlib.sha256).hexdigest()

    def _is_token(self, shown: str) -> bool:
        return hmac.compare_digest(shown.encode(), self._token)

    def allows(self, request: Request) -> bool:
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        by_header = scheme.lower() == "bearer" and self._is_token(shown.strip())
        by_cookie = hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self.cookie().encode())
        return by_header or by_cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await (self._answer(request) or self._app)(scope, receive, send)

    def _answer(self, request: Request) -> Response | None:
        """What is said instead of the page; None where the page may be shown."""
        is_api = request.url.path.startswith(API)
        if request.method not in ("GET", "HEAD"):
            return JSONResponse({"error": "everything here is read-only"}, 405, {"Allow": "GET, HEAD"})
        if not is_api and "token" in request.query_params:
            return self._enter(request)
        if self.allows(request):
            return None
        if is_api:
            words = {"error": "send Authorization: Bearer <RATCHET_ADMIN_TOKEN>"}
            return JSONResponse(words, 401, {"WWW-Authenticate": "Bearer"})
        return PlainTextResponse(DENIED, 401)

    def _enter(self, request: Request) -> Response:
        """The token leaves the address bar at once: a cookie takes its place."""
        if not self._is_token(request.query_params["token"]):
            return PlainTextResponse(DENIED, 401)
        rest = urlencode([(k, v) for k, v in request.query_params.multi_items() if k != "token"])
        path = "/" + request.url.path.lstrip("/")  # one slash: never another host's address
        answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        answer.set_cookie(
            COOKIE,
            self.cookie(),
            max_age=COOKIE_AGE_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer
