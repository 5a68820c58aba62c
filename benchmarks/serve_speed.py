"""Speed of scripts/serve.py beside `transformers serve` on the same model, by the same clients, in one run.

    python benchmarks/serve_speed.py [--repeats 3] [--seconds 10] [--clients 1 8 64] [--checkpoint FOLDER] [--only ours]

Each contender has a process of its own, started for each turn and warmed by two requests. So many clients at once, each
with a connection that stays open, ask `/v1/completions` for greedy text of `--tokens` tokens, one request after the
other. Printed for each number of clients:
- tokens a second, of all clients together, by the `usage` of the answers
- p50 and p99 of the time from request to answer, and answers that were not 200
- ratios of tokens a second, medians over the turns: beside `transformers serve`, and beside one client at a time

float32 on the CPU, as many threads for each contender. Needs two quiet cores; with no --checkpoint, ../shared/data.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contenders

LABELS = {
    "ours": "scripts/serve.py",
    "transformers": "`transformers serve`",
    "continuous": "`transformers serve --continuous-batching`",
}
START_S = 120


@dataclass
class Measured:
    """What the clients of one turn have seen."""

    seconds: float = 0.0
    num_tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


# --- servers ---------------------------------------------------------------------------------------------------------


def command_of(name: str, folder: Path, port: int) -> list[str]:
    """How the server is started."""
    if name == "ours":
        script = str(contenders.ROOT / "scripts" / "serve.py")
        return [sys.executable, script, f"checkpoint={folder}", f"port={port}", f"name={name}"]
    program = Path(sys.executable).parent / "transformers"
    more = ["--continuous-batching"] if name == "continuous" else []
    return [str(program), "serve", str(folder), "--port", str(port), "--device", "cpu", "--dtype", "float32", *more]


@contextlib.contextmanager
def running(name: str, folder: Path, threads: int) -> Iterator[int]:
    """The port of a server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(contenders.ROOT / "runs" / f"serve_{name}.log", "wb") as log:
        process = subprocess.Popen(command_of(name, folder, port), stdout=log, stderr=log, env=environment)
    try:
        model = "ours" if name == "ours" else str(folder)
        deadline = time.monotonic() + START_S
        body = {"model": model, "prompt": "Once", "max_tokens": 2, "temperature": 0}
        while asyncio.run(once(port, body)) != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"does not answer; see runs/serve_{name}.log")
            time.sleep(0.5)
        asyncio.run(once(port, body))
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


# --- clients ---------------------------------------------------------------------------------------------------------


def request_of(body: dict[str, Any]) -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Status and JSON."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def once(port: int, body: dict[str, Any]) -> int:
    """The status of one request, 0 if there was no answer."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_of(body))
        status, _ = await answer(reader)
        writer.close()
        return status
    except (OSError, asyncio.IncompleteReadError, IndexError, ValueError):
        return 0


async def client(port: int, body: dict[str, Any], until: float, found: Measured) -> None:
    """Ask again and again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = request_of(body)
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(data)
        status, reply = await answer(reader)
        found.codes[status] += 1
        if status == 200:
            found.latencies.append(time.perf_counter() - began)
            found.num_tokens += reply["usage"]["completion_tokens"]
    writer.close()


async def load(port: int, model: str, num_clients: int, options: argparse.Namespace) -> Measured:
    """So many clients for so many seconds; the last answers are waited for, and their time counts."""
    found, began = Measured(), time.perf_counter()
    bodies = [
        {"model": model, "prompt": f"Once there were {n + 2} cats", "max_tokens": options.tokens, "temperature": 0}
        for n in range(num_clients)
    ]
    await asyncio.gather(*(client(port, body, began + options.seconds, found) for body in bodies))
    found.seconds = time.perf_counter() - began
    return found


# --- report ----------------------------------------------------------------------------------------------------------


def report(
    results: dict[tuple[str, int], list[Measured]], problems: dict[str, str], options: argparse.Namespace
) -> None:
    """The tables, in Markdown."""
    print(f"\n{options.checkpoint.name}: {options.tokens} new tokens a request, {options.threads} threads")
    print(f"machine: {contenders.processor()}, {options.repeats} turns of {options.seconds:g} s\n")
    print("| clients | contender | tokens/s | smallest to largest | p50 ms | p99 ms | not 200 |")
    print("|---|---|---|---|---|---|---|")
    for num_clients in options.clients:
        for name in options.only:
            found = results.get((name, num_clients), [])
            if not found:
                print(f"| {num_clients} | {LABELS[name]} | {problems.get(name, 'not run')} | | | | |")
                continue
            rates = [each.rate for each in found]
            delays = [statistics.median(each.percentile(share) for each in found) for share in (0.5, 0.99)]
            others = sum(sum(each.codes.values()) - each.codes[200] for each in found)
            print(
                f"| {num_clients} | {LABELS[name]} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to"
                f" {max(rates):,.0f} | {delays[0]:,.0f} | {delays[1]:,.0f} | {others} |"
            )
    print("\n| ratio of tokens/s | here | smallest to largest | bar | |\n|---|---|---|---|---|")
    pairs = [("ours", n, other, n, 1.0) for n in options.clients for other in ("transformers", "continuous")]
    pairs += [("ours", n, "ours", options.clients[0], 1.0) for n in options.clients[1:]]
    for name, number, other, other_number, bar in pairs:
        both = list(zip(results.get((name, number), []), results.get((other, other_number), []), strict=False))
        if both:
            ratios = [a.rate / b.rate for a, b in both]
            middle, ends = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
            passed = contenders.verdict(middle, bar, at_least=True, void="")
            what = f"{name}, {number} clients / {other}, {other_number}"
            print(f"| {what} | {middle:.2f} | {ends} | {bar} | {passed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=contenders.SHARED / "models" / "stories260K")
    parser.add_argument("--only", nargs="+", default=list(LABELS), choices=list(LABELS))
    options = parser.parse_args()
    options.checkpoint = options.checkpoint.resolve()
    (contenders.ROOT / "runs").mkdir(exist_ok=True)
    results: dict[tuple[str, int], list[Measured]] = {}
    problems: dict[str, str] = {}
    for turn in range(options.repeats):
        for name in [name for name in options.only if name not in problems]:
            try:
                with running(name, options.checkpoint, options.threads) as port:
                    for num_clients in options.clients:
                        model = "ours" if name == "ours" else str(options.checkpoint)
                        found = asyncio.run(load(port, model, num_clients, options))
                        results.setdefault((name, num_clients), []).append(found)
                        told = f"{found.rate:,.0f} tokens/s, p50 {found.percentile(0.5):,.0f} ms {dict(found.codes)}"
                        print(f"turn {turn + 1}: {name}, {num_clients} clients: {told}", flush=True)
            except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
                problems[name] = str(error)[:200]
    report(results, problems, options)


if __name__ == "__main__":
    main()
