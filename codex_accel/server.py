"""The HTTP server of a model: routes, who may ask, and the life of the process from loading to the last answer.

Rule: whatever comes in, what goes out is JSON (or a stream of it) with a code, and never a traceback; a request that is
over, or whose client has gone, leaves nothing behind. The event loop does no work that lasts: parsing and encoding have
threads of their own, and so has the model.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from codex_accel import api, connections, events, redaction, safety
from codex_accel.api import Refused
from codex_accel.errors import UserError
from codex_accel.policy import default_policy
from codex_accel.serve_schema import ServeConfig
from codex_accel.text_stream import MaskedStream

if TYPE_CHECKING:
    from codex_accel.admission import Admission, Admitted
    from codex_accel.service import Job, Service

Parse = Callable[[bytes], api.Asked]
OPEN = ("/health", "/ready")  # without a token: a container's probe has none
CLOSING_S = 5.0  # for the last bytes of the last answers
MAX_LOG_WAITING = 1 << 20  # bytes of lines that wait for a full disk; the oldest of more are dropped, and counted


@dataclass(frozen=True)
class Loaded:
    """A model that is ready."""

    service: "Service"
    admission: "Admission"
    identity: api.Identity


@dataclass
class State:
    """The server between its routes. `status` goes from loading over ready to draining; the process ends after it."""

    config: ServeConfig
    token: str | None
    log: events.LineLog
    status: str = "loading"
    loaded: Loaded | None = None
    failure: BaseException | None = None
    num_open: int = 0  # requests under way, those of OPEN apart
    numbers: Any = field(default_factory=itertools.count)

    def require_ready(self) -> Loaded:
        """Raises: Refused before the model is there, and after SIGTERM."""
        if self.status != "ready" or self.loaded is None:
            what = "the model is not loaded yet" if self.status == "loading" else "the server is about to end"
            raise Refused(503, self.status, f"{what}. Ask again later.", Retry_After="2")
        return self.loaded


# --- routes ----------------------------------------------------------------------------------------------------------


def application(state: State) -> Any:
    """The ASGI application."""
    quiet: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, telemetry=quiet)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        if state.status != "ready" or state.loaded is None:
            return _json({"status": state.status}, 503)
        identity = state.loaded.identity
        digests = {"content_digest": identity.content_digest, "manifest_digest": identity.manifest_digest}
        named = {"model": identity.name, "kind": identity.kind, **digests}
        return _json({"status": "ready", **named, "masking": redaction.facts()})

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [state.require_ready().identity.listed]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        identity = state.require_ready().identity
        if name != identity.name:
            raise Refused(404, "model_not_found", f"that model is not served here, but '{identity.name}' is.")
        return _json(identity.listed)

    @app.post("/infer")
    async def infer(request: Request) -> Response:
        return await _answer(state, request, api.infer)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(state, request, lambda data: api.completion(data, state.require_ready().identity.name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(state, request, lambda data: api.chat(data, state.require_ready().identity.name))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def not_routed(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        headers = {name.replace("-", "_"): value for name, value in (error.headers or {}).items()}
        return _refusal(
            Refused(error.status_code, code, f"{error.detail}. See docs/serve.md for the routes.", **headers)
        )

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which goes nowhere

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _refusal(_of_error(error))

    return _guarded(app, state)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(api.dump(value), status, headers, "application/json")


def _refusal(refused: Refused) -> Response:
    return _json(refused.body, refused.status, refused.headers)


# --- who may ask -----------------------------------------------------------------------------------------------------


def _guarded(app: Any, state: State) -> Any:
    """`app` for those who may ask; counts what is under way, and answers what it fails at."""

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        started = complete = False

        async def noting(message: Any) -> None:
            nonlocal started, complete
            started = started or message["type"] == "http.response.start"
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start" and origin in state.config.allowed_origins:
                shared = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
                message = {**message, "headers": [*message["headers"], *shared]}
            await send(message)

        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        counts = scope["path"] not in OPEN
        state.num_open += counts
        try:
            if scope["method"] == "OPTIONS" and origin in state.config.allowed_origins:
                allowed = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
                allowed["access-control-allow-headers"] = "authorization, content-type"
                await Response(status_code=204, headers=allowed)(scope, receive, noting)
                return
            _require_allowed(state, scope, headers, origin)
            await app(scope, receive, noting)
        except Refused as refused:
            await _refusal(refused)(scope, receive, noting)
        except Exception as error:
            if not started:
                await _refusal(_of_error(error))(scope, receive, noting)
            elif not complete:
                _report(error)
                raise _Broken from None  # uvicorn ends the connection, which tells the client that more was to come
        finally:
            state.num_open -= counts

    return guard


class _CutOff(Exception):
    """The time to drain is over."""


class _Broken(Exception):
    """An answer that cannot be brought to its end; the reason is reported already."""


def _require_allowed(state: State, scope: Any, headers: dict[bytes, bytes], origin: str) -> None:
    """Raises: Refused for a page of a web site that is not allowed, a name that is not ours, a token that is not right.

    A browser lets any page send requests to this machine, and a site can give its own name this machine's address; but
    the first says in Origin, the other in Host, whose page it is.
    """
    config = state.config
    if origin and origin not in config.allowed_origins:
        what = "pages of this origin may not ask. Name it in allowed_origins to let them."
        raise Refused(403, "origin_not_allowed", what)
    if scope["path"] in OPEN:
        return
    if state.token is not None:
        if not connections.is_right(headers.get(b"authorization", b""), state.token):
            what = "the header 'Authorization: Bearer TOKEN' is missing, or its token is not right."
            raise Refused(401, "not_authorized", what, WWW_Authenticate="Bearer")
    elif config.unix_socket is None and (host := headers.get(b"host", b"").decode("latin-1")):
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not connections.is_loopback(name) and name.lower() not in (each.lower() for each in config.allowed_hosts):
            what = "the name in the Host header is not of this machine. Name it in allowed_hosts, or set a token."
            raise Refused(403, "host_not_allowed", what)


def _of_error(error: Exception) -> Refused:
    """What a client is told, who gets no traceback; whoever runs the server does."""
    if isinstance(error, _CutOff):
        return Refused(503, "draining", "the server has ended before this request did.", Retry_After="2")
    if isinstance(error, UserError):  # of the model: logits that are not finite, ...
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Refused(500, "model_failed", str(error))
    _report(error)
    return Refused(500, "internal_error", "the server has failed at this request; its log tells more.")


def _report(error: BaseException) -> None:
    """The traceback, for whoever runs the server, with secrets masked."""
    told = "".join(traceback.format_exception(error))
    print(safety.mask(told).text, file=sys.stderr, end="", flush=True)


# --- answers ---------------------------------------------------------------------------------------------------------


async def _answer(state: State, request: Request, parse: Parse) -> Response:
    """From the body of a request to its reply."""
    began_s = time.monotonic()
    loaded = state.require_ready()
    _require_room(loaded, 1)
    data = await _body(request, state.config.limits.max_body_bytes)
    number = next(state.numbers)

    def admit() -> "tuple[api.Asked, Admitted, list[Any]]":
        asked = parse(data)
        shown = [_shown(prompt, loaded) for prompt in asked.prompts] if state.config.log_prompts else []
        return asked, loaded.admission.admit(asked, number=number), shown

    asked, admitted, shown = await asyncio.to_thread(admit)
    _require_room(loaded, len(admitted.requests))  # of which the line only loses until the next line
    options: Any = {"openings": admitted.openings, "on_news": asyncio.Event()}
    job = loaded.service.submit(admitted.requests, streams=asked.streams, **options)
    try:
        if not await _until(job, request, first_piece=asked.streams):
            raise ClientDisconnect
        if job.error is not None:
            raise _of_error(job.error)
        if job.started_s is None:
            what = f"no place came free in {state.config.limits.max_time_s:g} s. Ask again later."
            raise Refused(429, "waited_too_long", what, Retry_After="5")
    except BaseException:
        loaded.service.cancel(job)
        raise
    entry = _Entry(state, request.url.path, shown, admitted, job, began_s)
    head = api.Head(f"cmpl-{uuid.uuid4().hex}", int(time.time()), loaded.identity, "chat" in entry.route)
    if asked.streams:
        return _Stream(_events(job, asked, admitted, head), loaded.service, entry)
    entry.write()
    outcomes = [row.outcome for row in job.rows]
    if entry.route == "/infer":
        facts = {"num_prompt_tokens": admitted.num_prompt_tokens, "seed": admitted.seed}
        return _json(api.inferred(loaded.identity, outcomes[0], **facts))
    choices = [api.choice(head, index, outcome) for index, outcome in enumerate(outcomes)]
    more = {"usage": api.usage(admitted.num_prompt_tokens, outcomes), "num_findings": entry.num_findings}
    return _json(head.around(choices, is_piece=False, **more))


def _require_room(loaded: Loaded, num_texts: int) -> None:
    """Raises: Refused if so many texts would not get into the line."""
    from codex_accel import service

    try:
        loaded.service.require_room(num_texts)
    except service.Busy:
        raise Refused(429, "too_many_requests", "too many requests wait already.", Retry_After="1") from None
    except service.Closed:
        raise Refused(503, "draining", "the server is about to end.", Retry_After="2") from None


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body of JSON. Raises: Refused by its headers or its size; ClientDisconnect."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        what = "the body is to be JSON in UTF-8. Send it with 'Content-Type: application/json'."
        raise Refused(415, "not_json", what)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "compressed", "compressed bodies are not taken. Send it as it is.")
    too_large = Refused(413, "body_too_large", f"the body has more than {max_bytes} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise too_large
    return bytes(data)


async def _until(job: "Job", request: Request, *, first_piece: bool) -> bool:
    """Wait for the end of a job, or for its first piece; False if the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaves = asyncio.create_task(gone())
    try:
        while not job.is_over and not (first_piece and any(row.pieces for row in job.rows)):
            news = asyncio.create_task(job.on_news.wait())
            done, _ = await asyncio.wait({news, leaves}, return_when=asyncio.FIRST_COMPLETED)
            if leaves in done:
                news.cancel()
                return False
            job.on_news.clear()
        return True
    finally:
        leaves.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaves


