"""Intervals hold what they promise, and a comparison finds what is there and nothing else."""

import json
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.significance import PairedTest

from codex_accel import answers, metrics, ngrams, uncertainty
from codex_accel.scoring import Loss, Metric, Text, means, table
from codex_accel.uncertainty import intervals, paired

MEAN = Metric(statistics=lambda sample: (sample, 1.0), values=means("mean"))
DRAWS = {"seed": 0, "num_resamples": 1000, "confidence": 0.95}
LENGTHS, SHARES, LOSSES = np.array([16, 64, 256]), np.array([0.5, 0.3, 0.2]), np.array([4.0, 3.5, 3.0])
LONG, SELDOM, FALLING = np.array([8, 64, 512, 2048]), np.array([0.4, 0.3, 0.2, 0.1]), np.array([4.0, 3.5, 3.0, 2.8])


def share_held(
    metric: Metric,
    name: str,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    truth: float,
    *,
    num_samples: int,
    num_trials: int = 1000,
    num_resamples: int = 500,
) -> float:
    """Share of trials whose 95 % interval holds the truth; each draws its samples and its resamples anew."""
    held = 0
    for trial in range(num_trials):
        rows = draw(np.random.default_rng([7, trial]), num_samples)
        drawn = {"seed": trial, "num_resamples": num_resamples, "confidence": 0.95}
        low, high = intervals(metric, range(num_samples), rows=rows, **drawn)[name]
        held += low <= truth <= high
    return held / num_trials


def with_count(scores: np.ndarray) -> np.ndarray:
    return np.stack([scores, np.ones(len(scores))], axis=1)


def documents(lengths: np.ndarray, shares: np.ndarray, losses: np.ndarray):
    """Draws rows of `metrics.losses`: ragged documents, the longer ones easier, each with luck of its own."""

    def draw(generator: np.random.Generator, num: int) -> np.ndarray:
        kind = generator.choice(len(lengths), size=num, p=shares)
        nll = lengths[kind] * losses[kind] * generator.gamma(50, 1 / 50, size=num)
        zero = np.zeros(num)
        return np.stack([nll, lengths[kind], zero, lengths[kind], zero], axis=1)

    return draw, float((shares * lengths * losses).sum() / (shares * lengths).sum())


# --- coverage -------------------------------------------------------------------------------------------------------


def test_intervals_of_a_mean_hold_it_in_95_percent_of_trials():
    """Scores of Beta(1, 4), whose mean is 1/5."""
    held = share_held(MEAN, "mean", lambda g, n: with_count(g.beta(1, 4, size=n)), 1 / 5, num_samples=100)
    assert 0.93 <= held <= 0.97


def test_intervals_of_a_share_hold_it_in_95_percent_of_trials():
    held = share_held(MEAN, "mean", lambda g, n: with_count(1.0 * (g.random(n) < 0.3)), 0.3, num_samples=100)
    assert 0.93 <= held <= 0.97


def test_intervals_of_a_ratio_over_ragged_documents_hold_it_in_95_percent_of_trials():
    draw, loss = documents(LENGTHS, SHARES, LOSSES)
    assert 0.93 <= share_held(metrics.losses(), "loss", draw, loss, num_samples=150, num_resamples=400) <= 0.97


def test_intervals_of_distinct_n_hold_its_mean():
    """Texts of words with Zipf's frequencies; the truth is the mean over 200 corpora of the same size."""
    frequencies = 1 / np.arange(1, 1001)
    frequencies /= frequencies.sum()
    corpora = []
    for trial in range(200):
        generator = np.random.default_rng([3, trial])
        drawn = [generator.choice(1000, size=n, p=frequencies) for n in generator.integers(3, 30, size=40)]
        corpora.append([Text(" ".join(map(str, words)), ("",)) for words in drawn])
    metric = ngrams.distinct(n=[1, 2])
    found = [intervals(metric, corpus, **DRAWS) for corpus in corpora]
    for name in ("distinct_1", "distinct_2"):
        truth = np.mean([metric.whole(corpus)[name] for corpus in corpora])
        held = np.mean([each[name][0] <= truth <= each[name][1] for each in found])
        assert 0.92 <= held <= 1  # the jackknife errs on the wide side


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_samples", "told"),
    [("documents", 30, 0.87), ("documents", 100, 0.93), ("lognormal", 10, 0.87), ("lognormal", 100, 0.92)],
)
def test_coverage_of_hard_cases_is_as_the_page_says(case, num_samples, told):
    draw, truth = documents(LONG, SELDOM, FALLING)
    metric, name = metrics.losses(), "loss"
    if case == "lognormal":
        draw, truth = (lambda g, n: with_count(g.lognormal(size=n))), math.exp(0.5)
        metric, name = MEAN, "mean"
    held = share_held(metric, name, draw, truth, num_samples=num_samples, num_trials=4000, num_resamples=1000)
    assert held == pytest.approx(told, abs=0.005)


