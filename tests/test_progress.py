"""A progress bar is drawn by the main process on a terminal, and nowhere else."""

import contextlib
import os
import pty
import sys

import pytest

from codex_accel import progress


@contextlib.contextmanager
def terminal(monkeypatch):
    """Standard error as a terminal; yields what reads all that was drawn, up to a mark that it puts behind.

    No fixture: pytest puts its own standard error back between the phases of a test.
    """
    main, other = pty.openpty()
    stream = os.fdopen(other, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def drawn() -> str:
        stream.write("<end>")
        stream.flush()
        text = b""
        while b"<end>" not in text:
            text += os.read(main, 1 << 16)
        return text.decode().removesuffix("<end>")

    yield drawn
    stream.close()
    os.close(main)


def test_bar_shows_title_share_and_note_on_a_terminal(monkeypatch):
    with terminal(monkeypatch) as drawn:
        with progress.bar("train", total=20, done=5, unit="steps") as show:
            show(13, "loss 1.2345")
        text = drawn()
    assert "train" in text
    assert "13/20" in text
    assert "steps" in text
    assert "loss 1.2345" in text


def test_nothing_is_drawn_into_a_pipe(capsys):
    with progress.bar("train", total=20) as show:
        show(13, "loss 1.2345")
        show(14)
    assert capsys.readouterr() == ("", "")


def test_other_processes_draw_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with terminal(monkeypatch) as drawn:
        with progress.bar("train", total=20) as show:
            show(13, "")
        assert drawn() == ""


def test_error_inside_comes_out(monkeypatch):
    with terminal(monkeypatch), pytest.raises(KeyError), progress.bar("train", total=20):
        raise KeyError
