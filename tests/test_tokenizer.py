"""Tokenizers are the same each time, load with transformers, and never make a special token of text."""

import json

import pytest
import transformers
from conftest import run_script
from hypothesis import example, given
from hypothesis import strategies as st

from codex_accel import manifest, tokenizer
from codex_accel.errors import UserError
from codex_accel.records import Record
from codex_accel.schema import Source, SpecialTokens, TokenizerConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def config(**options) -> TokenizerConfig:
    return TokenizerConfig(output_dir="out", sources=[Source(path="x")], **options)


def trained(folder, texts, **options) -> tokenizer.Tokenizer:
    """Trained on `texts`, saved to `folder` and loaded."""
    settings = config(**options)
    folder.mkdir(exist_ok=True)
    backend = tokenizer.train(settings, texts)
    tokenizer.save(backend, folder, settings.special_tokens, has_unk=settings.type == "char")
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def udhr(shared) -> list[str]:
    """Paragraphs of the Universal Declaration of Human Rights in 20 languages."""
    lines = (shared / "text" / "udhr_20lang.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def emoji(shared) -> list[str]:
    return [entry["emoji"] for entry in json.loads((shared / "text" / "gemoji_emoji.json").read_text())]


@pytest.fixture(scope="module")
def bpe(tiny) -> tokenizer.Tokenizer:
    return tokenizer.load(tiny / "tokenizer")


@pytest.fixture(scope="module")
def auto(tiny):
    return transformers.AutoTokenizer.from_pretrained(tiny / "tokenizer")


# --- special tokens -----------------------------------------------------------------------------------------------


def test_special_tokens_have_fixed_ids(bpe, auto):
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.unk_id) == (0, 1, 2, None)
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 1, 2)
    assert auto.convert_ids_to_tokens([0, 1, 2]) == ["[PAD]", "[BOS]", "[EOS]"]


@pytest.mark.parametrize(("type_", "expected"), [("bpe", [0, 1, 2, 3, 4]), ("char", [0, 1, 2, 4, 5])])
def test_names_come_from_the_configuration(tmp_path, type_, expected):
    special = SpecialTokens(pad="<p>", bos="<b>", eos="<e>", unk="<u>", additional=["<x>", "<y>"])
    loaded = trained(tmp_path / "t", ["text"], type=type_, special_tokens=special)
    ids = [loaded.backend.token_to_id(name) for name in ("<p>", "<b>", "<e>", "<x>", "<y>")]
    assert ids == expected
    assert loaded.unk_id == (3 if type_ == "char" else None)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert {"<p>", "<b>", "<e>", "<x>", "<y>"} <= set(auto.all_special_tokens)


@pytest.mark.security
@given(before=TEXT, name=st.sampled_from(["[PAD]", "[BOS]", "[EOS]"]), after=TEXT)
def test_name_of_a_special_token_in_text_is_text(bpe, before, name, after):
    [ids] = bpe.encode([before + name + after])
    assert not {0, 1, 2} & set(ids)
    assert bpe.decode(ids) == before + name + after


@pytest.mark.security
def test_name_of_a_special_token_in_text_is_text_for_characters_too(tmp_path):
    loaded = trained(tmp_path / "t", ["[EOS]"], type="char")
    [ids] = loaded.encode(["[EOS]"])
    assert loaded.decode(ids) == "[EOS]"
    assert min(ids) > 3


@pytest.mark.security
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"special_tokens": SpecialTokens(additional=["the"])}, "the the the"),
        ({"pre_tokenizer": "whitespace"}, " ".join(["[EOS]"] * 9)),
        ({"pre_tokenizer": "none"}, "[EOS][EOS]\n" * 9),
        ({"type": "char", "special_tokens": SpecialTokens(pad="e")}, "hello"),
    ],
    ids=["word", "whitespace", "none", "char"],
)
def test_special_token_that_text_would_make_is_refused(options, text):
    """Merges learned from the text would reach the special id, so nothing could tell the two apart."""
    with pytest.raises(UserError, match=r"special_tokens: the text .* alone makes this token"):
        tokenizer.train(config(vocab_size=512, **options), [text] * 9)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["bpe", "char"])
