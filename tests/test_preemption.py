"""A run that is told to stop stops at a boundary; told twice, at once; and it does not outlive its launcher."""

import ctypes
import json
import os
import signal
import threading
import time

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import code_of, fork

from codex_accel import preemption, processes


@pytest.fixture
def listener():
    listener = preemption.Listener()
    yield listener
    listener.close()


def in_child(function) -> int:
    """Run `function` in a forked process; its exit code, 0 if it returns."""
    return code_of(fork(function))


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


def without_launcher(monkeypatch) -> None:
    for name in preemption.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def tell_twice(listener: preemption.Listener, number: int) -> None:
    """SIGTERM, and once that is heard, `number`; two that wait at the same time may reach a process as one."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not listener.reason:
        time.sleep(0.001)
    os.kill(os.getpid(), number)


def block_in_a_lock() -> None:
    """Wait where Python's own handlers never come to run, as in a collective: the lock is taken twice."""
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_stops_at_once_whatever_the_process_waits_for(monkeypatch, number):
    without_launcher(monkeypatch)

    def told_twice() -> None:
        listener = preemption.Listener()
        threading.Thread(target=tell_twice, args=[listener, number], daemon=True).start()
        block_in_a_lock()

    assert in_child(told_twice) == 128 + number


def test_two_signals_of_one_wave_are_one(monkeypatch):
    """A service manager signals launcher and process alike, and the launcher passes its own on."""
    monkeypatch.setenv(preemption.LAUNCHER_VARIABLES[0], "no")
    monkeypatch.setattr(preemption, "SAME_WAVE_S", 60.0)

    def told_twice() -> None:
        with preemption.Listener() as listener:
            tell_twice(listener, signal.SIGINT)
            assert listener.told_to_stop()
        assert listener.reason == "SIGTERM"

    assert in_child(told_twice) == 0


def test_under_a_launcher_a_signal_after_the_wave_stops_at_once(monkeypatch):
    monkeypatch.setenv(preemption.LAUNCHER_VARIABLES[0], "no")
    monkeypatch.setattr(preemption, "SAME_WAVE_S", 0.01)

    def told_until_it_ends() -> None:
        preemption.Listener()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(told_until_it_ends) == 128 + signal.SIGTERM


def test_it_hears_on_when_the_reader_of_its_output_has_gone(monkeypatch):
    """`train.py 2>&1 | tee log`: Ctrl-C ends tee first."""
    without_launcher(monkeypatch)

    def told_twice() -> None:
        readable, writable = os.pipe()
        os.dup2(writable, 2)
        os.close(readable)
        listener = preemption.Listener()
        threading.Thread(target=tell_twice, args=[listener, signal.SIGTERM], daemon=True).start()
        block_in_a_lock()

    assert in_child(told_twice) == 128 + signal.SIGTERM


def test_a_start_up_ends_at_the_first_signal_and_leaves_the_marker(monkeypatch, tmp_path):
    without_launcher(monkeypatch)
    (tmp_path / "checkpoints" / "step-000000012").mkdir(parents=True)

    def told_once() -> None:
        listener = preemption.Listener()
        listener.start_up(tmp_path)
        os.kill(os.getpid(), signal.SIGUSR1)
        block_in_a_lock()

    assert in_child(told_once) == preemption.EXIT_CODE
    assert json.loads((tmp_path / "preempted").read_text()) == {"step": 12, "reason": "SIGUSR1"}


def test_a_signal_just_before_the_start_up_ends_it(monkeypatch, tmp_path):
    without_launcher(monkeypatch)

    def told_once() -> None:
        listener = preemption.Listener()
        os.kill(os.getpid(), signal.SIGTERM)
        listener.start_up(None)
        block_in_a_lock()

    assert in_child(told_once) == preemption.EXIT_CODE
    assert not list(tmp_path.iterdir())


def test_processes_without_a_launcher_agree_after_their_start_up(monkeypatch, tmp_path):
    """One that ended alone would leave the other waiting for it for half an hour."""
    without_launcher(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def told_once() -> None:
        with preemption.Listener() as listener:
            listener.start_up(tmp_path)
            os.kill(os.getpid(), signal.SIGTERM)
            assert listener.told_to_stop()

    assert in_child(told_once) == 0


def test_a_start_up_ends_when_its_launcher_dies(monkeypatch, tmp_path):
    """Workers of torchrun wait for its store without end (`torch.distributed.init_process_group`)."""
    monkeypatch.setenv(preemption.LAUNCHER_VARIABLES[0], "no")
    readable, writable = os.pipe()

    def launcher() -> None:
        ready, go = os.pipe()
        if os.fork() == 0:
            preemption.Listener().start_up(tmp_path)
            os.write(go, b"r")
            block_in_a_lock()
        os.read(ready, 1)

    assert in_child(launcher) == 0
    os.close(writable)  # the worker, which has inherited it, is the last to have it
    assert os.read(readable, 1) == b""
    os.close(readable)
    assert json.loads((tmp_path / "preempted").read_text()) == {"step": 0, "reason": "launcher died"}


def test_close_puts_the_handlers_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    listener = preemption.Listener()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
    listener.close()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


@pytest.mark.parametrize("variable", preemption.LAUNCHER_VARIABLES)
def test_death_of_the_launcher_is_noticed(monkeypatch, variable):
    """`accelerate launch` and `torchrun` set these; SIGTERM to the former leaves its child alive and unsignalled."""
    without_launcher(monkeypatch)
    monkeypatch.setenv(variable, "no")
    assert not survives_its_parent()


def test_run_outlives_the_shell_that_started_it(monkeypatch):
    """`nohup python scripts/train.py &` and a log-out must not stop the run."""
    without_launcher(monkeypatch)
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
