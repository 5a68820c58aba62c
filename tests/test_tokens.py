"""Documents go into the store and come out the same; the row of tokens can be cut anywhere."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import tokens
from codex_accel.errors import UserError
from codex_accel.tokens import Document, Documents, ShardWriter, TokenStore


def document(ids: list[int], spans: tuple[tuple[int, int], ...] = (), number: int = 0) -> Document:
    return Document(np.array(ids, dtype=np.uint32), spans, num_bytes=3 * number, record_id=f"{number:032x}")


def written(folder, documents, *, vocab_size: int = 1000, split: str = "train", unit: int = 0):
    """Write one shard; the folder."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder / tokens.shard_name(split, unit), tokens.schema_for(vocab_size))
    for each in documents:
        writer.add(Documents.of([each]))
    writer.close()
    return folder


def plain(document: Document) -> tuple:
    return document.input_ids.tolist(), document.target_spans, document.num_bytes, document.record_id


@st.composite
def documents(draw, vocab_size=1 << 16):
    """Documents with some tokens or none, and with sorted spans or none."""
    result = []
    for number in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(0, vocab_size - 1), max_size=12))
        edges = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=4)))
        result.append(document(ids, tuple(zip(edges[::2], edges[1::2], strict=False)), number))
    return result


@settings(max_examples=50)
@given(st.sampled_from([1 << 16, (1 << 16) + 1, 1 << 31]).flatmap(lambda v: st.tuples(st.just(v), documents(v))))
def test_documents_come_back_as_they_were(tmp_path_factory, drawn):
    vocab_size, written_ones = drawn
    folder = written(tmp_path_factory.mktemp("store"), written_ones, vocab_size=vocab_size)
    store = TokenStore(folder, "train")
    assert list(map(plain, store)) == list(map(plain, written_ones))
    assert store.lengths.tolist() == [len(d.input_ids) for d in written_ones]
    assert store.has_spans == any(d.target_spans for d in written_ones)


@settings(max_examples=50)
@given(shards=st.lists(documents(), min_size=1, max_size=3), batch_tokens=st.integers(1, 20), data=st.data())
def test_tokens_of_any_cut_are_a_slice_of_all_documents(tmp_path_factory, shards, batch_tokens, data):
    """Over several shards, and over several batches in each."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BATCH_TOKENS", batch_tokens)
        for unit, shard in enumerate(shards):
            written(folder, shard, unit=unit)
    store = TokenStore(folder, "train")
    row = [token for shard in shards for each in shard for token in each.input_ids.tolist()]
    assert store.num_tokens == len(row)
    start = data.draw(st.integers(0, len(row) + 2))
    stop = data.draw(st.integers(start, len(row) + 5))
    assert store.tokens(start, stop).tolist() == row[start:stop]
    assert [store.document(n).input_ids.tolist() for n in range(store.num_documents)] == [
        each.input_ids.tolist() for shard in shards for each in shard
    ]


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_a_token_takes_two_bytes_below_65537_ids(tmp_path, vocab_size, num_bytes):
    """The largest id of each fits; the rest of the file is small."""
    ids = [vocab_size - 1] * 100_000
    folder = written(tmp_path / "d", [document(ids)], vocab_size=vocab_size)
    assert (folder / "train-00000.arrow").stat().st_size == pytest.approx(100_000 * num_bytes, rel=0.02)
    assert TokenStore(folder, "train").tokens(99_999, 100_000).tolist() == [vocab_size - 1]


def test_store_opens_with_datasets_and_keeps_its_types(tmp_path):
    written(tmp_path / "d", [document([5, 6, 7], ((1, 3),), 1), document([8], (), 2)])
    opened = datasets.Dataset.from_file(str(tmp_path / "d" / "train-00000.arrow"))
    assert opened["input_ids"][:] == [[5, 6, 7], [8]]
    assert opened["target_spans"][:] == [[[1, 3]], []]
    assert opened["num_bytes"][:] == [3, 6]
    assert opened["record_id"][:] == [(1).to_bytes(16, "big"), (2).to_bytes(16, "big")]
    assert opened.features["input_ids"].feature.dtype == "uint16"


def test_ids_are_views_into_the_memory_map(tmp_path):
    """No copy of the values is held: the array does not own its data and cannot be written."""
    store = TokenStore(written(tmp_path / "d", [document(list(range(1000)))]), "train")
    ids = store.document(0).input_ids
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_a_split_is_not_the_one_whose_name_it_begins(tmp_path):
    """`test-00000.arrow` is of `test`; `test-hard-00000.arrow` is not."""
    folder = written(tmp_path / "d", [document([1])], split="test")
    written(folder, [document([2])], split="test-hard")
    assert TokenStore(folder, "test").tokens(0, 9).tolist() == [1]
    assert TokenStore(folder, "test-hard").tokens(0, 9).tolist() == [2]


def test_shards_are_read_in_order_of_their_units(tmp_path):
    """By number: unit 100,000 has a digit more than the names have room for."""
    folder = tmp_path / "d"
    for unit in (100_000, 9, 99_999):
        written(folder, [document([unit % 1000])], unit=unit)
    assert TokenStore(folder, "train").tokens(0, 9).tolist() == [9, 999, 0]


def test_unknown_split_is_told_with_those_that_are_there(tmp_path):
    folder = written(tmp_path / "d", [document([1])], split="test")
    with pytest.raises(UserError, match=r"has no split 'train'. Choose from: test\."):
        TokenStore(folder, "train")


@given(
    length=st.integers(1, 12),
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=3),
    data=st.data(),
)
def test_targets_are_the_spans_without_the_first_token(length, spans, data):
    """By brute force over the tokens of a cut; no span means everything."""
    spans = tuple((min(a, b, length), min(max(a, b), length)) for a, b in spans)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    expected = [t > 0 and (not spans or any(a <= t < b for a, b in spans)) for t in range(start, stop)]
    assert document([0] * length, spans).is_target(start, stop).tolist() == expected


@settings(max_examples=50)
@given(documents(), st.data())
def test_columns_give_the_documents_and_any_choice_of_them(drawn, data):
    columns = Documents.of(drawn)
    assert list(map(plain, columns)) == list(map(plain, drawn))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn))))
    kept = [plain(each) for each, keep in zip(drawn, chosen, strict=True) if keep]
    assert list(map(plain, columns.where(chosen))) == kept


@settings(max_examples=50)
@given(documents())
def test_targets_of_columns_are_those_of_each_document(drawn):
    assert Documents.of(drawn).num_targets().tolist() == [int(each.is_target().sum()) for each in drawn]


def test_batch_that_its_offsets_cannot_count_is_an_error(tmp_path):
    """Arrow's lists count with 32 bits; a number that wraps would be written in silence."""
    with pytest.raises(pa.ArrowInvalid):
        tokens._offsets(np.array([1 << 30, 1 << 30]))
