"""Every metric gives the number of its reference implementation, and None where there is no number."""

import inspect
import json
import math
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import sacrebleu
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from test_plugins import pip_install, wheel

from codex_accel import answers, metrics, ngrams, plugins
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig
from codex_accel.metrics import Choice, Loss, Text, load, measure

PAGE = ROOT / "docs" / "metrics.md"
CONFIG = EvaluateConfig(checkpoint="model", output_dir="report")
BOOTSTRAP = {"seed": 0, "num_resamples": 50, "confidence": 0.95}
TEXTS = st.text(alphabet="ab é北.,1 \n", max_size=12)
SAMPLES = st.lists(
    st.builds(Text, TEXTS, st.lists(TEXTS, min_size=1, max_size=3).map(tuple), st.sampled_from([0.0, 1.0, 2.5])),
    min_size=1,
    max_size=6,
)
WITHOUT_SETTINGS = ["exact_match", "f1", "rouge", "bleu", "chrf", "distinct", "weighted_accuracy", "numeric_answer"]


def loaded(name: str, *, kind: str = "generate", **given):
    return load(kind, {name: given}, config=CONFIG, key="metrics")


def scored(name: str, *samples, kind: str = "generate", **given) -> metrics.Measured:
    return measure(loaded(name, kind=kind, **given), samples, **BOOTSTRAP)


def texts(*pairs: tuple[str, ...]) -> list[Text]:
    """(prediction, reference, ...) of each sample."""
    return [Text(prediction, tuple(references)) for prediction, *references in pairs]


def cases(shared, file: str, part: str = "cases") -> list[dict]:
    found = json.loads((shared / "metrics" / file).read_text())[part]
    assert found
    return found


def of_streams(hypotheses: list[str], streams: list[list[str]]) -> list[Text]:
    """Samples out of sacrebleu's layout: references[k][i] is the k-th reference of hypothesis i."""
    return texts(*zip(hypotheses, *streams, strict=False))


# --- equal to the reference implementations -------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["squad_v1", "squad_v2"])
def test_exact_match_and_f1_are_those_of_the_squad_scripts(shared, rules):
    """Source: the official scripts of SQuAD 1.1 and 2.0, run on these strings (em_f1_cases.json)."""
    for case in cases(shared, "em_f1_cases.json"):
        sample = Text(case["prediction"], tuple(case["references"]))
        wanted = {"exact_match": case["em" if rules == "squad_v1" else "em_squad_v2"], "f1": case[f"f1_{rules}"]}
        found = {name: scored(name, sample, rules=rules).values[name] for name in wanted}
        assert found == pytest.approx(wanted, abs=1e-6), case


def test_squad_v2_does_not_accept_an_empty_reference_beside_others():
    """Source: get_raw_scores of evaluate-v2.0.py keeps the answers that normalize to something, or [""]."""
    sample = Text("", ("Denver", "the"))
    assert scored("exact_match", sample, rules="squad_v1").values == {"exact_match": 1}
    assert scored("exact_match", sample, rules="squad_v2").values == {"exact_match": 0}
    assert scored("f1", sample, rules="squad_v2").values == {"f1": 0}


def test_bleu_is_that_of_sacrebleus_own_tests(shared):
    for case in cases(shared, "bleu_cases.json", "corpus_bleu"):
        samples = of_streams(case["hypotheses"], case["references"])
        assert scored("bleu", *samples, **case["kwargs"]).values["bleu"] == pytest.approx(case["expected"], abs=1e-6)


def test_raw_bleu_is_that_of_sacrebleus_own_tests(shared):
    """raw_corpus_bleu: no tokenizer, smoothing by a floor, effective order."""
    options = {"tokenize": "none", "smooth_method": "floor", "effective_order": True}
    for case in cases(shared, "bleu_cases.json", "raw_corpus_bleu"):
        samples = of_streams(case["hypotheses"], case["references"])
        found = scored("bleu", *samples, smooth_value=case["smooth_value"], **options)
        assert found.values["bleu"] == pytest.approx(case["expected"], abs=1e-6)


