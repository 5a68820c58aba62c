"""Two training runs side by side."""

import json
import shutil
from pathlib import Path

import pytest

from codex_accel import run_comparison
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import CompareConfig

CONTENT = {"dataset": "d1", "tokenizer": "t1"}


def train(step: int, loss: float, **more) -> dict:
    return {"step": step, "split": "train", "loss": loss, "num_target_tokens": 100 * step, **more}


def validation(step: int, loss: float, accuracy: float) -> dict:
    return {"step": step, "split": "validation", "loss": loss, "token_accuracy": accuracy}


LINES = [
    *(train(step, 10 - step / 2) for step in range(1, 11)),
    validation(5, 4.0, 0.25), validation(10, 4.5, 0.375),
]  # fmt: skip


def make_run(
    path: Path, lines: list[dict] = LINES, *, content: dict = CONTENT, settings: str = "", packages: dict | None = None
) -> Path:
    """A run folder's three files in the form that train.py writes."""
    path.mkdir()
    (path / "metrics.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(f"output_dir: {path}\nseed: 0\noptimizer:\n  learning_rate: 0.001\n{settings}")
    parents = [
        {"kind": kind, "path": str(path), "manifest_digest": "m", "content_digest": d} for kind, d in content.items()
    ]
    provenance = {"time": str(path), "python": "3.11.7", "packages": packages or {"torch": "2.13.0"}}
    document = {"num_parameters": 1000, "parents": parents, "provenance": provenance}
    (path / "run.json").write_text(json.dumps(document))
    return path


def compared(a: Path, b: Path) -> dict:
    return run_comparison.compare(a, b, CompareConfig(a=str(a), b=str(b)))


def test_last_best_and_common_lines_stand_side_by_side(tmp_path):
    """The last common step is where the two can be held against each other at equal training."""
    b = [*LINES[:10], validation(5, 3.5, 0.5), validation(20, 3.75, 0.25), train(20, 1.0)]
    found = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", b))["splits"]
    assert found["validation"]["last"] == [
        {"step": 10, "loss": 4.5, "token_accuracy": 0.375}, {"step": 20, "loss": 3.75, "token_accuracy": 0.25},
    ]  # fmt: skip
    assert [one["step"] for one in found["validation"]["best"]] == [5, 5]
    assert [(one["step"], one["loss"]) for one in found["validation"]["at_last_common_step"]] == [(5, 4.0), (5, 3.5)]
    assert [one["step"] for one in found["train"]["last"]] == [10, 20]


def test_best_is_by_the_metric_that_the_run_names(tmp_path):
    settings = "checkpoint:\n  best_metric: token_accuracy\n"
    found = compared(make_run(tmp_path / "a", settings=settings), make_run(tmp_path / "b", settings=settings))
    assert found["best_metric"] == "token_accuracy"
    assert [one["step"] for one in found["splits"]["validation"]["best"]] == [10, 10]


def test_the_end_of_the_training_loss_is_a_mean(tmp_path):
    many = [train(step, float(step % 2)) for step in range(1, 41)]
    found = compared(make_run(tmp_path / "a", many), make_run(tmp_path / "b", [train(1, 3.0), train(2, "nan")]))
    assert found["splits"]["train"]["mean_loss_of_last_tenth"] == [0.5, 3.0]


def test_differences_of_configuration_and_surroundings_are_told_by_leaf(tmp_path):
    a = make_run(tmp_path / "a", settings="data: {block_size: 32}\n")
    b = make_run(
        tmp_path / "b", settings="data: {block_size: 64}\nmore: 1\n", packages={"torch": "2.14.0", "peft": "1"}
    )
    found = compared(a, b)
    assert found["configuration"] == [
        {"key": "data.block_size", "a": 32, "b": 64}, {"key": "more", "a": None, "b": 1},
    ]  # fmt: skip
    assert found["environment"] == [
        {"key": "packages.torch", "a": "2.13.0", "b": "2.14.0"}, {"key": "packages.peft", "a": None, "b": "1"},
    ]  # fmt: skip
    assert found["facts"] == found["notes"] == []


@pytest.mark.parametrize(
    ("kind", "words"), [("tokenizer", "do not compare"), ("dataset", "Evaluate both models on one")]
)
def test_other_contents_are_listed_and_what_follows_is_said(tmp_path, kind, words):
    found = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", content=CONTENT | {kind: "x"}))
    assert found["facts"] == [{"key": f"content.{kind}", "a": CONTENT[kind], "b": "x"}]
    assert len(found["notes"]) == 1
    assert words in found["notes"][0]


def test_a_run_without_evaluations_compares(tmp_path):
    found = compared(make_run(tmp_path / "a", LINES[:3]), make_run(tmp_path / "b"))["splits"]["validation"]
    assert (found["last"][0], found["best"][0]) == (None, None)
    assert found["at_last_common_step"] == [None, None]


@pytest.mark.parametrize("text", ["[]", "{}", '{"provenance": {}, "parents": [1]}', "no"])
def test_a_record_that_is_none_is_told(tmp_path, text):
    (make_run(tmp_path / "a") / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: is no record of a run"):
        compared(tmp_path / "a", make_run(tmp_path / "b"))


@pytest.mark.parametrize("section", ["null", "[loss]", "{best_metric: null}", "{best_metric: lost}"])
def test_a_section_that_was_edited_to_something_else_is_told(tmp_path, section):
    a, b = make_run(tmp_path / "a", settings=f"checkpoint: {section}\n"), make_run(tmp_path / "b")
    with pytest.raises(UserError, match=r"a/config\.yaml: checkpoint = .* names no best_metric of loss, .* Restore it"):
        compared(a, b)


def test_a_run_whose_settings_name_no_metric_is_measured_by_its_loss(tmp_path):
    found = compared(make_run(tmp_path / "a", settings="checkpoint: {keep_last: 3}\n"), make_run(tmp_path / "b"))
    assert found["best_metric"] == "loss"


def test_a_damaged_final_is_refused(chain, tmp_path):
    shutil.copytree(chain / "run", tmp_path / "run")
    path = tmp_path / "run" / "final" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"b = .*is damaged.*model\.safetensors"):
        compared(chain / "run", tmp_path / "run")
