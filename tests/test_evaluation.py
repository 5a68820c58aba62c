"""Every target is scored once, and the numbers do not depend on batches, order or processes."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import document, written

from codex_accel import evaluation, tokenizer
from codex_accel import model as models
from codex_accel.evaluation import Scores, Window, plan_windows
from codex_accel.tokens import TokenStore

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(0, 40), max_size=6)
CONTEXT = st.integers(2, 12)


@pytest.fixture(scope="module")
def stories(shared):
    """(model, tokenizer, reference values) of stories260K."""
    folder = shared / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    return models.load(folder), tokenizer.load(folder), reference


@pytest.fixture(scope="module")
def alice(stories, shared):
    """64 documents of Alice in Wonderland: BOS and 100 tokens and less, of ragged lengths."""
    text = (shared / "text" / "alice_pg11_utf8.txt").read_text(encoding="utf-8-sig")
    [ids] = stories[1].encode([text[2000:22000]])
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 101, 64)
    ends = np.cumsum(sizes)
    return [document([1, *ids[end - size : end]]) for size, end in zip(sizes, ends, strict=True)]


def score(model, documents, *, context_length=64, stride=None, batch_size=4, **options) -> Scores:
    lengths = documents.lengths if isinstance(documents, TokenStore) else [len(d.input_ids) for d in documents]
    windows = plan_windows(lengths, context_length=context_length, stride=stride)
    return evaluation.score(model, documents, windows, batch_size=batch_size, device=CPU, **options)


# --- windows ------------------------------------------------------------------------------------------------------


@given(lengths=LENGTHS, context=CONTEXT, stride=st.none() | st.integers(1, 20))
def test_windows_score_every_token_but_the_first_once(lengths, context, stride):
    scored = [
        (window.document, target)
        for window in plan_windows(lengths, context_length=context, stride=stride)
        for target in range(window.first_target, window.stop + 1)
    ]
    assert scored == [(index, target) for index, length in enumerate(lengths) for target in range(1, length)]


@given(lengths=LENGTHS, context=CONTEXT, stride=st.none() | st.integers(1, 20))
def test_a_window_feeds_at_most_the_context_and_what_its_targets_need(lengths, context, stride):
    for window in plan_windows(lengths, context_length=context, stride=stride):
        assert 0 <= window.start < window.first_target <= window.stop < lengths[window.document]
        assert window.stop - window.start <= context


@given(lengths=LENGTHS, context=CONTEXT, stride=st.integers(1, 20))
def test_later_windows_have_context_before_their_first_target(lengths, context, stride):
    for window in plan_windows(lengths, context_length=context, stride=stride):
        if window.first_target > 1:
            assert window.first_target - window.start >= context - min(stride, context) + 1
            assert window.stop - window.first_target + 1 <= stride


def test_windows_without_a_stride_do_not_share_targets_or_waste_context():
    """Worked by hand: 8 tokens, context 3: targets 1-3, 4-6, 7; the last looks back as far as it can."""
    assert plan_windows([8], context_length=3, stride=None) == [
        Window(0, 0, 3, 1),
        Window(0, 3, 6, 4),
        Window(0, 4, 7, 7),
    ]


@given(num=st.integers(1, 300), wanted=st.integers(1, 320))
def test_chosen_windows_are_different_and_spread_from_first_to_last(num, wanted):
    windows = [Window(n, 0, 1, 1) for n in range(num)]
    chosen = [window.document for window in evaluation.choose(windows, wanted)]
    assert len(chosen) == min(num, wanted)
    assert chosen == sorted(set(chosen))
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (0, num - 1)
        assert max(np.diff(chosen)) <= math.ceil((num - 1) / (len(chosen) - 1))


def test_all_windows_are_chosen_by_default():
    windows = [Window(n, 0, 1, 1) for n in range(5)]
    assert evaluation.choose(windows, None) == windows


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1])
def test_scores_are_those_of_the_reference(stories, place):
    """../shared/data/models/stories260K/reference.json: torch 2.13 and transformers 5.23, float32, on a CPU."""
    model, _, reference = stories
    wanted = reference["nll"][place]
    found = evaluation.summarize(score(model, [document(wanted["ids"])], context_length=512), num_bytes=None)
    assert found["num_target_tokens"] == wanted["predicted_tokens"]
    assert found["loss"] == pytest.approx(wanted["mean_nll"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(wanted["ppl"], rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(wanted["token_accuracy"], abs=1e-5)


@pytest.mark.parametrize("place", [0, 1])
def test_bits_per_byte_are_those_of_the_reference(stories, place):
    model, loaded, reference = stories
    wanted = reference["nll"][place]
    assert [1, *loaded.encode([wanted["text"]])[0]] == wanted["ids"]
    scores = score(model, [document(wanted["ids"])], context_length=512)
    found = evaluation.summarize(scores, num_bytes=len(wanted["text"].encode()))
    assert found["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_scores_do_not_depend_on_the_batch_size(stories, alice, batch_size):
    one, other = score(stories[0], alice, batch_size=1), score(stories[0], alice, batch_size=batch_size)
    np.testing.assert_allclose(one.nll, other.nll, rtol=1e-5)
    assert one.num_targets.tolist() == other.num_targets.tolist() == [len(d.input_ids) - 1 for d in alice]
    assert abs(one.num_correct - other.num_correct).sum() <= 1  # a near-tie may turn


def test_scores_of_processes_add_up(stories, alice):
    """Three processes and batches that three does not divide."""
    whole = score(stories[0], alice)
    parts = [score(stories[0], alice, process_index=rank, num_processes=3) for rank in range(3)]
    np.testing.assert_allclose(sum(part.nll for part in parts), whole.nll, rtol=1e-6)
    assert sum(part.num_targets for part in parts).tolist() == whole.num_targets.tolist()
    assert sum(part.num_correct for part in parts).tolist() == whole.num_correct.tolist()
    assert all(part.num_targets.sum() for part in parts)


def test_every_process_is_called_between_batches_as_often(stories, alice):
    """Else one would wait for the others for ever: 65 windows in batches of 16 are 5 batches for 2 processes."""
    calls: list[list] = [[], []]
    for rank in (0, 1):
        options = {"process_index": rank, "num_processes": 2, "batch_size": 16, "context_length": 101}
        score(stories[0], [*alice, alice[0]], **options, between_batches=lambda *call, to=calls[rank]: to.append(call))
    assert calls[0] == calls[1] == [(0, 3), (1, 3), (2, 3)]


def test_what_is_raised_between_batches_ends_the_evaluation(stories, alice):
    def stop(done: int, total: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        score(stories[0], alice, between_batches=stop)


def test_stored_documents_score_as_those_in_memory(stories, alice, tmp_path):
    store = TokenStore(written(tmp_path / "d", alice), "train")
    np.testing.assert_array_equal(score(stories[0], store).nll, score(stories[0], alice).nll)


def test_a_shorter_stride_gives_more_context_and_a_lower_loss(stories, alice):
    losses = [score(stories[0], alice[:16], context_length=32, stride=stride).nll.sum() for stride in (32, 8)]
    assert losses[1] < losses[0]


def test_a_stride_of_one_gives_each_target_its_full_context(stories):
    """Against one forward pass for each target, by hand."""
    model, _, reference = stories
    ids = reference["nll"][1]["ids"][:20]
    expected = 0.0
    for target in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, target - 6) : target]]), use_cache=False).logits[0, -1]
        expected -= logits.log_softmax(-1)[ids[target]].item()
    assert score(model, [document(ids)], context_length=6, stride=1).nll[0] == pytest.approx(expected, rel=1e-5)


def test_prompts_are_read_and_not_scored(stories):
    model, _, reference = stories
    ids = reference["nll"][1]["ids"][:40]
    everything, rest = score(model, [document(ids), document(ids, ((25, 40),))]).nll
    assert score(model, [document(ids, ((25, 40),))]).num_targets.tolist() == [15]
    assert rest == pytest.approx(everything - score(model, [document(ids[:25])]).nll[0], rel=1e-5)


def test_document_without_a_target_counts_nothing(stories):
    scores = score(stories[0], [document([1]), document([]), document([1, 410, 447])])
    assert scores.num_targets.tolist() == [0, 0, 2]
    assert scores.nll[:2].tolist() == [0, 0]


# --- summary ------------------------------------------------------------------------------------------------------


def scores_of(nll, num_targets, num_correct) -> Scores:
    return Scores(np.array(nll, dtype=np.float64), np.array(num_targets), np.array(num_correct))


def test_summary_divides_the_sums_once():
    """By hand: 6 nats over 4 targets, not the mean of 1 and 5/3; 1.5 nats are 2.164 bits a token."""
    found = evaluation.summarize(scores_of([1.0, 5.0], [1, 3], [1, 2]), num_bytes=8)
    assert found["loss"] == 1.5
    assert found["perplexity"] == pytest.approx(4.4816890703)
    assert found["bits_per_byte"] == pytest.approx(6 / math.log(2) / 8)
    assert found["token_accuracy"] == 0.75
    assert (found["num_target_tokens"], found["num_bytes"]) == (4, 8)


def test_bits_per_byte_are_unknown_where_the_bytes_are():
    assert evaluation.summarize(scores_of([1.0], [1], [1]), num_bytes=None)["bits_per_byte"] is None


def test_nothing_scored_is_no_number():
    found = evaluation.summarize(scores_of([0.0], [0], [0]), num_bytes=None)
    assert math.isnan(found["loss"])
    assert math.isnan(found["perplexity"])
    assert math.isnan(found["token_accuracy"])


def test_broken_model_has_no_perplexity():
    found = evaluation.summarize(scores_of([math.nan], [1], [0]), num_bytes=None)
    assert math.isnan(found["perplexity"])


def test_bytes_are_those_of_all_documents():
    assert evaluation.total_bytes([document([1], (), 2), document([1], (), 5)]) == 21
