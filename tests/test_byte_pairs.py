"""The fast path gives the ids of `tokenizers`, or says why it is not taken."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, trainers

from codex_accel import byte_pairs, vocabulary

PATTERNS = {
    "gpt2": byte_pairs.GPT2_PATTERN,
    "gpt4": byte_pairs.GPT4_PATTERN,
    "whitespace": byte_pairs.WHITESPACE_PATTERN,
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
EDGES = "a1 \n\r\t'sSl!_\u00a0é漢²\u0301\u200d\x1c\x85"  # what the patterns tell apart, and what they might
EDGY = st.text(st.sampled_from(EDGES), max_size=24)
SINGLE = {bytes([byte]): byte for byte in range(256)}


def trained(texts, *, pattern="gpt2", vocab_size=400) -> tokenizers.Tokenizer:
    """Byte-level BPE with the special token [EOS] and a pattern of vocabulary.PRE_TOKENIZERS."""
    result = tokenizers.Tokenizer(models.BPE())
    result.pre_tokenizer = vocabulary.PRE_TOKENIZERS[pattern]()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[EOS]"],
        initial_alphabet=sorted(byte_pairs.BYTE_OF),
        show_progress=False,
    )
    result.train_from_iterator(texts, trainer)
    result.encode_special_tokens = True
    return result


def revealing(name: str) -> tokenizers.Tokenizer:
    """A vocabulary with a token for every pair of `EDGES`, so that a cut anywhere shows in the ids."""
    letter = {byte: character for character, byte in byte_pairs.BYTE_OF.items()}
    merges = []
    for character in EDGES:  # the bytes of each character first
        parts = [letter[byte] for byte in character.encode()]
        merges += [("".join(parts[:end]), parts[end]) for end in range(1, len(parts))]
    whole = ["".join(letter[byte] for byte in character.encode()) for character in EDGES]
    merges = list(dict.fromkeys(merges)) + [(left, right) for left in whole for right in whole]
    names = [*sorted(byte_pairs.BYTE_OF), *(left + right for left, right in merges)]
    result = tokenizers.Tokenizer(models.BPE({token: id_ for id_, token in enumerate(names)}, merges))
    result.pre_tokenizer = vocabulary.PRE_TOKENIZERS[name]()
    return result


def ids_of(backend, texts) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def split(found) -> list[list[int]]:
    ids, counts = found
    assert (ids.dtype, counts.dtype) == (np.uint16, np.int64)
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] if len(counts) else []


@pytest.fixture(scope="module")
def udhr(shared) -> list[str]:
    lines = (shared / "text" / "udhr_20lang.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def backends(udhr) -> dict[str, tokenizers.Tokenizer]:
    return {name: trained(udhr[::4], pattern=name, vocab_size=600) for name in PATTERNS}


@pytest.fixture(scope="module")
def pairs(backends) -> byte_pairs.BytePairs:
    return byte_pairs.build(backends["gpt2"])


@pytest.fixture(scope="module")
def revealers() -> dict[str, byte_pairs.BytePairs]:
    return {name: byte_pairs.build(revealing(name)) for name in PATTERNS}


# --- the two engines of patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"\p{L}+", r"\p{N}+", r"\s+"])
def test_every_code_point_is_of_one_class_in_both_engines(pattern):
    """Else texts would be cut otherwise. What tiktoken matches becomes its bytes, the rest gives nothing.

    No version of Unicode has put a character in planes 4 to 13; 15 and 16 are for private use.
    """
    points = np.r_[0:0xD800, 0xE000:0x40000, 0xE0000:0xE1000, 0xFFF00:0x100100, 0x10FF00:0x110000].astype("<u4")
    text = points.tobytes().decode("utf-32-le")
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=SINGLE, special_tokens={})
    matched = encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint8).tobytes().decode()
    rest = normalizers.Replace(Regex(pattern), "").normalize_str(text)
    assert 8 <= len(matched) == len(text) - len(rest)
    assert not set(matched) & set(rest)


@every_pattern
@settings(max_examples=60)
@given(text=EDGY)
@example("a  b \n\n\n 1\r\n!\r\n\r\n 'S's '\u017f  ")
def test_the_possessive_form_cuts_as_the_plain_one(revealers, name, text):
    pairs = revealers[name]
    assert split(byte_pairs.encode_batch(pairs, [text])) == ids_of(pairs.backend, [text])


def test_a_cut_shows_in_the_revealing_vocabulary():
    """The test above must not be blind: the three patterns cut this text in three ways."""
    text = "a1 \n\n!\r\na's"
    assert len({tuple(ids_of(revealing(name), [text])[0]) for name in PATTERNS}) == 3


def test_engines_of_different_unicode_versions_are_told(monkeypatch, udhr):
    """Here the class of letters of the one engine is that of numbers in the other."""
    monkeypatch.setattr(byte_pairs, "Regex", lambda name: Regex(r"\p{N}" if name == r"\p{L}" else name))
    with pytest.raises(ValueError, match=r"different versions of Unicode: U\+"):
        byte_pairs.build(trained(udhr[:9]))


# --- equal ids ----------------------------------------------------------------------------------------------------


@every_pattern
def test_real_texts_and_traps_get_the_same_ids(backends, udhr, name):
    texts = [*udhr[::4], *byte_pairs.TRAPS]
    pairs = byte_pairs.build(backends[name])
    assert split(byte_pairs.encode_batch(pairs, texts)) == ids_of(backends[name], texts)


@settings(max_examples=40)
@given(corpus=st.lists(EDGY, max_size=6), texts=st.lists(EDGY, max_size=4), name=st.sampled_from(sorted(PATTERNS)))
def test_any_trained_vocabulary_gives_the_same_ids(corpus, texts, name):
    backend = trained(corpus, pattern=name, vocab_size=320)
    assert split(byte_pairs.encode_batch(byte_pairs.build(backend), texts)) == ids_of(backend, texts)


@pytest.mark.security
@given(before=TEXT, after=TEXT)
def test_the_separator_in_a_text_is_text(pairs, before, after):
    texts = [before + byte_pairs.SEPARATOR + after, "", after, byte_pairs.SEPARATOR]
    assert split(byte_pairs.encode_batch(pairs, texts)) == ids_of(pairs.backend, texts)


@pytest.mark.security
def test_the_separator_across_two_texts_is_text(pairs):
    texts = ["a\x00", "\x01\x02b", "\x02\x00\x01", "\x00\x01"]
    assert split(byte_pairs.encode_batch(pairs, texts)) == ids_of(pairs.backend, texts)


@pytest.mark.security
def test_white_space_beyond_tiktoken_goes_through_tokenizers():
    texts = ["a", " " * 1_000_000 + "x", "", "b\n"]
    pairs = byte_pairs.build(trained([]))
    with pytest.raises(ValueError, match="Regex error"):
        pairs.encoding.encode_to_numpy("".join(texts), disallowed_special=())
    assert split(byte_pairs.encode_batch(pairs, texts)) == ids_of(pairs.backend, texts)


@every_pattern
@settings(max_examples=60)
@given(texts=st.lists(EDGY, max_size=5))
def test_cuts_and_blocks_do_not_change_the_ids(revealers, name, texts):
    pairs = revealers[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_pairs, "BLOCK", 3)
        found = split(byte_pairs.encode_batch(pairs, texts))
    assert found == ids_of(pairs.backend, texts)


def test_long_texts_are_cut_to_blocks(shared):
    text = (shared / "text" / "tinyshakespeare.txt").read_text() * 3
    owners, pieces = zip(*byte_pairs.segments(["a", text], byte_pairs.CUT), strict=True)
    assert owners == (0, 1, 1, 1, 1)
    assert "".join(pieces) == "a" + text
    assert max(map(len, pieces)) < byte_pairs.BLOCK + 100


def test_several_threads_get_the_same_ids(pairs, udhr):
    parts = [udhr[start::16] for start in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: split(byte_pairs.encode_batch(pairs, part)), parts))
    assert found == [ids_of(pairs.backend, part) for part in parts]


def test_no_text_gives_no_ids(pairs):
    ids, counts = byte_pairs.encode_batch(pairs, [])
    assert (len(ids), len(counts)) == (0, 0)
    ids, counts = byte_pairs.encode_batch(pairs, ["", ""])
    assert (len(ids), counts.tolist()) == (0, [0, 0])


# --- what is refused ----------------------------------------------------------------------------------------------


def changed(backend, change) -> tokenizers.Tokenizer:
    """The tokenizer whose tokenizer.json was changed in place by `change`."""
    document = json.loads(backend.to_str())
    change(document)
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def put(path: str, value):
    """A change that sets one key of tokenizer.json."""
    *sections, last = path.split(".")

    def change(document):
        for section in sections:
            document = document[section]
        document[last] = value

    return change


def add_plain_token(document):
    token = {"id": len(document["model"]["vocab"]), "content": "<b>", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append(token | flags)


def add_unmade_token(document):
    document["model"]["vocab"]["zzzz"] = len(document["model"]["vocab"])


def swap_merges(document):
    merges = document["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def drop_byte(document):
    vocabulary_ = document["model"]["vocab"]
    vocabulary_["zzz"] = vocabulary_.pop("Ā")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("normalizer", {"type": "NFC"}), "has a normalizer"),
        (put("pre_tokenizer", {"type": "Whitespace"}), "known byte-level pattern"),
        (put("pre_tokenizer", None), "known byte-level pattern"),
        (put("pre_tokenizer.add_prefix_space", True), "known byte-level pattern"),
        (put("pre_tokenizer.use_regex", False), "known byte-level pattern"),
        (put("model.dropout", 0.5), r"dropout = 0\.5"),
        (put("model.unk_token", "[EOS]"), r"unk_token = '\[EOS\]'"),
        (put("model.byte_fallback", True), "byte_fallback = True"),
        (add_plain_token, "adds '<b>', which is not a special token"),
        (add_unmade_token, "'zzzz' is neither made by a merge nor special"),
        (swap_merges, "ids do not rise with its merges"),
        (drop_byte, "no token for the byte 0"),
    ],
)
def test_tokenizer_without_a_proof_is_refused(udhr, change, reason):
    with pytest.raises(ValueError, match=reason):
        byte_pairs.build(changed(trained(udhr[:20]), change))


def test_model_that_is_not_bpe_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = vocabulary.PRE_TOKENIZERS["gpt2"]()
    with pytest.raises(ValueError, match="WordLevel, not BPE"):
        byte_pairs.build(backend)


def unreached(ignore_merges: bool) -> tokenizers.Tokenizer:
    """By rank, b and c merge first, so the listed merge of ab and c is never done: "abc" is a, bc."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    names = [*sorted(byte_pairs.BYTE_OF), "bc", "ab", "abc"]
    model = models.BPE({name: id_ for id_, name in enumerate(names)}, merges, ignore_merges=ignore_merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = vocabulary.PRE_TOKENIZERS["gpt2"]()
    return backend


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_token_that_its_own_text_does_not_give_is_refused(ignore_merges):
    """tiktoken would give abc as one token."""
    with pytest.raises(ValueError, match="its token 'abc' is not what its own text gives"):
        byte_pairs.build(unreached(ignore_merges))


@pytest.mark.security
def test_difference_in_a_trap_is_told(udhr):
    """As it comes from a file, `tokenizers` makes a special token of its name in a text."""
    backend = trained(udhr[:20])
    backend.encode_special_tokens = False
    with pytest.raises(ValueError, match=r"tiktoken gives other ids for '\[PAD\]\[BOS\]\[EOS\]"):
        byte_pairs.build(backend)


def test_bytes_of_a_token_are_those_of_gpt2():
    """openai/gpt-2, src/encoder.py: the space is Ġ, the line end Ċ; what stands outside the alphabet has no bytes."""
    assert byte_pairs.bytes_of("ĠÃ©Ċ") == " é\n".encode()
    assert byte_pairs.bytes_of("漢") is None
    assert sorted(byte_pairs.BYTE_OF.values()) == list(range(256))
    assert set(byte_pairs.BYTE_OF) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
