"""Tokenizers of every type: text comes back, never becomes a special token, and transformers gives the same ids."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from codex_accel import byte_pairs, tokenizer, vocabulary
from codex_accel.errors import UserError
from codex_accel.schema import Source, SpecialTokens, TokenizerConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TYPES = {
    "bpe": {"type": "bpe", "vocab_size": 600},
    "unigram": {"type": "unigram", "vocab_size": 600},
    "sentencepiece-unigram": {"type": "sentencepiece", "algorithm": "unigram", "vocab_size": 700},
    "sentencepiece-bpe": {"type": "sentencepiece", "algorithm": "bpe", "vocab_size": 700},
    "char": {"type": "char"},
}
LOSSLESS = [name for name in TYPES if name != "char"]  # char: what was in the training text
every_type = pytest.mark.parametrize("name", TYPES)
CODE = ["def f(x):\n\treturn x  # é\n", "a  b ", "", " ", "\n\n", "\r\n", "x\x00y\ufeffz", "\u2028e\u0301 \U0010ffff"]


def config(**options) -> TokenizerConfig:
    return TokenizerConfig(output_dir="out", sources=[Source(path="x")], **options)


def trained(folder, texts, **options) -> tokenizer.Tokenizer:
    """Trained on `texts`, saved to `folder` and loaded."""
    chosen = config(**options)
    folder.mkdir(exist_ok=True)
    vocabulary.save(vocabulary.train(chosen, texts), folder, chosen)
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
def every(tmp_path_factory, udhr, emoji) -> dict[str, tokenizer.Tokenizer]:
    """One tokenizer of each type, trained on the declaration: all of it for char, else in four languages."""
    root = tmp_path_factory.mktemp("types")
    texts = dict.fromkeys(TYPES, udhr[:360:4]) | {"char": udhr + emoji}
    return {name: trained(root / name, texts[name], **options) for name, options in TYPES.items()}


@pytest.fixture(scope="module")
def auto(every) -> dict[str, transformers.PreTrainedTokenizerBase]:
    """The same folders, loaded by transformers."""
    return {name: transformers.AutoTokenizer.from_pretrained(loaded.folder) for name, loaded in every.items()}


@pytest.fixture(scope="module")
def bpe(every) -> tokenizer.Tokenizer:
    return every["bpe"]


def split(found) -> list[list[int]]:
    ids, counts = found
    assert (ids.dtype, counts.dtype) == (np.uint16, np.int64)
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] if len(counts) else []


# --- special tokens -----------------------------------------------------------------------------------------------


@every_type
def test_special_tokens_have_fixed_ids(every, auto, name):
    loaded, theirs = every[name], auto[name]
    unk = None if name in ("bpe", "unigram") else 3
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.unk_id) == (0, 1, 2, unk)
    assert loaded.special_ids == {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2} | ({} if unk is None else {"[UNK]": 3})
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2, unk)
    assert theirs.convert_ids_to_tokens([0, 1, 2]) == ["[PAD]", "[BOS]", "[EOS]"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"type": "bpe"}, [0, 1, 2, 3, 4]),
        ({"type": "char"}, [0, 1, 2, 4, 5]),
        ({"type": "sentencepiece", "vocab_size": 330}, [0, 1, 2, 4, 5]),
    ],
    ids=["bpe", "char", "sentencepiece"],
)
def test_names_come_from_the_configuration(tmp_path, options, expected):
    special = SpecialTokens(pad="<p>", bos="<b>", eos="<e>", unk="<u>", additional=["<x>", "<y>"])
    loaded = trained(tmp_path / "t", ["some text"] * 9, special_tokens=special, **options)
    assert [loaded.special_ids[name] for name in ("<p>", "<b>", "<e>", "<x>", "<y>")] == expected
    assert loaded.unk_id == (None if options["type"] == "bpe" else 3)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert {"<p>", "<b>", "<e>", "<x>", "<y>"} <= set(theirs.all_special_tokens)


@pytest.mark.security
@every_type
@settings(max_examples=40)
@given(before=TEXT, name_=st.sampled_from(["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<0x41>"]), after=TEXT)
def test_name_of_a_special_token_in_text_is_text(every, name, before, name_, after):
    loaded, text = every[name], before + name_ + after
    ids = loaded.encode([text])[0]
    assert split(loaded.encode_batch([text])) == [ids]
    assert not {0, 1, 2} & set(ids)
    if name in LOSSLESS and "\u2581" not in text:
        assert loaded.decode(ids) == text


def test_decoding_leaves_special_tokens_out(every):
    for loaded in every.values():
        assert loaded.decode([1, *loaded.encode(["text"])[0], 2, 0]) == "text"


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=TEXT.filter(lambda text: "\u2581" not in text))
@example("  two  spaces \t\r\n ")
@example("\x00\x1b\ufeff\u200b\u2028 e\u0301 👩‍👩‍👧")
def test_any_text_comes_back(every, name, text):
    assert every[name].decode(every[name].encode([text])[0]) == text


@every_type
def test_real_texts_come_back(every, shared, emoji, name):
    whole = (shared / "text" / "udhr_20lang.txt").read_text()
    texts = [*emoji, "".join(map(chr, range(0x20, 0x7F))) if name in LOSSLESS else "ASCII", whole]
    if name == "char":  # its training text had no line ends
        texts[-1] = whole.replace("\n", " ").replace("\r", " ")
    loaded = every[name]
    assert [loaded.decode(ids) for ids in loaded.encode(texts)] == texts


@pytest.mark.parametrize("name", ["sentencepiece-unigram", "sentencepiece-bpe"])
def test_sentencepiece_writes_its_space_sign_back_as_a_space(every, name):
    assert every[name].decode(every[name].encode(["a\u2581b"])[0]) == "a b"


def test_unknown_character_becomes_the_unknown_token(tmp_path):
    loaded = trained(tmp_path / "t", ["abc"], type="char")
    assert loaded.encode(["axb😀"]) == [[4, 3, 5, 3]]


# --- transformers, and the libraries below ------------------------------------------------------------------------


@every_type
def test_auto_tokenizer_gives_the_same_ids_and_text(every, auto, udhr, emoji, name):
    texts = udhr[::9] + emoji[::20] + CODE
    ids = every[name].encode(texts)
    assert auto[name](texts, add_special_tokens=False)["input_ids"] == ids
    assert [auto[name].decode(part, skip_special_tokens=True) for part in ids] == [every[name].decode(p) for p in ids]


@every_type
def test_padding_changes_no_id_and_is_masked(auto, udhr, name):
    """Right and left: what the mask keeps is what the text alone gives, and all else is the padding token."""
    texts = [udhr[3], "", udhr[7], "a"]
    alone = [auto[name](text, add_special_tokens=False)["input_ids"] for text in texts]
    for side in ("right", "left"):
        batch = auto[name](texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="np")
        assert batch["input_ids"].shape == (4, max(map(len, alone)))
        for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
            assert row[mask == 1].tolist() == ids
            assert set(row[mask == 0]) <= {0}
            assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")


@every_type
def test_each_token_has_an_id_of_its_own_below_the_vocabulary(every, name):
    ids = sorted(every[name].backend.get_vocab(with_added_tokens=True).values())
    assert ids == list(range(every[name].vocab_size))
    assert every[name].vocab_size == TYPES[name].get("vocab_size", every[name].vocab_size)


def test_ids_beyond_the_vocabulary_have_no_text(every):
    """Embeddings may be padded to more rows than the tokenizer has tokens, and a client may send their ids."""
    for loaded in every.values():
        ids = loaded.encode(["one two"])[0]
        assert loaded.decode([loaded.vocab_size, *ids, loaded.vocab_size + 5]) == loaded.decode(ids)


@pytest.mark.parametrize("name", ["sentencepiece-unigram", "sentencepiece-bpe"])
def test_ids_are_those_of_sentencepiece(every, shared, udhr, emoji, name):
    """tokenizer.json beside the tokenizer.model that it was made from, on prose and code by lines and as a whole."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(every[name].folder / "tokenizer.model"))
    botchan = (shared / "text" / "botchan.txt").read_text()
    with open(shared / "text" / "python311_stdlib.jsonl") as lines:
        modules = [json.loads(line)["text"] for line, _ in zip(lines, range(4), strict=False)]
    code = [line for module in modules for line in module.splitlines(keepends=True)]
    texts = [*udhr, *emoji, *botchan.splitlines()[::3], *code, *CODE, modules[1][:60_000], botchan[:60_000], "#" * 78]
    assert every[name].encode(texts) == library.encode(texts)


