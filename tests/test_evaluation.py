"""Every target is scored once, and the numbers do not depend on batches, order or processes."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import document, written
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel import evaluation, loss, tokenizer
from codex_accel import model as models
from codex_accel.errors import UserError
from codex_accel.evaluation import Scores, Window, WindowScores, plan_batches, plan_windows, score_windows
from codex_accel.packing import IGNORE
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


@torch.no_grad()
def one_by_one(model, documents, windows) -> WindowScores:
    """The reference: a forward pass for each window alone, all of its logits, and torch's own log-softmax."""
    sums = []
    for window in windows:
        each = documents[window.document]
        ids = torch.from_numpy(each.input_ids[window.start : window.stop + 1].astype(np.int64))
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
        places = [n - window.start for n in range(window.first_target, window.stop + 1) if each.is_target()[n]]
        rows, targets = logits[[place - 1 for place in places]], ids[places]
        nll = -rows.log_softmax(-1)[torch.arange(len(places)), targets]
        sums.append((nll.double().sum().item(), len(places), (rows.argmax(-1) == targets).sum().item()))
    nlls, *counts = zip(*sums, strict=True)
    return WindowScores(np.array(nlls), *map(np.array, counts))


def in_batches(model, documents, windows, batches, **options) -> WindowScores:
    """Scores of all windows, in their order, whatever the order of the batches."""
    nll, counts = np.full(len(windows), np.nan), np.zeros((2, len(windows)), dtype=np.int64)
    for batch in batches:
        found = score_windows(model, documents, [windows[n] for n in batch], device=CPU, **options)
        nll[batch], counts[0, batch], counts[1, batch] = found.nll, found.num_targets, found.num_correct
    return WindowScores(nll, *counts)


def assert_same(found: WindowScores, wanted: WindowScores, *, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found.nll, wanted.nll, rtol=rtol)
    assert found.num_targets.tolist() == wanted.num_targets.tolist()
    assert abs(found.num_correct - wanted.num_correct).sum() <= 1  # a near-tie may turn


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


@pytest.fixture(scope="module")
def windows_of_alice(stories, alice):
    """Windows of 40 tokens and less that score 24 each after the first, and what each gets alone."""
    windows = plan_windows([len(each.input_ids) for each in alice], context_length=40, stride=24)
    return windows, one_by_one(stories[0], alice, windows)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("budget", [{"batch_size": n} for n in (1, 2, 7, 16)] + [{"batch_tokens": 600}])
def test_windows_score_as_they_do_alone(stories, alice, windows_of_alice, budget, packed):
    windows, alone = windows_of_alice
    found = in_batches(stories[0], alice, windows, plan_batches(windows, **budget), packed=packed)
    assert_same(found, alone)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_windows_of_any_lengths_score_together_as_they_do_alone(stories, alice, windows_of_alice, packed):
    """Two batches, shuffled, so that long ones stand beside short ones and a CPU takes each in several passes."""
    windows, alone = windows_of_alice
    shuffled = np.random.default_rng(0).permutation(len(windows))
    found = in_batches(stories[0], alice, windows, np.array_split(shuffled, 2), packed=packed)
    assert_same(found, alone)


def test_shuffled_windows_get_the_same_scores(stories, alice, windows_of_alice):
    windows, alone = windows_of_alice
    order = np.random.default_rng(1).permutation(len(windows))
    shuffled = [windows[n] for n in order]
    found = in_batches(stories[0], alice, shuffled, plan_batches(shuffled, batch_tokens=600))
    assert_same(found, WindowScores(alone.nll[order], alone.num_targets[order], alone.num_correct[order]))


@pytest.mark.parametrize("batch_size", [3, 16, None])
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


# --- batches ------------------------------------------------------------------------------------------------------

WINDOWS = st.lists(st.integers(1, 40).map(lambda size: Window(0, 0, size, 1)), max_size=40)


@given(windows=WINDOWS, batch_size=st.none() | st.integers(1, 50), batch_tokens=st.integers(1, 200))
def test_every_window_is_in_one_batch_and_the_longest_come_first(windows, batch_size, batch_tokens):
    batches = plan_batches(windows, batch_size=batch_size, batch_tokens=batch_tokens)
    placed = [n for batch in batches for n in batch]
    assert sorted(placed) == list(range(len(windows)))
    assert [windows[n].stop for n in placed] == sorted((w.stop for w in windows), reverse=True)


