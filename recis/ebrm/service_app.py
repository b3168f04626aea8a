"""The HTTP side of the service: routes, limits, one clear line per error, metrics, and the page.

The event loop reads bodies and answers /health and /metrics; all that touches the model runs in one thread, one request
after the other, so that a large request delays others but never the health check. Bodies must say application/json: a page
of another site cannot send that without the browser asking us first, and we never agree.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, NoReturn

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from recis.ebrm.service import Service
from recis.ebrm.service_metrics import CONTENT_TYPE, ServiceMetrics
from recis.ebrm.service_requests import BadRequestError

_LOG = logging.getLogger(__name__)
Work = Callable[[Any], Any]
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
SAFE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_app(service: Service) -> FastAPI:
    """Return the application of a service; its cache is written when the application ends."""
    http = _Http(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(http.executor, service.close)
        http.executor.shutdown()

    app = FastAPI(title="recis ebrm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for path, work in (
        ("/score", service.score),
        ("/explain", service.explain),
        ("/overrides", service.add),
        ("/overrides/remove", service.remove),
    ):
        app.add_api_route(path, http.endpoint(path, partial(http.post, work)), methods=["POST"])
    for path, answer in (
        ("/overrides", http.overrides),
        ("/overrides/audit", http.audit),
        ("/items", http.items),
        ("/health", http.health),
        ("/metrics", http.prometheus),
    ):
        app.add_api_route(path, http.endpoint(path, answer), methods=["GET"])
    for path, (name, media_type) in PAGE.items():
        content = files("recis.ebrm").joinpath("page", name).read_bytes()
        app.add_api_route(path, http.endpoint(path, _constant(content, media_type)), methods=["GET"])
    app.add_exception_handler(HTTPException, http.no_route)
    return app


class _Http:
    """Turns requests into calls of the service, and what comes of them into responses."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.metrics = ServiceMetrics()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="ebrm-model")
        self.num_waiting = 0

    def endpoint(self, route: str, answer: Callable[[Request], Awaitable[Response]]):
        """Return the handler of a route: it answers, counts, and never lets an error out."""

        async def handle(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await answer(request)
            except BadRequestError as error:
                response = _error(error.status, str(error))
            except ClientDisconnect:
                response = _error(400, "the client went away before its body was complete")
            except Exception as error:  # a fault of ours or of the model: this request's alone
                _LOG.exception("%s failed", route)
                response = _error(500, f"the service failed: {type(error).__name__}: {error}")
            self.metrics.observe(route, response.status_code, time.perf_counter() - started)
            return response

        return handle

    async def no_route(self, _: Request, error: Exception) -> Response:
        """Answer a path or method that there is not."""
        assert isinstance(error, HTTPException)
        self.metrics.observe("other", error.status_code, 0.0)
        return _error(
            error.status_code, f"{error.detail}; the routes are /score, /explain, /overrides, /items, /health"
        )

    async def in_model_thread(self, work: Callable[[], Any]) -> Any:
        """Return what work returns, run in the model's thread; 503 when too many wait for it already."""
        if self.num_waiting >= self.service.config.max_waiting:
            raise BadRequestError(f"{self.num_waiting} requests are waiting already; try again in a second", status=503)
        self.num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, work)
        finally:
            self.num_waiting -= 1

    async def post(self, work: Work, request: Request) -> Response:
        """Answer a body of JSON."""
        body = await self._body(request)
        return await self.in_model_thread(lambda: _json(work(_parse(body))))

    async def overrides(self, _: Request) -> Response:
        """List the rules."""
        return _json(await self.in_model_thread(self.service.overrides))

    async def audit(self, request: Request) -> Response:
        """Export the file of rules as JSON lines."""
        since = request.query_params.get("since")
        records = await self.in_model_thread(lambda: self.service.audit(since))
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        headers = SAFE_HEADERS | {"Content-Disposition": 'attachment; filename="overrides.jsonl"'}
        return Response(lines, media_type="application/x-ndjson", headers=headers)

    async def items(self, request: Request) -> Response:
        """Find items of the catalogue."""
        words, limit = request.query_params.get("words", ""), request.query_params.get("limit", "50")
        if not limit.isascii() or not limit.isdigit() or len(limit) > 9:
            raise BadRequestError(f"limit must be a whole number; got {limit[:80]!r}")
        if len(words) > self.service.config.max_query_chars:
            raise BadRequestError(
                f"words must have at most {self.service.config.max_query_chars} characters; got {len(words)}"
            )
        return _json(await self.in_model_thread(lambda: self.service.find(words, int(limit))))

    async def health(self, _: Request) -> Response:
        """Say that the service is up, without waiting for the model."""
        return _json(self.service.health() | {"num_waiting": self.num_waiting})

    async def prometheus(self, _: Request) -> Response:
        """Give the metrics, without waiting for the model."""
        gauges = self.service.gauges() | {"waiting_requests": self.num_waiting}
        text = self.metrics.text(self.service.counters(), gauges, model_version=self.service.model.version)
        return Response(text, headers=SAFE_HEADERS | {"Content-Type": CONTENT_TYPE})

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequestError(f"Content-Type must be application/json; got {kind[:80]!r}", status=415)
        limit, seconds = self.service.config.max_body_bytes, self.service.config.body_timeout_s
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise BadRequestError(f"the body must have at most {limit} bytes", status=413)
        except TimeoutError as error:
            raise BadRequestError(f"the body did not arrive within {seconds:g} s", status=408) from error
        return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body must be UTF-8: {error.reason} at byte {error.start}", status=400) from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise BadRequestError(f"the body must be JSON: {error}", status=400) from error
    if not isinstance(data, dict):
        raise BadRequestError(f"the body must be a JSON object; got a {type(data).__name__}", status=400)
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _json(data: Any, status: int = 200) -> Response:
    # ASCII: half of a surrogate pair, which JSON can carry, has no UTF-8
    content = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Response(content, status, media_type="application/json", headers=SAFE_HEADERS)


def _error(status: int, text: str) -> Response:
    response = _json({"error": " ".join(text.split())}, status)
    if status == 503:
        response.headers["Retry-After"] = "1"
    return response


def _constant(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=SAFE_HEADERS)

    return answer