def test_training_twice_gives_the_same_content(tmp_path, shared, type_):
    sources = f"sources=[{{path: {shared}/text/udhr_20lang.jsonl}}]"
    for name in ("a", "b"):
        run_script("train_tokenizer", f"output_dir={tmp_path}/{name}", sources, f"type={type_}", "vocab_size=600")
    digests = {manifest.read(tmp_path / name)["content_digest"] for name in ("a", "b")}
    assert len(digests) == 1


def test_vocabulary_has_the_size_asked_for(bpe):
    assert bpe.vocab_size == 512
    assert sorted(bpe.backend.get_vocab().values()) == list(range(512))


def test_vocabulary_below_the_bytes_is_refused():
    """Three special tokens and 256 bytes."""
    with pytest.raises(UserError, match="vocab_size: 258 is too small: 259 or more are needed"):
        tokenizer.train(config(vocab_size=258), ["a"])
    assert tokenizer.train(config(vocab_size=259), ["a"]).get_vocab_size() == 259


def test_characters_without_room_for_one_are_refused():
    with pytest.raises(UserError, match="vocab_size: 4 is too small: 5 or more are needed"):
        tokenizer.train(config(type="char", vocab_size=4), ["a"])


def test_merges_need_the_minimum_frequency(tmp_path):
    """ "ab" stands twice: it is one token at min_frequency 2 and two at 3."""
    counts = [len(trained(tmp_path / f"{n}", ["ab ab"], min_frequency=n).encode(["ab"])[0]) for n in (2, 3)]
    assert counts == [1, 2]


def test_shakespeare_has_65_characters(tmp_path, shared):
    """nanoGPT data/shakespeare_char/readme.md: a vocabulary of 65; here 4 special tokens come before."""
    text = (shared / "text" / "tinyshakespeare.txt").read_text()
    loaded = trained(tmp_path / "t", [text], type="char")
    assert loaded.vocab_size == 65 + 4
    assert loaded.encode(["\n !$&',-.3:;?ABC"])[0] == list(range(4, 20))
    assert loaded.decode(loaded.encode([text[:5000]])[0]) == text[:5000]


def test_unknown_character_becomes_the_unknown_token(tmp_path):
    loaded = trained(tmp_path / "t", ["abc"], type="char")
    assert loaded.encode(["axb😀"]) == [[4, 3, 5, 3]]


def test_rarest_characters_give_way_to_the_limit(tmp_path):
    loaded = trained(tmp_path / "t", ["aaabbc"], type="char", vocab_size=6)
    assert loaded.encode(["abc"]) == [[4, 5, 3]]


@pytest.mark.parametrize("type_", ["bpe", "char"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("none", "ﬁ Cafe\u0301"), ("nfc", "ﬁ Caf\u00e9"), ("nfkc", "fi Caf\u00e9"), ("lowercase", "ﬁ cafe\u0301")],
)
def test_normalizer_changes_the_text_by_its_name(tmp_path, name, expected, type_):
    """Unicode normalization forms, UAX #15."""
    text = "ﬁ Cafe\u0301"
    loaded = trained(tmp_path / "t", [text], normalizer=name, type=type_)
    assert loaded.decode(loaded.encode([text])[0]) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ["I", "'ll", " pay", " 12345", " $", "\n", "\n", "x"]),
        ("gpt4", ["I", "'ll", " pay", " ", "123", "45", " $\n\n", "x"]),
        ("whitespace", ["I'll", " pay", " 12345", " $", "\n\n", "x"]),
        ("none", ["I'll pay 12345 $\n\nx"]),
    ],
)
def test_pre_tokenizer_cuts_by_its_name(name, expected):
    """Patterns of GPT-2 (encoder.py) and cl100k_base (tiktoken_ext/openai_public.py), applied by hand."""
    pieces = tokenizer.PRE_TOKENIZERS[name]().pre_tokenize_str("I'll pay 12345 $\n\nx")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == expected


