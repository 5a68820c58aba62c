"""Records become documents whose tokens, targets and bytes are those of their parts."""

import json

import numpy as np
import pytest
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import documents, sources, tokenizer
from codex_accel.errors import UserError
from codex_accel.records import Part, Record
from codex_accel.schema import Source
from codex_accel.tokens import TokenStore

PARTS = st.lists(st.builds(Part, st.text(max_size=8), st.booleans(), st.just(False)), min_size=1, max_size=4).filter(
    lambda parts: any(part.is_target for part in parts)
)


@pytest.fixture(scope="module")
def loaded(tiny):
    return tokenizer.load(tiny / "tokenizer")


def record(*parts: Part, line: int = 1) -> Record:
    return Record("a.jsonl", line, tuple(parts), None)


@settings(max_examples=60)
@given(drawn=st.lists(PARTS, min_size=1, max_size=6), add_bos=st.booleans(), add_eos=st.booleans())
def test_documents_are_begin_parts_end(loaded, drawn, add_bos, add_eos):
    """Against the definition, document by document."""
    found, num_bytes = documents.encode(loaded, [record(*parts) for parts in drawn], add_bos=add_bos, add_eos=add_eos)
    for document, total, parts in zip(found, num_bytes, drawn, strict=True):
        ids, target = [loaded.bos_id] * add_bos, [parts[0].is_target] * add_bos
        for part in parts:
            new = list(loaded.encode([part.text])[0])
            ids, target = ids + new, target + [part.is_target] * len(new)
        ids, target = ids + [loaded.eos_id] * add_eos, target + [parts[-1].is_target] * add_eos
        if add_bos and not all(part.is_target for part in parts):
            target[0] = False
        assert document.input_ids.tolist() == ids
        assert document.is_target().tolist() == ([False, *target[1:]])[: len(ids)]
        assert document.num_bytes == sum(len(part.text.encode()) for part in parts if part.is_target)
        assert total == sum(len(part.text.encode()) for part in parts)


def test_text_whose_every_part_is_a_target_has_no_spans(loaded):
    columns, _ = documents.encode(loaded, [record(Part("a", True), Part("b", True))], add_bos=True, add_eos=True)
    assert columns.num_spans.tolist() == [0]


def test_special_part_becomes_its_id_and_the_same_text_does_not(loaded):
    parts = [Part("[EOS]", False), Part("[EOS]", True, is_special=True), Part("[EOS]", True)]
    [document], _ = documents.encode(loaded, [record(*parts)], add_bos=False, add_eos=False)
    [as_text] = loaded.encode(["[EOS]"])
    assert document.input_ids.tolist() == [*as_text, loaded.eos_id, *as_text]
    assert document.target_spans == ((len(as_text), 2 * len(as_text) + 1),)


def test_begin_and_end_of_a_template_are_not_placed_twice(loaded):
    parts = [Part("[BOS]", False, is_special=True), Part("a", True), Part("[EOS]", True, is_special=True)]
    [document], _ = documents.encode(loaded, [record(*parts)], add_bos=True, add_eos=True)
    assert document.input_ids.tolist() == [loaded.bos_id, *loaded.encode(["a"])[0], loaded.eos_id]


@pytest.mark.parametrize("name", ["mistral_v1", "stories260K"])
def test_parts_of_a_record_make_its_text_whatever_space_the_tokenizer_begins_with(shared, name):
    """sentencepiece itself, and a tokenizer.json that puts a space before each text."""
    folder = shared / ("tokenizers" if name == "mistral_v1" else "models") / name
    loaded = tokenizer.load(folder)
    whole = [Part("Once upon", False), Part(" a ti", True), Part("me", True)]
    [document], _ = documents.encode(loaded, [record(*whole)], add_bos=False, add_eos=False)
    assert loaded.decode(document.input_ids.tolist()).lstrip() == "Once upon a time"


# --- straight from files ------------------------------------------------------------------------------------------


def test_documents_straight_from_files_are_those_of_a_dataset(tiny, loaded, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three")))
    source = f"sources=[{{path: {path}}}]"
    run_script(
        "prepare_data", f"output_dir={tmp_path}/d", f"tokenizer={tiny}/tokenizer", source, "split.ratios={all: 1.0}"
    )
    raw_files = sources.resolve([Source(path=str(path))], config_problem=None)
    direct = documents.from_files(raw_files, loaded, add_bos=True, add_eos=True)
    for one, other in zip(direct, TokenStore(tmp_path / "d", "all"), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert (one.target_spans, one.num_bytes) == (other.target_spans, other.num_bytes)
        assert one.record_id == other.record_id


def test_scoring_leaves_no_bad_record_out(loaded, tmp_path):
    (tmp_path / "spoilt.jsonl").write_text('{"text": "a"}\n{\n')
    raw_files = sources.resolve([Source(path=f"{tmp_path}/spoilt.jsonl")], config_problem=None)
    with pytest.raises(UserError, match=r"spoilt\.jsonl:2: not JSON.*scoring leaves none out"):
        list(documents.from_files(raw_files, loaded, add_bos=True, add_eos=True))
