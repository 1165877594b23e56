"""The addresses of a live page.

    /  /report.html  /report/<story>.html    the report's pages, as the static report has them
    /parts?page=<story>&name=<part>          parts of a page, as JSON
    /events?page=<story>                     which parts changed, as server-sent events
    /media/  /poster/  /thumbnail/<path>     clips and pictures of the run folder, and small pictures of them
    /control                                 POST: a request for the queue

With several runs ``/`` lists them, and each has the same addresses under ``/runs/<name>/``.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.observe.live import assets, control
from storymem_dist.observe.live.access import Access, Guard
from storymem_dist.observe.live.hub import MAX_CLIENTS, Hub, Place, ServerStops
from storymem_dist.observe.live.listing import RUNS
from storymem_dist.observe.live.pages import document_of
from storymem_dist.observe.live.stream import EventStream
from storymem_dist.observe.report.assets import story_file
from storymem_dist.observe.report.page import INDEX

BODY_SECONDS = 10.0
"""Longest time for a request's body to arrive."""

IMMUTABLE = "private, max-age=31536000, immutable"
CHECKED = "private, no-cache"


class Json(JSONResponse):
    """JSON in ASCII: names of files in a run folder need not be UTF-8."""

    def render(self, content: Any) -> bytes:
        """See starlette."""
        return json.dumps(content, separators=(",", ":")).encode()


class OpenedFile(FileResponse):
    """A file that is open already, so that it is the one that was checked."""

    def __init__(self, file: BinaryIO, **more: Any) -> None:
        super().__init__(f"/dev/fd/{file.fileno()}", stat_result=os.fstat(file.fileno()), **more)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See starlette."""
        with self._file:
            await super().__call__(scope, receive, send)


class LivePages:
    """Answers to requests. Reads go through ``hub``."""

    def __init__(self, hub: Hub, access: Access) -> None:
        self._hub = hub
        self._access = access

    def application(self) -> ASGIApp:
        """Return the ASGI application."""
        packed = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
        pages = [
            Route("/", self.page, middleware=packed),
            Route("/parts", self.parts, middleware=packed),
            Route("/events", self.events),
        ]
        of_run = [
            *pages,
            Route("/report.html", self.page, middleware=packed),
            Route("/report/{file}", self.page, middleware=packed),
            Route("/media/{path:path}", self.media),
            Route("/poster/{path:path}", partial(self._small, assets.poster)),
            Route("/thumbnail/{path:path}", partial(self._small, assets.thumbnail)),
            Route("/control", self.control, methods=["POST"]),
        ]
        routes = of_run if self._hub.sources.is_single else [*pages, Mount("/runs/{run}", routes=of_run)]
        handlers = {HTTPException: _say, ServerStops: _stopping}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), self._access)

    # -- pages ---------------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The index, the page of a story, or the list of runs."""
        place = await self._place(request, file=request.path_params.get("file"))
        page = await self._read(partial(document_of, self._hub, place, control=self._access.control))
        body = page.text.encode(errors="backslashreplace")
        return HTMLResponse(body, headers={"content-security-policy": page.policy})

    async def parts(self, request: Request) -> Response:
        """The parts of a page that are asked for, or all of them, with their digests."""
        place = await self._place(request)
        page = await self._read(partial(self._hub.look, place))
        names = request.query_params.getlist("name") or list(page.parts)
        parts = {name: page.parts[name] for name in names if name in page.parts}
        return Json({**page.news, "parts": parts})

    async def events(self, request: Request) -> Response:
        """Which parts of a page changed, for as long as the client listens."""
        place = await self._place(request)
        if self._hub.num_followers >= MAX_CLIENTS:
            raise HTTPException(503, f"{MAX_CLIENTS} pages are open already; close some")
        first = await self._read(partial(self._hub.look, place))
        if request.method == "HEAD":
            return Response(media_type=EventStream.media_type)
        known = request.headers.get("last-event-id") or request.query_params.get("known", "")
        return EventStream(self._hub.follow(place, first, known))

    # -- files ---------------------------------------------------------------------------------------------------------

    async def media(self, request: Request) -> Response:
        """A clip or a picture, whole or in ranges."""
        path, root = request.path_params["path"], self._run(request).root
        with _or_404():
            file, kind = await run_in_threadpool(assets.open_media, root, path)
        response = OpenedFile(file, media_type=kind, headers={"cache-control": _cache(path)})
        if (known := _unless_known(request, response)) is not response:
            file.close()
        return known

    async def _small(self, make: Any, request: Request) -> Response:
        path, root = request.path_params["path"], self._run(request).root
        with _or_404():
            place, _ = await run_in_threadpool(assets.find_media, root, path)
            found = await run_in_threadpool(place.stat)
        tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        response = Response(media_type="image/jpeg", headers={"cache-control": _cache(path), "etag": tag})
        if (known := _unless_known(request, response)) is not response:
            return known
        jpeg = await run_in_threadpool(make, root, path)
        if jpeg is None:
            raise HTTPException(404, "this picture cannot be read")
        return Response(
            jpeg, media_type="image/jpeg", headers=dict(response.headers) | {"content-length": str(len(jpeg))}
        )

    # -- changes -------------------------------------------------------------------------------------------------------

    async def control(self, request: Request) -> Response:
        """Publish a request for the queue."""
        run = self._run(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "a request is sent as application/json")
        try:
            published = await self._hub.in_thread(control.publish, run, control.parse_request(await _body(request)))
        except ConfigError as error:
            raise HTTPException(400, str(error)) from None
        except StoryMemError as error:  # the folder or the disk
            raise HTTPException(507, str(error)) from None
        return Json(published)

    # -- places --------------------------------------------------------------------------------------------------------

    def _run(self, request: Request) -> Any:
        sources = self._hub.sources
        name = next(iter(sources.runs)) if sources.is_single else request.path_params.get("run", "")
        if name not in sources.runs:
            raise HTTPException(404, "no such run")
        return sources.runs[name]

    async def _place(self, request: Request, *, file: str | None = None) -> Place:
        """The page that a request is about."""
        if not self._hub.sources.is_single and "run" not in request.path_params:
            return RUNS, INDEX
        run = self._run(request)
        if file is None:
            return run.name, request.query_params.get("page", INDEX)
        stories = await self._hub.in_thread(
            lambda: {story_file(one.story_id): one.story_id for one in run.view.stories}
        )
        if file not in stories:
            raise HTTPException(404, "no such page")
        return run.name, stories[file]

    async def _read(self, read: Any) -> Any:
        try:
            return await self._hub.in_thread(read)
        except KeyError:
            raise HTTPException(404, "no such page") from None


async def _body(request: Request) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > control.MAX_BODY_BYTES:
                    raise HTTPException(413, f"a request has at most {control.MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, "the request did not arrive") from None
    return bytes(data)


@contextlib.contextmanager
def _or_404() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise HTTPException(404, "no such clip or picture in this run") from None


def _cache(path: str) -> str:
    return IMMUTABLE if assets.is_immutable(path) else CHECKED


def _unless_known(request: Request, response: Response) -> Response:
    """``response``, or that it is what the client has already."""
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if response.headers["etag"] in tags:
        return Response(status_code=304, headers={name: response.headers[name] for name in ("etag", "cache-control")})
    return response


async def _say(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Json({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _stopping(request: Request, error: Exception) -> Response:
    return Json({"error": "the server is being stopped"}, status_code=503)
