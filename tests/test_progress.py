"""A progress bar is drawn by the main process on a terminal, and nowhere else."""

import contextlib
import os
import pty
import re
import sys

import pytest
import torch

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


STEP = {"loss": 3.2124, "learning_rate": 3e-4, "tokens_per_s": 12088.3}
CPU = torch.device("cpu")


def test_note_of_a_step_has_loss_rate_speed_and_peak_memory():
    pattern = r"loss 3\.2124  lr 3\.0e-04  12,088 tokens/s  peak \d+\.\d GB"
    assert re.fullmatch(pattern, progress.note(STEP, CPU))


def test_note_has_mfu_only_where_it_is_known():
    assert "  MFU 41 %  " in progress.note({**STEP, "mfu": 0.412}, CPU)
    assert "MFU" not in progress.note(STEP, CPU)


def test_peak_memory_on_a_cpu_is_that_of_the_process():
    with open("/proc/self/status") as stream:
        [high_water] = re.findall(r"^VmHWM:\s+(\d+) kB", stream.read(), re.MULTILINE)
    assert progress.peak_bytes(CPU) == pytest.approx(int(high_water) * 1024, rel=0.05)


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_bar_keeps_to_one_line_of_a_narrow_terminal_and_cuts_no_number(monkeypatch, width):
    note = progress.note({**STEP, "mfu": 0.412}, CPU)
    with terminal(monkeypatch) as drawn:
        monkeypatch.setenv("COLUMNS", str(width))
        with progress.bar("train", total=100_000, done=99_990, unit="steps") as show:
            show(99_999, note)
        text = drawn()
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).strip() for frame in re.split("[\r\n]+", text)]
    shown = [frame for frame in frames if "99999/100000" in frame]
    assert shown
    assert all(len(frame) <= width for frame in frames)
    for frame in shown:
        kept = [part for part in note.split("  ") if part in frame]
        assert frame.endswith("  ".join(kept))
        assert len(kept) >= {40: 0, 80: 3, 120: 5, 160: 5}[width]
        assert ("loss" in frame) == bool(kept)