def test_rouge_is_that_of_rouge_1_5_5_and_of_rouge_scores_own_tests(shared):
    """ROUGE-1.5.5 prints five places."""
    for case in cases(shared, "rouge_cases.json"):
        name, parts = case["metric"], ["f", "precision", "recall"]
        sample = Text(case["prediction"], (case["target"],))
        found = scored("rouge", sample, types=[name], stemmer=case["use_stemmer"], parts=parts).values
        wanted = {name: case["fmeasure"], f"{name}_precision": case["precision"], f"{name}_recall": case["recall"]}
        assert found == pytest.approx(wanted, abs=5.1e-6 if case["oracle"] == "ROUGE-1.5.5" else 1e-6), case


def test_scores_of_252_real_outputs(shared, every_metric):
    """Source: sacrebleu 2.6.0, rouge_score 0.1.2 and the SQuAD 1.1 functions (*.expected.json)."""
    lines = (shared / "metrics" / "selfinstruct_textdavinci001.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    samples = texts(*[(record["prediction"], record["reference"]) for record in records])
    wanted = json.loads((shared / "metrics" / "selfinstruct_textdavinci001.expected.json").read_text())
    found = measure(every_metric, samples, **BOOTSTRAP)
    names = {"rouge1": "rouge1_f", "rouge2": "rouge2_f", "rougeL": "rougeL_f", "bleu": "bleu"}
    names |= {"distinct_1": "distinct1", "distinct_2": "distinct2"}
    for name, known_as in names.items():
        assert found.values[name] == pytest.approx(wanted[known_as], abs=1e-6), name
    assert 100 * found.values["exact_match"] == pytest.approx(wanted["em_squad_v1"], abs=1e-6)
    assert 100 * found.values["f1"] == pytest.approx(wanted["f1_squad_v1"], abs=1e-6)
    assert found.facts["bleu"]["signature"] == wanted["bleu_signature"]
    each = [scores["rougeL"] for scores in found.sample_scores]
    assert each == pytest.approx([record["rougeL_f"] for record in records], abs=1e-6)
    stemmed = scored("rouge", *samples, types=["rougeL"], stemmer=True)
    assert stemmed.values["rougeL"] == pytest.approx(wanted["rougeL_f_stemmed"], abs=1e-6)
    assert set(found.intervals) == set(found.values)
    assert all(low < found.values[name] < high for name, (low, high) in found.intervals.items())


def padded(samples: list[Text]) -> list[list[str | None]]:
    """sacrebleu's layout, None where a sample has fewer references than another."""
    most = max(len(sample.references) for sample in samples)
    return [[(*sample.references, *[None] * most)[k] for sample in samples] for k in range(most)]


@given(
    SAMPLES,
    st.fixed_dictionaries(
        {
            "smooth_method": st.sampled_from(["exp", "floor", "add-k", "none"]),
            "effective_order": st.booleans(),
            "lowercase": st.booleans(),
            "max_ngram_order": st.sampled_from([1, 2, 4]),
            "tokenize": st.sampled_from(["13a", "char", "zh"]),
        }
    ),
)
@settings(max_examples=60)
def test_bleu_of_any_corpus_is_sacrebleus(samples, options):
    """Empty texts and references of uneven number included; of one sample it is sacrebleu's sentence BLEU."""
    outputs = [sample.prediction for sample in samples]
    found = measure({"bleu": ngrams.bleu(**options)}, samples, **BOOTSTRAP)
    reference = sacrebleu.BLEU(**options)
    assert found.values["bleu"] == pytest.approx(reference.corpus_score(outputs, padded(samples)).score, abs=1e-9)
    assert found.facts["bleu"]["signature"] == str(reference.get_signature())
    alone = sacrebleu.BLEU(**options | {"effective_order": True})
    wanted = [alone.sentence_score(sample.prediction, list(sample.references)).score for sample in samples]
    assert [scores["bleu"] for scores in found.sample_scores] == pytest.approx(wanted, abs=1e-9)


@given(
    SAMPLES,
    st.fixed_dictionaries(
        {
            "word_order": st.sampled_from([0, 2]),
            "char_order": st.sampled_from([2, 6]),
            "beta": st.sampled_from([1, 2]),
            "whitespace": st.booleans(),
            "lowercase": st.booleans(),
            "eps_smoothing": st.booleans(),
        }
    ),
)
@settings(max_examples=60)
def test_chrf_of_any_corpus_is_sacrebleus(samples, options):
    outputs = [sample.prediction for sample in samples]
    found = measure({"chrf": ngrams.chrf(**options)}, samples, **BOOTSTRAP)
    reference = sacrebleu.CHRF(**options)
    assert found.values["chrf"] == pytest.approx(reference.corpus_score(outputs, padded(samples)).score, abs=1e-9)
    assert found.facts["chrf"]["signature"] == str(reference.get_signature())
    wanted = [reference.sentence_score(sample.prediction, list(sample.references)).score for sample in samples]
    assert [scores["chrf"] for scores in found.sample_scores] == pytest.approx(wanted, abs=1e-9)


def test_rouge_takes_the_reference_with_the_highest_f_of_each_type():
    """As score_multi of rouge_score; here rouge1 likes the second reference, rouge2 the first."""
    prediction, references = "the cat sat on a mat", ("the cat sat up", "a mat on the sat cat thing")
    [sample] = texts((prediction, *references))
    found = scored("rouge", sample, parts=["f", "precision", "recall"]).values
    wanted = RougeScorer(["rouge1", "rouge2", "rougeL"]).score_multi(list(references), prediction)
    for name, score in wanted.items():
        assert found[name] == score.fmeasure
        assert (found[f"{name}_precision"], found[f"{name}_recall"]) == (score.precision, score.recall)
    alone = [scored("rouge", *texts((prediction, reference))).values for reference in references]
    assert found["rouge1"] == alone[1]["rouge1"] > alone[0]["rouge1"]
    assert found["rouge2"] == alone[0]["rouge2"] > alone[1]["rouge2"]


# --- definitions of our own, by hand --------------------------------------------------------------------------------


def test_plain_exact_match_minds_all_but_outer_white_space():
    samples = texts((" A cat.\n", "A cat."), ("a cat.", "A cat."), ("A cat", "A cat."))
    assert [each["exact_match"] for each in scored("exact_match", *samples, rules="plain").sample_scores] == [1, 0, 0]
    assert scored("exact_match", *samples).values == {"exact_match": 1}


def test_weighted_accuracy_divides_the_weight_of_the_right_by_all_weight():
    samples = [Text("a b", ("a b",), 3.0), Text("x", ("y",), 1.0), Text("z", ("z",), 0.0)]
    found = scored("weighted_accuracy", *samples)
    assert found.values == {"weighted_accuracy": 0.75}
    assert found.sample_scores[2] == {"weighted_accuracy": None}
    assert found.facts["weighted_accuracy"]["num_without_weight"] == 1
    assert scored("weighted_accuracy", *samples[2:]).values == {"weighted_accuracy": None}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_is_a_number_from_0_on(weight):
    with pytest.raises(ValueError, match="weight"):
        Text("a", ("a",), weight)


def test_distinct_counts_over_all_outputs_and_not_across_them():
    """a b a | b c: three of five words, three of three pairs, one of one triple; nothing has four words."""
    found = scored("distinct", *texts(("a b a", ""), ("b\n c", "")), n=[1, 2, 3, 4]).values
    assert found == {"distinct_1": 3 / 5, "distinct_2": 1, "distinct_3": 1, "distinct_4": None}


@given(st.lists(st.text(alphabet="ab ", max_size=8), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_distinct_without_a_group_is_that_of_the_others(outputs, num_groups, n):
    metric, groups = ngrams.distinct(n=[n]), np.arange(len(outputs)) % min(num_groups, len(outputs))
    samples = texts(*[(output, "") for output in outputs])
    found = metric.left_out(samples, groups)[f"distinct_{n}"]
    for group, value in enumerate(found):
        words = [output.split() for output, other in zip(outputs, groups, strict=True) if other != group]
        counted = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        assert value == pytest.approx(len(set(counted)) / len(counted) if counted else math.nan, nan_ok=True)


def test_losses_are_sums_divided_once():
    documents = [Loss(nll=6.0, num_targets=2, num_correct=1, num_bytes=10), Loss(2.0, 2, 2, 6)]
    found = measure({"losses": metrics.losses()}, documents, **BOOTSTRAP)
    assert found.values == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2)),
        "bits_per_byte": pytest.approx(8 / math.log(2) / 16),
        "token_accuracy": 0.75,
    }
    assert found.sample_scores[1]["loss"] == 1.0


