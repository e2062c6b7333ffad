"""The HTTP side: routes, keys, streams. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from saccade.engines.serve import protocol
from saccade.engines.serve.address import is_own_name
from saccade.engines.serve.jobs import Event, Job, Refused
from saccade.engines.serve.protocol import Answer, Asked, Kind
from saccade.engines.serve.reader import Reader, chat_note
from saccade.engines.serve.service import Service

BODY_BYTES = 8 * 2**20
BODY_SECONDS = 30.0
RETRY_SECONDS = 1
CLIENT_LEFT = 499  # nobody reads it; the name that logs know
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


def make_app(service: Service, name: str, *, key: str | None = None, any_host: bool = False) -> Starlette:
    """The application. `name` is the model's for clients. Without a key only requests to this machine's own names are
    answered, unless `any_host`: a page in a browser must not reach the model through a name of its own."""
    endpoint = _Endpoint(service, name, key, any_host)
    routes = [
        Route("/v1/chat/completions", endpoint.guarded(endpoint.chat), methods=["POST"]),
        Route("/v1/completions", endpoint.guarded(endpoint.complete), methods=["POST"]),
        Route("/v1/models", endpoint.guarded(endpoint.models)),
        Route("/v1/models/{model:path}", endpoint.guarded(endpoint.model)),
        Route("/health", endpoint.health),
    ]
    handlers = {Refused: _refused, HTTPException: _no_route, ClientDisconnect: _client_left, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Endpoint:
    def __init__(self, service: Service, name: str, key: str | None, any_host: bool):
        self.service, self.name, self.key, self.any_host = service, name, key, any_host
        self.reader = Reader(service.tokenizer, service.model.get_input_embeddings().num_embeddings)
        self.created = int(time.time())
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saccade-read")
        self._reading = 0  # requests whose text is being read

    def guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Only with the key, or, where there is none, by a name of this machine."""

        async def check(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if self.key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                found, do = "the API key is missing or wrong", "Send the header Authorization: Bearer KEY."
                raise Refused("use this server", found, do, status=401, code="invalid_api_key")
            host = request.headers.get("host", "")
            if self.key is None and not self.any_host and not is_own_name(host):
                found = f"it answers to localhost and addresses such as 127.0.0.1, and was asked as {host[:64]!r}"
                raise Refused("use this server without a key", found, "Start it with a key.", status=403)
            return await answer(request)

        return check

    # --- what it says of itself -------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Open to all: no text goes in or out."""
        chat = chat_note(self.reader.tokenizer) or "chat template"
        return JSONResponse({"model": self.name, "chat": chat, **self.service.health()})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same by name."""
        self._known(request.path_params["model"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "saccade"}

    def _known(self, model: str) -> None:
        if model != self.name:
            found = f"this server has {self.name!r}"
            raise Refused(f"ask {model[:64]!r}", found, "", status=404, param="model", code="model_not_found")

    # --- generating -------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate("chat", request)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate("text", request)

    async def _generate(self, kind: Kind, request: Request) -> Response:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        asked, job = await self._take(kind, request, deliver)
        streams = False
        try:
            told = await _listen(request, events, whole=not asked.stream)
            if told and told[-1].error:
                raise told[-1].error
            if told and asked.stream:
                streams = True  # which sees to the end of the job
                return _Stream(_pieces(Answer(asked), asked, job, told[0], events), self.service, job)
        finally:
            if not streams:
                self.service.cancel(job)
        if not told:
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(Answer(asked).whole("".join(e.text for e in told), told[-1].finish or "stop", job))

    async def _take(self, kind: Kind, request: Request, deliver: Callable[[Event], None]) -> tuple[Asked, Job]:
        """Read a request and hand it to the service."""
        if self._reading >= self.service.limits.queue:
            raise Refused("serve a request", f"{self._reading} are being read", "Ask again in a moment.", status=429)
        self._reading += 1
        try:
            asked = protocol.read(kind, protocol.read_json(await _body(request)))
            self._known(asked.model)
            ids = await asyncio.get_running_loop().run_in_executor(self._pool, self.reader.ids, asked.prompt)
            job = Job(ids, asked.wish, deliver)
            self.service.submit(job)
            return asked, job
        finally:
            self._reading -= 1


class _Stream(StreamingResponse):
    """Server-sent events; however it ends, the job ends with it."""

    def __init__(self, pieces: AsyncIterator[bytes], service: Service, job: Job):
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.service, self.job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.cancel(self.job)


async def _pieces(
    answer: Answer, asked: Asked, job: Job, event: Event, events: asyncio.Queue[Event]
) -> AsyncIterator[bytes]:
    if answer.chat:
        yield protocol.event(answer.piece("", first=True))
    while not event.last:
        yield protocol.event(answer.piece(event.text))
        event = await events.get()
    if event.error:
        yield protocol.event(protocol.error(event.error))
        return
    if event.text:
        yield protocol.event(answer.piece(event.text))
    yield protocol.event(answer.piece("", event.finish))
    if asked.usage:
        yield protocol.event(answer.end(job))
    yield protocol.event("[DONE]")


async def _listen(request: Request, events: asyncio.Queue[Event], whole: bool) -> list[Event]:
    """The first event, or all of them; none if the client leaves before."""
    left, told = asyncio.create_task(_leaving(request)), []
    try:
        while not told or (whole and not told[-1].last):
            coming = asyncio.create_task(events.get())
            await asyncio.wait({coming, left}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return []
            told.append(coming.result())
        return told
    finally:
        left.cancel()


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        do = "Send the header Content-Type: application/json."
        raise Refused("read the body", "it is not said to be JSON", do, status=415)
    try:
        return await asyncio.wait_for(_all_of(request), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        found = f"it did not come within {BODY_SECONDS:.0f} s"
        raise Refused("read the body", found, "Send it at once.", status=408) from error


async def _all_of(request: Request) -> bytes:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > BODY_BYTES:
            found = f"it is longer than {BODY_BYTES:,} bytes"
            raise Refused("read the body", found, "Send a shorter prompt.", status=413)
    return bytes(raw)


# --- errors -----------------------------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SECONDS)}}
    return JSONResponse(protocol.error(error), error.status, headers.get(error.status))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked, do = f"{request.method} {request.url.path[:64]}", f"See: {', '.join(PATHS)}."
    return JSONResponse(protocol.error(Refused(asked, error.detail, do, status=error.status_code)), error.status_code)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    found = f"the server failed with a {type(error).__name__}"
    return await _refused(request, Refused("serve a request", found, "Its log says more.", status=500))
