"""Every token is the target of one block; documents of one block are trained as if each were alone."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics_of, run_script, train_argv
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import kill_once, last_step, outcome, trained_on
from test_tokens import document, written
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel import packing, packing_cost, packing_plan, probes
from codex_accel.errors import UserError
from codex_accel.loss import sum_of_losses
from codex_accel.packing import IGNORE, Blocks
from codex_accel.tokens import TokenStore
from codex_accel.train_schema import Data, Model, TrainConfig, Training

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


# --- plans: best_fit and group_by_length -----------------------------------------------------------------------------

PACKED = ("best_fit", "group_by_length")
OVERLONG = ("split", "drop", "truncate")


def config_of(packing_name: str, *, block_size: int, overlong: str = "split", batch_size: int = 2) -> TrainConfig:
    return TrainConfig(
        output_dir="run",
        model=Model(config={"model_type": "gpt2"}),
        data=Data(dataset="d", block_size=block_size, packing=packing_name, overlong=overlong),
        training=Training(max_steps=1, micro_batch_size=batch_size, global_batch_size=2 * batch_size),
    )


def packed(folder, documents, packing_name: str, **options) -> Blocks:
    return packing.build(config_of(packing_name, **options), TokenStore(written(folder, documents), "train"))


def plan_of(lengths, packing_name: str, *, block_size: int, overlong: str = "split", batch_size: int = 2):
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces, counts = packing_plan.cut(lengths, block_size=block_size, overlong=overlong)
    if packing_name == "best_fit":
        return packing_plan.best_fit(pieces, block_size=block_size, counts=counts)
    return packing_plan.group_by_length(pieces, batch_size=batch_size, counts=counts)


def kept_of(lengths, *, block_size: int, overlong: str) -> list[int]:
    """Lengths that are left of each document."""
    if overlong == "drop":
        return [length for length in lengths if length <= block_size]
    return [min(length, block_size) for length in lengths] if overlong == "truncate" else list(lengths)


ANY_LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@settings(max_examples=150)
@given(lengths=ANY_LENGTHS, size=st.integers(2, 24), overlong=st.sampled_from(OVERLONG), batch_size=st.integers(1, 9))
def test_a_plan_counts_what_packing_cost_counts(lengths, size, overlong, batch_size):
    kept = kept_of(lengths, block_size=size, overlong=overlong)
    histogram = np.unique(np.array(kept, dtype=np.int64), return_counts=True)
    expected = {
        "best_fit": packing_cost.best_fit(*histogram, block_size=size),
        "group_by_length": packing_cost.group_by_length(*histogram, block_size=size, batch_size=batch_size),
    }
    num_over = sum(length > size for length in lengths)
    lost = {
        "documents_cut": num_over if overlong == "split" else 0,
        "documents_dropped": num_over if overlong == "drop" else 0,
        "documents_truncated": num_over if overlong == "truncate" else 0,
        "num_over_long": num_over,
        "tokens_dropped": sum(lengths) - sum(kept),
    }
    for name in PACKED:
        counts = plan_of(lengths, name, block_size=size, overlong=overlong, batch_size=batch_size).counts
        assert {key: counts[key] for key in expected[name]} == expected[name] | {
            key: lost[key] for key in ("num_over_long", "documents_cut")
        }
        assert {key: counts[key] for key in lost} == lost


@settings(max_examples=150)
@given(lengths=ANY_LENGTHS, size=st.integers(2, 24))
def test_best_fit_is_the_plan_made_one_document_at_a_time(lengths, size):
    """The definition: longest first, ties by index, to the fullest block that fits, ties to who got so full first."""
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    whole = [
        (start + place, min(size, length - place))
        for start, length in zip(starts, lengths, strict=True)
        for place in range(0, length, size)
    ]
    blocks: list[list] = []  # [room, when it was last filled, pieces]
    for when, (start, length) in enumerate(sorted(whole, key=lambda piece: (-piece[1], piece[0]))):
        if not (fitting := [block for block in blocks if block[0] >= length]):
            blocks.append([size, 0, []])
            fitting = blocks[-1:]
        chosen = min(fitting, key=lambda block: block[:2])
        chosen[0], chosen[1] = chosen[0] - length, when
        chosen[2].append((start, start + length))
    plan = plan_of(lengths, "best_fit", block_size=size)
    assert [plan.stretches(block) for block in range(len(plan))] == [block[2] for block in blocks]
    assert plan.counts["blocks_with_boundary"] == sum(len(block[2]) > 1 for block in blocks)


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=16).filter(any),
    batch_size=st.integers(1, 5),
    per_step=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_every_row_is_grouped_once_an_epoch_with_rows_of_its_length(lengths, batch_size, per_step, seed):
    """Steps need not end with an epoch; a batch is a stretch of the rows sorted by length, whatever is drawn."""
    plan = plan_of(lengths, "group_by_length", block_size=8, batch_size=batch_size)
    num_batches = plan.counts["num_batches"]
    options = {"batch_size": batch_size, "global_batch_size": batch_size * per_step, "seed": seed}
    steps = [packing_plan.grouped_rows(plan, step, **options) for step in range(-(-3 * num_batches // per_step))]
    batches = np.concatenate(steps).reshape(-1, batch_size)
    expected = [plan.pieces.lengths[place : place + batch_size].tolist() for place in range(0, len(plan), batch_size)]
    for epoch in range(3):
        rows = batches[epoch * num_batches : (epoch + 1) * num_batches]
        assert sorted(rows[rows >= 0].tolist()) == list(range(len(plan)))
        widths = [plan.pieces.lengths[row[row >= 0]].tolist() for row in rows]
        assert sorted(widths) == sorted(expected)


def test_batches_hold_other_documents_in_another_epoch():
    plan = plan_of([5] * 40, "group_by_length", block_size=8, batch_size=4)
    first, second = (
        {frozenset(row) for row in packing_plan.grouped_rows(plan, step, batch_size=4, global_batch_size=40, seed=0)
         .reshape(-1, 4).tolist()}
        for step in (0, 1)
    )  # fmt: skip
    assert len(first) == len(second) == 10
    assert len(first & second) < 3


def test_sequences_of_an_epoch_are_whole_micro_batches_padded_to_their_longest(tmp_path):
    blocks = packed(tmp_path / "b", numbered([3, 5, 2, 4, 1]), "group_by_length", block_size=8, batch_size=2)
    assert (len(blocks), blocks.num_blocks, blocks.facts()["num_batches"]) == (6, 5, 3)
    rows = [blocks.of_step(step, global_batch_size=2, seed=0) for step in range(3)]
    assert sorted(np.concatenate(rows).tolist()) == [-1, 0, 1, 2, 3, 4]
    assert sorted(blocks.batch(each).input_ids.shape for each in rows) == [(1, 1), (2, 3), (2, 5)]


@settings(max_examples=80)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=8).filter(
        lambda shapes: any(map(sum, shapes))
    ),
    prompted=st.booleans(),
    size=st.integers(2, 7),
    name=st.sampled_from(PACKED),
)
def test_what_is_fed_is_followed_by_the_next_token_of_its_document(tmp_path_factory, shapes, prompted, size, name):
    """Over (prompt, completion) documents: each token is fed once, each target met once, and padding comes last."""
    documents, expected, token = [], [], 0
    for prompt, completion in shapes:
        ids = list(range(token + 1, token + prompt + completion + 1))
        token += len(ids)
        documents.append(document(ids, ((prompt, len(ids)),) if prompted else ()))
        expected += ids[max(prompt if prompted else 0, 1) :]
    blocks = packed(tmp_path_factory.mktemp("b"), documents, name, block_size=size)
    batch = blocks.batch(np.arange(blocks.num_blocks))
    fed = batch.input_ids[batch.input_ids > 0]
    assert sorted(fed.tolist()) == list(range(1, token + 1))
    assert sorted(batch.labels[batch.labels != IGNORE].tolist()) == expected
    assert np.isin(batch.labels - batch.input_ids, [1, *(IGNORE - np.arange(token + 1))]).all()
    assert (batch.labels[batch.input_ids == 0] == IGNORE).all()
    assert (np.diff((batch.input_ids > 0).astype(int), axis=1) <= 0).all()
    longest = max(len(row[row > 0]) for row in batch.input_ids)
    assert batch.input_ids.shape[1] == (size if name == "best_fit" else longest)


@settings(max_examples=60)
@given(lengths=LENGTHS, size=st.integers(2, 7), name=st.sampled_from(PACKED))
def test_positions_count_from_the_start_of_each_piece(tmp_path_factory, lengths, size, name):
    documents = numbered(lengths)
    place = {int(token): t % size for each in documents for t, token in enumerate(each.input_ids)}
    blocks = packed(tmp_path_factory.mktemp("b"), documents, name, block_size=size)
    batch = blocks.batch(np.arange(blocks.num_blocks))
    assert (batch.position_ids is None) == (blocks.facts()["blocks_with_boundary"] == 0)
    positions = np.arange(batch.input_ids.shape[1]) if batch.position_ids is None else batch.position_ids
    fed = batch.input_ids > 0
    positions = np.broadcast_to(positions, fed.shape)
    assert positions[fed].tolist() == [place[int(token)] for token in batch.input_ids[fed]]


def test_documents_longer_than_a_block_are_told_as_an_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.overlong: 2 of 3 documents .*_size = 4; the longest has 9 tokens"):
        packed(tmp_path / "b", numbered([9, 4, 5]), "best_fit", block_size=4, overlong="error")
    assert len(packed(tmp_path / "c", numbered([4, 4]), "best_fit", block_size=4, overlong="error")) == 2


def test_a_plan_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.overlong: drop leaves no document of the 2 .* 1 are longer"):
        packed(tmp_path / "b", numbered([9, 0]), "group_by_length", block_size=4, overlong="drop")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"overlong": "drop"}, "does not go with data.packing = concat"),
        ({"packing": "best_fit", "isolate_documents": False}, "never see each other"),
        ({"packing": "group_by_length", "isolate_documents": False}, "never see each other"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        Data(dataset="d", block_size=8, **keys)


def test_a_length_in_tokens_needs_blocks_of_one_size():
    with pytest.raises(ValueError, match=r"max_tokens = 9 does not go with data\.packing = group_by_length"):
        TrainConfig(
            output_dir="run",
            model=Model(config={"model_type": "gpt2"}),
            data=Data(dataset="d", block_size=8, packing="group_by_length"),
            training=Training(max_tokens=9),
        )


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


def alone(model, documents) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one document a row; nothing is packed, padded or masked."""
    rows = []
    for each in documents:
        ids = each.input_ids.astype(np.int64)[None]
        labels = np.where(each.is_target(), ids, IGNORE)
        rows.append((ids[:, :-1], labels[:, 1:], None))
    return loss_and_gradient(model, rows)


