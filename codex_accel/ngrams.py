"""Metrics that count n-grams: ROUGE, BLEU, chrF, distinct-n.

Rule: what is counted in one sample is counted by the reference implementation (rouge_score, sacrebleu); sums over
samples become a score here, by its formula, for many resamples at once.
"""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from codex_accel.answers import without_tokens
from codex_accel.scoring import Metric, Text, Values, means, share

RougeType = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
RougePart = Literal["f", "precision", "recall"]
ROUGE_TOKEN = re.compile("[a-z0-9]")  # after lower(): rouge_score drops all else, such as é and every Chinese character
Tokenizer = Literal["13a", "intl", "char", "zh", "none", "ja-mecab", "ko-mecab"]  # spm and flores need the network
Smoothing = Literal["exp", "floor", "add-k", "none"]
Natural = Annotated[int, Field(ge=1)]


def rouge(
    *,
    types: Annotated[Sequence[RougeType], Field(min_length=1)] = ("rouge1", "rouge2", "rougeL"),
    stemmer: bool = False,
    parts: Annotated[Sequence[RougePart], Field(min_length=1)] = ("f",),
) -> Metric:
    """Mean over samples of ROUGE F (Lin 2004), by rouge_score; of several references the one with the highest F counts.

    rougeL takes a text as one sentence, rougeLsum its lines as sentences. `stemmer`: Porter's, for words of more than
    three letters. `parts` are named rouge1 (F), rouge1_precision, rouge1_recall. From 0 to 1.

    Source: rouge_score 0.1.2 (google-research), score_multi. Its tokenizer keeps runs of a-z and 0-9 only: a text
    without any has no token and scores 0, which the facts count.
    """
    import importlib.metadata

    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(list(types), use_stemmer=stemmer)
    fields = {"f": "fmeasure", "precision": "precision", "recall": "recall"}
    names = [name if part == "f" else f"{name}_{part}" for name in types for part in parts]

    def statistics(sample: Text) -> list[float]:
        found = scorer.score_multi(list(sample.references), sample.prediction)
        scores = [getattr(found[name], fields[part]) for name in types for part in parts]
        has_tokens = [bool(ROUGE_TOKEN.search(text.lower())) for text in (sample.prediction, *sample.references)]
        return [*(value for score in scores for value in share(score)), not has_tokens[0], not any(has_tokens[1:])]

    facts = {"rouge_score": importlib.metadata.version("rouge-score"), "stemmer": stemmer}
    return Metric(statistics=statistics, values=means(*names), facts=facts, facts_of=without_tokens(2 * len(names)))


# --- BLEU and chrF --------------------------------------------------------------------------------------------------


def bleu(
    *,
    tokenize: Tokenizer = "13a",
    lowercase: bool = False,
    smooth_method: Smoothing = "exp",
    smooth_value: Annotated[float, Field(ge=0)] | None = None,
    max_ngram_order: Natural = 4,
    effective_order: bool = False,
) -> Metric:
    """BLEU of the corpus (Papineni et al. 2002) by sacrebleu's definition, from 0 to 100.

    The score of one sample is sacrebleu's sentence BLEU: the same settings, and `effective_order`.

    Source: sacrebleu 2.6.0 (Post 2018), class BLEU; settings have its names and defaults. Its signature is a fact.
    """
    from sacrebleu.metrics.bleu import BLEU

    counter = BLEU(
        tokenize=tokenize,
        lowercase=lowercase,
        smooth_method=smooth_method,
        smooth_value=smooth_value,
        max_ngram_order=max_ngram_order,
        effective_order=effective_order,
        force=True,
    )
    value = BLEU.SMOOTH_DEFAULTS[smooth_method] if smooth_value is None else smooth_value

    def score(sums: np.ndarray, *, effective: bool) -> Values:
        return {"bleu": bleu_of(sums, smooth_method=smooth_method, smooth_value=value, effective_order=effective)}

    def facts_of(samples: Sequence[Text], rows: np.ndarray) -> dict[str, Any]:
        counts = {
            "num_predictions_without_tokens": int((rows[:, 0] == 0).sum()),
            "num_references_without_tokens": int((rows[:, 1] == 0).sum()),
        }
        return {"signature": _signature(counter, samples)} | counts

    return Metric(
        statistics=lambda sample: _counted(counter, sample),
        values=lambda sums: score(sums, effective=effective_order),
        per_sample=lambda rows: score(rows, effective=True),
        facts_of=facts_of,
    )


def _counted(counter: Any, sample: Text) -> list[float]:
    """The sufficient statistics that sacrebleu takes from one sample, whatever its number of references."""
    [found] = counter._extract_corpus_statistics([sample.prediction], [[text] for text in sample.references])
    return list(found)


def _signature(counter: Any, samples: Sequence[Text]) -> str:
    """sacrebleu's signature; `nrefs:var` if samples differ in their number of references."""
    numbers = {len(sample.references) for sample in samples}
    counter.num_refs = numbers.pop() if len(numbers) == 1 else -1
    return str(counter.get_signature())