# --- many texts at once -------------------------------------------------------------------------------------------


@every_type
def test_a_batch_gives_the_ids_of_each_text(every, udhr, name):
    texts = [*udhr[::9], *CODE]
    assert split(every[name].encode_batch(texts)) == every[name].encode(texts)
    assert split(every[name].encode_batch([])) == []


def test_a_batch_gives_the_same_ids_on_several_threads(bpe, udhr):
    """The first use makes the fast path, here by four threads at once."""
    loaded = tokenizer.load(bpe.folder)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: split(loaded.encode_batch(udhr[start::16])), range(4)))
    assert found == [loaded.encode(udhr[start::16]) for start in range(4)]


SLOW = [name for name in TYPES if name != "bpe"]


@pytest.mark.parametrize("name", SLOW)
@settings(max_examples=60)
@given(text=TEXT | st.text(st.sampled_from("the \n\r\u2581\u2585#é\U0010ffff"), max_size=24))
@example("é\n\n#\n the\n\nthe \n")
def test_long_texts_go_through_tokenizers_in_pieces(every, name, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_pairs, "BLOCK", 3)
        found = split(every[name].encode_batch([text, "", text]))
    assert found == every[name].encode([text, "", text])


@pytest.mark.parametrize("name", SLOW)
def test_lines_of_a_long_text_never_come_all_at_once(monkeypatch, every, name):
    """So memory is bounded: 3 MB in one piece took 600 MB."""
    monkeypatch.setattr(byte_pairs, "BLOCK", 3)
    pieces = list(byte_pairs.segments(["born free\n" * 9], every[name]._cut))
    assert len(pieces) >= 9


