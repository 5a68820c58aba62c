"""Two evaluations side by side: the same samples, each with itself, and nothing that does not compare."""

import json
import random

import pytest
from evaluations import choice_line, loss_line, of_losses, of_predictions, of_tasks, text_line, write

from codex_accel import comparison, metrics, scoring, uncertainty
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import CompareConfig

NAMES = {"exact_match": {}, "f1": {}}
WORDS = ["red", "green", "blue", "black"]


def answers(number: int = 40, *, seed: int = 0, right: float = 0.5) -> list[dict]:
    """Questions 1, 2, ... with random answers, of which a share is right."""
    rng = random.Random(seed)
    return [
        text_line(n, reference if rng.random() < right else rng.choice(WORDS), [reference])
        for n, reference in enumerate((WORDS[n % 4] + " sky" for n in range(number)), 1)
    ]


def config(**more) -> CompareConfig:
    return CompareConfig(**{"a": "a", "b": "b", "num_resamples": 300, **more})


def compared(a, b, **more) -> dict:
    evaluations = [comparison.read(path, verify=True, key=key) for key, path in (("a", a), ("b", b))]
    return comparison.compare(*evaluations, config(**more))


def predictions(folder, lines: list[dict], names: dict = NAMES, **settings):
    return write(folder, of_predictions(lines, names, **settings), lines)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_values_and_intervals_are_those_of_the_paired_bootstrap(tmp_path):
    a, b = answers(seed=1), answers(seed=2, right=0.8)
    document = compared(predictions(tmp_path / "a", a), predictions(tmp_path / "b", b), seed=3, confidence=0.9)
    assert document["differences"] == document["notes"] == []
    [part] = document["parts"].values()
    assert part["notes"] == []
    texts = [[metrics.Text(x["output"], tuple(x["references"])) for x in lines] for lines in (a, b)]
    options = {"seed": 3, "num_resamples": 300, "confidence": 0.9}
    for name, metric in metrics.load("generate", NAMES, config=config(), key="a").items():
        expected = uncertainty.paired(metric, *texts, **options)[name]
        found = part["metrics"][name]
        assert found["difference"] == expected.difference == pytest.approx(found["b"] - found["a"])
        assert (found["low"], found["high"], found["p_value"]) == (expected.low, expected.high, expected.p_value)
        assert found["low"] <= found["difference"] <= found["high"]


def test_values_are_those_of_the_reports(tmp_path):
    folders = [predictions(tmp_path / name, answers(seed=n)) for n, name in enumerate("ab")]
    [part] = compared(*folders)["parts"].values()
    for side, folder in zip("ab", folders, strict=True):
        reported = json.loads((folder / "report.json").read_text())["metrics"]
        assert {name: value[side] for name, value in part["metrics"].items()} == pytest.approx(reported)


def test_a_report_compared_with_itself_has_no_difference(tmp_path):
    folder = predictions(tmp_path / "a", answers())
    [part] = compared(folder, folder)["parts"].values()
    assert {(v["difference"], v["low"], v["high"], v["p_value"]) for v in part["metrics"].values()} == {(0, 0, 0, 1)}
    assert part["changed"]["num"] == 0


def test_a_clear_difference_is_marked_and_chance_is_not(tmp_path):
    base = predictions(tmp_path / "base", answers(100, right=0.2))
    better = predictions(tmp_path / "better", answers(100, right=0.9))
    lines = answers(100, right=0.2)
    lines[7] = text_line(8, "another answer", lines[7]["references"])
    other = predictions(tmp_path / "other", lines)
    [part] = compared(base, better)["parts"].values()
    assert part["metrics"]["exact_match"]["below_alpha"]
    assert part["metrics"]["exact_match"]["p_value"] < 0.01
    [part] = compared(base, other)["parts"].values()
    assert not part["metrics"]["exact_match"]["below_alpha"]


