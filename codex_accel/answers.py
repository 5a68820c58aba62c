"""Metrics of answers that are right or wrong, or partly right.

Rule: each function states whose rules it follows; a sample without a defined score takes no part in the mean, and is
counted. Every value is a share from 0 to 1.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from codex_accel.scoring import Choice, Metric, Text, means, share

Rules = Literal["plain", "squad_v1", "squad_v2"]
ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as the SQuAD scripts have it


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces: normalize_answer of the SQuAD scripts.

    >>> normalized("An  apple, a day!")
    'apple day'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def _accepted(references: Sequence[str], rules: Rules) -> Sequence[str]:
    """The references that count: squad_v2 drops those that normalize to nothing, unless all do."""
    if rules != "squad_v2":
        return references
    return [text for text in references if normalized(text)] or [""]


def _is_match(sample: Text, rules: Rules) -> bool:
    clean = str.strip if rules == "plain" else normalized
    prediction = clean(sample.prediction)
    return any(prediction == clean(reference) for reference in _accepted(sample.references, rules))


def exact_match(*, rules: Rules = "squad_v1") -> Metric:
    """Share of outputs equal to one of their references.

    squad_v1, squad_v2: after `normalized`, as in the official scripts of SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0
    (2018), which differ for a list of references of which some are empty. plain: equal but for outer white space.
    """
    return Metric(
        statistics=lambda sample: share(_is_match(sample, rules)),
        values=means("exact_match"),
        facts={"rules": rules},
    )


def weighted_accuracy(*, rules: Rules = "squad_v1") -> Metric:
    """Sum of the weights of the exact matches, by the sum of all weights."""

    def statistics(sample: Text) -> tuple[float, float]:
        return sample.weight * _is_match(sample, rules), sample.weight

    def facts_of(samples: Sequence[Text], _: np.ndarray) -> dict[str, Any]:
        return {"num_without_weight": sum(sample.weight == 0 for sample in samples)}

    values = means("weighted_accuracy")
    return Metric(statistics=statistics, values=values, facts={"rules": rules}, facts_of=facts_of)


# --- F1 over words --------------------------------------------------------------------------------------------------


def _overlap(prediction: list[str], reference: list[str], rules: Rules) -> float:
    """Harmonic mean of precision and recall of words; with nothing to compare 0 (v1), or whether both are (v2)."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if rules == "squad_v2" and not (prediction and reference):
        return float(prediction == reference)
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def f1(*, rules: Literal["squad_v1", "squad_v2"] = "squad_v1") -> Metric:
    """Mean over samples of the F1 of normalized words with the reference that gives the most.

    Source: the official scripts of SQuAD 1.1 and 2.0. Empty against empty is 0 by the first and 1 by the second.
    """

    def statistics(sample: Text) -> tuple[float, ...]:
        prediction = normalized(sample.prediction).split()
        references = [normalized(text).split() for text in _accepted(sample.references, rules)]
        best = max(_overlap(prediction, reference, rules) for reference in references)
        return *share(best), not prediction, not any(references)

    return Metric(statistics=statistics, values=means("f1"), facts={"rules": rules}, facts_of=without_tokens(2))


def without_tokens(first: int) -> Callable[[Sequence[Any], np.ndarray], dict[str, Any]]:
    """Counts the samples without any token, from the columns `first` (in the output) and the next (in a reference)."""

    def facts_of(_: Sequence[Any], rows: np.ndarray) -> dict[str, Any]:
        predictions, references = (int(rows[:, column].sum()) for column in (first, first + 1))
        return {"num_predictions_without_tokens": predictions, "num_references_without_tokens": references}

    return facts_of


# --- final numbers --------------------------------------------------------------------------------------------------

NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)\]%])[-+\u2212])?(?:[$€£¥](?P<inner>[-+\u2212])?)?"  # 3-5 has no negative number
    r"(?P<digits>\.?[0-9][0-9.,]*)(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order.

    ASCII digits with a decimal point; commas between digits, a currency sign before and a full stop after are dropped,
    and so is what follows, such as % or a unit. A minus counts where no digit, letter or bracket stands before it.
    What has two points (1.2.3) is no number.

    >>> numbers("It is 3-5 times, or -$1,234.50. (v1.2.3)")
    [Decimal('3'), Decimal('5'), Decimal('-1234.50')]
    """
    return [value for match in NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> Decimal | None:
    digits = match["digits"].rstrip(".,").replace(",", "")
    if digits.count(".") > 1:
        return None
    exponent = match["exponent"] or "" if match["digits"][-1] not in ".," else ""
    value = Decimal(digits + exponent)
    return value.copy_negate() if (match["sign"] or match["inner"]) in ("-", "\u2212") else value


def _after(text: str, marker: str) -> Decimal | None:
    """The number that follows the first `marker` with nothing but white space between; None if there is none."""
    rest = text.partition(marker)[2].lstrip()
    match = NUMBER.match(rest)
    return _value(match) if match else None


def numeric_answer(
    *, take: Literal["last", "marked"] = "last", marker: Annotated[str, Field(min_length=1)] = "####"
) -> Metric:
    """Share of outputs whose final number has the value of a reference's.

    take = last: the last number of the output, like flexible-extract of lm-evaluation-harness (gsm8k). take = marked:
    what follows the first `marker`, like strict-match there and extract_answer of openai/grade-school-math. Of a
    reference it is what follows its marker, or else its last number. Values are compared, not texts: 18.00 is 18. An
    output without such a number is wrong, and counted; a sample without a number in any reference has no score.
    """

    def found(text: str) -> Decimal | None:
        if take == "marked":
            return _after(text, marker)
        return next(iter(numbers(text)[-1:]), None)

    def of_reference(text: str) -> Decimal | None:
        return _after(text, marker) if marker in text else next(iter(numbers(text)[-1:]), None)

    def statistics(sample: Text) -> tuple[float, ...]:
        answer = found(sample.prediction)
        right = {value for reference in sample.references if (value := of_reference(reference)) is not None}
        return *share(answer in right if right else None), answer is None, not right

    def facts_of(_: Sequence[Text], rows: np.ndarray) -> dict[str, Any]:
        predictions, references = int(rows[:, 2].sum()), int(rows[:, 3].sum())
        return {"num_predictions_without_number": predictions, "num_references_without_number": references}

    facts = {"take": take, "marker": marker}
    return Metric(statistics=statistics, values=means("numeric_answer"), facts=facts, facts_of=facts_of)


# --- multiple choice ------------------------------------------------------------------------------------------------


def acc() -> Metric:
    """Share of questions whose likeliest choice is the right one; of equal ones the first counts.

    Source: `acc` of lm-evaluation-harness (output_type multiple_choice).
    """
    return _chosen("acc", lambda sample: sample.loglikelihoods)


def acc_norm() -> Metric:
    """`acc` with each log-likelihood divided by the number of characters of its choice.

    Source: `acc_norm` of lm-evaluation-harness. A question with an empty choice has no score, and is counted.
    """

    def scores(sample: Choice) -> Sequence[float] | None:
        if not all(sample.choices):
            return None
        return [value / len(text) for value, text in zip(sample.loglikelihoods, sample.choices, strict=True)]

    return _chosen("acc_norm", scores)


def _chosen(name: str, scores: Callable[[Choice], Sequence[float] | None]) -> Metric:
    """Share of questions whose highest score is that of the answer; a question with a NaN has no score."""

    def statistics(sample: Choice) -> tuple[float, float]:
        found = scores(sample)
        if found is None or np.isnan(found).any():
            return share(None)
        return share(int(np.argmax(found)) == sample.answer)

    def facts_of(_: Sequence[Choice], rows: np.ndarray) -> dict[str, Any]:
        return {"num_without_score": int((rows[:, 1] == 0).sum())}

    return Metric(statistics=statistics, values=means(name), facts_of=facts_of)
