"""A real server on a real port: the official client, curl, requests of all kinds of ill will, and many at once."""

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import pytest
from conftest import ROOT
from served import ASK, Served, everything, everything_until, kill_all, parsed, stream_head

from codex_accel import connections, events, generation, server, tokenizer
from codex_accel import model as models
from codex_accel.prompts import encode_prompt
from codex_accel.serve_schema import ServeConfig

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LIMITS = ["limits.receive_timeout_s=1", "limits.send_timeout_s=2", "limits.max_body_bytes=20000"]


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def served(fork_server, folder, tmp_path_factory):
    template = tmp_path_factory.mktemp("served") / "chat.jinja"
    template.write_text(TEMPLATE)
    made = Served(fork_server, folder, "name=stories", f"chat_template={template}", *LIMITS)
    yield made
    made.stop()
    kill_all()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def alone(folder):
    """The greedy continuation of a prompt by `generation`, by itself."""
    loaded, model = tokenizer.load(folder), models.load(folder).eval()

    def run(prompt: str, max_new_tokens: int) -> generation.Continuation:
        request = generation.Request(encode_prompt(loaded, prompt), max_new_tokens)
        return generation.generate(model, loaded, [request])[0]

    return run


# --- answers ---------------------------------------------------------------------------------------------------------


def test_infer_tells_text_tokens_and_how_it_ended(served, alone):
    expected = alone("Once", 20)
    reply = served.infer("Once", 20)
    assert (reply["text"], reply["tokens"]) == (expected.text, list(expected.ids))
    assert (reply["finish_reason"], reply["num_prompt_tokens"], reply["num_output_tokens"]) == ("length", 2, 20)
    assert (reply["num_findings"], reply["num_near_ties"], reply["model"]) == (0, 0, "stories")


@pytest.mark.parametrize("text", ["Once upon", "Ünïcode 中文 \U0001f600", "a\tb\n\nc", "</s><s>", "\u202egnirts\u0007"])
def test_text_goes_through_the_tokenizer_and_back(served, folder, text):
    """As text and as ids a prompt is the same; the ids of it, and of the answer, decode to what was sent and got."""
    loaded = tokenizer.load(folder)
    ids = encode_prompt(loaded, text)
    as_text, as_ids = served.infer(text, 12), served.infer(list(ids), 12)
    assert as_text["num_prompt_tokens"] == len(ids)
    assert loaded.decode(ids) == text
    assert {**as_text, "seed": 0} == {**as_ids, "seed": 0}
    assert loaded.decode([*ids, *as_text["tokens"]]) == text + as_text["text"]


def test_a_seed_draws_what_generate_draws(served, fork_server, folder):
    job = fork_server.run(
        "generate",
        [f"checkpoint={folder}", "prompt=Once", "temperature=1.0", "top_k=40", "seed=7", "max_new_tokens=20"],
    )
    reply = served.infer("Once", 20, temperature=1.0, top_k=40, seed=7)
    assert "Once" + reply["text"] == job.output.rstrip("\n")
    other = served.infer("Once", 20, temperature=1.0, top_k=40)
    assert other["seed"] != 7
    assert served.infer("Once", 20, temperature=1.0, top_k=40, seed=other["seed"])["text"] == other["text"]


def test_the_official_client_completes(client, alone):
    found = client.completions.create(model="stories", prompt="Once", max_tokens=20)
    assert found.choices[0].text == alone("Once", 20).text
    assert (found.choices[0].finish_reason, found.object) == ("length", "text_completion")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 20, 22)


