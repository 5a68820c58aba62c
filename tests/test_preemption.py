"""A run that is told to stop stops at a boundary; told twice, at once; and it does not outlive its launcher."""

import json
import os
import signal
import time
import traceback

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from codex_accel import preemption, processes


@pytest.fixture
def listener():
    listener = preemption.Listener()
    yield listener
    listener.close()


def in_child(function) -> int:
    """Run `function` in a forked process; its wait status, with code 0 if it returns."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def survives_its_parent() -> bool:
    """Whether a listener, made below a process that then ends, goes on without a stop."""
    ready, result = os.pipe(), os.pipe()

    def launcher() -> None:
        if os.fork() == 0:
            listener = preemption.Listener()
            parent = os.getppid()
            assert not listener.told_to_stop()
            os.write(ready[1], b"r")
            while os.getppid() == parent:
                time.sleep(0.001)
            os.write(result[1], json.dumps([listener.told_to_stop(), listener.reason]).encode())
            os._exit(0)
        os.read(ready[0], 1)

    assert in_child(launcher) == 0
    told, reason = json.loads(os.read(result[0], 100))
    for descriptor in (*ready, *result):
        os.close(descriptor)
    assert reason == ("launcher died" if told else "")
    return not told


def test_nothing_is_heard_before_a_signal(listener):
    assert not listener.told_to_stop()
    assert listener.reason == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_asks_and_names_itself(listener, number):
    os.kill(os.getpid(), number)
    assert listener.told_to_stop()
    assert listener.reason == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_stops_at_once(number):
    def told_twice() -> None:
        preemption.Listener()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), number)
        time.sleep(5)

    assert in_child(told_twice) == -number


def test_close_puts_the_handlers_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    listener = preemption.Listener()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
    listener.close()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


@pytest.mark.parametrize("variable", preemption.LAUNCHER_VARIABLES)
def test_death_of_the_launcher_is_noticed(monkeypatch, variable):
    """`accelerate launch` and `torchrun` set these; SIGTERM to the former leaves its child alive and unsignalled."""
    for name in preemption.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "no")
    assert not survives_its_parent()


def test_run_outlives_the_shell_that_started_it(monkeypatch):
    """`nohup python scripts/train.py &` and a log-out must not stop the run."""
    for name in preemption.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert survives_its_parent()


def test_alone_the_flag_is_its_own_answer():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert processes.any_process(accelerator, True) is True
    assert processes.any_process(accelerator, False) is False
    AcceleratorState._reset_state(reset_partial_state=True)


def test_marker_says_where_and_why(tmp_path):
    preemption.write_marker(tmp_path, step=7, reason="SIGTERM")
    assert json.loads((tmp_path / "preempted").read_text()) == {"step": 7, "reason": "SIGTERM"}
