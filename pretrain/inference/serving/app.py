"""The server's addresses: what comes in is checked, what goes out is sent as it is written.

A client that goes away frees its places; one that sends too much, or too slowly, gets one clear error.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import out_of_memory
from pretrain.inference.serving import answers as shapes
from pretrain.inference.serving.api import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, read
from pretrain.inference.serving.jobs import Busy, Ending, Failed, Job, News, Piece, Vectors

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pretrain.inference.serving.answers import Shape
    from pretrain.inference.serving.front import Front

BODY_SECONDS = 60  # for a request's body to come
DRAINED = 8 << 20  # bytes of a body that is too large which are read before the error is sent
PING = 15  # seconds of silence after which a stream says that it goes on
GONE = 499  # the status, in the metrics, of what nobody waited for
PAGE_RULES = (  # for the browser: nothing from elsewhere
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
ADDRESSES = "accepted: GET /v1/models, POST /v1/chat/completions, /v1/completions, /v1/embeddings"
J = TypeVar("J", bound=Job)


def application(front: Front) -> Starlette:
    """The ASGI application of a model that is open; its engine runs while the application does."""

    @asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        front.engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(front.engine.stop)

    served = Served(front)
    routes = [
        Route("/", served.page), Route("/health", served.health), Route("/metrics", served.metrics),
        Route("/v1/models", served.models), Route("/v1/models/{name:path}", served.model),
        Route("/v1/chat/completions", served.chat, methods=["POST"]),
        Route("/v1/completions", served.complete, methods=["POST"]),
        Route("/v1/embeddings", served.embed, methods=["POST"]),
    ]  # fmt: skip
    app = Starlette(routes=routes, lifespan=running, exception_handlers=_HANDLERS)
    paths = frozenset(route.path for route in routes)
    app.add_middleware(Gate, front=front, paths=paths)
    return app


class Gate:
    """Before every request: the key, where one is wanted; after it: a count."""

    def __init__(self, app: ASGIApp, front: Front, paths: frozenset[str]) -> None:
        self.app, self.front, self.paths = app, front, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        status = GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._open(path) or self._knows(scope):
                await self.app(scope, receive, counted)
            else:
                refusal = ApiError(
                    401, "the API key is missing or another; accepted: Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                await _error(refusal)(scope, receive, counted)
        finally:
            self.front.engine.metrics.answered(path if path in self.paths else "other", status)

    def _open(self, path: str) -> bool:
        return not self.front.settings.api_key or path in ("/", "/health")

    def _knows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.front.settings.api_key.encode())


class Served:
    """What answers at each address."""

    def __init__(self, front: Front) -> None:
        self.front, self.engine, self.settings = front, front.engine, front.settings
        self.html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    async def page(self, _: Request) -> Response:
        """A page to chat with the model."""
        return HTMLResponse(self.html, headers={"Content-Security-Policy": PAGE_RULES})

    async def health(self, _: Request) -> Response:
        """Whether the model's thread is alive."""
        dead = self.engine.dead
        return JSONResponse({"status": "dead" if dead else "ok"}, 503 if dead else 200)

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        engine = self.engine
        now = {
            "running_answers": len(engine.rows), "waiting_answers": len(engine.waiting),
            "cache_tokens": engine.cached_tokens, "cache_tokens_limit": engine.limits.cache_tokens,
        }  # fmt: skip
        return PlainTextResponse(engine.metrics.text(now), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """The one model that there is."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same, by its name."""
        self.front.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, object]:
        front = self.front
        kinds = (("chat", front.writes and front.chats), ("completions", front.writes), ("embeddings", True))
        return {
            "id": self.settings.name, "object": "model", "created": front.created, "owned_by": "pretrain",
            "capabilities": [kind for kind, can in kinds if can],
        }  # fmt: skip

    async def chat(self, request: Request) -> Response:
        """The answers to a conversation."""
        asked = read(await self._body(request), ChatRequest)
        self.front.check_model(asked.model)
        answers = await run_in_threadpool(self.front.chat, asked)
        shape = shapes.Shape(self.settings.name, "chat", answers)
        return await self._answer(request, shape, asked.stream, asked.usage)

    async def complete(self, request: Request) -> Response:
        """What follows prompts."""
        asked = read(await self._body(request), CompletionRequest)
        self.front.check_model(asked.model)
        answers = await run_in_threadpool(self.front.complete, asked)
        shape = shapes.Shape(self.settings.name, "completion", answers, len(asked.prompts))
        return await self._answer(request, shape, asked.stream, asked.usage)

    async def embed(self, request: Request) -> Response:
        """Vectors of texts."""
        asked = read(await self._body(request), EmbeddingRequest)
        self.front.check_model(asked.model)
        job = await run_in_threadpool(self.front.embed, asked)
        news = self._submitted([job])
        try:
            _, vectors = await _unless_gone(request, news.get())
        finally:
            self.engine.cancel([job])
        if not isinstance(vectors, Vectors):
            raise _of_job(vectors)
        width, tokens = vectors.features_NE.shape[1], sum(map(len, job.pieces))
        if asked.dimensions not in (None, width):
            raise ApiError(400, f"dimensions {asked.dimensions}: accepted: {width}, the model's", param="dimensions")
        made = shapes.vectors(self.settings.name, vectors.features_NE, asked.encoding_format, tokens)
        return JSONResponse(made)

    async def _body(self, request: Request) -> bytes:
        """A request's body; refused is what is no JSON by its type, too large or too slow."""
        kind, most = request.headers.get("content-type", ""), self.settings.body_bytes
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, f"Content-Type {kind!r}: accepted: application/json")
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > most + DRAINED:
                        break
        except TimeoutError as error:
            raise ApiError(408, f"the body is not there after {BODY_SECONDS} seconds") from error
        if size > most:
            raise ApiError(413, f"a body of more than {most:,} bytes; accepted: at most {most:,}")
        return b"".join(parts)

    def _submitted(self, jobs: Sequence[J]) -> asyncio.Queue[tuple[int, News]]:
        """The queue to which the model's thread puts what it says of these jobs."""
        news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(number: int, item: News) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(news.put_nowait, (number, item))

        for number, job in enumerate(jobs):
            job.send = partial(send, number)
        self.engine.submit(jobs)
        return news

    async def _answer(self, request: Request, shape: Shape, stream: bool, usage: bool) -> Response:
        news = self._submitted(shape.answers)
        if stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            events = self._events(shape, news, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            return await _unless_gone(request, _whole(shape, news))
        finally:
            self.engine.cancel(shape.answers)

    async def _events(self, shape: Shape, news: asyncio.Queue[tuple[int, News]], usage: bool) -> AsyncIterator[bytes]:
        """Each piece as an event, and then the end."""
        try:
            for number in range(len(shape.answers)):
                if (first := shape.begin(number)) is not None:
                    yield shapes.event(first)
            left = len(shape.answers)
            while left:
                try:
                    number, item = await asyncio.wait_for(news.get(), PING)
                except TimeoutError:
                    yield shapes.STILL_HERE
                    continue
                if not isinstance(item, Piece):
                    yield shapes.event(_of_job(item).body)
                    return
                for chunk in shape.piece(number, item):
                    yield shapes.event(chunk)
                left -= item.finish is not None
            if usage:
                yield shapes.event(shape.last())
            yield shapes.DONE
        finally:
            self.engine.cancel(shape.answers)


async def _whole(shape: Shape, news: asyncio.Queue[tuple[int, News]]) -> Response:
    """All answers at once."""
    texts: list[list[str]] = [[] for _ in shape.answers]
    finishes: list[str | None] = [None] * len(texts)
    while None in finishes:
        number, item = await news.get()
        if not isinstance(item, Piece):
            raise _of_job(item)
        texts[number].append(item.text)
        shape.piece(number, item)
        finishes[number] = item.finish
    return JSONResponse(shape.whole(["".join(parts) for parts in texts], finishes))


R = TypeVar("R")


async def _unless_gone(request: Request, work: Awaitable[R]) -> R:
    """What is awaited; `ClientDisconnect` as soon as the client is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _of_job(item: News) -> ApiError:
    """What a client is told of a job that came to nothing."""
    error = item.error if isinstance(item, Failed) else None
    if isinstance(error, Ending):
        return ApiError(503, "the server ends", code="ending")
    if isinstance(error, PretrainError):
        return ApiError(400, str(error))
    if error is not None and out_of_memory(error):
        return ApiError(503, "there is not enough memory; accepted: fewer tokens", code="memory")
    return ApiError(500, "the server failed at this; its log says where")


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _refuse(_: Request, error: Exception) -> Response:
    """Any error that is foreseen, in OpenAI's shape."""
    match error:
        case ApiError():
            return _error(error)
        case Busy():
            after = {"Retry-After": str(error.seconds)}
            words = f"too many requests wait; accepted: again in {error.seconds} s"
            return _error(ApiError(429, words, code="queue_full", headers=after))
        case Ending():
            return _error(ApiError(503, "the server ends", code="ending"))
        case ClientDisconnect():
            return Response(status_code=GONE)
        case HTTPException():
            return _error(ApiError(error.status_code, f"{error.detail}; {ADDRESSES}", headers=error.headers))
    return _error(ApiError(400, str(error)))


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    kind: _refuse for kind in (ApiError, Busy, Ending, ClientDisconnect, HTTPException, PretrainError)
}
