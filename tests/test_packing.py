"""Every token is the target of one block; documents of one block are trained as if each were alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import document, written
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel.loss import sum_of_losses
from codex_accel.packing import IGNORE, Blocks
from codex_accel.tokens import TokenStore

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def blocks_of(folder, documents, *, block_size: int, isolate: bool = True) -> Blocks:
    store = TokenStore(written(folder, documents), "train")
    return Blocks(store, block_size=block_size, isolate_documents=isolate)


def numbered(lengths: list[int]) -> list:
    """Documents whose tokens are all different: 1, 2, 3, ... along the row."""
    ends = np.cumsum(lengths)
    return [document(list(range(end - length + 1, end + 1))) for length, end in zip(lengths, ends, strict=True)]


def targets_of(blocks: Blocks) -> list[int]:
    batch = blocks.batch(np.arange(len(blocks)))
    return batch.labels[batch.labels != IGNORE].tolist()


@settings(max_examples=80)
@given(lengths=LENGTHS, block_size=st.integers(2, 7))
def test_every_token_but_the_first_is_a_target_once(tmp_path_factory, lengths, block_size):
    blocks = blocks_of(tmp_path_factory.mktemp("b"), numbered(lengths), block_size=block_size, isolate=False)
    assert targets_of(blocks) == list(range(2, sum(lengths) + 1))


@settings(max_examples=80)
@given(lengths=LENGTHS, block_size=st.integers(2, 7))
def test_isolated_targets_leave_out_the_first_token_of_each_document(tmp_path_factory, lengths, block_size):
    blocks = blocks_of(tmp_path_factory.mktemp("b"), numbered(lengths), block_size=block_size)
    firsts = {int(d.input_ids[0]) for d in numbered(lengths) if len(d.input_ids)}
    assert targets_of(blocks) == [token for token in range(1, sum(lengths) + 1) if token not in firsts]


@settings(max_examples=80)
@given(lengths=LENGTHS, block_size=st.integers(2, 7), isolate=st.booleans())
def test_a_label_is_the_next_token_and_padding_comes_last(tmp_path_factory, lengths, block_size, isolate):
    blocks = blocks_of(tmp_path_factory.mktemp("b"), numbered(lengths), block_size=block_size, isolate=isolate)
    batch = blocks.batch(np.arange(len(blocks)))
    row = batch.input_ids.reshape(-1)
    num_tokens = sum(lengths)
    fed = min(num_tokens, row.size)
    assert row.tolist() == [*range(1, fed + 1), *[0] * (row.size - fed)]
    labels = batch.labels.reshape(-1)
    assert all(label in (IGNORE, token + 1) for token, label in zip(row, labels, strict=True))
    assert (labels[num_tokens - 1 :] == IGNORE).all()
    assert row.size - (num_tokens - 1) < block_size or num_tokens == 1


@settings(max_examples=80)
@given(lengths=LENGTHS, block_size=st.integers(2, 7))
def test_positions_restart_at_each_document_and_block(tmp_path_factory, lengths, block_size):
    blocks = blocks_of(tmp_path_factory.mktemp("b"), numbered(lengths), block_size=block_size)
    batch = blocks.batch(np.arange(len(blocks)))
    places = [place for length in lengths for place in range(length)]
    for index in range(len(blocks)):
        for t in range(block_size):
            place = index * block_size + t
            if place < len(places):
                expected = min(t, places[place])
                found = t if batch.position_ids is None else batch.position_ids[index, t]
                assert found == expected


def test_positions_are_left_out_where_nothing_restarts(tmp_path):
    blocks = blocks_of(tmp_path / "b", numbered([4, 5]), block_size=4)
    assert blocks.batch(np.array([0])).position_ids is None
    assert blocks.batch(np.array([0, 1])).position_ids is None  # the second document begins with its block
    open_ = blocks_of(tmp_path / "c", numbered([3, 6]), block_size=4, isolate=False)
    assert open_.batch(np.array([0, 1])).position_ids is None


@settings(max_examples=80)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6).filter(
        lambda shapes: any(map(sum, shapes))
    ),
    block_size=st.integers(2, 7),
    isolate=st.booleans(),
)
def test_prompts_are_never_targets(tmp_path_factory, shapes, block_size, isolate):
    """Each document is (prompt tokens, completion tokens); the first token of an isolated one is no target either."""
    documents, expected, token = [], [], 0
    for prompt, completion in shapes:
        ids = list(range(token + 1, token + prompt + completion + 1))
        token += len(ids)
        documents.append(document(ids, ((prompt, prompt + completion),)))
        expected += ids[max(prompt, 1 if isolate else 0) :]
    blocks = blocks_of(tmp_path_factory.mktemp("b"), documents, block_size=block_size, isolate=isolate)
    assert targets_of(blocks) == [each for each in expected if each > 1]


def test_facts_count_blocks_padding_and_cuts(tmp_path):
    """Worked by hand, T = 4, tokens 1-5 | 6-8 | 9-13 | 14: blocks feed 1-4, 5-8, 9-12, 13-14 and predict one more.

    The first document is predicted whole in block 0; the third needs block 2 alone (13 is its last target); the fourth
    begins inside block 3, the second inside block 1.
    """
    facts = blocks_of(tmp_path / "b", numbered([5, 3, 5, 1]), block_size=4).facts()
    assert facts == {
        "num_documents": 4,
        "num_tokens": 14,
        "num_blocks": 4,
        "padding_tokens": 3,
        "documents_cut": 0,
        "blocks_with_boundary": 2,
    }


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), block_size=st.integers(2, 7))
def test_a_document_is_cut_if_its_targets_are_in_two_blocks(tmp_path_factory, lengths, block_size):
    blocks = blocks_of(tmp_path_factory.mktemp("b"), numbered(lengths), block_size=block_size)
    labels = blocks.batch(np.arange(len(blocks))).labels
    where = {int(label): block for block, row in enumerate(labels) for label in row if label != IGNORE}
    cut = [len({where[int(t)] for t in d.input_ids[1:]}) > 1 for d in numbered(lengths)]
    assert blocks.facts()["documents_cut"] == sum(cut)


# --- with models --------------------------------------------------------------------------------------------------

SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


@pytest.fixture(params=SIZES)
def model(request):
    """A small model with large random weights, so that attention matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=97, **SIZES[request.param])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model