def test_a_loss_that_cannot_be_known_is_none():
    unknown = [Loss(1.0, 1, 0, None), Loss(1.0, 1, 0, 4)]
    assert measure({"losses": metrics.losses()}, unknown, **BOOTSTRAP).values["bits_per_byte"] is None
    infinite = measure({"losses": metrics.losses()}, [Loss(1e6, 1, 0, 1), Loss(2e6, 1, 0, 1)], **BOOTSTRAP)
    assert (infinite.values["loss"], infinite.values["perplexity"]) == (1.5e6, None)
    assert infinite.intervals["perplexity"] is None
    nothing = measure({"losses": metrics.losses()}, [Loss(0.0, 0, 0, 0)], **BOOTSTRAP)
    assert set(nothing.values.values()) == {None}


def test_choices_are_compared_by_likelihood_and_by_likelihood_a_character():
    """process_results of lm-evaluation-harness: argmax(lls), argmax(lls / len(choice)); a tie goes to the first."""
    samples = [
        Choice((-4.0, -9.0, -8.0), ("no", "certainly so", "perhaps"), answer=1),  # a character: -2, -0.75, -1.14
        Choice((-4.0, -4.0), ("ab", "cd"), answer=1),
        Choice((-3.0, -4.0), ("北京", "x"), answer=0),  # characters, not bytes: -1.5 and -4
    ]
    assert [s["acc"] for s in scored("acc", *samples, kind="choice").sample_scores] == [0, 0, 1]
    assert [s["acc_norm"] for s in scored("acc_norm", *samples, kind="choice").sample_scores] == [1, 0, 1]