class _Stream(StreamingResponse):
    """Server-sent events; when the client goes, the job is cancelled."""

    def __init__(self, content: AsyncIterator[bytes], service: "Service", entry: "_Entry"):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(content, media_type="text/event-stream; charset=utf-8", headers=headers)
        self.service, self.entry = service, entry

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.cancel(self.entry.job)
            self.entry.write()


async def _events(job: "Job", asked: api.Asked, admitted: "Admitted", head: api.Head) -> AsyncIterator[bytes]:
    """What a stream sends. What comes while the client is slow goes into one event."""
    more = {"usage": None} if asked.include_usage else {}
    begun: set[int] = set()
    ended: set[int] = set()
    while len(ended) < len(job.rows):
        job.on_news.clear()
        sent = []
        for index, row in enumerate(job.rows):
            outcome = row.outcome  # before the pieces: all of them are there then
            text = "".join(row.pieces.popleft() for _ in range(len(row.pieces)))
            if index in ended or not (text or outcome):
                continue
            told = api.piece(head, index, text, outcome.finish_reason if outcome else None, is_first=index not in begun)
            found = {"num_findings": outcome.num_findings} if outcome else {}
            sent.append(api.event(head.around([told], is_piece=True, **more, **found)))
            begun.add(index)
            if outcome:
                ended.add(index)
        if sent:
            yield b"".join(sent)
        if job.error is not None:
            yield api.event(_of_error(job.error).body)
            return
        if len(ended) < len(job.rows):
            await job.on_news.wait()
    if asked.include_usage:
        counts = api.usage(admitted.num_prompt_tokens, [row.outcome for row in job.rows])
        yield api.event(head.around([], is_piece=True, usage=counts))
    yield api.event("[DONE]")