# --- intervals ------------------------------------------------------------------------------------------------------


def test_an_interval_of_many_samples_is_the_normal_one():
    """Mean plus and minus 1.96 standard errors, the central limit theorem."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    low, high = intervals(MEAN, samples, seed=1, num_resamples=20_000, confidence=0.95)["mean"]
    width = NormalDist().inv_cdf(0.975) * samples.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((samples.mean() - width, samples.mean() + width), abs=0.05 * width)


def test_the_seed_decides_and_other_metrics_do_not():
    samples = [Text("a b", ("a b",)), Text("a c", ("a b",)), Text("d", ("e",)), Text("f g", ("f h",))]
    asked = {"f1": answers.f1(), "chrf": ngrams.chrf()}
    alone = metrics.measure({"f1": asked["f1"]}, samples, **DRAWS).intervals["f1"]
    assert metrics.measure(asked, samples, **DRAWS).intervals["f1"] == alone
    assert metrics.measure(asked, samples, **DRAWS | {"seed": 1}).intervals["f1"] != alone


def test_the_interval_of_a_perplexity_is_that_of_the_loss_in_its_unit():
    """BCa follows a monotone change of scale, which an interval of value plus and minus a width cannot."""
    drawn = [
        Loss(float(n * loss), int(n), 0, None) for n, loss in np.random.default_rng(0).integers(1, 9, size=(300, 2))
    ]
    found = intervals(metrics.losses(), drawn, **DRAWS | {"num_resamples": 20_000})
    assert found["perplexity"] == pytest.approx(tuple(map(math.exp, found["loss"])), rel=1e-3)


def test_more_confidence_is_a_wider_interval():
    samples = np.random.default_rng(0).random(50)
    bounds = [intervals(MEAN, samples, **DRAWS | {"confidence": level})["mean"] for level in (0.6, 0.9, 0.99)]
    assert bounds[2][0] < bounds[1][0] < bounds[0][0] < bounds[0][1] < bounds[1][1] < bounds[2][1]


@pytest.mark.parametrize("samples", [[0.5], [1.0] * 20, [0.1] * 7])
def test_what_resampling_cannot_tell_has_no_interval(samples):
    assert intervals(MEAN, samples, **DRAWS) == {"mean": None}


def test_no_sample_has_no_interval():
    assert intervals(MEAN, [], **DRAWS) == {}


def test_resamples_without_a_value_give_no_interval():
    """Of ten samples one has a score: 0.9^10 = 35 % of the resamples have none."""
    metric = Metric(statistics=lambda sample: sample, values=means("mean"))
    rare = [(1.0, 1.0)] + [(0.0, 0.0)] * 9
    assert intervals(metric, rare, **DRAWS) == {"mean": None}
    common = [(score, 1.0) for score in (0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)] + [(0.0, 0.0)]
    assert intervals(metric, common, **DRAWS)["mean"]


@pytest.mark.parametrize("num_samples", [3, 2000])
def test_resamples_have_the_mean_and_spread_of_draws_with_replacement(num_samples):
    """The mean of a resample of N has the mean and 1/N of the variance of the samples; 2000 take several chunks."""
    samples = np.random.default_rng(0).random((num_samples, 1))
    sums = np.concatenate(list(uncertainty.resampled_sums(samples, seed=0, num_resamples=2000)))
    assert sums.shape == (2000, 1)
    drawn = sums[:, 0] / num_samples
    error = samples.std() / math.sqrt(num_samples)
    assert drawn.mean() == pytest.approx(samples.mean(), abs=4 * error / math.sqrt(2000))
    assert drawn.std() == pytest.approx(error, rel=0.1)


def test_memory_is_bounded_whatever_the_number_of_samples():
    """100,000 samples: each chunk holds ten resamples or so, not a thousand."""
    chunks = list(uncertainty.resampled_sums(np.ones((100_000, 2)), seed=0, num_resamples=25))
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    assert np.concatenate(chunks).tolist() == [[100_000.0] * 2] * 25


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=50)
def test_any_interval_is_ordered_and_within_the_samples(samples, seed):
    found = intervals(MEAN, samples, seed=seed, num_resamples=60, confidence=0.9)["mean"]
    if found is not None:
        assert min(samples) - 1e-9 <= found[0] <= found[1] <= max(samples) + 1e-9


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (99, 1.984), (5000, 1.960)],
)
def test_students_t_is_that_of_the_tables(degrees, t):
    """Source: t tables, 97.5 %, as in the NIST/SEMATECH handbook 1.3.6.7.2."""
    assert uncertainty.student_quantile(0.975, degrees) == pytest.approx(t, abs=6e-4)
    assert uncertainty.student_cdf(-t, degrees) == pytest.approx(0.025, abs=1e-4)


# --- two systems ----------------------------------------------------------------------------------------------------


def test_a_system_against_itself_has_no_difference():
    samples = np.random.default_rng(0).random(50)
    found = paired(MEAN, samples, samples, **DRAWS)["mean"]
    assert found.a == found.b == pytest.approx(samples.mean())
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.15, 0.3])
def test_the_p_value_of_a_mean_is_that_of_the_t_test(shift):
    """Student's paired t test, by hand: the mean of the differences by its standard error."""
    generator = np.random.default_rng(5)
    a = generator.normal(size=400)
    b = a + shift + generator.normal(size=400)
    found = paired(MEAN, a, b, seed=0, num_resamples=10_000, confidence=0.95)["mean"]
    t = (b - a).mean() / ((b - a).std(ddof=1) / math.sqrt(400))
    assert found.difference == pytest.approx((b - a).mean())
    assert found.p_value == pytest.approx(2 * (1 - uncertainty.student_cdf(abs(t), 399)), abs=0.015)
    half = 1.966 * (b - a).std(ddof=1) / math.sqrt(400)  # t table, 399 degrees
    wanted = found.difference - half, found.difference + half
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.06 * half)