def test_a_question_without_a_score_is_counted_and_takes_no_part():
    samples = [Choice((-1.0, -2.0), ("", "a"), 0), Choice((math.nan, -2.0), ("a", "b"), 1), Choice((-1.0,), ("a",), 0)]
    found = scored("acc_norm", *samples, kind="choice")
    assert found.values == {"acc_norm": 1}
    assert [each["acc_norm"] for each in found.sample_scores] == [None, None, 1]
    assert found.facts["acc_norm"] == {"num_without_score": 2}


# --- final numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It is 3-5 times, or -$1,234.50.", ["3", "5", "-1234.50"]),
        ("$-5, −5 and (+7)", ["-5", "-5", "7"]),
        ("- 5", ["5"]),
        ("<<48/2=24>>24 clips", ["48", "2", "24", "24"]),
        ("v1.2.3", []),
        ("50% of .5, 1e3 or 2E", ["50", "0.5", "1000", "2"]),
        ("**42**", ["42"]),
        ("٣ and 四", []),
        ("", []),
    ],
)
def test_numbers_are_read_out_of_a_text(text, wanted):
    assert answers.numbers(text) == list(map(answers.Decimal, wanted))


@given(st.integers(), st.sampled_from(["{:,}", "${:,}", "{}.", "{:,}.00", "={} km"]))
def test_an_integer_is_read_as_written(number, form):
    assert answers.numbers("So it is " + form.format(number)) == [number]


@given(st.text(alphabet="0123456789.,-+$eE% a", max_size=30))
def test_any_text_has_finite_numbers(text):
    assert all(value.is_finite() for value in answers.numbers(text))