@dataclass
class _Entry:
    """A line of the request log."""

    state: State
    route: str
    shown: list[Any]  # its prompts, masked
    admitted: "Admitted"
    job: "Job"
    began_s: float

    @property
    def num_findings(self) -> int:
        return sum(row.outcome.num_findings for row in self.job.rows if row.outcome)

    def write(self) -> None:
        """Append it, if there is a log. Prompts and texts are masked by the built-in policy, whatever `safety` says."""
        if not self.state.log.enabled:
            return
        outcomes = [row.outcome for row in self.job.rows if row.outcome]
        waited_s = (self.job.started_s or time.monotonic()) - self.began_s
        facts: dict[str, Any] = {
            "route": self.route,
            "finish_reasons": [outcome.finish_reason for outcome in outcomes],
            "num_prompt_tokens": self.admitted.num_prompt_tokens,
            "num_output_tokens": sum(outcome.num_output_tokens for outcome in outcomes),
            "num_findings": self.num_findings,
            "waited_s": round(waited_s, 4),
            "elapsed_s": round(time.monotonic() - self.began_s, 4),
        }
        if self.state.config.log_prompts:
            written = zip(self.admitted.tails, self.job.rows, strict=True)
            texts = [(tail, row.outcome.text) for tail, row in written if row.outcome]
            facts["prompts"] = self.shown
            facts["texts"] = [MaskedStream(default_policy(), tail).finish(text) for tail, text in texts]
        events.event(self.state.log, "request", "answered" if len(outcomes) == len(self.job.rows) else "left", **facts)


