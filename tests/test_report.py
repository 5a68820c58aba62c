"""Every number of an evaluation stands in report.json; the other files repeat it."""

import csv
import json

import pytest
from evaluations import loss_line, of_losses, of_predictions, of_tasks, text_line
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import report

REPORT = {
    "metrics": {"loss": 1.5, "bits_per_byte": None, "compression": {"lzma": {"together": 2.25}}},
    "intervals": {"loss": {"low": -1.25, "high": 1.75}, "bits_per_byte": None},
    "name": "é",
}
SAMPLES = [loss_line(1, 5, 2.0, record_id="a"), loss_line(2, 9, 1e-17, record_id="ü")]


def read_table(folder) -> list[list[str]]:
    with open(folder / "report.csv", newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_report_is_what_was_measured_with_an_overview_of_the_samples(tmp_path):
    report.write(tmp_path, report=REPORT, samples=SAMPLES)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.pop("overview")["ends"] == {"ordered_by": ["loss"], "lowest": [2], "highest": [1]}
    assert written == REPORT


def test_table_has_a_row_for_each_number(tmp_path):
    report.write(tmp_path, report=REPORT, samples=SAMPLES)
    assert read_table(tmp_path) == [
        ["task", "metric", "value", "low", "high"],
        ["", "loss", "1.5", "-1.25", "1.75"],
        ["", "bits_per_byte", "", "", ""],
        ["", "compression.lzma.together", "2.25", "", ""],
    ]


def test_table_has_the_rows_of_each_task(tmp_path):
    lines = [text_line(n, "a b", ["a b" if n % 3 else "c"]) for n in range(30)]
    more = [text_line(n, "x", ["x"]) for n in range(2)]
    document, lines = of_tasks({"one": ("generate", lines, {"exact_match": {}}), "two": ("generate", more, {"f1": {}})})
    report.write(tmp_path, report=document, samples=lines)
    low, high = document["intervals"]["one"]["exact_match"].values()
    assert read_table(tmp_path)[1:] == [
        ["one", "exact_match", repr(20 / 30), repr(low), repr(high)],
        ["two", "f1", "1.0", "", ""],
    ]
    overview = json.loads((tmp_path / "report.json").read_text())["overview"]
    assert {task: overview[task]["num_samples"] for task in overview} == {"one": 30, "two": 2}


@pytest.mark.security
@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", "＋1", "－1", "＠1"])
def test_no_cell_is_a_formula_and_negative_numbers_stay_numbers(tmp_path, name):
    """OWASP, CSV Injection: the characters that begin a formula."""
    parts = {"metrics": {name: -0.5}, "intervals": {name: {"low": -1e-7, "high": -0.25}}}
    report.write(tmp_path, report=parts, samples=[])
    assert read_table(tmp_path)[1] == ["", f"'{name}", "-0.5", "-1e-07", "-0.25"]


def test_samples_are_one_line_each_in_order(tmp_path):
    report.write(tmp_path, report=REPORT, samples=iter(SAMPLES))
    lines = (tmp_path / "samples.ndjson").read_text().splitlines()
    assert [json.loads(line) for line in lines] == SAMPLES


@settings(max_examples=20)
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_is_one_line_for_any_reader(tmp_path_factory, texts):
    """Python's splitlines takes more characters for line ends than JSON lines have."""
    folder = tmp_path_factory.mktemp("report")
    lines = [text_line(number, text, [text]) for number, text in enumerate([*texts, "\u2028\x85\u2029\x1c\x0b"])]
    report.write(folder, report=of_predictions(lines, {"exact_match": {}}), samples=lines)
    found = [json.loads(line) for line in (folder / "samples.ndjson").read_text(encoding="utf-8").splitlines()]
    assert found == [{**line, "num_findings": 0} for line in lines]


def test_equal_evaluations_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, report=REPORT, samples=SAMPLES)
    for name in (*report.PAYLOAD, report.PAGE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_else_is_written(tmp_path):
    report.write(tmp_path, report=REPORT, samples=SAMPLES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*report.PAYLOAD, report.PAGE])


def test_number_that_json_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, report={"metrics": {"loss": float("nan")}}, samples=[])


def test_a_report_without_samples_can_be_written(tmp_path):
    report.write(tmp_path, report=REPORT, samples=[])
    assert json.loads((tmp_path / "report.json").read_text())["overview"]["num_samples"] == 0
    assert (tmp_path / "samples.ndjson").read_bytes() == b""


def test_ten_times_the_samples_do_not_make_a_larger_page(tmp_path):
    sizes = []
    for number in (1000, 10_000):
        lines = [loss_line(n, 2 + n % 500, 1 + (n * 7919 % number) / number) for n in range(number)]
        (tmp_path / str(number)).mkdir()
        report.write(tmp_path / str(number), report=of_losses(lines), samples=lines)
        sizes.append((tmp_path / str(number) / "report.html").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0] < 100_000
