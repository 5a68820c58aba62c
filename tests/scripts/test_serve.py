"""scripts/serve.py: what is refused before the model loads, where it listens, how it ends, what it logs."""

import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import run_script
from served import ASK, Served, everything, everything_until, kill_all, parsed, stream_head

from codex_accel import events, server
from codex_accel.errors import UserError
from codex_accel.serve_schema import ServeConfig

TOKEN = "correct-horse-battery-staple-0123"


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module", autouse=True)
def leave_nothing():
    yield
    kill_all()


def refused(*argv: object) -> str:
    """What is told, of a start in this process."""
    with pytest.raises(UserError) as caught:
        run_script("serve", *argv)
    return str(caught.value)


# --- before the model loads -------------------------------------------------------------------------------------------


def test_a_missing_framework_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    told = refused("checkpoint=nowhere")
    assert told == (
        "serving needs fastapi and uvicorn: fastapi: not installed. Run `pip install -r requirements-serve.txt`."
    )


@pytest.mark.security
def test_another_address_needs_a_token(fork_server, stories):
    job = fork_server.run("serve", [f"checkpoint={stories}", "host=0.0.0.0", "port=0"])
    assert job.codes == [2]
    what = "host: '0.0.0.0' is open to other machines, and CODEX_ACCEL_TOKEN is not set."
    assert job.output.startswith(f"error: command line: {what}")
    assert "listening" not in job.output


@pytest.mark.security
@pytest.mark.parametrize("token", ["", "short", "fifteen-letters", "a b" * 20, "ü" * 20])
def test_a_token_that_is_none_is_refused_and_not_shown(monkeypatch, stories, token):
    monkeypatch.setenv("CODEX_ACCEL_TOKEN", token)
    told = refused(f"checkpoint={stories}", "port=0")
    assert told.startswith("environment: CODEX_ACCEL_TOKEN: has")
    assert not token or token not in told


def test_a_port_in_use_is_told(stories):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(f"checkpoint={stories}", f"port={port}")
    assert told.startswith(f"command line: port: 127.0.0.1 port {port} cannot be listened on (Address already in use).")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["host=no.such.host.invalid"], "host: 'no.such.host.invalid' is no address of this machine"),
        (["safety.policy=nowhere.yaml"], "nowhere.yaml"),
        (["safety.bypass_reason="], "safety.bypass_reason: is empty"),
        (["log_prompts=true"], "log_prompts needs request_log"),
        (["request_log_max_bytes=2000"], "request_log_max_bytes needs request_log"),
        (["request_log=/dev/null/log"], "request_log: '/dev/null/log' cannot be written to ("),
        (["limits.max_new_tokens=5"], "sampling.max_new_tokens = 128"),
        (["limits.max_waiting=3"], "max_texts = 16 never fit into max_waiting = 3"),
        (["chat_template=nowhere.jinja"], "nowhere.jinja: cannot be read"),
        (["checkpoint=nowhere"], "checkpoint = 'nowhere': no such folder"),
    ],
)
def test_a_mistake_is_told(stories, arguments, words):
    assert words in refused(f"checkpoint={stories}", "port=0", *arguments)


def test_a_damaged_model_is_not_served(chain, tmp_path):
    folder = shutil.copytree(chain / "run" / "final", tmp_path / "final")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert "is damaged" in refused(f"checkpoint={folder}", "port=0")


# --- where it listens -------------------------------------------------------------------------------------------------


@pytest.mark.security
def test_with_a_token_all_addresses_are_served_to_who_knows_it(fork_server, chain):
    made = Served(fork_server, chain / "run", "host=0.0.0.0", CODEX_ACCEL_TOKEN=TOKEN)
    assert made.ask("/health")[0] == made.ask("/ready")[0] == 200
    for headers in ({}, {"authorization": f"Bearer {TOKEN[:-1]}"}, {"authorization": f"Basic {TOKEN}"}):
        status, reply = made.ask("/infer", ASK, **headers)
        assert (status, reply["error"]["code"]) == (401, "not_authorized")
        assert made.ask("/v1/models", **headers)[0] == 401
    status, reply = made.ask("/infer", ASK, authorization=f"Bearer {TOKEN}", host="models.example")
    assert (status, reply["model"]) == (200, "run")
    ready = made.ask("/ready")[1]
    digest = hashlib.sha256((chain / "run" / "final" / "manifest.json").read_bytes()).hexdigest()
    assert (ready["kind"], ready["manifest_digest"]) == ("model", digest)
    made.stop()
    assert TOKEN not in made.job.output


