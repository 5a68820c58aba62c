"""A server in a process of its own, and requests to it byte by byte."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

ASK = {"prompt": "Once", "max_new_tokens": 1}
STARTED: list["Served"] = []


class Served:
    """A server in a process of its own."""

    def __init__(self, fork_server, folder: Path, *argv: str, ready: bool = True, **environment: str):
        self.job = fork_server.start("serve", [f"checkpoint={folder}", "port=0", *argv], environment=environment)
        STARTED.append(self)
        self.wait_for("ready  " if ready else "listening")
        self.address = self.output.split("listening", 1)[1].split()[0]

    def wait_for(self, words: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.output:
            assert self.job.alive(), self.job.output
            assert time.monotonic() < deadline, self.job.output
            time.sleep(0.01)

    @property
    def output(self) -> str:
        return self.job.output if self.job.log.exists() else ""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def raw(self, data: bytes, *, timeout_s: float = 10) -> bytes:
        """What comes back on a connection of its own, until the server ends it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout_s) as connection:
            connection.sendall(data)
            return everything(connection)

    def ask(self, path: str, body: object = None, *, method: str = "", **headers: str) -> tuple[int, dict]:
        """Status and JSON of a request of its own."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "connection: close"]
        given = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(data))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines += [f"{name}: {value}" for name, value in given.items() if value]
        return parsed(self.raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data, timeout_s=60))

    def infer(self, prompt: object, max_new_tokens: int = 8, **more: object) -> dict:
        status, reply = self.ask("/infer", {"prompt": prompt, "max_new_tokens": max_new_tokens, **more})
        assert status == 200, reply
        return reply

    def stop(self) -> None:
        if self.job.alive():
            os.kill(self.job.pids[0], signal.SIGTERM)
        assert self.job.wait(60) == [0], self.job.output
        assert "Traceback" not in self.job.output, self.job.output


def everything(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def everything_until(connection: socket.socket, words: bytes) -> bytes:
    reply = b""
    while words not in reply:
        part = connection.recv(65536)
        assert part, reply
        reply += part
    return reply


def parsed(reply: bytes) -> tuple[int, dict]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"application/json" in head.lower(), reply
    return int(head.split()[1]), json.loads(body)


def kill_all() -> None:
    """End what a failed test has left."""
    for served in STARTED:
        if None in served.job.codes and served.job.alive():
            served.job.kill()
            served.job.wait(10)
    STARTED.clear()


def stream_head(model: str, max_tokens: int, *, number: int = 1, streams: bool = True) -> bytes:
    """A request for texts that go on from "Once"."""
    body = {"model": model, "prompt": "Once", "max_tokens": max_tokens, "stream": streams, "n": number}
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(data) + data
