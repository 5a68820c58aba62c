"""Where the server listens, and the HTTP of its connections under limits of time.

Rule: an address beyond this machine is listened on only with a token. No connection stays without doing something: a
request has a time to arrive in, an answer one to be taken in, and so has the pause between two of them. What is no HTTP
is answered in JSON too.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from codex_accel.api import Refused, dump
from codex_accel.errors import UserError
from codex_accel.serve_schema import ServeConfig

TOKEN = "CODEX_ACCEL_TOKEN"
MIN_TOKEN_LENGTH = 16
MAX_HEADER_BYTES = 16_384
MAX_READ_BYTES = 16_384  # that one turn of the loop takes from a connection: a chunk of one byte costs 6 of them
MAX_CHUNKS = 16_384  # of one body
BACKLOG = 512
LINGER_S = 1.0  # for a client that still sends what is not read any more to find the answer

_FILES: dict[Path, tuple[int, int, int]] = {}  # the socket files of this process, by which each is known again


# --- addresses -------------------------------------------------------------------------------------------------------


def token(environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that clients must know; None if the environment has none.

    Raises: UserError, which does not show it, for one that is short or that no header can hold.
    """
    value = environment.get(TOKEN)
    if value is None:
        return None
    if len(value) < MIN_TOKEN_LENGTH or not value.isascii() or not value.isprintable() or " " in value:
        what = (
            f"has {len(value)} characters, or some that are no visible ASCII. Take {MIN_TOKEN_LENGTH} or more, such as"
        )
        raise UserError(f"environment: {TOKEN}: {what} those of `openssl rand -hex 32`, or unset it.")
    return value


def is_right(authorization: bytes, token: str) -> bool:
    """Whether the header says `Bearer <token>`; the time that it takes tells nothing of the token."""
    scheme, _, given = authorization.partition(b" ")
    return hmac.compare_digest(given.strip(), token.encode()) & (scheme.lower() == b"bearer")