def test_text_that_may_become_unknown_is_not_cut(tmp_path):
    """Unknown characters beside each other are one token, the line end too."""
    loaded = trained(tmp_path / "t", ["ab ab"], type="sentencepiece", byte_fallback=False)
    text = "a\U0010ffff\n\U0010ffff\nb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_pairs, "BLOCK", 1)
        assert split(loaded.encode_batch([text])) == loaded.encode([text])


def test_added_word_with_a_space_is_never_cut(tmp_path, every):
    """It is found before the text is cut into words, so a cut before a space would split it."""
    backend = tokenizers.Tokenizer.from_str(every["bpe"].backend.to_str())
    backend.add_tokens(["New York"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path)
    assert loaded.encode(["New York"]) == [[600]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_pairs, "BLOCK", 3)
        assert split(loaded.encode_batch(["in New York"])) == loaded.encode(["in New York"])


def foreign(folder, normalizer, pre_tokenizer) -> tokenizer.Tokenizer:
    """A folder with the letters a, b and the space sign, as conversions of sentencepiece models are set up."""
    backend = tokenizers.Tokenizer(models.BPE({"?": 0, "a": 1, "b": 2, "\u2581": 3}, [], unk_token="?"))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    return tokenizer.load(folder)


SPACE = normalizers.Replace(" ", "\u2581")
PREPEND = normalizers.Prepend("\u2581")
METASPACE = {scheme: pre_tokenizers.Metaspace(prepend_scheme=scheme) for scheme in ("always", "first", "never")}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "first"),
    [
        (None, METASPACE["always"], 1),
        (None, METASPACE["first"], 1),
        (None, METASPACE["never"], 0),
        (normalizers.Sequence([PREPEND, SPACE]), None, 1),
        (normalizers.Sequence([normalizers.Strip(), PREPEND, SPACE]), None, 1),
        (None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE["always"]]), 1),
    ],
    ids=["always", "first", "never", "prepend", "strip", "words"],
)
@pytest.mark.parametrize("parts", [["a", " b"], ["a ", "b"], ["a b", " b a"], ["a", " ", "b a"]], ids=repr)
def test_spaces_between_parts_stay_and_none_is_added(tmp_path, normalizer, pre_tokenizer, first, parts):
    """Each part has the space signs of the whole text, at the end of a part or at the beginning of the next."""
    loaded = foreign(tmp_path, normalizer, pre_tokenizer)
    ids, _ = loaded.encode_batch(parts, continued=np.arange(len(parts)) > 0)
    assert ids.tolist() == loaded.encode(["".join(parts)])[0]
    assert (ids[0] == 3) == first


