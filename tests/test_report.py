"""Every number of an evaluation stands in report.json; the other files repeat it."""

import csv
import json

import pytest

from codex_accel import report

REPORT = {"metrics": {"loss": 1.5, "bits_per_byte": None, "compression": {"lzma": {"together": 2.25}}}, "name": "é"}
SAMPLES = [{"record_id": "a", "nll": 0.1}, {"record_id": "ü", "nll": 1e-17}]


def test_report_is_what_was_measured(tmp_path):
    report.write(tmp_path, report=REPORT, samples=SAMPLES)
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT


def test_table_has_a_row_for_each_number(tmp_path):
    report.write(tmp_path, report=REPORT, samples=SAMPLES)
    with open(tmp_path / "report.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [["metric", "value"], ["loss", "1.5"], ["bits_per_byte", ""], ["compression.lzma.together", "2.25"]]


def test_samples_are_one_line_each_in_order(tmp_path):
    report.write(tmp_path, report=REPORT, samples=iter(SAMPLES))
    lines = (tmp_path / "samples.ndjson").read_text().splitlines()
    assert [json.loads(line) for line in lines] == SAMPLES


def test_equal_evaluations_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, report=REPORT, samples=SAMPLES)
    for name in report.PAYLOAD:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_else_is_written(tmp_path):
    report.write(tmp_path, report=REPORT, samples=SAMPLES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(report.PAYLOAD)


def test_number_that_json_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, report={"metrics": {"loss": float("nan")}}, samples=[])