def test_systems_that_do_not_differ_are_called_different_in_5_percent_of_trials():
    called = []
    for trial in range(600):
        generator = np.random.default_rng([11, trial])
        a, b = (1.0 * (generator.random(80) < 0.4) for _ in range(2))
        called.append(paired(MEAN, a, b, seed=trial, num_resamples=300, confidence=0.95)["mean"].p_value < 0.05)
    assert 0.03 <= np.mean(called) <= 0.07


def test_the_p_value_is_small_where_the_interval_does_not_hold_0():
    decided = 0
    for trial in range(150):
        generator = np.random.default_rng([13, trial])
        a = generator.random(40)
        found = paired(MEAN, a, a + generator.normal(0.05, 0.15, size=40), **DRAWS)["mean"]
        if abs(found.p_value - 0.05) > 0.005:  # at the edge the resamples decide
            decided += 1
            assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert decided > 100


def test_pairs_are_drawn_together():
    """Systems that differ by the same amount on uneven samples: each is unsure, their difference is not."""
    a = np.random.default_rng(0).random(30) * 10
    b = a + 0.1 + np.random.default_rng(1).normal(size=30) / 100
    low, high = intervals(MEAN, a, **DRAWS)["mean"]
    found = paired(MEAN, a, b, **DRAWS)["mean"]
    assert high - low > 1
    assert found.high - found.low < 0.02
    assert found.p_value < 0.01


@pytest.mark.parametrize(("num", "p_value"), [(1, 1.0), (2, 0.5), (3, 0.25), (6, 2**-5)])
def test_few_samples_prove_little_however_large_the_difference(num, p_value):
    """The sign test: of m pairs all in one direction, two-sided 2 / 2^m. Every sample alike: no interval."""
    found = paired(MEAN, [0.0] * num, [1.0] * num, **DRAWS)["mean"]
    assert found == uncertainty.Difference(0.0, 1.0, 1.0, None, None, p_value)
    mixed = paired(MEAN, [0.0] * num + [1.0] * 50, [1.0 + 0.1 * i for i in range(num)] + [1.0] * 50, **DRAWS)["mean"]
    assert mixed.p_value >= p_value