@given(windows=WINDOWS, batch_tokens=st.integers(1, 200))
def test_a_padded_batch_is_within_the_budget_and_full(windows, batch_tokens):
    batches = plan_batches(windows, batch_tokens=batch_tokens)
    for number, batch in enumerate(batches):
        longest = windows[batch[0]].stop
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        assert number == len(batches) - 1 or (len(batch) + 1) * longest > batch_tokens


@given(windows=WINDOWS, batch_size=st.integers(1, 50))
def test_batches_of_a_given_size_have_it_but_for_the_last(windows, batch_size):
    sizes = [len(batch) for batch in plan_batches(windows, batch_size=batch_size)]
    assert all(size == batch_size for size in sizes[:-1])
    assert sum(sizes) == len(windows)


def test_packed_rows_hold_several_windows_and_no_more_than_fit():
    """By hand: rows of 512 take 300 and 200, then 290, 200 and 10, then 200."""
    windows = [Window(0, 0, size, 1) for size in (200, 300, 200, 290, 200, 10)]
    rows = evaluation._rows(windows, list(range(6)), packed=True)
    assert [[windows[n].stop for n in row] for row in rows] == [[300, 200, 10], [290, 200], [200]]
    assert evaluation._rows([Window(0, 0, 700, 1)], [0], packed=True) == [[0]]


# --- other architectures ------------------------------------------------------------------------------------------

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS = {**LLAMA, "num_key_value_heads": 2}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
ARCHITECTURES = {
    "llama": KEYS,
    "mistral": {**KEYS, "sliding_window": 8},
    "phi3": {**KEYS, "max_position_embeddings": 64, "original_max_position_embeddings": 12}  # LongRoPE
    | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    | {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}},
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "max_position_embeddings": 32},
    "gemma2": {**KEYS, "head_dim": 16},  # these three change their logits
    "cohere": {**LLAMA, "bos_token_id": 0, "eos_token_id": 0},
    "granite": {**LLAMA, "logits_scaling": 8.0},
    "mamba": STATES,
    "mamba2": {**STATES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "recurrent_gemma": {**KEYS, "num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 32},
}
CHANGE_LOGITS = {"gemma2", "cohere", "granite", "recurrent_gemma"}
SHARE_ROWS = {"llama", "mistral", "phi3", "gpt2", "gemma2", "cohere", "granite"}


def made(model_type: str, vocab_size: int = 300):
    """A model whose weights are large enough for the scores to depend on what it sees."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **ARCHITECTURES[model_type])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def ragged():
    """Documents of 3 to 31 tokens, one of them with a prompt, and windows of 20 and less."""
    rng = np.random.default_rng(0)
    spans = {22: ((12, 22),)}
    documents = [document(rng.integers(0, 300, size).tolist(), spans.get(size, ())) for size in (31, 9, 22, 3, 27)]
    return documents, plan_windows([31, 9, 22, 3, 27], context_length=20, stride=8)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_padding_on_the_right_changes_no_score_of_any_architecture(ragged, model_type):
    """Attention, positions learned or by slope, recurrent and state-space models; soft caps and scales of logits."""
    model, alone = made(model_type), one_by_one(made(model_type), *ragged)
    assert np.ptp(alone.nll / alone.num_targets) > 0.1  # the scores do tell windows apart
    found = score_windows(model, *ragged, device=CPU)
    assert_same(found, alone)
    assert loss.ends_in_head(model, CPU) == (model_type not in CHANGE_LOGITS)


def test_positions_that_depend_on_the_longest_row_are_those_of_each_window(ragged):
    """LongRoPE, whose limit of 12 lies between the windows, in the form that training takes too."""
    model, (documents, windows) = made("phi3"), ragged
    alone = one_by_one(model, documents, windows)
    found = evaluation.score(model, documents, windows, batch_size=4, device=CPU)
    owners = [window.document for window in windows]
    np.testing.assert_allclose(found.nll, np.bincount(owners, weights=alone.nll), rtol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_windows_share_rows_where_the_architecture_keeps_them_apart(ragged, model_type):
    model = made(model_type)
    if model_type in SHARE_ROWS:
        assert_same(score_windows(model, *ragged, device=CPU, packed=True), one_by_one(model, *ragged))
    else:
        with pytest.raises(UserError, match=f"packed = true: {model_type} models cannot keep .* Say packed=false"):
            score_windows(model, *ragged, device=CPU, packed=True)


# --- without full logits ------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(result)
        self.size = max(self.size, *(leaf.numel() for leaf in leaves if torch.is_tensor(leaf)), 0)
        return result


def test_logits_are_made_for_targets_alone_and_some_at_a_time():
    """40 rows of 28 targets, then of a prompt and one target."""
    vocab_size, rng = 3000, np.random.default_rng(0)
    model = made("llama", vocab_size)
    ids = [rng.integers(0, vocab_size, 29).tolist() for _ in range(40)]
    windows = plan_windows([29] * 40, context_length=28, stride=None)
    for spans, most in (((), loss.CHUNK_ROWS * vocab_size), (((28, 29),), 40 * vocab_size)):
        documents = [document(each, spans) for each in ids]
        score_windows(model, documents[:1], windows[:1], device=CPU)  # tries whether the model ends in its head
        with LargestTensor() as largest:
            found = score_windows(model, documents, windows, device=CPU)
        assert largest.size <= most
        assert_same(found, one_by_one(model, documents, windows))


@given(rows=st.integers(1, 9), ignored=st.sets(st.integers(0, 8)), seed=st.integers(0, 99), bias=st.booleans())
def test_scores_by_chunks_are_those_of_full_logits(rows, ignored, seed, bias):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, added = (torch.randn(size, generator=generator) for size in ((1, rows, 4), (5, 4), (5,)))
    labels = torch.randint(0, 5, (1, rows), generator=generator)
    labels[0, [place for place in ignored if place < rows]] = IGNORE
    nll, correct = loss.scores_by_chunks(hidden, weight, labels, bias=added if bias else None)
    wanted = loss.token_scores(hidden @ weight.T + added * bias, labels)
    torch.testing.assert_close(nll, wanted[0], rtol=1e-5, atol=1e-6)
    assert correct.tolist() == wanted[1].tolist()


def test_of_equal_logits_the_first_is_the_arg_max():
    """So a model that has learned nothing is right once in V tokens, not always."""
    scores = loss.token_scores(torch.zeros(1, 4, 4), torch.tensor([[0, 1, 2, 3]]))
    assert scores[1].tolist() == [[True, False, False, False]]
    by_chunks = loss.scores_by_chunks(torch.zeros(1, 4, 2), torch.zeros(4, 2), torch.tensor([[0, 1, 2, 3]]))
    assert by_chunks[1].tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_half_precision_products_get_float32_probabilities(autocast):
    """Reference: the logits of a bfloat16 product, turned into probabilities in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator) for size in ((1, 64, 16), (67, 16)))
    labels = torch.randint(0, 67, (1, 64), generator=generator)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).double()
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            nll, correct = loss.scores_by_chunks(hidden, weight, labels)
    else:
        nll, correct = loss.scores_by_chunks(hidden.bfloat16(), weight.bfloat16(), labels)
    assert nll.dtype == torch.float32
    wanted = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=1e-6)
    assert (correct == (logits.argmax(-1) == labels)).all()