def test_answers_of_gsm8k_are_those_of_its_own_script(shared):
    """Source: ANS_RE of openai/grade-school-math dataset.py, which takes a text; ours compares values."""
    lines = (shared / "instruct" / "gsm8k_train.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    assert len(solutions) > 7000
    expected = [re.search(r"#### (\-?[0-9\.\,]+)", text)[1].replace(",", "") for text in solutions]
    samples = [Text(text, (value,)) for text, value in zip(solutions, expected, strict=True)]
    wrong = [Text(text, (f"{value}1",)) for text, value in zip(solutions[::9], expected[::9], strict=True)]
    for take in ("marked", "last"):
        metric = answers.numeric_answer(take=take)
        assert {metric.statistics(sample)[0] for sample in samples} == {1.0}
        assert {metric.statistics(sample)[0] for sample in wrong} == {0.0}


@pytest.mark.parametrize(
    ("prediction", "last", "marked"),
    [
        ("5 + 13 = 18\n#### 18", 1, 1),
        ("#### $18.00", 1, 1),
        ("The answer is 18.", 1, 0),
        ("#### 18\n\nQuestion: 2 + 2?\n#### 4", 0, 1),  # it went on; the first marker answers the question
        ("####", 0, 0),
        ("eighteen", 0, 0),
        ("", 0, 0),
    ],
)
def test_a_final_number_is_the_last_or_the_marked_one(prediction, last, marked):
    sample = Text(prediction, ("20 - 2 = 18\n#### 18",))
    for take, wanted in (("last", last), ("marked", marked)):
        assert scored("numeric_answer", sample, take=take).values == {"numeric_answer": wanted}


def test_missing_numbers_are_counted():
    found = scored("numeric_answer", *texts(("7", "seven"), ("none", "7"), ("7", "7")))
    assert found.values == {"numeric_answer": 0.5}
    assert found.sample_scores[0] == {"numeric_answer": None}
    assert found.facts["numeric_answer"]["num_predictions_without_number"] == 1
    assert found.facts["numeric_answer"]["num_references_without_number"] == 1


# --- edges ----------------------------------------------------------------------------------------------------------

EDGES = {  # prediction, reference -> values; the table of docs/metrics.md
    ("", ""): {"exact_match": 1, "f1": 0, "rouge1": 0, "bleu": 0, "chrf": 0, "distinct_1": None},
    ("", "a cat"): {"exact_match": 0, "f1": 0, "rouge1": 0, "bleu": 0, "chrf": 0, "distinct_1": None},
    ("cat", ""): {"exact_match": 0, "f1": 0, "rouge1": 0, "bleu": 0, "chrf": 0, "distinct_1": 1},
    ("naïve café", "naive cafe"): {"exact_match": 0, "f1": 0, "rouge1": 0, "bleu": 0, "distinct_1": 1},
    ("北京是首都", "北京是首都"): {"exact_match": 1, "f1": 1, "rouge1": 0, "bleu": 0, "chrf": 100, "distinct_1": 1},
}


@pytest.mark.parametrize(("prediction", "reference"), EDGES)
def test_edge_cases_are_as_the_page_says(every_metric, prediction, reference):
    found = measure(every_metric, texts((prediction, reference)), **BOOTSTRAP).values
    wanted = EDGES[prediction, reference]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    row = f"| {' | '.join(f'`{text}`' if text else 'empty' for text in (prediction, reference))} |"
    [line] = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(row)]
    told = dict(zip(EDGES["", ""], line.split("|")[3:-1], strict=True))
    for name, value in wanted.items():
        assert told[name].strip() == ("none" if value is None else str(value)), name


def test_texts_that_a_tokenizer_drops_are_counted():
    """rouge_score keeps a-z and 0-9 only, so it sees nothing of a Chinese text."""
    chinese = texts(("北京", "北京"), ("Beijing", "Beijing"), ("", "Beijing"))
    found = scored("rouge", *chinese)
    assert found.values["rouge1"] == pytest.approx(1 / 3)
    assert found.facts["rouge"]["num_predictions_without_tokens"] == 2
    assert found.facts["rouge"]["num_references_without_tokens"] == 1
    assert scored("chrf", *chinese[:1]).values["chrf"] == pytest.approx(100)
    assert scored("bleu", *texts(("北京是首都", "北京是首都")), tokenize="zh").values["bleu"] == pytest.approx(100)


@pytest.fixture(scope="module")
def every_metric():
    return load("generate", {name: {} for name in WITHOUT_SETTINGS}, config=CONFIG, key="metrics")