def test_the_official_client_streams(client, alone):
    stream = client.completions.create(
        model="stories", prompt="Once", max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == alone("Once", 60).text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 60


def test_the_official_client_asks_for_several_texts(client, alone):
    found = client.completions.create(model="stories", prompt=["Once", "Lily"], n=2, max_tokens=9, stop=["upon a t"])
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [" "] * 2 + [alone("Lily", 9).text] * 2
    assert [choice.finish_reason for choice in found.choices] == ["stop"] * 2 + ["length"] * 2


def test_the_official_client_chats(client, alone):
    messages = [{"role": "user", "content": "Tell me"}]
    whole = client.chat.completions.create(model="stories", messages=messages, max_completion_tokens=40)
    assert whole.choices[0].message.content == alone("user: Tell me\n", 40).text
    pieces = client.chat.completions.create(model="stories", messages=messages, max_completion_tokens=40, stream=True)
    deltas = [chunk.choices[0].delta for chunk in pieces]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content


def test_the_official_client_lists_the_model_and_its_digest(client, served):
    [entry] = client.models.list().data
    assert entry.id == client.models.retrieve("stories").id == "stories"
    status, ready = served.ask("/ready")
    assert (status, ready["status"], ready["kind"]) == (200, "ready", "unverified")
    assert ready["content_digest"] == entry.model_extra["content_digest"]


def test_the_official_client_gets_its_own_kinds_of_errors(client):
    with pytest.raises(openai.NotFoundError, match="'stories' is"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="stories", prompt="a", max_tokens=511)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


def test_curl_gets_an_answer_and_a_stream(served):
    command = ["curl", "-sS", "--max-time", "60", "-H", "Content-Type: application/json"]
    body = {"model": "stories", "prompt": "Once", "max_tokens": 5, "stream": True}
    once = subprocess.run([*command, f"{served.address}/infer", "-d", '{"prompt": "Once"}'], capture_output=True)
    assert json.loads(once.stdout)["num_output_tokens"] == 128
    lines = subprocess.run(
        [*command, "-N", f"{served.address}/v1/completions", "-d", json.dumps(body)], capture_output=True, text=True
    ).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-2])


def test_health_answers_get_and_head(served):
    assert served.ask("/health") == (200, {"status": "ok"})
    assert served.raw(b"HEAD /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_the_health_check_of_the_docs_tells_a_server_that_answers_from_none(served):
    command = (ROOT / "docs" / "serve.md").read_text().split("HEALTHCHECK")[1].split(" CMD ")[1].split("\n```")[0]
    command = json.loads(command.split("\nCMD")[0].replace("\\\n", ""))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        unused = probe.getsockname()[1]
    for port, is_healthy in ((served.port, True), (unused, False)):
        done = subprocess.run([part.replace(":8000/", f":{port}/") for part in command], capture_output=True)
        assert (done.returncode == 0) == is_healthy, done.stderr


# --- ill will --------------------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize(
    ("path", "body", "options", "status", "code"),
    [
        ("/nowhere", None, {}, 404, "not_found"),
        ("/infer/", ASK, {}, 404, "not_found"),
        ("/docs", None, {}, 404, "not_found"),
        ("/openapi.json", None, {}, 404, "not_found"),
        ("/infer", None, {}, 405, "method_not_allowed"),
        ("/infer", None, {"method": "OPTIONS"}, 405, "method_not_allowed"),
        ("/infer", ASK, {"method": "FROBNICATE"}, 405, "method_not_allowed"),
        ("/health", ASK, {}, 405, "method_not_allowed"),
        ("/v1/models/x%00%ff%2f..", None, {}, 404, "model_not_found"),
        ("/infer", b"", {}, 400, "not_json"),
        ("/infer", b"\xff\xfe", {}, 400, "not_utf8"),
        ("/infer", b"[" * 19_000, {}, 400, "not_json"),
        ("/infer", b'{"prompt": "a", "top_p": NaN}', {}, 400, "not_json"),
        ("/infer", [1], {}, 400, "not_an_object"),
        ("/infer", {"prompt": 5}, {}, 400, "invalid_request"),
        ("/infer", {"prompt": "\ud800"}, {}, 400, "invalid_request"),
        ("/infer", {**ASK, "max_new_tokens": 10**30}, {}, 400, "too_many_tokens"),
        ("/infer", {**ASK, "max_new_tokens": -1}, {}, 400, "invalid_request"),
        ("/infer", {**ASK, "temperature": 1e308}, {}, 400, "invalid_request"),
        ("/infer", {"prompt": [512]}, {}, 400, "no_such_token"),
        ("/infer", {"prompt": [10**400]}, {}, 400, "not_json"),
        ("/infer", {"prompt": "a b " * 2000}, {}, 400, "context_length_exceeded"),
        ("/infer", b" " * 20_001, {}, 413, "body_too_large"),
        ("/infer", ASK, {"content_type": "text/plain"}, 415, "not_json"),
        ("/infer", ASK, {"content_type": ""}, 415, "not_json"),
        ("/infer", ASK, {"content_type": "application/json; charset=utf-16"}, 415, "not_json"),
        ("/infer", ASK, {"content_encoding": "gzip"}, 415, "compressed"),
        ("/infer", ASK, {"origin": "https://evil.example"}, 403, "origin_not_allowed"),
        ("/infer", ASK, {"origin": "null"}, 403, "origin_not_allowed"),
        ("/infer", ASK, {"host": "evil.example"}, 403, "host_not_allowed"),
        ("/v1/models", None, {"host": "127.0.0.1.evil.example:80"}, 403, "host_not_allowed"),
        ("/v1/completions", {"model": "stories", "n": 17}, {}, 400, "too_many_texts"),
        ("/v1/completions", {"model": "stories", "tools": [1]}, {}, 400, "invalid_request"),
    ],
)
def test_a_hostile_request_is_refused_in_json(served, path, body, options, status, code):
    found, reply = served.ask(path, body, **options)
    assert (found, reply["error"]["code"]) == (status, code)
    assert set(reply["error"]) == {"message", "type", "param", "code"}