@pytest.mark.parametrize("parts", [["Hello", " world"], ["Hello ", "world"], ["Hello", "  world"], ["Hello", "world"]])
def test_sentencepiece_keeps_the_space_between_parts(shared, parts):
    """The model drops white space at both ends of a text, and puts one space before it."""
    loaded = tokenizer.load(shared / "tokenizers" / "sentencepiece_unigram_botchan.model")
    ids, _ = loaded.encode_batch(parts, continued=np.array([False, True]))
    assert loaded.decode(ids) == " ".join("".join(parts).split())


def test_the_engine_is_named_with_a_reason(every, shared):
    assert {name: loaded.engine for name, loaded in every.items()} == dict.fromkeys(TYPES, "tokenizers") | {
        "bpe": "tiktoken"
    }
    assert every["bpe"].engine_reason == ""
    assert every["unigram"].engine_reason == "its model is Unigram, not BPE"
    assert "normalizer" in every["sentencepiece-bpe"].engine_reason
    assert tokenizer.load(shared / "tokenizers" / "mistral_v1").engine == "sentencepiece"


def test_a_difference_on_real_text_ends_the_fast_path(tmp_path, udhr):
    """The fast path of another vocabulary stands in for an engine that errs."""
    loaded, other = trained(tmp_path / "a", udhr[:60]), trained(tmp_path / "b", ["ab ab"] * 9)
    assert loaded.check_on(udhr[:5]) == ""
    assert loaded.engine == "tiktoken"
    loaded._fast = byte_pairs.BytePairs(other._fast.encoding, other._fast.separator_id, loaded.backend)
    assert loaded.check_on(["", "\n", udhr[0]]) == "tiktoken gave other ids for text number 3 of the first block"
    assert (loaded.engine, loaded.engine_reason[:8]) == ("tokenizers", "tiktoken")
    assert split(loaded.encode_batch(udhr[:5])) == loaded.encode(udhr[:5])


# --- tokens for people --------------------------------------------------------------------------------------------


@every_type
def test_tokens_of_a_text_read_as_the_text(every, name):
    text = "All human beings are born free"
    assert "".join(map(every[name].token_text, every[name].encode([text])[0])) == text
    assert every[name].token_text(2) == "[EOS]"


@pytest.mark.parametrize("name", LOSSLESS)
def test_bytes_of_a_partial_character_are_shown(every, name):
    ids = every[name].encode(["\U0010ffff"])[0]
    assert "".join(map(every[name].token_text, ids)) == r"\xf4\x8f\xbf\xbf"


def test_an_id_beyond_the_vocabulary_has_no_text(bpe):
    with pytest.raises(ValueError, match="no token has the id 99999"):
        bpe.token_text(99999)


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "ids", "special"),
    [
        ("gpt2", "gpt2/reference_ids.jsonl", (50256, 50256, None, None)),
        ("mistral_v1", "mistral_v1/reference_ids.jsonl", (1, 2, None, 0)),
        ("mistral_v1/tokenizer.model", "mistral_v1/reference_ids.jsonl", (1, 2, None, 0)),
        (
            "sentencepiece_unigram_botchan.model",
            "sentencepiece_unigram_botchan.reference_ids.jsonl",
            (1, 2, None, 0),
        ),
    ],
)
def test_foreign_files_give_the_reference_ids(shared, path, ids, special):
    """../shared/data/SOURCES.json says by which library each was made."""
    loaded = tokenizer.load(shared / "tokenizers" / path)
    rows = [json.loads(line) for line in (shared / "tokenizers" / ids).read_text().splitlines()]
    texts, wanted = [row["text"] for row in rows], [row["ids"] for row in rows]
    assert loaded.encode(texts) == wanted
    assert split(loaded.encode_batch(texts)) == wanted
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.unk_id) == special
    assert loaded.engine == ("tiktoken" if path == "gpt2" else "sentencepiece")
    assert loaded.vocab_size > max(max(part, default=0) for part in wanted)
    if "botchan" not in path:  # which strips and knows few characters
        assert [loaded.decode(part) for part in wanted] == texts


