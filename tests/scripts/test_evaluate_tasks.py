"""scripts/evaluate.py on tasks and predictions, and after a kill."""

import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import run_script

from codex_accel import documents, journal, questions, tokenizer
from codex_accel import model as models
from codex_accel.errors import UserError
from codex_accel.files import sha256_file
from codex_accel.records import Part, Record
from codex_accel.tasks import Sample

CHOICE = "{kind: choice, prompt: '{{ q }}', choices: c, target: '{{ a }}'"


def evaluate(fork_server, output_dir: Path, *argv: object, **options) -> dict:
    job = fork_server.run("evaluate", [*map(str, argv), f"output_dir={output_dir}"], **options)
    assert set(job.codes) == {0}, job.output
    return json.loads((output_dir / "report.json").read_text())


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.ndjson").read_text().splitlines()]


def content_digest(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["content_digest"]


def written(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def loaded(stories):
    """(model, tokenizer) of stories260K."""
    return models.load(stories).eval(), tokenizer.load(stories)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Small files of three tasks."""
    folder = tmp_path_factory.mktemp("files")
    beginnings = ["Once upon a time", "Lily", "One day, a big dog", "Tom and Sue were", "The sun", "She", "Mom said"]
    written(folder / "text.jsonl", [{"q": text, "a": [" there was", " a"]} for text in beginnings])
    written(folder / "choice.jsonl", [
        {"q": "Once upon a", "c": ["time", "dog", "of of"], "a": "time"},
        {"q": "She went to the", "c": ["store and", "zzz"], "a": "0"},
        {"q": "He had a big red", "c": ["ball", "the", "run", "x"], "a": "ball"},
    ])  # fmt: skip
    return folder


def tasks_of(files: Path) -> str:
    text = f"{{file: {{path: {files}/text.jsonl}}, prompt: '{{{{ q }}}}', references: a, "
    text += "sampling: {max_new_tokens: 12, stop: ['.']}, metrics: {exact_match: {}, rouge: {}}}"
    return f"tasks={{text: {text}, choice: {CHOICE}, file: {{path: {files}/choice.jsonl}}}}}}"


@pytest.fixture(scope="module")
def report(fork_server, stories, files, tmp_path_factory) -> Path:
    """A report on both tasks, in small batches."""
    folder = tmp_path_factory.mktemp("report") / "r"
    evaluate(fork_server, folder, f"checkpoint={stories}", tasks_of(files), "batch_size=2", "self_check=3")
    return folder


# --- what is scored ---------------------------------------------------------------------------------------------------


def test_texts_are_those_of_generate_for_one_prompt(report, loaded):
    model, encoder = loaded
    for line in lines_of(report)[:7]:
        ids = torch.tensor([[encoder.bos_id, *encoder.encode([line["prompt"]])[0]]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=True
        )
        text = encoder.decode(made[0].tolist()).removeprefix(encoder.decode(ids[0].tolist()))
        assert line["output"] == text.partition(".")[0]
        assert line["finish_reason"] == ("stop" if "." in text else "length")
        assert line["num_prompt_tokens"] == ids.shape[1]


def test_choices_have_the_log_likelihood_of_their_tokens(report, loaded):
    """By one plain forward pass for each; prompt and choice encoded one after the other."""
    model, encoder = loaded
    lines = lines_of(report)[7:]
    assert [line["answer"] for line in lines] == [0, 0, 0]
    for line in lines:
        prompt = [encoder.bos_id, *encoder.encode([line["prompt"]])[0]]
        for choice, found in zip(line["choices"], line["loglikelihoods"], strict=True):
            whole = [encoder.bos_id, *encoder.encode([f"{line['prompt']} {choice}"])[0]]
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                log_p = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
            wanted = sum(log_p[n - 1, whole[n]].item() for n in range(len(prompt), len(whole)))
            assert found == pytest.approx(wanted, rel=1e-5)
        assert line["predicted"] == max(range(len(line["choices"])), key=line["loglikelihoods"].__getitem__)


def test_a_report_holds_the_tasks_by_name(report):
    found = json.loads((report / "report.json").read_text())
    lines = lines_of(report)
    accuracy = sum(line["predicted"] == line["answer"] for line in lines[7:]) / 3
    assert found["metrics"]["choice"]["acc"] == pytest.approx(accuracy)
    assert set(found["metrics"]["text"]) >= {"exact_match", "rouge1", "rouge2", "rougeL"}
    assert found["metrics"]["text"]["rouge1"] == pytest.approx(sum(s["scores"]["rouge1"] for s in lines[:7]) / 7)
    assert found["counts"]["text"]["num_scored"] == 7
    assert found["counts"]["choice"]["num_skipped"] == 0
    for name, task in found["metrics"].items():
        for metric, value in task.items():
            bounds = found["intervals"][name][metric]
            assert bounds is None or bounds["low"] - 1e-12 <= value <= bounds["high"] + 1e-12


def test_a_report_has_the_digest_of_each_file(report, files):
    digests = json.loads((report / "report.json").read_text())["digests"]
    wanted = {f"file of {name}": sha256_file(files / f"{name}.jsonl") for name in ("text", "choice")}
    assert digests | wanted == digests


def test_a_self_check_finds_the_same(report):
    checked = json.loads((report / "report.json").read_text())["self_check"]
    assert checked["text"] == {"num_samples": 3, "num_other_texts": 0, "num_other_without_near_tie": 0}
    assert checked["choice"]["num_choices"] == 3
    assert checked["choice"]["largest_loglikelihood_difference"] < 1e-4


def test_few_shot_prompts_reach_the_model(fork_server, stories, files, tmp_path):
    task = f"tasks.t={CHOICE}, few_shot: {{num: 1, separator: ' '}}, file: {{path: {files}/choice.jsonl}}}}"
    evaluate(fork_server, tmp_path / "r", f"checkpoint={stories}", task)
    for line in lines_of(tmp_path / "r"):
        assert sum(line["prompt"].count(q) for q in ("Once upon", "She went", "He had")) == 2


def test_prompt_and_completion_records_are_asked_as_they_were_trained_on(fork_server, stories, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"p": "Once upon a", "c": " time"}])
    task = f"tasks.t={{file: {{path: {path}, prompt: p, completion: c}}, sampling: {{max_new_tokens: 1}}}}"
    found = evaluate(fork_server, tmp_path / "r", f"checkpoint={stories}", task)
    [line] = lines_of(tmp_path / "r")
    assert (line["output"], line["references"]) == (" time", [" time"])
    assert found["metrics"]["t"]["exact_match"] == 1


def test_a_chat_is_rendered_and_ends_with_its_turn(fork_server, chain, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}[EOS]{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    turns = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "x"}]
    path = written(tmp_path / "a.jsonl", [{"m": turns}])
    file = f"{{path: {path}, messages: m, chat_template: {tmp_path}/t.jinja}}"
    task = f"tasks.t={{file: {file}, sampling: {{max_new_tokens: 2}}}}"
    found = evaluate(fork_server, tmp_path / "r", f"checkpoint={chain}/run", task)
    encoder = tokenizer.load(chain / "tokenizer")
    parts = ["user: def", "assistant: "]
    num_ids = sum(len(encoder.encode([part])[0]) for part in parts) + 1
    assert lines_of(tmp_path / "r")[0]["num_prompt_tokens"] in (num_ids, num_ids + 1)  # BOS before it
    assert "chat_template of t" in found["digests"]


@pytest.mark.parametrize("prompt", ["def", "def ", "a\n", ""])
def test_a_choice_has_the_ids_that_a_completion_has_in_training(shared, prompt):
    """Of a tokenizer that strips the white space around a text, too."""
    folders = [shared / "models" / "stories260K", shared / "tokenizers" / "sentencepiece_unigram_botchan.model"]
    choices = (" a ", "b", " c", "d ")
    sample = Sample("f", 1, "0" * 32, prompt, None, (), choices)
    for encoder in map(tokenizer.load, folders):
        for choice, found in zip(choices, questions._continuations(encoder, sample, ""), strict=True):
            record = Record("f", 1, (Part(prompt, False), Part(choice, True)))
            [whole], _ = documents.encode(encoder, [record], add_bos=True, add_eos=False)
            ((start, stop),) = whole.target_spans
            assert found.tolist() == whole.input_ids[start:stop].tolist()


def test_equal_samples_have_draws_of_their_own(fork_server, stories, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "Lily said", "a": "x"}] * 3)
    task = f"tasks.t={{file: {{path: {path}}}, prompt: '{{{{ q }}}}', target: '{{{{ a }}}}', "
    task += "sampling: {max_new_tokens: 24, temperature: 1.0}}"
    evaluate(fork_server, tmp_path / "r", f"checkpoint={stories}", task)
    lines = lines_of(tmp_path / "r")
    assert len({line["output"] for line in lines}) == 3
    assert len({line["sample_id"] for line in lines}) == 1


def test_prompts_without_bos_for_a_model_that_has_trained_without(fork_server, stories, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"p": "Once upon a", "c": " time"}])
    task = f"tasks.t={{file: {{path: {path}, prompt: p, completion: c}}, sampling: {{max_new_tokens: 1}}}}"
    lengths = []
    for add_bos in ("true", "false"):
        folder = tmp_path / add_bos
        evaluate(fork_server, folder, f"checkpoint={stories}", task, f"add_bos={add_bos}")
        lengths.append(lines_of(folder)[0]["num_prompt_tokens"])
    assert lengths[1] == lengths[0] - 1


# --- what is left out -------------------------------------------------------------------------------------------------


def test_long_prompts_are_told_skipped_or_cut(fork_server, chain, tmp_path):
    """The model has 32 positions."""
    path = written(tmp_path / "a.jsonl", [{"q": "a " * 60, "a": "b"}, {"q": "a", "a": "b"}])
    task = f"{{file: {{path: {path}}}, prompt: '{{{{ q }}}}', target: '{{{{ a }}}}', sampling: {{max_new_tokens: 4}}"
    argv = [f"checkpoint={chain}/run"]
    job = fork_server.run("evaluate", [*argv, f"tasks.t={task}}}", f"output_dir={tmp_path}/e"])
    assert job.codes == [2]
    assert f"{path}:1: a prompt of " in job.output
    assert "the model has room for 28 before the answer" in job.output
    found = evaluate(fork_server, tmp_path / "s", *argv, f"tasks.t={task}, on_long: skip}}")
    assert found["counts"]["t"] | {"num_samples": 2, "num_scored": 1, "num_skipped": 1} == found["counts"]["t"]
    assert "a prompt of" in lines_of(tmp_path / "s")[-1]["skipped"]
    found = evaluate(fork_server, tmp_path / "c", *argv, f"tasks.t={task}, on_long: truncate}}")
    assert found["counts"]["t"]["num_cut_prompts"] == 1
    first = lines_of(tmp_path / "c")[0]
    assert first["num_prompt_tokens"] == 28
    assert first["num_cut_tokens"] > 10


def test_bad_samples_stop_before_the_model_loads_or_are_counted(fork_server, chain, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}, {"q": "a"}, {"q": "a", "a": "c"}])
    task = f"tasks.t={{file: {{path: {path}}}, prompt: '{{{{ q }}}}', target: '{{{{ a }}}}', "
    task += "sampling: {max_new_tokens: 2}}"
    with pytest.raises(UserError, match=r"a.jsonl:2: no field 'a'"):
        run_script("evaluate", f"checkpoint={chain}/run", task, f"output_dir={tmp_path}/r")
    found = evaluate(fork_server, tmp_path / "r", f"checkpoint={chain}/run", task, "on_bad_sample=skip")
    assert found["counts"]["t"]["num_skipped"] == 1
    assert [line["line"] for line in lines_of(tmp_path / "r") if "skipped" in line] == [2]


def test_long_prompts_that_are_skipped_take_no_other_with_them(fork_server, stories, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "a " * 600, "c": ["b", "c"]}, {"q": "a", "c": ["", "b"]}])
    task = f"tasks.t={{kind: choice, file: {{path: {path}}}, prompt: '{{{{ q }}}}', choices: c, target: '1', "
    job = fork_server.run(
        "evaluate", [f"checkpoint={stories}", task + "delimiter: '', on_long: skip}", f"output_dir={tmp_path}/r"]
    )
    assert job.codes == [2]
    assert f"{path}:2: a choice without a token" in job.output
    assert "a.jsonl:1" not in job.output


def test_the_problems_of_all_tasks_are_told_at_once(chain, files, tmp_path):
    bad = "{file: {path: none.jsonl}, prompt: '{{', target: x, metrics: {rogue: {}}}"
    worse = f"{{file: {{path: {files}/text.jsonl}}, prompt: '{{{{ q }}}}', target: x, few_shot: {{num: 99}}}}"
    argv = [f"checkpoint={chain}/run", f"output_dir={tmp_path}/r"]
    with pytest.raises(UserError) as caught:
        run_script("evaluate", *argv, f"tasks={{a: {bad}, b: {worse}, c: {bad}}}")
    keys = [problem.split(": ")[1] for problem in caught.value.problems]
    assert keys == [f"tasks.{n}.{key}" for n in "ac" for key in ("file.path", "prompt")] + [
        f"tasks.{n}.metrics.rogue" for n in "ac"
    ]
    with pytest.raises(UserError) as caught:
        run_script("evaluate", *argv, f"tasks={{a: {worse}, b: {worse}}}")
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"tasks.{n}.few_shot.num" for n in "ab"]


def test_a_chat_without_a_template_stops_before_the_model_loads(fork_server, stories, files, tmp_path):
    task = f"tasks.t={{file: {{path: {files}/text.jsonl}}, prompt: '{{{{ q }}}}', references: a, chat: true}}"
    copy = tmp_path / "m"
    shutil.copytree(stories, copy)
    (copy / "model.safetensors").write_bytes(b"no weights")
    job = fork_server.run("evaluate", [f"checkpoint={copy}", task, f"output_dir={tmp_path}/r"])
    assert job.codes == [2]
    assert "has no chat template, which messages need" in job.output


def test_an_unknown_metric_is_told_with_its_key(chain, files, tmp_path):
    argv = [f"checkpoint={chain}/run", tasks_of(files), "tasks.text.metrics={rogue: {}}", f"output_dir={tmp_path}/r"]
    with pytest.raises(UserError, match=r"tasks.text.metrics.*rogue.*[Dd]id you mean 'rouge'"):
        run_script("evaluate", *argv)


# --- interrupted ------------------------------------------------------------------------------------------------------


def killed(fork_server, argv: list[str], output_dir: Path, *, after: int, **options) -> Path:
    """Kill an evaluation once `after` batches are done; returns its journal."""
    job = fork_server.start("evaluate", [*argv, f"output_dir={output_dir}"], **options)
    deadline = time.monotonic() + 60
    num_done = 0
    while num_done < after:
        assert job.alive(), job.output
        assert time.monotonic() < deadline
        found = list(output_dir.parent.glob(f"{journal.PREFIX}{output_dir.name}-*/*.ndjson"))
        num_done = sum(path.read_bytes().count(b"\n") for path in found)
        time.sleep(0.002)
    job.kill()
    while job.alive():
        time.sleep(0.01)
    assert not output_dir.exists()
    [place] = output_dir.parent.glob(f"{journal.PREFIX}{output_dir.name}-*")
    return place


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [(1, 1), (1, 2), (2, 1)])
def test_a_killed_evaluation_goes_on_to_the_same_report(fork_server, stories, files, report, tmp_path, first, then):
    argv = [f"checkpoint={stories}", tasks_of(files), "batch_size=2", "self_check=3"]
    place = killed(fork_server, argv, tmp_path / "r", after=2, num_processes=first)
    num_before = len(journal.read(place))
    job = fork_server.run("evaluate", [*argv, f"output_dir={tmp_path}/r"], num_processes=then)
    assert set(job.codes) == {0}, job.output
    assert f"go on    {num_before} of " in job.output
    assert (tmp_path / "r" / "samples.ndjson").read_bytes() == (report / "samples.ndjson").read_bytes()
    assert content_digest(tmp_path / "r") == content_digest(report)
    assert not place.exists()


def test_killed_losses_go_on_to_the_same_report(fork_server, chain, tmp_path):
    argv = [f"checkpoint={chain}/run", "batch_size=4"]
    killed(fork_server, argv, tmp_path / "r", after=5)
    evaluate(fork_server, tmp_path / "r", *argv)
    evaluate(fork_server, tmp_path / "whole", *argv)
    assert content_digest(tmp_path / "r") == content_digest(tmp_path / "whole")


def test_other_metrics_need_no_other_scores(fork_server, stories, files, tmp_path):
    """So that one that fails when all is done can be taken out."""
    argv = [f"checkpoint={stories}", tasks_of(files), "batch_size=1"]
    place = killed(fork_server, argv, tmp_path / "r", after=3)
    num_before = len(journal.read(place))
    more = "tasks.text.metrics={f1: {}}"
    job = fork_server.run("evaluate", [*argv, more, f"output_dir={tmp_path}/r"])
    assert job.codes == [0], job.output
    assert f"go on    {num_before} of " in job.output
    assert not place.exists()


def test_other_settings_take_nothing_from_a_journal(fork_server, chain, tmp_path):
    place = killed(fork_server, [f"checkpoint={chain}/run", "batch_size=4"], tmp_path / "r", after=2)
    job = fork_server.run(
        "evaluate", [f"checkpoint={chain}/run", "batch_size=4", "stride=16", f"output_dir={tmp_path}/r"]
    )
    assert job.codes == [0], job.output
    assert "go on" not in job.output
    assert f"{place} is of an unfinished evaluation with other settings" in job.output
    assert place.exists(), "it can still be gone on with"


def test_two_evaluations_into_one_folder_do_not_meet(fork_server, chain, tmp_path):
    argv = [f"checkpoint={chain}/run", "batch_size=1", f"output_dir={tmp_path}/r"]
    first = fork_server.start("evaluate", argv)
    while not list(tmp_path.glob(f"{journal.PREFIX}*/*.ndjson")):
        assert first.alive(), first.output
        time.sleep(0.01)
    second = fork_server.run("evaluate", argv)
    assert second.codes == [2]
    assert "process" in second.output
    assert first.wait() == [0], first.output


# --- predictions ------------------------------------------------------------------------------------------------------


def test_real_predictions_have_the_published_scores(shared, tmp_path):
    """../shared/data/metrics: text-davinci-001 on Self-Instruct, by sacrebleu, rouge_score and the script of SQuAD."""
    source = shared / "metrics" / "selfinstruct_textdavinci001.jsonl"
    wanted = json.loads((shared / "metrics" / "selfinstruct_textdavinci001.expected.json").read_text())
    run_script("evaluate", f"predictions={source}", f"output_dir={tmp_path}/r")
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    metrics = found["metrics"]
    assert metrics["bleu"] == pytest.approx(wanted["bleu"], abs=1e-6)
    assert metrics["rougeL"] == pytest.approx(wanted["rougeL_f"], abs=1e-6)
    assert metrics["exact_match"] * 100 == pytest.approx(wanted["em_squad_v1"], abs=1e-6)
    assert metrics["f1"] * 100 == pytest.approx(wanted["f1_squad_v1"], abs=1e-6)
    assert found["counts"]["num_scored"] == 252
    assert found["facts"]["bleu"]["signature"] == wanted["bleu_signature"]


def test_predictions_of_several_files_are_not_scored_as_those_of_the_first(tmp_path):
    for name in "ab":
        written(tmp_path / f"{name}.jsonl", [{"prediction": name, "reference": "a"}])
    with pytest.raises(UserError, match=r"predictions: .* are 2 files"):
        run_script("evaluate", f"predictions={tmp_path}/*.jsonl", f"output_dir={tmp_path}/r")


def test_a_value_that_there_is_not_is_called_so(tmp_path, capsys):
    path = written(tmp_path / "p.jsonl", [{"prediction": "a", "reference": "no number"}])
    run_script("evaluate", f"predictions={path}", f"output_dir={tmp_path}/r", "metrics={numeric_answer: {}}")
    assert re.search(r"^numeric_answer +not known$", capsys.readouterr().out, re.MULTILINE)


def test_predictions_without_references_are_told_or_counted(tmp_path):
    path = written(tmp_path / "p.jsonl", [{"prediction": "a", "reference": "a"}, {"prediction": "b"}])
    with pytest.raises(UserError, match=r"p.jsonl:2: no reference"):
        run_script("evaluate", f"predictions={path}", f"output_dir={tmp_path}/r")
    run_script("evaluate", f"predictions={path}", f"output_dir={tmp_path}/r", "on_bad_sample=skip")
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["counts"] == {"num_samples": 2, "num_scored": 1, "num_skipped": 1, "num_empty_outputs": 0}
    assert found["metrics"]["exact_match"] == 1


def test_empty_predictions_are_scored_and_counted(tmp_path):
    path = written(tmp_path / "p.jsonl", [{"prediction": "", "reference": "b"}, {"prediction": "b", "reference": "b"}])
    run_script("evaluate", f"predictions={path}", f"output_dir={tmp_path}/r", "metrics={exact_match: {}}")
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["metrics"] == {"exact_match": 0.5}
    assert found["counts"]["num_empty_outputs"] == 1


# --- recipe -----------------------------------------------------------------------------------------------------------


def test_the_recipe_of_tasks_runs_on_files_of_its_formats(fork_server, stories, shared, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sums = [json.loads(line) for line in (shared / "instruct" / "gsm8k_train.jsonl").read_text().splitlines()[:8]]
    short = [{"question": s["question"][:40], "answer": s["answer"][-12:]} for s in sums]
    written(data / "gsm8k_test.jsonl", short[:2])
    written(data / "gsm8k_train.jsonl", short)
    written(data / "hellaswag_val.jsonl", [
        {"activity_label": "Cooking", "ctx_a": "She has a pan.", "ctx_b": "she",
         "endings": ["puts an egg in it.", "flies away."], "label": "0"}
    ])  # fmt: skip
    written(data / "cnn_dailymail_test.jsonl", [{"article": "One day. " * 300, "highlights": "A day."}])
    pairs = [("the sun", "die Sonne"), ("a dog", "ein Hund"), ("the moon", "der Mond"), ("a cat", "eine Katze")]
    written(data / "wmt_en_de.jsonl", [{"translation": {"en": en, "de": de}} for en, de in pairs])
    root = Path(__file__).parents[2]
    argv = ["--config", str(root / "configs/tasks/evaluate.yaml"), f"checkpoint={stories}", "output_dir=r"]
    argv += [f"tasks.{name}.sampling.max_new_tokens=8" for name in ("gsm8k", "summary", "translation")]
    job = fork_server.run("evaluate", argv, cwd=tmp_path)
    assert job.codes == [0], job.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())["metrics"]
    assert set(found) == {"gsm8k", "hellaswag", "summary", "translation"}
    assert found["hellaswag"]["acc"] in (0, 1)
    assert all(math.isfinite(found["translation"][name]) for name in ("bleu", "chrf"))