# --- round trips --------------------------------------------------------------------------------------------------


@given(text=TEXT)
@example("  two  spaces \t\r\n ")
@example("\x00\x1b\ufeff\u200b\u2028 e\u0301 👩‍👩‍👧")
def test_any_text_comes_back(bpe, text):
    assert bpe.decode(bpe.encode([text])[0]) == text


def test_real_texts_come_back(bpe, udhr, emoji):
    texts = udhr + emoji
    assert [bpe.decode(ids) for ids in bpe.encode(texts)] == texts


def test_auto_tokenizer_gives_the_same_ids_and_text(bpe, auto, udhr, emoji):
    texts = udhr[::5] + emoji[::10] + ["", " ", "\n\n", "a  b ", "def f(x):\n\treturn x  # é"]
    assert [auto(text, add_special_tokens=False)["input_ids"] for text in texts] == bpe.encode(texts)
    assert [auto.decode(ids) for ids in bpe.encode(texts)] == texts


def test_auto_tokenizer_of_characters_gives_the_same_ids(tmp_path, udhr):
    loaded = trained(tmp_path / "t", udhr[:500], type="char")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert [auto(text, add_special_tokens=False)["input_ids"] for text in udhr[::20]] == loaded.encode(udhr[::20])


def test_decoding_leaves_special_tokens_out(bpe):
    assert bpe.decode([1, *bpe.encode(["text"])[0], 2, 0]) == "text"


# --- folders ------------------------------------------------------------------------------------------------------


def test_folder_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer.json. Give a folder made by train_tokenizer"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", tokenizer.PAYLOAD)
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"eos_token": {}}'])
def test_damaged_tokenizer_is_told(tmp_path, name, text):
    trained(tmp_path / "t", ["a"])
    (tmp_path / "t" / name).write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer"):
        tokenizer.load(tmp_path / "t")


def test_truncation_and_padding_of_a_foreign_tokenizer_are_off(tmp_path):
    loaded = trained(tmp_path / "t", ["a b c d"])
    loaded.backend.enable_truncation(2)
    loaded.backend.enable_padding(length=9)
    loaded.backend.save(str(tmp_path / "t" / "tokenizer.json"))
    assert len(tokenizer.load(tmp_path / "t").encode(["a b c d"])[0]) == 7


def test_foreign_special_tokens_are_found(shared):
    loaded = tokenizer.load(shared / "models" / "stories260K")
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.unk_id) == (None, 1, 2, 0)


# --- records ------------------------------------------------------------------------------------------------------


def test_parts_are_encoded_alone_between_begin_and_end(bpe):
    record = Record("f", 1, 0, (("return", False), ("er", True)))
    [document] = tokenizer.encode_records(bpe, [record], add_bos=True, add_eos=True)
    first, second = bpe.encode(["return", "er"])
    assert document.input_ids.tolist() == [1, *first, *second, 2]
    assert document.target_spans == ((1 + len(first), len(document.input_ids)),)
    assert (document.num_bytes, document.record_id) == (2, record.id.hex())


def test_end_is_no_target_after_a_part_that_is_none(bpe):
    record = Record("f", 1, 0, (("a", True), ("b", False)))
    [document] = tokenizer.encode_records(bpe, [record], add_bos=True, add_eos=True)
    assert document.is_target().tolist() == [False, True, False, False]


@given(texts=st.lists(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=3), max_size=4))
def test_documents_keep_the_order_and_the_parts_of_records(bpe, texts):
    records = [Record("f", 1, 0, tuple(parts)) for parts in texts]
    documents = tokenizer.encode_records(bpe, records, add_bos=False, add_eos=False)
    for record, document in zip(records, documents, strict=True):
        ids = [bpe.encode([text])[0] for text, _ in record.parts]
        assert document.input_ids.tolist() == [token for part in ids for token in part]
        wanted = [is_target for part, (_, is_target) in zip(ids, record.parts, strict=True) for _ in part]
        if any(is_target for _, is_target in record.parts):
            assert document.is_target().tolist() == [False, *wanted[1:]][: len(wanted)]