def bleu_of(
    sums: np.ndarray, *, smooth_method: Smoothing, smooth_value: float | None, effective_order: bool
) -> np.ndarray:
    """BLEU of summed statistics (..., 2 + 2 M): length, reference length, M counts of matches, M of n-grams.

    The formula is that of BLEU.compute_bleu in sacrebleu 2.6.0: a corpus without a match scores 0 whatever the
    smoothing, an order without any n-gram ends the product, and `effective_order` takes the mean over the orders up to
    there.
    """
    value = smooth_value or 0.0
    num_orders = (sums.shape[-1] - 2) // 2
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + num_orders].copy(), sums[..., 2 + num_orders :].copy()
    if smooth_method == "add-k":
        matches[..., 1:] += value
        totals[..., 1:] += value
    reached = np.logical_and.accumulate(totals > 0, axis=-1)
    missing = (matches == 0) & reached
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(length < reference_length, np.exp(1 - reference_length / length), 1.0)
        if smooth_method == "exp":
            matches = np.where(missing, 0.5 ** missing.cumsum(axis=-1), matches)
        elif smooth_method == "floor":
            matches = np.where(missing, value, matches)
        logs = np.where(reached, np.log(matches / totals), 0.0 if effective_order else -np.inf)
        num_used = np.maximum(reached.sum(axis=-1), 1) if effective_order else num_orders
        score = 100 * brevity * np.exp(logs.sum(axis=-1) / num_used)
    return np.where(sums[..., 2 : 2 + num_orders].any(axis=-1), score, 0.0)


def chrf(
    *,
    char_order: Natural = 6,
    word_order: Annotated[int, Field(ge=0)] = 0,
    beta: Natural = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> Metric:
    """chrF of the corpus (Popović 2015) by sacrebleu's definition, from 0 to 100; with word_order = 2 it is chrF++.

    Of several references the one with the highest chrF of the sample is counted.

    Source: sacrebleu 2.6.0, class CHRF; settings have its names and defaults. Its signature is a fact.
    """
    from sacrebleu.metrics.chrf import CHRF

    counter = CHRF(
        char_order=char_order,
        word_order=word_order,
        beta=beta,
        lowercase=lowercase,
        whitespace=whitespace,
        eps_smoothing=eps_smoothing,
    )

    def facts_of(samples: Sequence[Text], _: np.ndarray) -> dict[str, Any]:
        empty = [not sample.prediction.strip() for sample in samples]
        no_references = [not any(map(str.strip, sample.references)) for sample in samples]
        counts = {"num_predictions_without_tokens": sum(empty), "num_references_without_tokens": sum(no_references)}
        return {"signature": _signature(counter, samples)} | counts

    return Metric(
        statistics=lambda sample: _counted(counter, sample),
        values=lambda sums: {"chrf": chrf_of(sums, beta=beta, eps_smoothing=eps_smoothing)},
        facts_of=facts_of,
    )


def chrf_of(sums: np.ndarray, *, beta: float, eps_smoothing: bool) -> np.ndarray:
    """chrF of summed statistics (..., 3 M): n-grams of the output, of the reference and matches, for each of M orders.

    The formula is that of CHRF._compute_f_score in sacrebleu 2.6.0: precision and recall are averaged over the orders
    that both sides have; with `eps_smoothing` the F of each order is averaged over all orders instead.
    """
    outputs, references, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    factor, tiny = beta**2, 1e-16
    with np.errstate(divide="ignore", invalid="ignore"):
        if eps_smoothing:
            precision = np.where(outputs > 0, matches / outputs, tiny)
            recall = np.where(references > 0, matches / references, tiny)
            below = factor * precision + recall
            each = np.where(below > 0, (1 + factor) * precision * recall / below, tiny)
            return 100 * each.mean(axis=-1)
        both = (outputs > 0) & (references > 0)
        num_used = np.maximum(both.sum(axis=-1), 1)
        precision = np.where(both, matches / outputs, 0.0).sum(axis=-1) / num_used
        recall = np.where(both, matches / references, 0.0).sum(axis=-1) / num_used
        below = factor * precision + recall
        return np.where(below > 0, 100 * (1 + factor) * precision * recall / below, 0.0)


# --- distinct-n -----------------------------------------------------------------------------------------------------


def distinct(*, n: Annotated[Sequence[Natural], Field(min_length=1)] = (1, 2)) -> Metric:
    """Different n-grams of all outputs together, divided by all their n-grams (Li et al. 2016), from 0 to 1.

    Words are what white space parts, as they are written. n-grams do not run from one output into the next. The value
    falls as outputs are added, so compare outputs for the same prompts only. References are not looked at.
    """

    def whole(samples: Sequence[Text]) -> dict[str, float]:
        return {name: float(found[0]) for name, found in left_out(samples, np.ones(len(samples), dtype=int)).items()}

    def left_out(samples: Sequence[Text], groups: np.ndarray) -> Values:
        words = [sample.prediction.split() for sample in samples]
        return {f"distinct_{size}": _distinct_without(words, groups, size) for size in n}

    def facts_of(samples: Sequence[Text], _: np.ndarray) -> dict[str, Any]:
        return {"num_predictions_without_tokens": sum(not sample.prediction.split() for sample in samples)}

    return Metric(whole=whole, left_out=left_out, facts={"n": list(n)}, facts_of=facts_of, bounds=(0.0, 1.0))


def _distinct_without(words: Sequence[list[str]], groups: np.ndarray, n: int) -> np.ndarray:
    """distinct-n without each group, (max(groups) + 1,), in one pass; NaN where no n-gram is left.

    A group takes with it the n-grams that no other group has.
    """
    owner: dict[tuple[str, ...], int] = {}  # the group that has it alone, or -1
    totals = np.zeros(groups.max() + 1)
    for group, text in zip(groups.tolist(), words, strict=True):
        for ngram in zip(*(text[start:] for start in range(n)), strict=False):
            if owner.setdefault(ngram, group) != group:
                owner[ngram] = -1
        totals[group] += max(0, len(text) - n + 1)
    alone = np.bincount([group for group in owner.values() if group >= 0], minlength=len(totals))
    left = totals.sum() - totals
    return np.divide(len(owner) - alone, left, out=np.full(len(totals), math.nan), where=left > 0)