def is_loopback(host: str) -> bool:
    """Whether `host` is an address of this machine alone, or `localhost`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(config: ServeConfig, *, token: str | None) -> list[socket.socket]:
    """Sockets that take connections from now on.

    Raises: UserError if the address is taken, or not to be had, or is open to others and there is no token.
    """
    if config.unix_socket is not None:
        return [_listen_on_file(Path(config.unix_socket), config)]
    host = config.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        what = f"is no address of this machine ({error}). Give one, such as 127.0.0.1."
        raise UserError(config.problem("host", f"'{config.host}' {what}")) from error
    if token is None and not all(is_loopback(str(address[0])) for *_, address in found):
        what = (
            f"'{config.host}' is open to other machines, and {TOKEN} is not set. Put a secret into that variable of the"
        )
        raise UserError(
            config.problem("host", f"{what} environment, such as `openssl rand -hex 32`, or stay on 127.0.0.1.")
        )
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(found):
        port = sockets[0].getsockname()[1] if sockets else config.port
        made = socket.socket(
            family, socket.SOCK_STREAM, socket.IPPROTO_TCP
        )  # without it asyncio leaves Nagle on: 40 ms
        sockets.append(made)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address[0], port, *address[2:]))
            made.listen(BACKLOG)
        except OSError as error:
            if family == socket.AF_INET6 and len(found) > 1:  # localhost where there is no IPv6
                sockets.pop().close()
                continue
            for made in sockets:
                made.close()
            what = f"{address[0]} port {port} cannot be listened on ({error.strerror})."
            what += " Give another, or port=0 for a free one."
            raise UserError(config.problem("port", what)) from error
    return sockets


def _listen_on_file(path: Path, config: ServeConfig) -> socket.socket:
    """A socket in the file system; one that a dead server has left there is replaced."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _is_answered(path):
            path.unlink()
        mask = os.umask(0o177)
        try:
            made.bind(str(path))
        finally:
            os.umask(mask)
        _FILES[path] = _mark(path)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        what = f"'{path}' cannot be listened on ({error.strerror or error}). Give another path, or end what is there."
        raise UserError(config.problem("unix_socket", what)) from error
    return made


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def _mark(path: Path) -> tuple[int, int, int]:
    """What no other file at this path has; the time is there because an inode may be given out again."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def remove_file(config: ServeConfig) -> None:
    """Take the socket file away if it is the one that `listen` has made, and not that of a later server."""
    if config.unix_socket is not None:
        path = Path(config.unix_socket)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if _FILES.get(path) == _mark(path):
                path.unlink()


def address_of(made: socket.socket) -> str:
    """What clients are to be given."""
    name = made.getsockname()
    if made.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"http://[{name[0]}]:{name[1]}" if made.family == socket.AF_INET6 else f"http://{name[0]}:{name[1]}"


# --- connections -----------------------------------------------------------------------------------------------------


class _Connection(h11.Connection):
    """h11's, to which a body in very many chunks is no HTTP: each costs what thousands of bytes do."""

    num_chunks = 0

    def next_event(self) -> Any:
        """The next event. Raises: h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks = 0
        elif isinstance(event, h11.Data):
            self.num_chunks += event.chunk_end  # h11 misses a start whose first byte came later
            if self.num_chunks > MAX_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks")
        return event


class Protocol(H11Protocol):
    """uvicorn's, with limits of time on both ways and JSON for what is no HTTP. `limited` sets the limits."""

    receive_timeout_s = 20.0
    send_timeout_s = 20.0
    max_connections = 256

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.conn = _Connection(h11.SERVER, MAX_HEADER_BYTES)
        self._arrival: asyncio.TimerHandle | None = None  # of a request that is not all here
        self._departure: asyncio.TimerHandle | None = None  # of bytes that the client has not taken
        self._has_data = self._is_over = False

    def connection_made(self, transport: Any) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)
        transport.max_size = MAX_READ_BYTES  # of asyncio's own loop, whose 256 KiB are seconds of work in tiny chunks
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every byte that is not taken
        if len(self.connections) > self.max_connections:
            self._refuse(Refused(429, "too_many_connections", "too many open connections.", Retry_After="1"))
            return
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """End, with all that waits for a time."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._arrival, self._departure):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on; the first byte of a request starts its time."""
        if self._is_over:
            return
        self._has_data = True
        self._watch_arrival()
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # uvicorn would answer what is broken behind a request that has its answer
            self.transport.abort()
        self._note_arrival()

    def on_response_complete(self) -> None:
        """Go on to the next request, which may be here already."""
        super().on_response_complete()
        self._note_arrival()
        if self.conn.their_state is h11.SEND_BODY:  # of a request that came behind another, or of a refused one
            self._watch_arrival()

    def _watch_arrival(self) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(self.receive_timeout_s, self._arrives_too_slowly)

    def _note_arrival(self) -> None:
        """A request is all here, or there is none."""
        if self._arrival is not None and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._arrival.cancel()
            self._arrival = None

    def _arrives_too_slowly(self) -> None:
        self._arrival = None
        if self.transport.is_closing():
            return
        if not self._has_data:
            self.transport.close()
            return
        what = f"the request was not all here after {self.receive_timeout_s:g} s."
        self._refuse(Refused(408, "request_timeout", what))

    def pause_writing(self) -> None:
        """Some bytes were not taken at once: their time begins."""
        super().pause_writing()
        if self._departure is None:
            self._departure = self.loop.call_later(self.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """All bytes are taken."""
        super().resume_writing()
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        what = f"this is no HTTP/1.1 request, or one with too long a header or in more than {MAX_CHUNKS} chunks."
        self._refuse(Refused(400, "bad_http", what))

    def _refuse(self, refused: Refused) -> None:
        """Answer without the application, if there was no answer yet, and end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application has nothing to add
            self.cycle.message_event.set()
        body = dump(refused.body)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers += refused.headers.items()
        phrase = STATUS_PHRASES[refused.status]
        try:
            sent = [self.conn.send(h11.Response(status_code=refused.status, headers=headers, reason=phrase))]
            sent += [self.conn.send(h11.Data(data=body)), self.conn.send(h11.EndOfMessage())]
            self.transport.write(b"".join(part for part in sent if part))
            self.transport.write_eof()  # a socket that is closed with bytes unread takes the answer back
            self._is_over = True
            self._unset_keepalive_if_required()
            self.loop.call_later(LINGER_S, self.transport.close)
        except h11.LocalProtocolError:  # in the middle of an answer
            self.transport.abort()


def limited(config: ServeConfig) -> type[Protocol]:
    """The protocol with the limits of a configuration."""
    limits = config.limits
    values = {name: getattr(limits, name) for name in ("receive_timeout_s", "send_timeout_s", "max_connections")}
    return type("Limited", (Protocol,), values)