def test_a_metric_of_one_report_is_computed_for_both(tmp_path):
    a = predictions(tmp_path / "a", answers(), {"exact_match": {}})
    b = predictions(tmp_path / "b", answers(seed=1), {"f1": {}})
    [part] = compared(a, b)["parts"].values()
    assert set(part["metrics"]) == {"exact_match", "f1"}
    assert None not in (part["metrics"]["f1"]["a"], part["metrics"]["exact_match"]["b"])


def test_a_metric_with_other_settings_is_not_compared(tmp_path):
    a = predictions(tmp_path / "a", answers(), {"f1": {}, "exact_match": {}})
    b = predictions(tmp_path / "b", answers(seed=1), {"f1": {}, "exact_match": {"rules": "squad_v2"}})
    document = compared(a, b)
    [part] = document["parts"].values()
    assert set(part["metrics"]) == {"f1"}
    assert part["notes"] == ["exact_match was computed with other settings in b, so it is not compared."]
    assert {"key": "settings.metrics.exact_match.rules", "a": None, "b": "squad_v2"} in document["differences"]


def test_a_value_that_is_not_as_reported_is_told(tmp_path):
    lines = answers()
    document = of_predictions(lines, NAMES)
    document["metrics"]["f1"] += 0.125
    folder = write(tmp_path / "a", document, lines)
    [part] = compared(folder, folder)["parts"].values()
    assert [note.split()[:3] for note in part["notes"]] == [["f1", "of", "a"], ["f1", "of", "b"]]


# ------------------------------------------------------------------------------------------------------------- samples


def test_only_samples_of_both_are_compared_and_the_others_are_counted(tmp_path):
    a, b = answers(30), answers(30, seed=1)
    skipped = {"task": None, "line": 99, "skipped": "no reference"}
    folders = predictions(tmp_path / "a", a[5:]), predictions(tmp_path / "b", [*reversed(b[:28]), skipped])
    [part] = compared(*folders)["parts"].values()
    assert part["samples"] == {
        "num_both": 23, "num_only_a": 2, "num_only_b": 5, "num_skipped_a": 0, "num_skipped_b": 1,
        "num_other_prompt": 0, "num_other_references": 0,
    }  # fmt: skip
    expected = sum(x["output"] == x["references"][0] for x in a[5:28]) / 23
    assert part["metrics"]["exact_match"]["a"] == pytest.approx(expected)


def test_two_lines_with_one_id_are_told_apart_by_their_order(tmp_path):
    twice = [text_line(1, "red", ["red"]), text_line(1, "green", ["red"]), text_line(2, "blue", ["blue"])]
    [part] = compared(predictions(tmp_path / "a", twice), predictions(tmp_path / "b", twice[:2]))["parts"].values()
    assert (part["samples"]["num_both"], part["samples"]["num_only_a"]) == (2, 1)
    assert part["changed"]["num"] == 0


def test_other_prompts_and_references_of_one_sample_are_counted(tmp_path):
    b = [text_line(n, "red", ["blue"], prompt="another") for n in range(1, 11)]
    [part] = compared(predictions(tmp_path / "a", answers(10)), predictions(tmp_path / "b", b))["parts"].values()
    assert (part["samples"]["num_other_prompt"], part["samples"]["num_other_references"]) == (10, 10)


def test_changed_samples_come_most_changed_first(tmp_path):
    pairs = [
        ("red sky", "red sky"),
        ("green", "red"),
        ("red sky", "red"),
        ("x", "red sky"),
        ("red", "red rain"),
        ("y", "z"),
    ]
    a, b = ([text_line(n, pair[side], ["red sky"]) for n, pair in enumerate(pairs, 1)] for side in (0, 1))
    folders = predictions(tmp_path / "a", a), predictions(tmp_path / "b", b)
    [part] = compared(*folders, show=4)["parts"].values()
    changed = part["changed"]
    assert changed["num"] == 5
    assert [sample["line"] for sample in changed["samples"]] == [4, 3, 2, 5]
    assert changed["samples"][0]["output"] == ["x", "red sky"]
    assert changed["samples"][0]["scores"]["exact_match"] == [0.0, 1.0]
    assert changed["moves"]["exact_match"] == {"rises": 1, "falls": 1, "other": 0}