def ragged(num: int, *, longest: int) -> list:
    """Documents of all lengths from 2 on, every second one with a prompt."""
    rng = np.random.default_rng(1)
    documents = []
    for index, length in enumerate(rng.integers(2, longest + 1, num).tolist()):
        prompt = int(rng.integers(1, length)) if index % 2 else 0
        documents.append(document(rng.integers(1, 97, length).tolist(), ((prompt, length),) if prompt else ()))
    return documents


@pytest.mark.parametrize("name", PACKED)
def test_packed_and_grouped_training_equals_one_document_a_row(model, tmp_path, name):
    documents = ragged(11, longest=16)
    blocks = packed(tmp_path / "b", documents, name, block_size=16, batch_size=3)
    if name == "group_by_length":
        rows = [blocks.of_step(step, global_batch_size=3, seed=0) for step in range(len(blocks) // 3)]
    else:
        rows = np.array_split(np.arange(len(blocks)), 3)
    batches = [blocks.batch(each) for each in rows]
    assert any(batch.position_ids is not None for batch in batches) == (name == "best_fit")
    found = loss_and_gradient(model, [(b.input_ids, b.labels, b.position_ids) for b in batches])
    expected = alone(model, documents)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.parametrize("packing_name", ["concat", "best_fit"])
def test_the_block_that_isolation_is_tried_on_is_one_of_the_data(tmp_path, packing_name):
    """The first one in which a document begins after another, at its whole length."""
    blocks = packed(
        tmp_path / "b", [document([5] * 16), document([6] * 7), document([7] * 9)], packing_name, block_size=16
    )
    found = blocks.with_boundary()
    number = next(n for n in range(len(blocks)) if blocks.batch(np.array([n])).position_ids is not None)
    assert found.input_ids.shape == (1, 16)
    assert np.array_equal(found.input_ids, blocks.batch(np.array([number])).input_ids)
    assert (found.position_ids == 0).sum() == 2


CANNOT_ISOLATE = {
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 32, "max_position_embeddings": 32, "init_std": 0.2, "dropout": 0.0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("architecture", CANNOT_ISOLATE)
def test_what_cannot_be_packed_is_told_the_way_out_and_can_be_grouped(tmp_path, architecture):
    """`best_fit` is refused; with rows of their own documents equal training alone, because nothing looks ahead."""
    torch.manual_seed(0)
    settings_of = AutoConfig.for_model(architecture, vocab_size=97, pad_token_id=1, **CANNOT_ISOLATE[architecture])
    model = AutoModelForCausalLM.from_config(settings_of, attn_implementation="eager", dtype=torch.float32).eval()
    documents = ragged(7, longest=16)
    block = packed(tmp_path / "a", documents, "best_fit", block_size=16).with_boundary()
    with pytest.raises(UserError, match=r"cannot keep the documents.*Say data\.packing=group_by_length"):
        probes.require_isolation(model, config_of("best_fit", block_size=16), block)
    blocks = packed(tmp_path / "b", documents, "group_by_length", block_size=16, batch_size=2)
    batches = [blocks.batch(blocks.of_step(step, global_batch_size=2, seed=0)) for step in range(len(blocks) // 2)]
    found = loss_and_gradient(model, [(b.input_ids, b.labels, b.position_ids) for b in batches])
    expected = alone(model, documents)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_texts(tiny, tmp_path_factory) -> Path:
    """A folder with the tokenizer of `tiny` and a dataset of signatures and bodies, as fine-tuning has them."""
    root = tmp_path_factory.mktemp("short")
    (root / "tokenizer").symlink_to(tiny / "tokenizer")
    source = f"sources=[{{path: {tiny}/corpus/functions.jsonl, prompt: prompt, completion: completion}}]"
    split = "split={method: exact, ratios: {train: 0.8, validation: 0.1, test: 0.1}}"
    run_script("prepare_data", f"output_dir={root}/dataset", f"tokenizer={tiny}/tokenizer", source, split)
    return root


def packed_argv(root: Path, run_dir: Path, name: str, *overrides: str) -> list[str]:
    """A run of 12 steps; some of the documents are longer than a block."""
    short = [
        "training.max_steps=12",
        "evaluation.every_steps=null",
        "data.block_size=128",
        "model.config.n_positions=128",
    ]
    short += overrides
    return train_argv(root, run_dir, f"data.packing={name}", *short)


@pytest.mark.distributed
@pytest.mark.parametrize("name", PACKED)
def test_a_killed_run_ends_alike_and_two_processes_train_on_the_same_samples(fork_server, short_texts, tmp_path, name):
    for num_processes in (1, 2):
        run_dir, trace = tmp_path / str(num_processes), tmp_path / f"trace-{num_processes}"
        argv = packed_argv(short_texts, run_dir, name)
        job = fork_server.run("train", argv, num_processes=num_processes, trace=trace)
        assert job.codes == [0] * num_processes, job.output
    assert trained_on(tmp_path / "trace-2", 2) == trained_on(tmp_path / "trace-1", 1)
    for one, two in zip(metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    options, run_dir = {"num_processes": 1, "aim": "accumulation", "draws": random.Random(0)}, None
    while run_dir is None or not 1 <= last_step(run_dir) < 12:  # a kill that came too early or too late: another run
        run_dir = tmp_path / f"killed-{time.monotonic_ns()}"
        kill_once(fork_server, packed_argv(short_texts, run_dir, name), run_dir, **options)
    assert not (run_dir / "final").exists()
    job = fork_server.run("train", packed_argv(short_texts, run_dir, name))
    assert job.codes == [0], job.output
    assert outcome(run_dir) == outcome(tmp_path / "1")


@pytest.mark.parametrize("name", PACKED)
def test_run_json_tells_what_was_packed_and_left_out(fork_server, short_texts, tmp_path, name):
    job = fork_server.run(
        "train", packed_argv(short_texts, tmp_path / "run", name, "data.overlong=drop", "training.max_steps=1")
    )
    assert job.codes == [0], job.output
    blocks = json.loads((tmp_path / "run" / "run.json").read_text())["blocks"]
    lengths = TokenStore(short_texts / "dataset", "train").lengths
    expected = plan_of(lengths, name, block_size=128, overlong="drop").counts
    assert blocks == {"num_documents": len(lengths), "num_tokens": lengths.sum(), **expected}
    assert (
        f"{blocks['documents_dropped']:,} of {len(lengths):,} documents are longer than 128: drop leaves out"
        in job.output
    )
    assert blocks["documents_dropped"] > 0


def test_train_refuses_to_pack_for_an_architecture_that_cannot_isolate(fork_server, short_texts, tmp_path):
    opt = "model.config={model_type: opt, hidden_size: 32, ffn_dim: 48, num_hidden_layers: 1, num_attention_heads: 2, "
    opt += "word_embed_proj_dim: 32, max_position_embeddings: 128}"
    job = fork_server.run("train", [opt, *without_model(packed_argv(short_texts, tmp_path / "a", "best_fit"))])
    assert job.codes == [2]
    assert "Say data.packing=group_by_length" in job.output
    job = fork_server.run("train", [opt, *without_model(packed_argv(short_texts, tmp_path / "b", "group_by_length"))])
    assert job.codes == [0], job.output


def without_model(argv: list[str]) -> list[str]:
    return [argument for argument in argv if not argument.startswith("model.config")]