def test_loopback_of_both_kinds_is_served(fork_server, stories):
    made = Served(fork_server, stories, "host=localhost")
    families = [family for family, *_ in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)]
    assert made.job.output.splitlines()[0].count("http://") == len(set(families))
    assert made.infer("Once", 2)["num_output_tokens"] == 2
    made.stop()


def test_a_socket_file_is_open_to_its_owner_and_goes_with_the_server(fork_server, stories, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:  # of a server that was killed
        dead.bind(str(path))
    made = Served(fork_server, stories, f"unix_socket={path}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "cannot be listened on" in refused(f"checkpoint={stories}", f"unix_socket={path}")
    command = ["curl", "-sS", "--max-time", "30", "--unix-socket", str(path), "http://any.name/ready"]
    assert json.loads(subprocess.run(command, capture_output=True).stdout)["model"] == "stories260K"
    made.stop()
    assert not path.exists()


def test_an_origin_that_is_allowed_may_read_the_answers(fork_server, stories):
    made = Served(fork_server, stories, "allowed_origins=[https://a.example]", "allowed_hosts=[Box.local]")
    head = b"/infer HTTP/1.1\r\nhost: box.local:80\r\norigin: https://a.example\r\nconnection: close\r\n"
    assert b" 204 " in (reply := made.raw(b"OPTIONS " + head + b"\r\n")).splitlines()[0]
    assert b"access-control-allow-origin: https://a.example" in reply
    body = json.dumps(ASK).encode()
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    reply = made.raw(b"POST " + head + body)
    assert parsed(reply)[0] == 200
    assert b"access-control-allow-origin: https://a.example" in reply
    made.stop()


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_a_signal_lets_what_is_under_way_come_to_its_end(fork_server, stories):
    made = Served(fork_server, stories)
    with socket.create_connection(("127.0.0.1", made.port), 60) as connection:
        connection.sendall(stream_head("stories260K", 450))
        start = connection.recv(64)
        with socket.create_connection(("127.0.0.1", made.port), 60) as waiting:
            os.kill(made.job.pids[0], signal.SIGTERM)
            made.wait_for("SIGTERM: 1 requests under way")
            waiting.sendall(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert parsed(everything(waiting)) == (503, {"status": "draining"})
        reply = start + everything(connection)
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" in reply
    assert made.job.wait(30) == [0]


def test_what_does_not_end_in_time_is_cut_off_and_told_so(fork_server, stories):
    made = Served(fork_server, stories, "limits.drain_s=0.05", "limits.max_running=1")
    found = []
    waits = threading.Thread(target=lambda: found.append(made.ask("/infer", {"prompt": "Lily", "max_new_tokens": 480})))
    with socket.create_connection(("127.0.0.1", made.port), 60) as connection:
        connection.sendall(stream_head("stories260K", 450))
        start = connection.recv(64)
        waits.start()
        time.sleep(0.2)
        os.kill(made.job.pids[0], signal.SIGINT)
        reply = start + everything(connection)
        waits.join(30)
    assert b'"code":"draining"' in reply
    assert b"[DONE]" not in reply
    assert found[0][0] == 503
    assert made.job.wait(30) == [0]
    assert "requests were cut off" in made.job.output


def test_a_second_signal_ends_at_once(fork_server, stories):
    made = Served(fork_server, stories)
    with socket.create_connection(("127.0.0.1", made.port), 60) as connection:
        connection.sendall(stream_head("stories260K", 500))
        connection.recv(64)
        for _ in range(2):
            os.kill(made.job.pids[0], signal.SIGTERM)
            made.wait_for("SIGTERM: 1 requests")
        assert made.job.wait(10) == [128 + signal.SIGTERM]


# --- what it logs -----------------------------------------------------------------------------------------------------

KEY = "AKIA" + "QZ5XMV2PLJ7RK3TW"  # of the form of AWS, and of nobody


@pytest.mark.security
@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_if_asked_for_and_masked(fork_server, stories, tmp_path, log_prompts):
    log = tmp_path / "requests.ndjson"
    made = Served(fork_server, stories, f"request_log={log}", f"log_prompts={str(log_prompts).lower()}")
    prompt = f"Once upon a midnight, my key is {KEY} and"
    made.infer(prompt, 3)
    made.ask("/v1/completions", {"model": "stories260K", "prompt": [prompt, "x"], "max_tokens": 2})
    with socket.create_connection(("127.0.0.1", made.port), 60) as connection:
        connection.sendall(stream_head("stories260K", 2))
        everything_until(connection, b"[DONE]")
    made.ask("/infer", {"prompt": prompt, "max_new_tokens": 0})
    made.stop()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["route"], line["finish_reasons"]) for line in lines] == [
        ("/infer", ["length"]), ("/v1/completions", ["length", "length"]), ("/v1/completions", ["length"])
    ]  # fmt: skip
    assert KEY not in log.read_text() + made.job.output
    assert ("midnight" in log.read_text()) == log_prompts
    if log_prompts:
        assert lines[0]["prompts"] == ["Once upon a midnight, my key is [SECRET] and"]
        assert len(lines[1]["texts"]) == 2


def test_a_policy_masks_answers_and_a_bypass_is_told(fork_server, stories, tmp_path):
    (tmp_path / "policy.yaml").write_text("version: t\nrules:\n- {id: time, action: redact, literals: [time]}\n")
    made = Served(fork_server, stories, f"safety.policy={tmp_path}/policy.yaml")
    reply = made.infer("Once", 20)
    assert reply["text"].startswith(" upon a [SECRET],")
    assert (reply["num_findings"], reply["tokens"]) == (1, None)
    digest = hashlib.sha256((tmp_path / "policy.yaml").read_bytes()).hexdigest()
    assert made.ask("/ready")[1]["masking"] == {"policy": "t", "sha256": digest, "bypass_reason": None}
    made.stop()
    reason = "safety.bypass_reason=a test of it"
    log = tmp_path / "requests.ndjson"
    made = Served(fork_server, stories, f"safety.policy={tmp_path}/policy.yaml", reason, f"request_log={log}")
    assert made.infer("Once", 20)["text"].startswith(" upon a time,")
    nothing = {"policy": None, "sha256": None, "bypass_reason": "a test of it"}
    assert made.ask("/ready")[1]["masking"] == nothing
    made.stop()
    assert "secrets are not masked: a test of it" in made.job.output
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["bypass", "request"]
    assert lines[0]["message"] == "secrets are not masked: a test of it"


def test_what_a_full_disk_does_not_take_of_the_log_is_bounded_and_counted(tmp_path):
    """40 lines of 100 kB and no room: a mebibyte of them waits, the oldest are dropped, and a line says how many."""
    path = tmp_path / "requests.ndjson"
    log = server._request_log(ServeConfig(checkpoint="x", request_log=str(path)))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        for number in range(40):
            events.event(log, "request", "x" * 100_000, number=number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_text() == ""
    events.event(log, "request", "answered", number=40)
    dropped, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(30, 41))
    assert (dropped["kind"], dropped["num_lines"]) == ("dropped", 30)


def test_a_log_with_a_limit_goes_on_in_another_file(fork_server, stories, tmp_path):
    log = tmp_path / "requests.ndjson"
    made = Served(fork_server, stories, f"request_log={log}", "request_log_max_bytes=1024")
    for _ in range(5):
        made.infer("Once", 1)
    made.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requests.000001.ndjson", "requests.ndjson"]
    assert [json.loads(line.text)["route"] for line in events.read(log)] == ["/infer"] * 5
