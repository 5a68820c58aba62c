"""scripts/evaluate.py against values from outside, and its own promises."""

import csv
import json
import math
from pathlib import Path

import pytest
from conftest import load_script, run_script

from codex_accel.errors import UserError


def evaluate(fork_server, output_dir: Path, *argv: object) -> dict:
    job = fork_server.run("evaluate", [*map(str, argv), f"output_dir={output_dir}"])
    assert job.codes == [0], job.output
    return json.loads((output_dir / "report.json").read_text())


@pytest.mark.parametrize("index", [0, 1])
def test_an_external_model_gets_the_reference_values(fork_server, shared, tmp_path, index):
    """../shared/data/models/stories260K/reference.json: NLL and accuracy from a plain transformers forward pass."""
    model = shared / "models" / "stories260K"
    reference = json.loads((model / "reference.json").read_text())["nll"][index]
    (tmp_path / "text.txt").write_text(reference["text"], encoding="utf-8")
    report = evaluate(
        fork_server, tmp_path / "r", f"checkpoint={model}", f"file={{path: {tmp_path}/text.txt, unit: file}}"
    )
    metrics = report["metrics"]
    assert metrics["num_target_tokens"] == reference["predicted_tokens"]
    assert metrics["loss"] == pytest.approx(reference["mean_nll"], abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(reference["ppl"], rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(reference["token_accuracy"], abs=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(reference["bits_per_byte"], rel=1e-5)
    assert report["digests"]["unverified"]


def test_64_windows_of_alice_do_not_depend_on_the_batch_size(fork_server, shared, tmp_path):
    losses = []
    for batch_size in (1, 3, 16):
        report = evaluate(
            fork_server, tmp_path / str(batch_size), f"checkpoint={shared}/models/stories260K", "max_windows=64",
            f"file={{path: {shared}/text/alice_pg11_utf8.txt, unit: file}}", f"batch_size={batch_size}",
        )  # fmt: skip
        assert report["counts"]["num_windows_scored"] == 64
        losses.append(report["metrics"]["loss"])
    assert max(losses) - min(losses) < 1e-5


def test_what_is_scored_is_not_replaced_by_the_report(chain):
    for read in (chain / "run" / "final", chain / "dataset"):
        with pytest.raises(UserError, match="is read, or holds what is"):
            run_script("evaluate", f"checkpoint={chain}/run", f"output_dir={read}", "overwrite=true")
        assert (read / "manifest.json").exists()


@pytest.mark.distributed
def test_two_processes_give_the_report_of_one(fork_server, chain, tmp_path):
    argv = [f"checkpoint={chain}/run", f"output_dir={tmp_path}/two", "batch_size=64"]
    job = fork_server.run("evaluate", argv, num_processes=2)
    assert job.codes == [0, 0], job.output
    one = json.loads((chain / "report" / "report.json").read_text())
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-6)
    assert two["counts"] == one["counts"]
    assert two["metrics"]["num_target_tokens"] == one["metrics"]["num_target_tokens"]


def test_the_same_evaluation_has_the_same_content_digest(fork_server, chain, tmp_path):
    evaluate(fork_server, tmp_path / "again", f"checkpoint={chain}/run", "batch_size=64")
    digests = [
        json.loads((folder / "manifest.json").read_text())["content_digest"]
        for folder in (chain / "report", tmp_path / "again")
    ]
    assert digests[0] == digests[1]


def test_the_files_of_a_report_agree(chain):
    folder = chain / "report"
    report = json.loads((folder / "report.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.ndjson").read_text().splitlines()]
    rows = {row["metric"]: row for row in csv.DictReader((folder / "report.csv").read_text().splitlines())}
    assert float(rows["loss"]["value"]) == report["metrics"]["loss"]
    assert float(rows["loss"]["low"]) == report["intervals"]["loss"]["low"]
    assert len(samples) == report["counts"]["num_documents"]
    targets = sum(sample["num_target_tokens"] for sample in samples)
    assert targets == report["metrics"]["num_target_tokens"]
    assert math.fsum(s["nll"] for s in samples) / targets == pytest.approx(report["metrics"]["loss"], rel=1e-12)
    assert sum(s["num_bytes"] for s in samples) == report["metrics"]["num_bytes"]


def test_a_stride_gives_every_token_once_and_a_lower_loss(fork_server, chain, tmp_path):
    report = evaluate(fork_server, tmp_path / "r", f"checkpoint={chain}/run", "stride=16", "batch_size=64")
    plain = json.loads((chain / "report" / "report.json").read_text())
    assert report["metrics"]["num_target_tokens"] == plain["metrics"]["num_target_tokens"]
    assert report["counts"]["num_windows"] > 1.9 * plain["counts"]["num_windows"]


def test_another_tokenizer_is_refused(fork_server, chain, shared, tmp_path):
    argv = [f"checkpoint={shared}/models/stories260K", f"dataset={chain}/dataset", f"output_dir={tmp_path}/r"]
    job = fork_server.run("evaluate", argv)
    assert job.codes == [2], job.output
    assert "was made with the tokenizer" in job.output


def test_nothing_to_score_is_told_before_the_model_loads(chain, shared, tmp_path):
    with pytest.raises(UserError, match=r"names no dataset .* Give dataset=DIR"):
        run_script("evaluate", f"checkpoint={shared}/models/stories260K", f"output_dir={tmp_path}/r")


def test_a_bad_record_stops_the_evaluation(fork_server, chain, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    argv = [f"checkpoint={chain}/run", f"file.path={tmp_path}/bad.jsonl", f"output_dir={tmp_path}/r"]
    job = fork_server.run("evaluate", argv)
    assert job.codes == [2]
    assert "bad.jsonl:2: field 'text' is of type int, not text" in job.output
    assert not (tmp_path / "r").exists()


def test_an_existing_report_is_kept(chain):
    with pytest.raises(UserError, match="exists"):
        load_script("evaluate").main([f"checkpoint={chain}/run", f"output_dir={chain}/report"])