def test_the_same_samples_must_be_given():
    with pytest.raises(ValueError, match="a has 2 samples and b 1"):
        paired(MEAN, [1.0, 2.0], [1.0], **DRAWS)


def test_a_difference_without_a_value_is_none():
    known, unknown = [Loss(1.0, 1, 1, 4), Loss(2.0, 1, 0, 5)], [Loss(1.0, 1, 0, None), Loss(3.0, 1, 0, 5)]
    found = paired(metrics.losses(), known, unknown, **DRAWS)
    assert found["bits_per_byte"] == uncertainty.Difference(3 / math.log(2) / 9, None, None, None, None, None)
    assert found["loss"].difference == 0.5


def test_infinite_perplexities_give_no_difference():
    huge = [Loss(1e4, 1, 0, 4), Loss(2e4, 1, 0, 5), Loss(1.0, 1, 1, 1)]
    found = paired(metrics.losses(), huge, huge[::-1], **DRAWS)["perplexity"]
    assert found == uncertainty.Difference(*[None] * 6)


def test_distinct_n_is_compared_by_the_jackknife():
    generator = np.random.default_rng(0)
    many, few = (
        [Text(" ".join(map(str, generator.integers(0, top, size=12))), ("",)) for _ in range(60)] for top in (900, 60)
    )
    metric = ngrams.distinct(n=[1])
    found = paired(metric, many, few, **DRAWS)["distinct_1"]
    assert found.low < found.difference < found.high < 0
    assert found.p_value < 1e-6
    again = paired(metric, many, many, **DRAWS)["distinct_1"]
    assert (again.difference, again.low, again.high, again.p_value) == (0, 0, 0, 1)


# --- beside sacrebleu -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems(shared) -> tuple[list[str], list[str], list[str]]:
    """252 real outputs, the same with a tenth of them cut to half, and the references."""
    lines = (shared / "metrics" / "selfinstruct_textdavinci001.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    outputs = [record["prediction"] for record in records]
    cut = [text[: len(text) // 2] if i % 10 == 0 else text for i, text in enumerate(outputs)]
    return outputs, cut, [record["reference"] for record in records]


def test_a_resample_of_bleu_is_the_bleu_of_the_resampled_corpus(systems):
    """Against sacrebleu's corpus score of the drawn texts themselves."""
    outputs, _, references = systems
    metric = ngrams.bleu()
    rows = table(metric, [Text(text, (reference,)) for text, reference in zip(outputs, references, strict=True)])
    for seed in range(3):
        drawn = np.random.default_rng(seed).integers(0, len(outputs), size=len(outputs))
        wanted = sacrebleu.BLEU().corpus_score([outputs[i] for i in drawn], [[references[i] for i in drawn]]).score
        assert float(metric.values(rows[drawn].sum(axis=0))["bleu"]) == pytest.approx(wanted, abs=1e-9)


def test_paired_bootstrap_agrees_with_sacrebleus(systems, monkeypatch):
    """Its test (of Moses) centres by another rule, and its interval is a percentile one, so they agree roughly."""
    outputs, cut, references = systems
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    named = [("baseline", outputs), ("cut", cut)]
    test = PairedTest(named, {"BLEU": sacrebleu.BLEU()}, [references], test_type="bs", n_samples=1000)
    _, scores = test()
    theirs_a, theirs_b = scores["BLEU"]
    ours = [[Text(text, (reference,)) for text, reference in zip(s, references, strict=True)] for s in (outputs, cut)]
    found = paired(ngrams.bleu(), *ours, **DRAWS)["bleu"]
    assert (found.a, found.b) == pytest.approx((theirs_a.score, theirs_b.score), abs=1e-9)
    assert found.p_value == pytest.approx(theirs_b.p_value, abs=0.03)
    low, high = intervals(ngrams.bleu(), ours[0], **DRAWS)["bleu"]
    assert (high - low) / 2 == pytest.approx(theirs_a.ci, rel=0.1)