def _shown(prompt: api.Prompt, loaded: "Loaded") -> Any:
    """A prompt for the log: its text or messages, masked."""
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
        return safety.mask(loaded.admission.tokenizer.decode(prompt)).text
    return safety.mask_json(prompt)


# --- the process -----------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def run(
    config: ServeConfig,
    sockets: list[socket.socket],
    *,
    token: str | None,
    load: Callable[[Callable[[list["Job"]], None]], Loaded],
) -> None:
    """Serve until a signal, and then until the requests under way are answered; a second signal ends the process.

    `load(on_news)` runs on the thread that then has the model. Raises: what it raises, such as UserError.
    """
    try:
        asyncio.run(_run(config, sockets, token, load))
    finally:
        for made in sockets:
            made.close()
        connections.remove_file(config)


async def _run(config: ServeConfig, sockets: list[socket.socket], token: str | None, load: Any) -> None:
    state = State(config, token, _request_log(config))
    server = _Server(_uvicorn_config(application(state), config))
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def drain(number: int) -> None:
        if state.status == "draining":
            print(f"{signal.Signals(number).name}: ends at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        state.status = "draining"
        told = f"{signal.Signals(number).name}: {state.num_open} requests under way have {config.limits.drain_s:g} s"
        print(f"{told}; once more ends at once", file=sys.stderr, flush=True)
        tasks.append(loop.create_task(_drain(state, server)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain, number)
    thread = threading.Thread(target=_model_thread, args=(state, server, loop, load), name="model", daemon=True)
    print(f"listening  {' '.join(map(connections.address_of, sockets))}", flush=True)
    thread.start()
    await server.serve(sockets)
    if state.failure is not None:
        raise state.failure
    await asyncio.to_thread(thread.join, CLOSING_S)
    if thread.is_alive():  # within a step, or a load: the interpreter cannot end under it
        sys.stdout.flush()
        connections.remove_file(config)
        os._exit(0)


def _request_log(config: ServeConfig) -> events.LineLog:
    """The log of requests, which begins with a bypass of masking if there is one. Raises: UserError."""
    options: Any = {"max_bytes": config.request_log_max_bytes, "max_waiting_bytes": MAX_LOG_WAITING}
    try:
        log = events.LineLog(Path(config.request_log or os.devnull), enabled=config.request_log is not None, **options)
    except OSError as error:
        what = f"'{config.request_log}' cannot be written to ({error.strerror}). Name another file."
        raise UserError(config.problem("request_log", what)) from error
    if redaction.is_bypassed():
        events.event(log, "bypass", f"secrets are not masked: {redaction.reason()}")
    return log


def _uvicorn_config(app: Any, config: ServeConfig) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it tells is in the answers, or reported here
    return uvicorn.Config(
        app,
        http=connections.limited(config),
        ws="none",
        loop="asyncio",
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=connections.BACKLOG,
        timeout_keep_alive=max(1, round(config.limits.idle_timeout_s)),
        timeout_graceful_shutdown=int(CLOSING_S),
    )


def _model_thread(state: State, server: uvicorn.Server, loop: asyncio.AbstractEventLoop, load: Any) -> None:
    """Load, tell, and run the loop of the model."""

    def on_news(jobs: "list[Job]") -> None:
        loop.call_soon_threadsafe(_wake, jobs)

    def is_ready(loaded: Loaded) -> None:
        state.loaded = loaded
        if state.status == "loading":
            state.status = "ready"
            identity = loaded.identity
            print(f"ready      {identity.name}  {identity.kind}  content {identity.content_digest[:12]}", flush=True)

    try:
        loaded = load(on_news)
        loop.call_soon_threadsafe(is_ready, loaded)
        loaded.service.run()
    except BaseException as error:
        state.failure = error
        server.should_exit = True


def _wake(jobs: "list[Job]") -> None:
    for job in jobs:
        job.on_news.set()


async def _drain(state: State, server: uvicorn.Server) -> None:
    """Let what is under way come to its end, in its time; then let the server go."""
    until_s = time.monotonic() + state.config.limits.drain_s
    while state.num_open and time.monotonic() < until_s:
        await asyncio.sleep(0.02)
    if state.loaded is not None:
        if state.num_open:
            print(f"{state.num_open} requests were cut off", file=sys.stderr, flush=True)
            state.loaded.service.abort(_CutOff())
        state.loaded.service.close()
    server.should_exit = True
