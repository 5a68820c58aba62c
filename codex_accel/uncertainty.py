"""How sure a value is: confidence intervals, and the difference between two systems on the same samples.

Rule: the sample (a document, a prompt) is what was drawn by chance, so samples are what is resampled, whole; every draw
comes from the seed. Where resampling can tell nothing (one sample, or all alike), there is no interval.

A metric of sums is bootstrapped (Efron 1979): each resample draws N samples with replacement, and the value is computed
anew from their sums. Intervals are BCa (Efron 1987), which mends the percentile interval for bias and skewness.

What does not add up is jackknifed: the spread of the value when a group of samples is left out. A resample, which has
samples twice, has fewer different n-grams than any true sample, so distinct-n cannot be bootstrapped; the jackknife's
spread tends to be too wide rather than too narrow (Efron and Stein 1981).

Shapes: N samples, K statistics, B resamples, G groups.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from codex_accel import seeds
from codex_accel.scoring import Metric, Values, number, table

CHUNK = 1 << 20  # draws at once: 8 MB of indices, and as much of counts
MAX_UNDEFINED = 0.01  # share of resamples that may lack a value
NUM_GROUPS = 100  # of the jackknife, or N if that is less
MANY_DEGREES = 1000  # of freedom, from which Student's t is taken for normal: 1.962 and 1.960
SAME = 1e-12  # relative spread that is rounding

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Two systems on the same samples; None where there is no value, and where the samples tell nothing."""

    a: float | None
    b: float | None
    difference: float | None  # b - a
    low: float | None
    high: float | None
    p_value: float | None  # two-sided: of no difference


def intervals(
    metric: Metric,
    samples: Sequence[Any],
    *,
    seed: int,
    num_resamples: int,
    confidence: float,
    rows: np.ndarray | None = None,
) -> dict[str, Interval | None]:
    """Confidence interval of each value; None where there is none. `rows` are the samples' statistics, if known.

    There is none for a single sample, where every sample counts alike (all right, or all wrong), and where the value,
    or that of more than 1 % of the resamples, does not exist.
    """
    if not len(samples):
        return {}
    if metric.statistics is None:
        whole, without = _jackknife(metric, samples, seed)
        return {
            name: _within(_of_jackknife(value, without[name], confidence), metric.bounds)
            for name, value in whole.items()
        }
    rows = table(metric, samples) if rows is None else rows
    value, resampled, without = _bootstrap(metric, rows, seed=seed, num_resamples=num_resamples)
    return {name: _bca(value[name], resampled[name], without[name], confidence) for name in value}