@given(samples=SAMPLES)
@settings(max_examples=30)
def test_no_value_is_nan_or_infinite(every_metric, samples):
    found = measure(every_metric, samples, **BOOTSTRAP)
    json.dumps([found.values, found.intervals, found.sample_scores, found.facts], allow_nan=False)
    assert set(found.values) == set(found.intervals)
    assert len(found.sample_scores) == len(samples)


def test_one_sample_has_values_and_no_interval(every_metric):
    found = measure(every_metric, texts(("1 cat", "1 cat")), **BOOTSTRAP)
    assert None not in found.values.values()
    assert set(found.intervals.values()) == {None}


def test_no_sample_has_no_value():
    assert measure(loaded("bleu"), [], **BOOTSTRAP) == metrics.Measured({}, {}, [], {})


# --- names and settings ---------------------------------------------------------------------------------------------


def problems_of(kind: str, **names) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(kind, names, config=CONFIG, key="metrics")
    return caught.value.problems


def test_all_mistakes_in_names_and_settings_are_told_at_once():
    assert problems_of(
        "generate", blue={}, f1={"rules": "plain"}, acc={}, bleu={"tokenise": "13a"}, rouge={"types": []}, evaluate={}
    ) == [
        "command line: metrics.blue: no such metric: 'blue'. Did you mean 'bleu'?",
        "command line: metrics.f1.rules: 'plain': should be 'squad_v1' or 'squad_v2'.",
        f"command line: metrics.acc: acc does not score samples of kind = generate. Choose from: "
        f"{', '.join(metrics.TEXT)}.",
        "command line: metrics.bleu.tokenise: unknown key. Did you mean 'tokenize'?",
        "command line: metrics.rouge.types: []: Value should have at least 1 item after validation, not 0.",
        "command line: metrics.evaluate.path: required and not given. Add it.",
    ]
    [problem] = problems_of("choice", bleu={})
    assert problem.endswith("metrics.bleu: bleu does not score samples of kind = choice. Choose from: acc, acc_norm.")


@pytest.mark.parametrize(
    ("metric", "package", "wanted"), [("bleu", "sacrebleu", "sacrebleu"), ("rouge", "rouge_score", "rouge-score")]
)
def test_a_missing_package_is_told_with_the_pip_command(monkeypatch, metric, package, wanted):
    """As in an environment without any package, but for those that are loaded already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    [problem] = problems_of("generate", **{metric: {}})
    assert problem == (
        f"command line: metrics.{metric}: needs {package}, which is not installed. Run: pip install {wanted}"
    )


def test_only_what_is_asked_for_is_imported():
    """In a true process: metrics load without torch and its like, rouge_score and sacrebleu only for their metrics."""
    code = (
        "import sys; from codex_accel import metrics; from codex_accel.evaluate_schema import EvaluateConfig\n"
        "def load(*names): metrics.load('generate', {name: {} for name in names}, key='metrics',"
        " config=EvaluateConfig(checkpoint='m', output_dir='r'))\n"
        "def told(): print(sorted({'torch', 'datasets', 'evaluate', 'sacrebleu', 'rouge_score'} & set(sys.modules)))\n"
        "load('exact_match', 'f1', 'distinct'); told(); load('bleu', 'rouge'); told()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["[]", "['rouge_score', 'sacrebleu']"]


# --- plug-ins -------------------------------------------------------------------------------------------------------

PLUGIN = """
from codex_accel.scoring import Metric

def words(*, per: float = 1.0):
    return lambda prediction, references: len(prediction.split()) / per

def lengths():
    def score(prediction, references):
        return {"chars": len(prediction), "shorter": None if not prediction else len(prediction) < len(references[0])}
    return score

def margin():
    return lambda loglikelihoods, choices, answer: loglikelihoods[answer] - max(loglikelihoods)

def total():
    return Metric(statistics=lambda sample: (sample.weight,), values=lambda sums: {"total": sums[..., 0]})

def fails():
    return lambda prediction, references: 1 / len(prediction)

def odd():
    return lambda prediction, references: "good"

def neither():
    return 3

def half():
    return Metric(statistics=lambda sample: (1,))

def bare(prediction, references):
    return 1.0

def exact_match():
    return None