@pytest.mark.security
@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000,  # more than a header may have
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip\r\n\r\n",
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_json_and_ended(served, data):
    last = served.raw(data).rpartition(b"HTTP/1.1 4")[2]  # HTTP/2 looks like two requests
    status, reply = parsed(b"HTTP/1.1 4" + last)
    assert (status, reply["error"]["code"]) == (400, "bad_http")


@pytest.mark.security
@pytest.mark.parametrize(
    "data",
    [
        b"GET /hea",
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\n",
        b'POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"pro',
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b'transfer-encoding: chunked\r\n\r\n4\r\n{"pr\r\n',
    ],
)
def test_a_request_that_does_not_come_to_its_end_is_given_up(served, data):
    """Limit: 1 s. Every byte comes in time for a limit between bytes, not for one of the whole."""
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        for byte in data:
            connection.sendall(bytes([byte]))
        began = time.monotonic()
        status, reply = parsed(everything(connection))
    assert (status, reply["error"]["code"]) == (408, "request_timeout")
    assert time.monotonic() - began < 8


def test_a_connection_that_says_nothing_is_ended(served):
    assert served.raw(b"") == b""


def test_a_body_without_a_length_is_cut_off_at_the_limit(served):
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    head = b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    status, reply = parsed(served.raw(head + b"transfer-encoding: chunked\r\n\r\n" + 6 * chunk))
    assert (status, reply["error"]["code"]) == (413, "body_too_large")


