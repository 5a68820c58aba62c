"""Pieces of text that come as tokens do join to the text of all of them, cut before a stop string."""

import functools

import pytest
import tokenizers
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from codex_accel import tokenizer
from codex_accel.text_stream import MAX_BYTES_OPEN, MAX_CONTEXT, TextStream
from codex_accel.tokenizer import Tokenizer

# Characters of one to four bytes, joined emoji, spaces at both ends and in rows, and what looks like a special token.
TEXTS = ["  Once  upon a\n\n time ", "naïve café — 3 €", "你好，世界", "👩‍👩‍👧 und 𝔘nicode 🏳️‍🌈!", "a</s>b<unk> [EOS]"]
NAMES = [
    "models/stories260K",
    "tokenizers/gpt2",
    "tokenizers/mistral_v1",
    "tokenizers/sentencepiece_unigram_botchan.model",
]


load = functools.cache(tokenizer.load)


@pytest.fixture(scope="module", params=NAMES, ids=lambda name: name.partition("/")[2].partition(".")[0])
def loaded(request, shared) -> Tokenizer:
    """Byte fallback in tokenizer.json, byte-level, and two of sentencepiece, of which the first has bytes."""
    return load(shared / request.param)


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(id_) for id_ in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_what_the_tokens_add_to_any_prompt(loaded, text):
    ids = loaded.encode([text])[0]
    if loaded.unk_id in ids:
        text = loaded.decode(ids)
    for place in range(len(ids) + 1):
        prompt = loaded.decode(ids[:place])
        if "\ufffd" in prompt:
            continue  # it ends within a character: the next test
        pieces = pieces_of(TextStream(loaded, ids[:place]), ids[place:])
        assert prompt + "".join(pieces) == loaded.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_begins_in_the_prompt_comes_whole(shared):
    loaded = load(shared / "tokenizers" / "gpt2")
    ids = loaded.encode(["a👩b"])[0]
    assert loaded.decode(ids[:2]) == "a\ufffd"
    assert "".join(pieces_of(TextStream(loaded, ids[:2]), ids[2:])) == "👩b"


def test_special_tokens_before_and_between_add_nothing(loaded):
    special = [id_ for id_ in (loaded.bos_id, loaded.eos_id) if id_ is not None]
    text, other = (loaded.encode([words])[0] for words in ("Once upon", "time"))
    stream = TextStream(loaded, [*special, *text, *special * 9])
    assert "".join(pieces_of(stream, [*special, *other, *special])) == loaded.decode(text + other)[len("Once upon") :]


def test_ids_that_only_the_model_has_add_nothing(loaded):
    beyond = loaded.vocab_size + 5
    ids = loaded.encode(["Once upon a time"])[0]
    assert "".join(pieces_of(TextStream(loaded, ids[:2]), [beyond, *ids[2:], beyond])) == loaded.decode(
        ids
    ).removeprefix(loaded.decode(ids[:2]))


@given(ids=st.lists(st.integers(0, 50_256), max_size=30), bytes_=st.lists(st.integers(0, 255), max_size=8))
def test_any_ids_of_a_byte_level_vocabulary_give_their_lossy_text(shared, ids, bytes_):
    """`tokenizers` decodes with Rust's from_utf8_lossy; the first 256 ids are single bytes."""
    loaded = load(shared / "tokenizers" / "gpt2")
    given_ids = ids[:10] + [188 + n % 68 for n in bytes_] + ids[10:]
    assert "".join(pieces_of(TextStream(loaded, []), given_ids)) == loaded.decode(given_ids)


@given(data=st.lists(st.one_of(st.sampled_from("aé你👩 "), st.integers(0, 255)), max_size=40))
@example(data=[0xF8, "é"])
@example(data=[0xF8, "é", "a"])
def test_bytes_that_are_no_character_spoil_none_beside_them(shared, data):
    """Byte fallback: each character is there, however many loose bytes stand around it."""
    loaded = load(shared / "models" / "stories260K")
    raw = [each.encode() if isinstance(each, str) else bytes([each]) for each in data]
    stream = TextStream(loaded, loaded.encode(["x"])[0])
    found = "".join(pieces_of(stream, [3 + byte for part in raw for byte in part]))
    for index, part in enumerate(raw):
        beside = b"".join(raw[max(index - 1, 0) : index] + raw[index + 1 : index + 2])
        if len(part) > 1 and all(byte < 0x80 or byte > 0xF7 for byte in beside):  # which no character goes on with
            assert part.decode() in found


@pytest.mark.parametrize("id_", [3 + 0xFF, 3 + 0x80, 3 + ord(" ")])
def test_time_is_linear_for_bytes_and_spaces_without_end(shared, id_):
    loaded = load(shared / "models" / "stories260K")
    for prompt in ([], loaded.encode(["x"])[0]):
        stream = TextStream(loaded, prompt)
        pieces = pieces_of(stream, [id_] * 200)
        assert len(stream._decoder._context) <= MAX_CONTEXT
        assert all(len(piece) <= MAX_BYTES_OPEN + 1 for piece in pieces)
        assert 199 <= len("".join(pieces)) <= 200


# --- stop strings ----------------------------------------------------------------------------------------------------


def of_words(words: list[str]) -> Tokenizer:
    """A tokenizer whose tokens are these words, decoded as they stand."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(None, backend, None, None, None, None)


def expected(text: str, stop: list[str]) -> str:
    """Character by character: the text before the first that is complete, of those the longest."""
    for end in range(1, len(text) + 1):
        ended = [each for each in stop if text[:end].endswith(each)]
        if ended:
            return text[: end - len(max(ended, key=len))]
    return text


WORD = st.text("ab.\n", min_size=1, max_size=4)


@given(
    words=st.lists(WORD, min_size=1, max_size=12), stop=st.lists(st.text("ab.\n", min_size=1, max_size=5), max_size=3)
)
def test_text_is_cut_before_the_first_stop_string_however_it_comes(words, stop):
    loaded = of_words(words)
    stream = TextStream(loaded, [], stop)
    pieces = []
    for word in words:
        pieces.append(stream.add(loaded.backend.token_to_id(word)))
        assert expected("".join(words), stop).startswith("".join(pieces))  # nothing has to be taken back
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == expected("".join(words), stop)
    assert stream.stopped == any(each in "".join(words) for each in stop)


@given(text=WORD, words=st.lists(WORD, min_size=1, max_size=5))
def test_no_more_is_held_back_than_could_become_a_stop_string(text, words):
    assume(text not in "".join(words))
    loaded = of_words(words)
    stream = TextStream(loaded, [], [text])
    so_far = ""
    for word in words:
        so_far += word
        stream.add(loaded.backend.token_to_id(word))
        held = so_far.removeprefix(stream.text)
        assert text.startswith(held)
        assert len(held) < len(text)


def test_a_stop_string_may_span_tokens_and_characters_of_several_bytes(shared):
    loaded = load(shared / "models" / "stories260K")
    ids = loaded.encode(["Hello 你好 there"])[0]
    stream = TextStream(loaded, [], ["o 你好 t"])
    assert "".join(pieces_of(stream, ids)) == "Hell"
    assert stream.stopped