"""


def block_of(page, language: str) -> str:
    [block] = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a package of metrics, installed by pip."""
    folder = tmp_path_factory.mktemp("metrics")
    names = re.findall(r"^def (\w+)", PLUGIN, re.MULTILINE)
    entries = {plugins.METRICS: {name: f"word_metrics:{name}" for name in names if name != "exact_match"}}
    made = wheel(folder, "word_metrics", "0.4", modules={"word_metrics": PLUGIN}, entries=entries)
    toml, python = (block_of(ROOT / "docs" / "plugins.md", language) for language in ("toml", "python"))
    project = tomllib.loads(toml)["project"]
    entries = {plugins.METRICS: project["entry-points"][plugins.METRICS]}
    example = wheel(folder, "codex_example", project["version"], modules={"codex_example": python}, entries=entries)
    return pip_install(folder / "site", made, example)


@pytest.fixture
def here(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "word_metrics", raising=False)


def test_a_plain_function_is_a_metric_by_its_mean(here):
    samples = texts(("a b c", "x"), ("a", "xyz"), ("", "x"))
    found = scored("words", *samples, per=2.0)
    assert found.values == {"words": pytest.approx(4 / 3 / 2)}
    assert [each["words"] for each in found.sample_scores] == [1.5, 0.5, 0]
    assert found.facts["words"]["plugin"] == {"distribution": "word_metrics", "version": "0.4"}
    assert found.intervals["words"]
    several = scored("lengths", *samples)
    assert several.values == {"lengths_chars": 2.0, "lengths_shorter": 0.5}
    assert several.sample_scores[2] == {"lengths_chars": 0, "lengths_shorter": None}
    assert several.facts["lengths"]["num_without_score"] == 1
    question = Choice((-1.0, -3.0), ("a", "b"), 1)
    assert scored("margin", question, kind="choice").values == {"margin": -2.0}


def test_the_example_of_the_page_on_plug_ins_scores(here):
    samples = texts(("a b", "x"), ("a", "x"), ("a b c", "x"))
    assert scored("short_enough", *samples, max_words=2).values == {"short_enough": pytest.approx(2 / 3)}
    [problem] = problems_of("generate", short_enough={"max_words": 0})
    assert problem.endswith("metrics.short_enough.max_words: 0: should be greater than or equal to 1.")


def test_the_examples_of_the_page_on_metrics_are_right():
    """Its settings load, and its function is a metric: four words by three."""
    given = yaml.safe_load(block_of(PAGE, "yaml"))["metrics"]
    assert set(load("generate", given, config=CONFIG, key="metrics")) == {*metrics.TEXT} - {"evaluate"}
    names: dict = {}
    exec(block_of(PAGE, "python"), names)
    found = measure({"length_ratio": names["length_ratio"]()}, texts(("a b c", "a b"), ("a", "a")), **BOOTSTRAP)
    assert found.values == {"length_ratio": pytest.approx(4 / 3)}


def test_every_metric_and_setting_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for name, make in (metrics.TEXT | metrics.CHOICE).items():
        for word in (name, *inspect.signature(make).parameters):
            assert f"`{word}`" in page or f"**{word}**" in page, word


def test_a_plugin_may_give_sums_of_its_own(here):
    assert scored("total", Text("a", ("a",), 2.0), Text("b", ("b",), 0.5)).values == {"total": 2.5}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fails",
            "'fails' of word_metrics 0.4 failed: ZeroDivisionError: division by zero (word_metrics.py, line 19).",
        ),
        ("odd", "'odd' of word_metrics 0.4 failed: TypeError: it gives 'good', not a number"),
        ("neither", "'neither' of word_metrics 0.4 cannot be made: TypeError: it gives 3, neither a Metric nor"),
        ("half", "'half' of word_metrics 0.4 cannot be made: TypeError: a Metric has either statistics and values"),
        ("bare", "'bare' of word_metrics 0.4 cannot be made: TypeError: bare() missing 2 required positional"),
    ],
)
def test_a_plugin_that_fails_is_named(here, name, words):
    with pytest.raises(UserError) as caught:
        scored(name, *texts(("a", "a"), ("", "a")))
    assert f"command line: metrics.{name}: the metric {words}" in str(caught.value)