def test_scores_under_autocast_are_those_of_its_full_logits(ragged):
    model = made("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, alone = score_windows(model, *ragged, device=CPU), one_by_one(model, *ragged)
    np.testing.assert_allclose(found.nll, alone.nll, rtol=0.02)  # bfloat16 rounds by up to 0.4 %
    assert abs(found.nll - one_by_one(model, *ragged).nll).max() > 1e-3  # and it was in use


def test_the_head_is_the_ordinary_one_afterwards(ragged):
    """After scores, and after a call that failed."""
    model, ids = made("llama"), torch.arange(8)[None]
    before, names = model(input_ids=ids).logits, list(model.state_dict())
    score_windows(model, *ragged, device=CPU)
    with pytest.raises(IndexError):
        score_windows(model, [document([1, 2, 999, 3])], [Window(0, 0, 3, 1)], device=CPU)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_head_that_is_more_than_a_product_gives_its_own_scores(ragged):
    """As an adapter's does, or one with a forward of its own: its weight alone would be another model."""

    class Adapted(torch.nn.Linear):
        def forward(self, hidden):
            return 3 * super().forward(hidden)

    for kind in ("class", "instance"):
        model = made("llama")
        if kind == "class":
            model.get_output_embeddings().__class__ = Adapted
        else:
            head = model.get_output_embeddings()
            head.forward = lambda hidden, head=head: 3 * torch.nn.functional.linear(hidden, head.weight)
        assert_same(score_windows(model, *ragged, device=CPU), one_by_one(model, *ragged))


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