def test_sentencepiece_tokens_read_as_the_text(shared):
    loaded = tokenizer.load(shared / "tokenizers" / "mistral_v1")
    ids = loaded.encode(["born free\U0010ffff"])[0]
    assert "".join(map(loaded.token_text, ids)) == r" born free\xf4\x8f\xbf\xbf"
    assert loaded.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_foreign_special_tokens_are_found(shared):
    loaded = tokenizer.load(shared / "models" / "stories260K")
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.unk_id) == (None, 1, 2, 0)
    assert loaded.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_folder_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(UserError, match=r"reference = .* has no tokenizer.json, .* Give a folder made by train_token"):
        tokenizer.load(tmp_path, key="reference")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("tokenizer.json", b"", "is not a tokenizer"),
        ("tokenizer.json", b"[1]", "is not a tokenizer"),
        ("tokenizer_config.json", b"{", "is no JSON object"),
        ("tokenizer_config.json", b"[1]", "is no JSON object"),
        ("special_tokens_map.json", b"\xff", "is no JSON object"),
        ("tokenizer_config.json", b'{"eos_token": {}}', "eos_token = {} is no text"),
        ("tokenizer_config.json", b'{"eos_token": 2}', "eos_token = 2 is no text"),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "chat_template is neither a text nor"),
        ("chat_template.jinja", b"\xff", "cannot be read as UTF-8 text"),
    ],
)
def test_damaged_file_is_told_by_its_name(tmp_path, every, name, data, reason):
    shutil.copytree(every["char"].folder, tmp_path / "t")
    (tmp_path / "t" / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/t/{name}: {reason}")):
        tokenizer.load(tmp_path / "t")


def test_damaged_pair_of_files_is_told(tmp_path, shared):
    shutil.copy(shared / "tokenizers" / "gpt2" / "merges.txt", tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match=r"merges\.txt with .*vocab\.json: is not a tokenizer"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"no protocol buffer"])
def test_damaged_sentencepiece_model_is_told(tmp_path, data):
    (tmp_path / "a.model").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.model: is not a tokenizer"):
        tokenizer.load(tmp_path / "a.model")


def test_truncation_and_padding_of_a_foreign_tokenizer_are_off(tmp_path):
    loaded = trained(tmp_path / "t", ["a b c d"])
    loaded.backend.enable_truncation(2)
    loaded.backend.enable_padding(length=9)
    loaded.backend.save(str(tmp_path / "t" / "tokenizer.json"))
    assert len(tokenizer.load(tmp_path / "t").encode(["a b c d"])[0]) == 7


@pytest.mark.parametrize(
    ("setting", "file", "expected"),
    [
        (None, None, None),
        ("one", None, "one"),
        ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}], None, "three"),
        ([{"name": "tool_use", "template": "two"}], None, None),
        ("one", "of the file", "of the file"),
    ],
)
def test_chat_template_is_found(tmp_path, setting, file, expected):
    trained(tmp_path / "t", ["a"])
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": setting}))
    if file is not None:
        (tmp_path / "t" / "chat_template.jinja").write_text(file)
    assert tokenizer.load(tmp_path / "t").chat_template == expected


def test_a_plain_tokenizer_json_loads(tmp_path):
    """As `tokenizers` itself saves it, without names for the special tokens."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.special_ids, loaded.encode(["a"])) == (None, {}, [[0]])
