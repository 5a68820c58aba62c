"""The log of a training run as curves."""

import json

import pytest

from codex_accel import curves
from codex_accel.errors import UserError

LINES = [
    {"step": 5, "split": "train", "loss": 4.0, "tokens_per_s": 100.0},
    {"step": 5, "split": "validation", "loss": 3.5},
    {"step": 10, "split": "train", "loss": "nan", "tokens_per_s": 90.0},
    {"step": 15, "split": "train", "loss": 2, "tokens_per_s": 80.0},
]


def run_dir(path, text: str | None = None):
    path.mkdir(parents=True)
    (path / "run.json").write_text("{}")
    (path / "metrics.ndjson").write_text("".join(json.dumps(x) + "\n" for x in LINES) if text is None else text)
    return path


def test_points_are_known_by_their_line(tmp_path):
    found = curves.read(run_dir(tmp_path / "run"))
    assert found.splits() == ["train", "validation"]
    assert found.points("train", "loss") == [(1, 5, 4.0), (4, 15, 2)]
    assert found.points("validation", "loss") == [(2, 5, 3.5)]
    assert found.points("validation", "tokens_per_s") == []
    assert (found.run, found.num_damaged, found.step) == ("run", 0, None)


def test_a_line_that_is_being_written_is_left_out_and_damaged_ones_are_counted(tmp_path):
    whole = json.dumps(LINES[0])
    text = f"{whole}\nnot JSON\n[1]\n{{}}\n\n{whole}\n{whole[:20]}"
    found = curves.read(run_dir(tmp_path / "run", text))
    assert list(found.lines) == [1, 6]
    assert found.num_damaged == 4


def test_numbers_that_are_none_by_json_or_beyond_floats_are_not_drawn(tmp_path):
    beyond = "1" + "0" * 309
    lines = ['{"step": 1, "split": "train", "loss": NaN}', f'{{"step": 2, "split": "train", "loss": {beyond}}}']
    found = curves.read(run_dir(tmp_path / "run", "".join(f"{line}\n" for line in lines)))
    assert found.num_damaged == 1
    assert list(found.lines) == [2]
    assert found.points("train", "loss") == []


def test_a_log_that_is_missing_is_told(tmp_path):
    (run_dir(tmp_path / "run") / "metrics.ndjson").unlink()
    with pytest.raises(UserError, match=r"metrics\.ndjson: cannot be read"):
        curves.read(tmp_path / "run")


@pytest.mark.parametrize(("model", "step"), [("final", None), ("checkpoints/step-000000010", 10), (".", None)])
def test_the_run_of_a_model_is_found_around_it(tmp_path, model, step):
    folder = run_dir(tmp_path / "run") / model
    folder.mkdir(parents=True, exist_ok=True)
    found = curves.of_model(folder)
    assert (found.run, found.step) == ("run", step)


def test_a_model_outside_of_a_run_has_no_curves(tmp_path):
    (tmp_path / "model").mkdir()
    assert curves.of_model(tmp_path / "model") is None


def test_lines_are_numbered_through_all_files_of_a_log(tmp_path):
    folder = run_dir(tmp_path / "run")
    whole = curves.read(folder)
    first, *rest = (folder / "metrics.ndjson").read_bytes().splitlines(keepends=True)
    (folder / "metrics.000001.ndjson").write_bytes(first)
    (folder / "metrics.ndjson").write_bytes(b"".join(rest))
    assert curves.read(folder) == whole
    assert len(whole.lines) > 2


def test_the_curves_of_a_real_run_are_its_log(chain):
    lines = [json.loads(line) for line in (chain / "run" / "metrics.ndjson").read_text().splitlines()]
    found = curves.of_model(chain / "run" / "final")
    assert list(found.lines.values()) == lines
    assert [step for _, step, _ in found.points("train", "loss")] == [1, 2, 3, 4]
    assert found.points("validation", "loss")