def loss_and_gradient(model, batches) -> tuple[float, torch.Tensor]:
    """Summed loss of (input_ids, labels, position_ids) batches and the gradient, flat."""
    model.zero_grad()
    total = 0.0
    for input_ids, labels, position_ids in batches:
        positions = None if position_ids is None else torch.from_numpy(position_ids)
        logits = model(input_ids=torch.from_numpy(input_ids), position_ids=positions, use_cache=False).logits
        loss = sum_of_losses(logits, torch.from_numpy(labels))
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_packed_block_has_the_loss_and_gradient_of_its_documents_alone(model, tmp_path):
    """Two blocks of three documents and two with a prompt; the documents end with their blocks."""
    rng = np.random.default_rng(0)
    lengths, prompts = [5, 7, 4, 9, 7], [0, 3, 0, 0, 2]
    documents = [
        document(rng.integers(0, 97, length).tolist(), ((prompt, length),) if prompt else ())
        for length, prompt in zip(lengths, prompts, strict=True)
    ]
    batch = blocks_of(tmp_path / "b", documents, block_size=16).batch(np.array([0, 1]))
    packed = loss_and_gradient(model, [(batch.input_ids, batch.labels, batch.position_ids)])
    alone = []
    for each in documents:
        ids = each.input_ids.astype(np.int64)[None]
        labels = np.where(each.is_target(), ids, IGNORE)
        alone.append((ids[:, :-1], labels[:, 1:], None))
    expected = loss_and_gradient(model, alone)
    assert packed[0] == pytest.approx(expected[0], rel=1e-5)
    assert (packed[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_without_isolation_documents_see_each_other(model, tmp_path):
    """So that the test above could fail."""
    rng = np.random.default_rng(0)
    documents = [document(rng.integers(0, 97, 8).tolist()) for _ in range(2)]
    isolated = blocks_of(tmp_path / "a", documents, block_size=16).batch(np.array([0]))
    open_ = blocks_of(tmp_path / "b", documents, block_size=16, isolate=False).batch(np.array([0]))
    losses = [loss_and_gradient(model, [(b.input_ids, isolated.labels, b.position_ids)])[0] for b in (isolated, open_)]
    assert abs(losses[0] - losses[1]) > 1e-2
