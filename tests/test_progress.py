"""A progress bar is drawn by the main process on a terminal, and nowhere else."""

import os
import pty
import sys

import pytest

from codex_accel import progress


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal; yields what reads all that was drawn."""
    main, other = pty.openpty()
    stream = os.fdopen(other, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    os.set_blocking(main, False)

    def drawn() -> str:
        stream.flush()
        try:
            return os.read(main, 1 << 16).decode()
        except BlockingIOError:
            return ""

    yield drawn
    stream.close()
    os.close(main)


def test_bar_shows_title_share_and_note_on_a_terminal(terminal):
    with progress.bar("train", total=20, done=5, unit="steps") as show:
        show(13, "loss 1.2345")
    text = terminal()
    assert "train" in text
    assert "13/20" in text
    assert "steps" in text
    assert "loss 1.2345" in text


def test_nothing_is_drawn_into_a_pipe(capsys):
    with progress.bar("train", total=20) as show:
        show(13, "loss 1.2345")
        show(14)
    assert capsys.readouterr() == ("", "")


def test_other_processes_draw_nothing(terminal, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress.bar("train", total=20) as show:
        show(13, "")
    assert terminal() == ""


def test_error_inside_comes_out(terminal):
    with pytest.raises(KeyError), progress.bar("train", total=20):
        raise KeyError