def test_choices_are_compared(tmp_path):
    a = [choice_line(n, [-1.0, -2.0, -3.0], n % 3) for n in range(9)]
    b = [choice_line(n, [-3.0, -2.0, -1.0] if n in (2, 3) else [-1.0, -2.0, -3.0], n % 3) for n in range(9)]
    folders = []
    for name, lines in (("a", a), ("b", b)):
        document, lines = of_tasks({"quiz": ("choice", lines, {"acc": {}})})
        folders.append(write(tmp_path / name, document, lines))
    part = compared(*folders)["parts"]["quiz"]
    assert (part["metrics"]["acc"]["a"], part["metrics"]["acc"]["b"]) == (pytest.approx(3 / 9), pytest.approx(3 / 9))
    assert [sample["predicted"] for sample in part["changed"]["samples"]] == [[0, 2], [0, 2]]
    assert part["changed"]["moves"]["acc"] == {"rises": 1, "falls": 1, "other": 0}


# --------------------------------------------------------------------------------------------------------------- tasks


def tasks(folder, names: str, **settings):
    found = {name: ("generate", answers(20, seed=len(name)), {"f1": {}}) for name in names.split()}
    document, lines = of_tasks(found, **settings)
    return write(folder, document, lines)


def test_tasks_of_one_report_only_are_named(tmp_path):
    document = compared(tasks(tmp_path / "a", "one two"), tasks(tmp_path / "b", "two three"))
    assert list(document["parts"]) == ["two"]
    assert document["notes"] == ["only a has the task one.", "only b has the task three."]


def test_reports_without_a_common_task_or_sample_are_refused(tmp_path):
    a, b = tasks(tmp_path / "a", "one"), tasks(tmp_path / "b", "two")
    with pytest.raises(UserError, match=r"nothing in common with a: one \(generate\) there, two \(generate\) here"):
        compared(a, b)
    lines = [loss_line(n, 9, 2.0) for n in range(5)]
    with pytest.raises(UserError, match="nothing in common"):
        compared(predictions(tmp_path / "c", answers(5)), write(tmp_path / "d", of_losses(lines), lines))
    other = [text_line(n, "red", ["red"]) for n in range(100, 105)]
    with pytest.raises(UserError, match="no sample in common"):
        compared(tmp_path / "c", predictions(tmp_path / "e", other))


def test_other_settings_and_digests_are_listed(tmp_path):
    document = compared(tasks(tmp_path / "a", "one"), tasks(tmp_path / "b", "one", context_length=256, num=None))
    assert document["differences"] == [{"key": "settings.context_length", "a": 512, "b": 256}]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}}, [("x.z", 2, 3)]),
        ({"x": {"y": 1}}, {"x": None}, [("x.y", 1, None)]),
        ({"x": 1}, {"x": {"y": 2}}, [("x.y", None, 2), ("x", 1, {"y": 2})]),
        ({"x": [1, 2]}, {"x": [1, 3], "w": 0}, [("x", [1, 2], [1, 3]), ("w", None, 0)]),
        ({"x": {}}, {}, []),
    ],
)
def test_differences_are_told_leaf_by_leaf(a, b, expected):
    assert [(one["key"], one["a"], one["b"]) for one in comparison.differences(a, b)] == expected


# -------------------------------------------------------------------------------------------------------------- losses


def documents(shift: float, number: int = 30) -> list[dict]:
    return [loss_line(n, 5 + 3 * n, 3 + n / 10 - shift * (n % 3)) for n in range(number)]


