"""Records become samples by templates, and what becomes none is located."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import config as configuration
from codex_accel import predictions, sources, tasks
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig
from codex_accel.schema import Source

QA = {"prompt": "Q: {{ question }}\nA:", "target": "{{ answer }}"}


def written(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path, **task) -> tuple[list[tasks.Sample], list[tasks.Bad]]:
    file = {"path": str(path), **task.pop("file", {})}
    values = {"checkpoint": "c", "output_dir": "o", "tasks": {"t": {"file": file, **task}}}
    config = configuration.build(EvaluateConfig, values, {}, [])
    return tasks.read("t", config.tasks["t"], tasks.resolve(config)["t"])


@pytest.fixture
def sums(tmp_path) -> Path:
    """Ten questions with their answers."""
    return written(tmp_path / "sums.jsonl", [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(10)])


# --- prompts --------------------------------------------------------------------------------------------------------


def test_a_template_makes_prompt_and_reference(sums):
    samples, bad = read(sums, **QA)
    assert [(s.line, s.prompt, s.references) for s in samples[:2]] == [
        (1, "Q: 0 + 1?\nA:", ("1",)),
        (2, "Q: 1 + 1?\nA:", ("2",)),
    ]
    assert not bad


def test_prompt_and_completion_need_no_template(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "Say hi. ", "a": "hi"}])
    [sample], _ = read(path, file={"prompt": "q", "completion": "a"})
    assert (sample.prompt, sample.references, sample.messages) == ("Say hi. ", ("hi",), None)


def test_the_last_message_is_the_reference(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    [sample], bad = read(written(tmp_path / "a.jsonl", [{"m": turns}]), file={"messages": "m"})
    assert sample.messages == (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert sample.references == ("d",)
    assert not bad


def test_nested_references_and_choices_are_expressions(tmp_path):
    record = {"q": "x", "answers": {"text": ["a", "b"]}, "choices": {"text": ["one", "two"]}, "right": "two", "w": 3}
    path = written(tmp_path / "a.jsonl", [record])
    [sample], _ = read(path, prompt="{{ q }}", references="answers.text", weight="w / 2")
    assert (sample.references, sample.weight) == (("a", "b"), 1.5)
    [sample], _ = read(path, kind="choice", prompt="{{ q }}", choices="choices.text", target="{{ right }}")
    assert (sample.choices, sample.answer) == (("one", "two"), 1)


def test_choices_may_be_put_together_and_the_right_one_a_number(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "a": "A", "b": "B", "n": 1}])
    [sample], _ = read(path, kind="choice", prompt="{{ q }}", choices="[a, b]", target="{{ n }}")
    assert (sample.choices, sample.answer, sample.references) == (("A", "B"), 1, ("B",))


def test_text_of_a_record_is_no_template(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"question": "{{ answer }}{% raw %}", "answer": "7"}])
    [sample], _ = read(path, **QA)
    assert sample.prompt == "Q: {{ answer }}{% raw %}\nA:"


def test_samples_are_spread_over_the_file(sums):
    samples, _ = read(sums, **QA, max_samples=4)
    assert [sample.line for sample in samples] == [1, 4, 7, 10]


@given(number=st.integers(0, 30), wanted=st.none() | st.integers(0, 40))
def test_spread_takes_so_many_in_order(number, wanted):
    found = tasks.spread(range(number), wanted)
    assert found == sorted(set(found))
    assert len(found) == (number if wanted is None else min(number, wanted))


def test_a_template_may_print_nothing_for_an_absent_field(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "a": "b"}])
    [sample], _ = read(path, prompt="{{ ctx if ctx is defined }}{{ q }}", target="{{ a }}")
    assert sample.prompt == "x"


def test_a_field_may_have_any_name(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"self": "x", "args": "y", "kwargs": "z"}])
    [sample], _ = read(path, prompt="{{ args }}", references="[kwargs]")
    assert (sample.prompt, sample.references) == ("y", ("z",))


# --- worked examples ------------------------------------------------------------------------------------------------


def test_examples_stand_before_the_question(sums):
    samples, _ = read(sums, **QA, few_shot={"num": 2})
    for sample in samples:
        first, second, question = sample.prompt.split("\n\n")
        assert question == f"Q: {sample.line - 1} + 1?\nA:"
        for shot in (first, second):
            asked, answer = shot.removeprefix("Q: ").split(" + 1?\nA: ")
            assert int(answer) == int(asked) + 1
            assert int(asked) != sample.line - 1, "the sample itself is no example"
        assert first != second


def test_examples_are_drawn_by_the_seed(sums):
    prompts = [[s.prompt for s in read(sums, **QA, few_shot={"num": 3, "seed": seed})[0]] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({prompt.partition("\n\n")[0] for prompt in prompts[0]}) > 2, "each sample has a draw of its own"


def test_a_sample_keeps_its_examples_whatever_else_is_scored(sums):
    whole = {s.line: s.prompt for s in read(sums, **QA, few_shot={"num": 2})[0]}
    for sample in read(sums, **QA, few_shot={"num": 2}, max_samples=3)[0]:
        assert sample.prompt == whole[sample.line]


def test_examples_of_another_file_and_separators(sums, tmp_path):
    shots = written(tmp_path / "shots.jsonl", [{"question": "?", "answer": "!"}])
    [sample], _ = read(
        sums,
        **QA,
        few_shot={"num": 1, "file": {"path": str(shots)}, "separator": "\n---\n"},
        delimiter="=",
        max_samples=1,
    )
    assert sample.prompt == "Q: ?\nA:=!\n---\nQ: 0 + 1?\nA:"


def test_examples_of_a_chat_are_turns(sums):
    sample = read(sums, **QA, few_shot={"num": 1}, chat=True, system="Add.")[0][0]
    assert [role for role, _ in sample.messages] == ["system", "user", "assistant", "user"]


def test_a_system_message_stands_at_the_beginning_alone(tmp_path):
    """Chat templates refuse it elsewhere; that of the record goes before that of the task."""
    turns = [[{"role": "system", "content": "S"}, {"role": "user", "content": f"{n}"},
              {"role": "assistant", "content": "a"}] for n in range(3)]  # fmt: skip
    path = written(tmp_path / "a.jsonl", [{"m": each} for each in turns] + [{"m": turns[0][1:]}])
    samples, _ = read(path, file={"messages": "m"}, few_shot={"num": 1}, chat=True, system="T")
    for sample, system in zip(samples, ["S", "S", "S", "T"], strict=True):
        assert [role for role, _ in sample.messages] == ["system", "user", "assistant", "user"]
        assert sample.messages[0] == ("system", system)


def test_too_few_examples_are_an_error(sums):
    with pytest.raises(UserError, match=r"tasks.t.few_shot.num: 10 are asked for, and there are 9 of other content"):
        read(sums, **QA, few_shot={"num": 10})


def test_a_double_of_the_sample_is_no_example(tmp_path):
    path = written(
        tmp_path / "a.jsonl", [{"question": "same", "answer": "1"}] * 3 + [{"question": "other", "answer": "2"}]
    )
    samples, _ = read(path, **QA, few_shot={"num": 1})
    assert all(sample.prompt.startswith("Q: other") for sample in samples[:3])


# --- what cannot be scored ------------------------------------------------------------------------------------------

RUNAWAY = ["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ q * 10**13 }}", "{{ 1 / 0 }}", "{% include q %}"]
CHOICE = {"kind": "choice", "prompt": "{{ q }}", "choices": "c"}
BAD = [
    ({"question": "q"}, "no field 'answer': there are 'question'"),
    ({"question": "q", "answer": "a\ud800"}, "lone surrogate"),
    (["q"], "a JSON list, not an object"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_a_bad_record_is_located(tmp_path, record, reason):
    path = written(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, record])
    samples, [bad] = read(path, **QA)
    assert len(samples) == 1
    assert (bad.file, bad.line) == (str(path), 2)
    assert reason in bad.reason


@pytest.mark.parametrize("answers", [[], None, 3, [1]])
def test_missing_references_are_never_a_wrong_answer(tmp_path, answers):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "answers": answers}])
    samples, [bad] = read(path, prompt="{{ q }}", references="answers")
    assert not samples
    assert bad.line == 1
    with pytest.raises(UserError, match=r"a.jsonl:1: .*"):
        tasks.require_good([bad], on_bad_sample="error")
    tasks.require_good([bad], on_bad_sample="skip")


@pytest.mark.parametrize("target", ["three", "2", "-1", ""])
def test_a_target_outside_of_the_choices_is_bad(tmp_path, target):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "c": ["one", "two"], "t": target}])
    samples, [bad] = read(path, kind="choice", prompt="{{ q }}", choices="c", target="{{ t }}")
    assert not samples
    assert "the target is neither one of the 2 choices nor a number from 0 to 1" in bad.reason


@pytest.mark.parametrize("prompt", RUNAWAY)
def test_a_template_that_fails_at_a_record_is_located(tmp_path, prompt):
    samples, [bad] = read(written(tmp_path / "a.jsonl", [{"q": "x"}]), prompt=prompt, target="{{ q }}")
    assert not samples
    assert "the template of prompt fails" in bad.reason


@pytest.mark.parametrize(
    ("field", "what"), [(None, "a null"), (["b"], "a list"), ({"b": 1}, "a dict")], ids=["null", "list", "dict"]
)
@pytest.mark.parametrize("key", ["prompt", "target"])
def test_what_is_no_text_is_not_printed(tmp_path, key, field, what):
    """Python would write None and ['b'], and the reference of an unanswered question would be the word None."""
    path = written(tmp_path / "a.jsonl", [{"q": "x", "a": field}])
    samples, [bad] = read(path, **{"prompt": "{{ q }}", "target": "{{ q }}", key: "{{ a }}"})
    assert not samples
    assert f"the template of {key} prints {what}" in bad.reason


@pytest.mark.parametrize("prompt", ["{{ q.upper }}", "{{ joiner() }}", "{{ [q] | map('upper') }}"])
def test_a_prompt_holds_no_address_in_memory(tmp_path, prompt):
    """Which each process would have another of, and so other samples."""
    samples, [bad] = read(written(tmp_path / "a.jsonl", [{"q": "x"}]), prompt=prompt, target="{{ q }}")
    assert not samples
    assert "which is no text" in bad.reason


@pytest.mark.parametrize(("prompt", "what"), [("{{ [1, 2] | random }}", "prompt: is no Jinja template: No filter")])
def test_a_template_draws_nothing_at_random(sums, prompt, what):
    with pytest.raises(UserError, match=what):
        read(sums, prompt=prompt, target="{{ answer }}")
    _, bad = read(sums, prompt="{{ lipsum() }}", target="{{ answer }}")
    assert len(bad) == 10


def test_the_field_that_is_told_is_one_of_the_template_that_fails(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "a": "b"}])
    _, [bad] = read(path, prompt="{{ q }}{{ ctx if ctx is defined }}", target="{{ a.b }}")
    assert "a part of a field that target names is missing" in bad.reason


@pytest.mark.parametrize("choices", ["a text", ["one"], [], ["one", 2], None])
def test_choices_are_two_texts_or_more(tmp_path, choices):
    """One text, such as a list in a cell of CSV, would be one choice, and each question answered right."""
    path = written(tmp_path / "a.jsonl", [{"q": "x", "c": choices, "a": "0"}])
    samples, [bad] = read(path, **CHOICE, target="{{ a }}")
    assert not samples
    assert bad.reason.startswith("choices ")


def test_a_target_that_is_text_and_number_is_bad_and_references_are_texts_alone(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "1 + 1", "c": ["1", "2", "0"], "n": 1}])
    _, [bad] = read(path, **CHOICE, target="{{ n }}")
    assert "the target is the text of one choice and the number of another" in bad.reason
    [sample], _ = read(path, **CHOICE, references="[c[n]]")
    assert sample.answer == 1
    [sample], _ = read(path, **CHOICE, references="['1']")
    assert sample.answer == 0


def test_a_right_choice_that_stands_there_twice_is_bad(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "c": ["b", "a", "a"], "t": "a"}])
    _, [bad] = read(path, **CHOICE, target="{{ t }}")
    assert "stands there twice" in bad.reason


def test_a_required_field_is_required(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "x", "a": "b", "k": 1}, {"q": "x", "a": "b"}])
    samples, [bad] = read(path, prompt="{{ q }}", target="{{ a }}", file={"required": ["k"]})
    assert len(samples) == 1
    assert "field 'k' is missing or null" in bad.reason


def test_of_so_many_samples_only_their_own_faults_count(tmp_path):
    records = [{"question": "q", "answer": "a"} if n not in (0, 5) else {"question": "q"} for n in range(10)]
    samples, bad = read(written(tmp_path / "a.jsonl", records), **QA, max_samples=4)
    assert ([s.line for s in samples], [b.line for b in bad]) == ([4, 7, 10], [1])
    assert tasks.counts([{}] * 3, bad) == {"num_samples": 4, "num_scored": 3, "num_skipped": 1}


def test_examples_that_cannot_be_used_are_no_samples(sums, tmp_path):
    shots = written(tmp_path / "s.jsonl", [{"question": "a", "answer": "b"}, {"question": "c"}])
    samples, bad = read(sums, **QA, few_shot={"num": 1, "file": {"path": str(shots)}})
    assert [(b.file, b.line, b.is_example) for b in bad] == [(str(shots), 2, True)]
    found = tasks.counts([{} for _ in samples], bad)
    assert found == {"num_samples": 10, "num_scored": 10, "num_skipped": 0, "num_skipped_examples": 1}
    assert tasks.skipped("t", bad) == []
    with pytest.raises(UserError, match=r"s.jsonl:2: no field 'answer'"):
        tasks.require_good(bad, on_bad_sample="error")


def test_reasons_repeat_no_data(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"q": "SECRET", "answers": "SECRET", "w": "SECRET"}])
    _, [bad] = read(path, prompt="{{ q }}", references="answers", weight="w")
    assert "SECRET" not in bad.reason


def test_only_the_first_bad_samples_are_told_and_all_are_counted():
    bad = [tasks.Bad("f", n, "why") for n in range(1, 30)]
    with pytest.raises(UserError) as caught:
        tasks.require_good(bad, on_bad_sample="error")
    assert caught.value.problems[:2] == ["f:1: why.", "f:2: why."]
    assert len(caught.value.problems) == tasks.TOLD + 1
    assert caught.value.problems[-1].startswith("29 samples cannot be scored")


def test_a_broken_template_is_told_with_its_key(sums):
    with pytest.raises(UserError) as caught:
        read(sums, prompt="{{ question", target="{% if %}", weight="1 +")
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "tasks.t.prompt", "tasks.t.target", "tasks.t.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["{{ question.__class__.__mro__ }}", "{{ ''.__class__ }}"])
def test_a_template_runs_in_a_sandbox(sums, prompt):
    samples, bad = read(sums, prompt=prompt, target="{{ answer }}")
    assert not samples
    assert len(bad) == 10


def test_no_record_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"holds no record|is empty"):
        read(tmp_path / "a.jsonl", **QA)


def test_a_missing_file_hides_no_broken_template(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "none.jsonl", prompt="{{", target="{{ a }}", few_shot={"num": 1, "file": {"path": "none"}})
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "tasks.t.file.path", "tasks.t.prompt", "tasks.t.few_shot.file.path",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "task",
    [{"system": "\ud800", "chat": True}, {"delimiter": "\ud800"}, {"few_shot": {"separator": "\ud800"}}],
    ids=["system", "delimiter", "separator"],
)
def test_what_goes_into_prompts_is_text(sums, task):
    with pytest.raises(UserError, match=r"tasks\.t .*holds bytes that are not UTF-8"):
        read(sums, **QA, **task)


TASK = {"t": {"file": {"path": "f"}, "prompt": "p", "target": "t"}}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"checkpoint": "c", "tasks": TASK, "add_eos": True, "split": "train"}, "split and add_eos .* on tasks"),
        ({"checkpoint": "c", "add_eos": True}, "add_eos .* on a dataset"),
        ({"checkpoint": "c", "file": {"path": "f"}, "split": "train"}, "split .* on file"),
        ({"checkpoint": "c", "tasks": {"t": {**TASK["t"], "kind": "choice", "choices": "c", "weight": "w"}}}, "weight"),
        ({"predictions": "p", "batch_size": 2}, "batch_size .* on predictions"),
    ],
)
def test_a_key_without_effect_is_told(values, what):
    with pytest.raises(UserError, match=what):
        configuration.build(EvaluateConfig, {"output_dir": "o", **values}, {}, [])


# --- ids ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1)),
                min_size=1, max_size=5, unique=True))  # fmt: skip
def test_equal_samples_have_equal_ids_and_others_have_not(tmp_path_factory, pairs):
    path = written(tmp_path_factory.mktemp("t") / "a.jsonl", [{"question": q, "answer": a} for q, a in pairs])
    ids = [sample.id for sample in read(path, **QA)[0]]
    assert ids == [sample.id for sample in read(path, **QA)[0]]
    assert len(set(ids)) == len(pairs)


# --- predictions ----------------------------------------------------------------------------------------------------


def predicted(path: Path):
    [raw] = sources.resolve([Source(path=str(path), format="jsonl")], config_problem=lambda key, what: what)
    return predictions.read(raw)


def test_predictions_take_one_reference_or_several(tmp_path):
    path = written(tmp_path / "p.jsonl", [
        {"id": 7, "prediction": "a", "reference": "b"},
        {"id": "x", "prediction": "", "references": ["b", "c"], "weight": 2},
    ])  # fmt: skip
    samples, bad = predicted(path)
    assert [(s.given_id, s.prediction, s.references, s.weight) for s in samples] == [
        (7, "a", ("b",), 1.0),
        ("x", "", ("b", "c"), 2.0),
    ]
    assert not bad


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prediction": "a"}, "no reference: neither 'references' nor 'reference'"),
        ({"prediction": "a", "references": []}, "no reference"),
        ({"reference": "a"}, "field 'prediction' is missing"),
        ({"prediction": None, "reference": "a"}, "field 'prediction' is missing"),
        ({"prediction": 3, "reference": "a"}, "is of type int, not text"),
        ({"prediction": "a", "reference": "a", "weight": -1}, "weight"),
    ],
)
def test_a_prediction_without_what_it_needs_is_located(tmp_path, record, reason):
    good = {"prediction": "a", "reference": "b"}
    samples, [bad] = predicted(written(tmp_path / "p.jsonl", [good, record, good]))
    assert len(samples) == 2
    assert bad.line == 2
    assert reason in bad.reason


def test_the_id_of_a_prediction_does_not_depend_on_the_prediction(tmp_path):
    """So that the answers of two models to one question are compared."""
    ids = [
        predicted(written(tmp_path / "p.jsonl", [{"prompt": "q", "prediction": text, "reference": "b"}]))[0][0].id
        for text in ("a", "b")
    ]
    assert ids[0] == ids[1]