def test_requests_behind_each_other_are_answered_in_their_order(served):
    body = json.dumps(ASK).encode()
    head = b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    first = head + b"content-length: %d\r\n\r\n" % len(body) + body
    last = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    reply = served.raw(first + b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n" + last)
    assert [part.split()[0] for part in reply.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]


def test_a_second_request_behind_an_answer_has_to_come_in_time_too(served):
    body = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    reply = served.raw(
        body
        + b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    assert [part.split()[0] for part in reply.split(b"HTTP/1.1 ")[1:]] == [b"200", b"408"]


# --- many ------------------------------------------------------------------------------------------------------------


def hammer(served, number: int, seconds: float, new: int = 24) -> tuple[Counter, set]:
    """So many clients, each with a connection of its own; statuses, and (client, text)."""
    codes, texts = Counter(), set()

    def run(client: int) -> None:
        body = json.dumps({"prompt": f"The {client % 8} cats", "max_new_tokens": new}).encode()
        head = b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.port), 60) as connection, connection.makefile("rb") as lines:
            while time.monotonic() < until:
                connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
                status, length = int(lines.readline().split()[1]), 0
                while line := lines.readline().strip():
                    length = int(line.split()[1]) if line.lower().startswith(b"content-length") else length
                reply = json.loads(lines.read(length))
                codes[status] += 1
                if status == 200:
                    texts.add((client % 8, reply["text"]))

    until = time.monotonic() + seconds
    threads = [threading.Thread(target=run, args=(client,)) for client in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    return codes, texts


def test_eight_clients_at_once_get_their_own_texts(served, alone):
    codes, texts = hammer(served, 8, 1)
    assert set(codes) == {200}
    assert codes[200] >= 16
    assert texts == {(client, alone(f"The {client} cats", 24).text) for client in range(8)}


def rss_bytes(served) -> int:
    return int(Path(f"/proc/{served.job.pids[0]}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_64_clients_for_a_minute_and_10_000_requests_leave_no_memory_behind(fork_server, folder):
    """No answer but 200 and 429. The first 2,000 requests fill caches and pools; 10,000 more add next to nothing."""
    made = Served(fork_server, folder, "limits.max_waiting=16", "limits.max_running=32")
    codes, _ = hammer(made, 64, 60)
    assert set(codes) == {200, 429}
    hammer_count(made, 2000)
    before = rss_bytes(made)
    hammer_count(made, 10_000)
    grown = rss_bytes(made) - before
    print(f"answers to 64 clients: {dict(codes)}; {before} bytes, and {grown} more after 10,000 requests")
    assert grown < 4 << 20
    made.stop()


def hammer_count(served, number: int) -> None:
    done = 0
    while done < number:
        codes, _ = hammer(served, 16, 5, new=2)
        done += codes[200]


def test_who_finds_no_room_gets_429_and_when_to_come_back(fork_server, folder):
    """One text runs and one waits, both of one request."""
    made = Served(fork_server, folder, "limits.max_running=1", "limits.max_waiting=1", "limits.max_texts=2", "name=s")
    body = json.dumps(ASK).encode()
    head = b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", made.port), 60) as connection:
        connection.sendall(stream_head("s", 150, number=2))
        connection.recv(64)
        reply = made.raw(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"[DONE]" in everything_until(connection, b"[DONE]")
    assert b"retry-after: 1" in reply.lower()
    status, refused = parsed(reply)
    assert (status, refused["error"]["code"]) == (429, "too_many_requests")
    made.infer("Once", 1)
    made.stop()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_place(fork_server, folder, streams):
    """With one place, which three texts of 300 tokens had: the next one is answered long before they were done."""
    made = Served(fork_server, folder, "limits.max_running=1", "name=stories")
    began = time.monotonic()
    made.infer("Once", 300)
    whole_s = time.monotonic() - began
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", made.port), 10) as connection:
            connection.sendall(stream_head("stories", 300, streams=streams))
            if streams:
                connection.recv(100)
    began = time.monotonic()
    made.infer("Lily", 2)
    assert time.monotonic() - began < whole_s * 1.5
    made.stop()


def test_a_slow_reader_is_waited_for_by_nobody_and_given_up(fork_server, folder):
    """Its text is far more than the buffers of a socket hold; the others go on, and its connection is ended."""
    made = Served(fork_server, folder, "name=stories", "limits.send_timeout_s=0.3", "limits.max_texts=64")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", made.port))
        slow.sendall(stream_head("stories", 400, number=64))
        began = time.monotonic()
        assert made.infer("Lily", 4)["num_output_tokens"] == 4
        assert time.monotonic() - began < 10
        made.stop()  # nothing is under way any more, or SIGTERM would wait for the reader
        assert b"[DONE]" not in everything(slow)


# --- before and after ------------------------------------------------------------------------------------------------


def through_asgi(app, path: str, method: str = "GET") -> tuple[int, dict, dict]:
    """A request to the application itself, without a port: status, headers, JSON."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b"", "asgi": {}}
    asyncio.run(app({**scope, "http_version": "1.1", "root_path": ""}, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, json.loads(sent[1]["body"])


@pytest.mark.parametrize("status", ["loading", "draining"])
def test_nothing_but_health_is_answered_before_and_after(tmp_path, status):
    log = events.LineLog(tmp_path / "log", enabled=False)
    app = server.application(server.State(ServeConfig(checkpoint="x"), None, log, status=status))
    assert through_asgi(app, "/health")[0] == 200
    assert through_asgi(app, "/ready")[::2] == (503, {"status": status})
    for path, method in (("/infer", "POST"), ("/v1/models", "GET"), ("/v1/chat/completions", "POST")):
        found, headers, reply = through_asgi(app, path, method)
        assert (found, reply["error"]["code"], headers["retry-after"]) == (503, status, "2")


def test_only_the_right_token_is_right():
    token = "a" * 32
    for header in (b"Bearer " + b"a" * 32, b"bearer  " + b"a" * 32 + b" "):
        assert connections.is_right(header, token)
    for header in (b"", b"Bearer", b"Bearer " + b"a" * 31, b"Basic " + b"a" * 32, b"a" * 32, b"Bearer \xff\x00"):
        assert not connections.is_right(header, token)


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil", "2130706433")),
    ],
)
def test_which_addresses_are_of_this_machine_alone(host, is_ours):
    assert connections.is_loopback(host) == is_ours


def test_a_body_in_tiny_chunks_takes_no_more_than_its_turn():
    """However much has arrived: others have their turn after 16 KiB, which 2731 chunks of one byte fill."""
    config = ServeConfig(checkpoint="x", port=0)
    [listening] = connections.listen(config, token=None)
    pieces = []

    async def application(scope, receive, send):
        while (message := await receive()).get("more_body"):
            pieces.append(len(message["body"]))
        pieces.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"all here"})
        served.should_exit = True

    served = server._Server(server._uvicorn_config(application, config))
    with listening, socket.create_connection(listening.getsockname(), 10) as client:
        head = b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        client.sendall(head + b"1\r\n \r\n" * 9000 + b"0\r\n\r\n")  # all there before the server looks
        asyncio.run(served.serve([listening]))
        assert b"all here" in everything(client)
    assert sum(pieces) == 9000
    assert max(pieces) <= 2731


def test_a_body_in_very_many_chunks_is_refused(served):
    """Up to 16384 are taken, in each of two requests on one connection."""
    head = (
        b"POST /infer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
    )
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in json.dumps(ASK).encode().ljust(16_384))
    whole = b"\r\n" + chunks + b"0\r\n\r\n"
    assert served.raw(head + whole + head + b"connection: close\r\n" + whole).count(b"HTTP/1.1 200 OK") == 2
    status, reply = parsed(served.raw(head + b"\r\n" + chunks + b"1\r\n \r\n0\r\n\r\n"))
    assert (status, reply["error"]["code"]) == (400, "bad_http")


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_server_removes_its_own_socket_file_and_not_that_of_its_successor(tmp_path, is_ours):
    path = tmp_path / "s"
    config = ServeConfig(checkpoint="x", unix_socket=str(path))
    [made] = connections.listen(config, token=None)
    made.close()
    with socket.socket(socket.AF_UNIX) as successor:
        if not is_ours:
            path.unlink()
            time.sleep(0.02)  # longer than a tick of the file system's clock
            successor.bind(str(path))
        connections.remove_file(config)
    assert path.is_socket() == (not is_ours)


def test_the_module_is_not_imported_by_the_rest():
    """fastapi and uvicorn are an extra."""
    code = "import sys; import codex_accel.serve_schema, codex_accel.api; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run(["python", "-c", code], cwd=ROOT).returncode == 0