def test_a_plugin_with_the_name_of_a_built_in_is_refused_whatever_is_asked_for(tmp_path, monkeypatch):
    entries = {plugins.METRICS: {"acc": "other_metrics:exact_match"}}
    made = wheel(tmp_path, "other_metrics", "1.0", modules={"other_metrics": PLUGIN}, entries=entries)
    monkeypatch.syspath_prepend(pip_install(tmp_path / "site", made))
    [problem] = problems_of("generate", f1={})
    assert "the plug-in 'acc' of other_metrics 1.0 has the name of a built-in metric" in problem


def test_two_metrics_may_not_have_a_value_of_one_name(here):
    twice = {"one": loaded("total")["total"], "two": loaded("total")["total"]}
    with pytest.raises(UserError, match="two and another metric both give total"):
        measure(twice, texts(("a", "a")), **BOOTSTRAP)


# --- evaluate.Metric ------------------------------------------------------------------------------------------------

LENGTHS = '''
import datasets
import evaluate

from .counting import count


class LengthRatio(evaluate.Metric):
    """Words of the outputs by words of the references."""

    def _info(self):
        text = datasets.Value("{kind}")
        features = datasets.Features({{"predictions": text, "references": {references}}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, scale=1.0):
        ratio = scale * sum(map(count, predictions)) / sum(map(count, references))
        return {{"ratio": ratio, "names": ["ratio"]}}
'''


@pytest.fixture
def written(tmp_path):
    """A folder as those of the evaluate library: a file of its name, and a module beside it."""

    def write(*, kind: str = "string", references: str = "text", more: str = ""):
        folder = tmp_path / "length_ratio"
        folder.mkdir()
        (folder / "counting.py").write_text("def count(text):\n    return len(text.split())\n")
        (folder / "length_ratio.py").write_text(LENGTHS.format(kind=kind, references=references) + more)
        return folder

    return write


def test_an_evaluate_metric_of_a_local_folder_scores_the_corpus(written, tmp_path):
    folder = written()
    samples = texts(("a b", "x"), ("a", "x y"), ("a b c d", "x y"))
    found = scored("evaluate", *samples, path=str(folder), compute={"scale": 2.0})
    assert found.values == {"evaluate_ratio": 2 * 7 / 5}
    low, high = found.intervals["evaluate_ratio"]
    assert low < 2 * 7 / 5 < high
    assert found.facts["evaluate"]["left_out"] == ["names"]
    assert found.facts["evaluate"]["file"] == "length_ratio.py"
    assert sorted(path.name for path in folder.glob("*.py")) == ["counting.py", "length_ratio.py"]


def test_references_go_to_an_evaluate_metric_one_or_all(written):
    folder = str(written(references="[text]", more="        # one list a sample\n").absolute())
    [sample] = texts(("a b", "x", "y z"))
    with pytest.raises(UserError, match="a sample has 2 references and it is given one: say references = all"):
        scored("evaluate", sample, path=folder)
    with pytest.raises(UserError, match="AttributeError: 'list' object has no attribute 'split'"):
        scored("evaluate", sample, path=folder, references="all")  # our count() got the list


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "int32"}, "TypeError: its predictions are int32, and ours are texts"),
        (
            {"more": "    def _download_and_prepare(self, manager):\n        pass\n"},
            "LengthRatio wants to download files",
        ),
        ({"more": "import no_such_package\n"}, "ModuleNotFoundError: No module named 'no_such_package'"),
        ({"more": "class Other(LengthRatio):\n    pass\n"}, "defines 2 evaluate.Metric classes, not one"),
    ],
)
def test_an_evaluate_metric_that_does_not_fit_is_told_before_anything_runs(written, changes, words):
    [problem] = problems_of("generate", evaluate={"path": str(written(**changes))})
    assert problem.startswith("command line: metrics.evaluate: the metric 'evaluate' of codex-accel")
    assert words in problem


def test_an_evaluate_metric_is_not_looked_up_on_the_hub():
    [problem] = problems_of("generate", evaluate={"path": "wer"})
    assert "metrics are not looked up on the Hub" in problem