def paired(
    metric: Metric, a: Sequence[Any], b: Sequence[Any], *, seed: int, num_resamples: int, confidence: float
) -> dict[str, Difference]:
    """The difference b - a of each value, `a` and `b` being outputs for the same samples in the same order.

    Paired bootstrap resampling (Koehn 2004, "Statistical significance tests for machine translation evaluation"): each
    resample draws samples with what both systems made of them. The p-value is two-sided, the confidence level at which
    the interval begins to hold 0, and so below 1 - confidence if the interval does not hold 0. But it is never below
    2^(1 - m), where m samples differ between the systems, which is as far as a test by signs could tell.

    Raises: ValueError if the two have different numbers of samples.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} samples and b {len(b)}; they must be the same ones")
    if not len(a):
        return {}
    if metric.statistics is None:
        return _paired_jackknife(metric, a, b, seed=seed, confidence=confidence)
    rows = table(metric, a), table(metric, b)
    floor = _smallest_p(int((rows[0] != rows[1]).any(axis=1).sum()))
    found = [_bootstrap(metric, each, seed=seed, num_resamples=num_resamples) for each in rows]  # the same draws
    differences = {}
    for name in [name for name in found[0][0] if name in found[1][0]]:
        (value_a, drawn_a, without_a), (value_b, drawn_b, without_b) = (
            (value[name], drawn[name], without[name]) for value, drawn, without in found
        )
        with np.errstate(invalid="ignore"):  # inf - inf, of perplexities beyond all bounds
            drawn, without = drawn_b - drawn_a, without_b - without_a
        differences[name] = _difference(value_a, value_b, drawn, without, confidence=confidence, floor=floor)
    return differences


def _smallest_p(num_different: int) -> float:
    return min(1.0, 2.0 ** (1 - num_different))


def _within(interval: Interval | None, bounds: Interval) -> Interval | None:
    return interval and (max(interval[0], bounds[0]), min(interval[1], bounds[1]))


# --- bootstrap ------------------------------------------------------------------------------------------------------


def resampled_sums(rows: np.ndarray, *, seed: int, num_resamples: int) -> Iterator[np.ndarray]:
    """Sums of the statistics of N samples drawn with replacement, chunk by chunk, (C, K), B in all.

    The draws depend on the seed and on N alone, so that two systems on the same samples are drawn alike, and a metric's
    interval does not depend on the other metrics.
    """
    num_samples = len(rows)
    generator = np.random.default_rng(seeds.derive(seed, "bootstrap", num_samples))
    size = max(1, CHUNK // num_samples)
    for start in range(0, num_resamples, size):
        num = min(size, num_resamples - start)
        drawn = generator.integers(0, num_samples, size=(num, num_samples))
        drawn += np.arange(num)[:, None] * num_samples
        counts = np.bincount(drawn.ravel(), minlength=num * num_samples).reshape(num, num_samples)
        yield counts.astype(np.float64) @ rows


def _bootstrap(
    metric: Metric, rows: np.ndarray, *, seed: int, num_resamples: int
) -> tuple[dict[str, float], Values, Values]:
    """By name: the value of all samples, of each resample (B,), and of all samples but one (N,)."""
    assert metric.values is not None
    sums = rows.sum(axis=0)
    parts = [metric.values(chunk) for chunk in resampled_sums(rows, seed=seed, num_resamples=num_resamples)]
    resampled = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: float(value) for name, value in metric.values(sums).items()}, resampled, metric.values(sums - rows)


def _defined(value: float, resampled: np.ndarray) -> np.ndarray | None:
    """The resamples that have a value; None if the samples have none, or too few resamples do."""
    finite = resampled[np.isfinite(resampled)]
    enough = len(finite) >= max(1, (1 - MAX_UNDEFINED) * len(resampled))
    return finite if enough and math.isfinite(value) else None


def _is_constant(value: float, resampled: np.ndarray, without: np.ndarray) -> bool:
    """Whether neither resampling nor leaving a sample out changes the value, so that nothing is known of its spread."""
    spread = max(np.ptp(resampled), np.ptp(without) if np.isfinite(without).all() else math.inf)
    return len(without) < 2 or bool(spread <= SAME * max(1.0, abs(value)))


def _normal_rank(resampled: np.ndarray, value: float) -> float:
    """The normal quantile of the share of resamples below `value`, of which those equal to it count half."""
    tolerance = SAME * max(1.0, abs(value))
    below, above = np.sum(resampled < value - tolerance), np.sum(resampled > value + tolerance)
    num = len(resampled)
    return NormalDist().inv_cdf((1 + num + below - above) / (2 * num + 2))  # never 0 or 1


def _mended(value: float, resampled: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """(z0, a) of BCa: the bias of the resamples about the value, in normal units, and the acceleration."""
    bias = _normal_rank(resampled, value)
    if not np.isfinite(without).all():
        return bias, 0.0
    deviations = without.mean() - without
    scale = np.sum(deviations**2) ** 1.5
    acceleration = float(np.sum(deviations**3) / (6 * scale)) if scale > 0 else 0.0
    return bias, acceleration


def _expansion(num_samples: int) -> float:
    """Resamples of N spread by sqrt((N - 1) / N) too little."""
    return math.sqrt(num_samples / (num_samples - 1))


def _bca(value: float, resampled: np.ndarray, without: np.ndarray, confidence: float) -> Interval | None:
    """The bias-corrected and accelerated interval (Efron 1987; Efron and Tibshirani 1993, equation 14.10).

    Its normal quantiles are widened for few samples as those of Hesterberg's expanded percentile interval (2015, "What
    teachers should know about the bootstrap"): Student's t with N - 1 degrees of freedom, times sqrt(N / (N - 1)).
    """
    usable = _defined(value, resampled)
    if usable is None or _is_constant(value, usable, without):
        return None
    bias, acceleration = _mended(value, usable, without)
    normal = NormalDist()
    reach = student_quantile((1 + confidence) / 2, len(without) - 1) * _expansion(len(without))
    shifted = bias - reach, bias + reach
    places = [normal.cdf(bias + z / max(0.1, 1 - acceleration * z)) for z in shifted]  # 0.1: no pole
    low, high = np.quantile(usable, places)
    return float(low), float(high)


def _difference(
    a: float, b: float, resampled: np.ndarray, without: np.ndarray, *, confidence: float, floor: float
) -> Difference:
    """The BCa interval of b - a, and the p-value at which an end of it comes to 0 (DiCiccio and Efron 1996, 3.5)."""
    value = b - a
    left = number(a), number(b), number(value)
    usable = _defined(value, resampled)
    if usable is None:
        return Difference(*left, None, None, None)
    if _is_constant(value, usable, without):
        return _constant_difference(left, num_samples=len(without), floor=floor)
    low, high = _bca(value, resampled, without, confidence) or (None, None)
    bias, acceleration = _mended(value, usable, without)
    z = _normal_rank(usable, 0.0) - bias
    reach = z / max(0.1, 1 + acceleration * z) - bias
    level = student_cdf(reach / _expansion(len(without)), len(without) - 1)
    return Difference(*left, low, high, min(1.0, max(floor, 2 * min(level, 1 - level))))


def _constant_difference(
    left: tuple[float | None, float | None, float | None], *, num_samples: int, floor: float
) -> Difference:
    """Of samples that all differ alike: none between equals; else the p-value of a test by signs, without interval."""
    if num_samples > 1 and abs(left[2] or 0.0) <= SAME * max(1.0, abs(left[0] or 0.0)):
        return Difference(*left, 0.0, 0.0, 1.0)
    return Difference(*left, None, None, floor)


# --- jackknife ------------------------------------------------------------------------------------------------------


def _jackknife(metric: Metric, samples: Sequence[Any], seed: int) -> tuple[dict[str, float], Values]:
    """By name: the value of all samples, and without each of G random groups of nearly equal size, (G,)."""
    assert metric.whole is not None
    num_groups = min(len(samples), NUM_GROUPS)
    generator = np.random.default_rng(seeds.derive(seed, "jackknife", len(samples)))
    groups = generator.permutation(len(samples)) % num_groups
    whole = metric.whole(samples)
    if num_groups < 2:
        return whole, {name: np.full(1, math.nan) for name in whole}
    if metric.left_out is not None:
        return whole, metric.left_out(samples, groups)
    parts = [
        metric.whole([s for s, g in zip(samples, groups, strict=True) if g != group]) for group in range(num_groups)
    ]
    return whole, {name: np.array([part.get(name, math.nan) for part in parts]) for name in whole}


def _error(without: np.ndarray) -> float:
    """Standard error, by the delete-a-group jackknife; NaN if a part has no value."""
    num_groups = len(without)
    if not np.isfinite(without).all():
        return math.nan
    return math.sqrt((num_groups - 1) / num_groups * float(np.sum((without - without.mean()) ** 2)))


def _of_jackknife(value: float, without: np.ndarray, confidence: float) -> Interval | None:
    error = _error(without)
    if not math.isfinite(value) or not math.isfinite(error) or error <= SAME * max(1.0, abs(value)):
        return None
    width = student_quantile((1 + confidence) / 2, len(without) - 1) * error
    return value - width, value + width


def _paired_jackknife(
    metric: Metric, a: Sequence[Any], b: Sequence[Any], *, seed: int, confidence: float
) -> dict[str, Difference]:
    (whole_a, without_a), (whole_b, without_b) = (_jackknife(metric, each, seed) for each in (a, b))
    floor = _smallest_p(sum(left != right for left, right in zip(a, b, strict=True)))
    differences = {}
    for name in [name for name in whole_a if name in whole_b]:
        value = whole_b[name] - whole_a[name]
        left = number(whole_a[name]), number(whole_b[name]), number(value)
        without = without_b[name] - without_a[name]
        interval = _of_jackknife(value, without, confidence)
        if interval is None:
            known = math.isfinite(value) and (len(a) == 1 or math.isfinite(_error(without)))
            found = _constant_difference(left, num_samples=len(a), floor=floor)
            differences[name] = found if known else Difference(*left, None, None, None)
            continue
        p_value = 2 * (1 - student_cdf(abs(value) / _error(without), len(without) - 1))
        differences[name] = Difference(*left, *interval, min(1.0, max(floor, p_value)))
    return differences


def student_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if degrees > MANY_DEGREES:
        return NormalDist().cdf(t)
    angle = math.atan(t / math.sqrt(degrees))
    squared = math.cos(angle) ** 2
    term = math.cos(angle) if degrees % 2 else 1.0
    total = 0.0
    for k in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * squared
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if degrees % 2 else math.sin(angle) * total
    return 0.5 + inside / 2


@functools.cache
def student_quantile(probability: float, degrees: int) -> float:
    """The t of which `student_cdf` is `probability` (above one half), by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < probability else (low, middle)
    return high