def test_losses_are_compared_by_document(tmp_path):
    a, b = documents(0), documents(0.25)
    folders = [write(tmp_path / name, of_losses(x), x) for name, x in (("a", a), ("b", b))]
    [part] = compared(*folders)["parts"].values()
    losses = [
        [scoring.Loss(x["nll"], x["num_target_tokens"], x["num_correct"], x["num_bytes"]) for x in y] for y in (a, b)
    ]
    expected = uncertainty.paired(metrics.losses(), *losses, seed=0, num_resamples=300, confidence=0.95)
    for name in ("loss", "perplexity", "bits_per_byte", "token_accuracy"):
        assert (part["metrics"][name]["a"], part["metrics"][name]["p_value"]) == (
            expected[name].a,
            expected[name].p_value,
        )
    assert part["metrics"]["loss"]["below_alpha"]
    assert part["changed"]["num"] == 20
    moved = [abs(one["nll"][1] - one["nll"][0]) for one in part["changed"]["samples"]]
    assert moved == sorted(moved, reverse=True)
    assert part["changed"]["moves"] == {"nll": {"rises": 0, "falls": 20, "other": 0}}


def test_rounding_is_no_change(tmp_path):
    a = documents(0)
    b = [{**line, "nll": line["nll"] * (1 + 3e-7)} for line in a]
    folders = [write(tmp_path / name, of_losses(x), x) for name, x in (("a", a), ("b", b))]
    [part] = compared(*folders)["parts"].values()
    assert part["changed"]["num"] == 0


def test_with_another_tokenizer_only_bits_per_byte_compare(tmp_path):
    a, b = documents(0), documents(0.25)
    b = [{**line, "num_target_tokens": 2 * line["num_target_tokens"]} for line in b]
    folders = [
        write(tmp_path / "a", of_losses(a), a),
        write(tmp_path / "b", of_losses(b, tokenizer="78" * 32), b),
    ]
    document = compared(*folders)
    [part] = document["parts"].values()
    assert [note.split(":")[0] for note in document["notes"]] == ["The tokenizers differ"]
    assert {name for name, value in part["metrics"].items() if value["compares"]} == {"bits_per_byte"}
    assert part["metrics"]["perplexity"]["difference"] is None
    assert part["metrics"]["perplexity"]["p_value"] is None
    assert part["metrics"]["bits_per_byte"]["low"] is not None
    assert part["samples"]["num_other_targets"] == 30


def test_bits_per_byte_of_a_part_are_not_known(tmp_path):
    lines = documents(0)
    document = of_losses(lines)
    document["metrics"]["bits_per_byte"] = None
    a, b = write(tmp_path / "a", document, lines), write(tmp_path / "b", of_losses(lines), lines)
    [part] = compared(a, b)["parts"].values()
    assert part["metrics"]["bits_per_byte"]["a"] is None


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_evaluation_is_refused(tmp_path):
    folder = predictions(tmp_path / "a", answers())
    path = folder / "samples.ndjson"
    path.write_bytes(path.read_bytes().replace(b"red sky", b"red sea", 1))
    with pytest.raises(UserError, match=r"a = .*is damaged.*samples\.ndjson: has changed"):
        comparison.read(folder, verify=True, key="a")


def test_lines_of_another_version_are_told(tmp_path):
    lines = answers(3)
    folder = write(tmp_path / "a", of_predictions(lines, NAMES), lines)
    (folder / "samples.ndjson").write_text('{"task": null, "scores": {}}\n')
    with pytest.raises(UserError, match=r"KeyError: 'record_id'.*Evaluate again"):
        comparison.read(folder, verify=False, key="a")


@pytest.mark.parametrize("name", ["scores", "output", "references", "prompt_sha256"])
def test_a_line_that_lacks_what_is_compared_is_told(tmp_path, name):
    lines = answers(3)
    folder = write(tmp_path / "a", of_predictions(lines, NAMES), lines)
    path = folder / "samples.ndjson"
    *kept, last = map(json.loads, path.read_text().splitlines())
    del last[name]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, last]))
    with pytest.raises(UserError, match=rf"KeyError: '{name}'.*Evaluate again"):
        comparison.read(folder, verify=False, key="a")


def test_another_artefact_is_refused(tiny):
    with pytest.raises(UserError, match="holds a dataset"):
        comparison.read(tiny / "dataset", verify=True, key="b")
