"""Byte-level byte-pair encoding at speed: tiktoken with the vocabulary and the pattern of a tokenizer.json.

Rule: the ids are those of `tokenizers`, or this path is not taken. `build` refuses every tokenizer for which equality
is not proven, and a block that tiktoken cannot do goes through `tokenizers`.

Why the two agree. `tokenizers` merges the adjacent pairs that are listed, lowest rank first, leftmost among equals.
tiktoken merges any adjacent pair whose joined bytes are a token, lowest id first, leftmost among equals, and takes a
piece that is a token as it stands. Let each merged token be made by exactly one merge, let ids rise with the rank of
the merges, and let every token come out as itself when `tokenizers` encodes its bytes alone (`build` checks all three).
Then both do the same at every step. For suppose that they have so far, and that tiktoken now joins x and y to the token
t. No merge has crossed the borders of this span, so those inside it are the merges of t encoded alone, up to here. That
goes on to t, and with two parts left only by a listed merge of x and y. So each pair that tiktoken may join is listed,
in the same order of priority; the other way round it is plain. A piece that is a token is reached by both.

The patterns are the same up to possessive forms, which only leave out steps back that cannot succeed.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

# openai/gpt-2, src/encoder.py; what ByteLevel(use_regex=True) of `tokenizers` cuts by.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# cl100k_base, from tiktoken's tiktoken_ext/openai_public.py as of version 0.3.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHITESPACE_PATTERN = r" ?\S+|\s+"

# Equal patterns that the engine of tiktoken runs faster.
POSSESSIVE = {
    GPT2_PATTERN: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    GPT4_PATTERN: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]+|\s++$|\s+(?!\S)|\s",
    WHITESPACE_PATTERN: r" ?+\S++|\s++",
}
# Where each of these patterns ends a piece, whatever stands around: before a space that follows a character which is no
# white space, and before a line end that follows a letter or a digit (GPT-4's takes line ends along with punctuation).
CUT = re.compile(r"(?<=\S) |(?<=[^\W_])\n")
BLOCK = 1 << 20  # characters that are encoded at once

# No beginning of it is also its end, so it occurs in texts joined by it only where it was put, or inside of a text.
SEPARATOR = "\x00\x01\x02"

# What engines of patterns have been seen to treat differently, and characters that were new in Unicode 13 to 17: two
# engines of different versions would class these differently. A test compares all code points for the pinned versions.
NEW_CHARACTERS = (
    "\u08be\u31bb\U00030000\U00010fb0\U00011950\U0001e290\U0001df00\U00016a70\U00016ac0\u1c89\U00011f04\U00011f50"
    "\U0001d2c0\U0001e4d0\U0001e4f0\U00031350\U0002ebf0\U000105c0\U00010d40\U00010d4a\U00011bf0\U0001cc00\U0001ccf0"
    "\U0001e5d0\U0001e5f1\ua7cb\ua7ce\U00016ea0\U00011db0\U00011de0\U000323b0\u20c1\U0001fae9"
)
TRAPS = (
    "I'll say I'LL, it's IT'S, 'twas, don't, DON\u2019T, x'\u017f y'\u212a ''s 'S",
    "  two  spaces \t tab\t\tand \r\n\r\n lines \n\n\n   end   ",
    "\n", " ", "   ", "\t \n", " \n x", "\u00a0\u00a0x\u3000y\u2028z\u0085w\x1c\x1f\u200b\ufeff\u180e",
    "e\u0301 a\u0308\u0323 \u0915\u094d\u0937\u093f \u0e01\u0e33 \u1112\u1161\u11ab",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea 1\ufe0f\u20e3 \U0001f44d\U0001f3fd",
    "\u6f22\u5b57\u304b\u306a\u30ab\u30ca\ud55c\uae00 \u4e00\u4e8c\u4e09",
    "12345 \u0661\u0662\u0663\u0664 \u00bd\u2167\u00b2 3.14",
    "\x00\x01 \x7f\x80 \ue000\U0010ffff \ufffd\ufffe",
    "[PAD][BOS][EOS][UNK]<|endoftext|><s></s>",
    "_a_b__c _1 --- ...!?\n\n!\r\n",
    "def f(x):\n\treturn {'a': x[0]}  # \u00e9\n\n\n", NEW_CHARACTERS, " ".join(NEW_CHARACTERS),
)  # fmt: skip


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (openai/gpt-2, src/encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token of a byte-level vocabulary stands for; None if it is not made of its alphabet."""
    found = [BYTE_OF.get(character) for character in token]
    return None if None in found else bytes(found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class BytePairs:
    """A tokenizer that tiktoken can do, beside the one that it must equal."""

    encoding: tiktoken.Encoding
    separator_id: int
    backend: tokenizers.Tokenizer


def build(backend: tokenizers.Tokenizer) -> BytePairs:
    """The fast path of `backend`. Raises: ValueError with the reason why its ids might differ."""
    settings = json.loads(backend.to_str())
    pattern = pattern_of(settings)
    if pattern is None:
        raise ValueError("it has a normalizer, or does not cut text by a known byte-level pattern")
    ranks = _ranks(settings)
    _require_classes()
    separator_id = max([*ranks.values(), *(token["id"] for token in settings["added_tokens"])]) + 1
    encoding = tiktoken.Encoding(
        "tokenizer.json",
        pat_str=POSSESSIVE[pattern],
        mergeable_ranks=ranks,
        special_tokens={SEPARATOR: separator_id},
    )
    pairs = BytePairs(encoding, separator_id, backend)
    if (place := first_difference(pairs, TRAPS)) is not None:
        raise ValueError(f"tiktoken gives other ids for {TRAPS[place]!r}")
    return pairs


def pattern_of(settings: dict[str, Any]) -> str | None:
    """The pattern that a tokenizer.json cuts text by, if it is one of `POSSESSIVE`, on bytes, of unchanged text."""
    cutter = settings["pre_tokenizer"] or {}
    if settings["normalizer"] is not None:
        return None
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if last["use_regex"] else None
    first = steps[0]
    plain = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    pattern = first["pattern"].get("Regex") if plain else None
    return pattern if len(steps) == 2 and not last["use_regex"] and pattern in POSSESSIVE else None


def _ranks(settings: dict[str, Any]) -> dict[bytes, int]:
    """Id of each token by its bytes. Raises: ValueError if a condition of the proof above does not hold."""
    model = settings["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"it has {name} = {model[name]!r}")
    vocabulary, added = model["vocab"], {token["content"]: token["special"] for token in settings["added_tokens"]}
    if plain := [name for name, special in added.items() if not special]:
        raise ValueError(f"it adds {plain[0]!r}, which is not a special token")
    merges = [tuple(pair) for pair in model["merges"]]
    made = [left + right for left, right in merges]
    ids = [vocabulary[token] for token in made]
    if ids != sorted(set(ids)):
        raise ValueError("its ids do not rise with its merges")
    tokens = {*made, *BYTE_OF}
    if missing := set(BYTE_OF) - set(vocabulary):
        raise ValueError(f"it has no token for the byte {BYTE_OF[min(missing)]}")
    if strange := (set(vocabulary) - tokens - set(added)) | (tokens & set(added)):
        raise ValueError(f"its token {min(strange)!r} is neither made by a merge nor special, or is both")
    alone = models.BPE(vocab=vocabulary, merges=merges)  # without ignore_merges, which would hide what is asked here
    for token in made:
        if len(alone.tokenize(token)) != 1:
            raise ValueError(f"its token {token!r} is not what its own text gives")
    result = {bytes_of(token): vocabulary[token] for token in tokens}
    if None in result:
        raise ValueError("it has tokens that are not bytes")
    return result  # type: ignore[return-value]


def _require_classes() -> None:
    """Raise ValueError if the two engines of patterns class one of `NEW_CHARACTERS` differently."""
    single = {bytes([byte]): byte for byte in range(256)}
    for name in (r"\p{L}", r"\p{N}", r"\s"):
        found = tiktoken.Encoding(name, pat_str=name, mergeable_ranks=single, special_tokens={})
        ours = bytes(found.encode_ordinary(NEW_CHARACTERS)).decode()
        rest = pre_tokenizers.Split(Regex(name), "removed").pre_tokenize_str(NEW_CHARACTERS)
        left = {character for text, _ in rest for character in text}
        if differing := set(ours) ^ (set(NEW_CHARACTERS) - left):
            raise ValueError(f"tiktoken and tokenizers know different versions of Unicode: U+{ord(min(differing)):04X}")


def encode_batch(pairs: BytePairs, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All ids (N,), and how many belong to each text, int64 (T,); on this thread, without the interpreter."""
    return in_blocks(texts, CUT, lambda pieces: _encode_block(pairs, pieces), dtype=dtype_for(pairs.encoding.n_vocab))


def dtype_for(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned type of 16 bits or more that ids below `vocab_size` fit in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def in_blocks(
    texts: list[str],
    cut: re.Pattern[str] | None,
    encode_block: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
    *,
    dtype: type[np.unsignedinteger],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) of `dtype` and their number for each text (T,), a block of pieces at a time, so that memory is bounded.

    `encode_block` gives the ids of a list of pieces, and how many belong to each.
    """
    totals = np.zeros(len(texts), np.int64)
    ids = [np.zeros(0, dtype)]
    for owners, pieces in _blocks(segments(texts, cut)):
        found, counts = encode_block(pieces)
        ids.append(found.astype(dtype, copy=False))
        np.add.at(totals, owners, counts)
    return np.concatenate(ids), totals


def segments(texts: Iterable[str], cut: re.Pattern[str] | None) -> Iterator[tuple[int, str]]:
    """Texts in pieces of about `BLOCK` characters, cut only where `cut` matches: (number of its text, piece)."""
    for number, text in enumerate(texts):
        start = 0
        while cut is not None and len(text) - start > BLOCK and (found := cut.search(text, start + BLOCK)):
            yield number, text[start : found.start()]
            start = found.start()
        yield number, text[start:] if start else text


def _blocks(pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Neighbouring pieces that make up about one block each, and the numbers of their texts."""
    owners, block, size = list[int](), list[str](), 0
    for number, piece in pieces:
        if block and size + len(piece) > BLOCK:
            yield owners, block
            owners, block, size = [], [], 0
        owners.append(number)
        block.append(piece)
        size += len(piece) + len(SEPARATOR)
    if block:
        yield owners, block


def _encode_block(pairs: BytePairs, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all pieces and the number of each; one call for all of them, because a call costs as much as 100 bytes."""
    text = SEPARATOR.join(pieces)
    if text.count(SEPARATOR) != len(pieces) - 1:  # somebody's text holds the separator
        return _encode_each(pairs, pieces)
    try:
        found = pairs.encoding.encode_to_numpy(text, allowed_special={SEPARATOR}, disallowed_special=())
    except ValueError:  # too much white space for its engine of patterns
        return _encode_each(pairs, pieces)
    if len(pieces) == 1:
        return found, np.array([len(found)], np.int64)
    between = found == pairs.separator_id
    ends = np.append(np.flatnonzero(between), len(found))
    return found[~between], np.diff(ends, prepend=-1) - 1


def _encode_each(pairs: BytePairs, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same, one piece a call; what tiktoken cannot do is done by `tokenizers`."""
    ids = []
    for piece in pieces:
        try:
            ids.append(pairs.encoding.encode_to_numpy(piece, disallowed_special=()))
        except ValueError:
            ids.append(encode_slowly(pairs.backend, [piece])[0])
    return np.concatenate(ids), np.array([len(part) for part in ids], np.int64)


def encode_slowly(backend: tokenizers.Tokenizer, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same by `tokenizers`, one piece a call: a call for many would start threads of its own."""
    ids = [
        np.array(encoding.ids, np.uint32)
        for piece in pieces
        for encoding in backend.encode_batch_fast([piece], add_special_tokens=False)
    ]
    return np.concatenate(ids) if ids else np.zeros(0, np.uint32), np.array([len(part) for part in ids], np.int64)


def first_difference(pairs: BytePairs, texts: Iterable[str]) -> int | None:
    """Place of the first text for which `tokenizers` gives other ids; None if there is none."""
    texts = list(texts)
    ids, counts = encode_batch(pairs, texts)
    ends = np.cumsum(counts)
    wanted = pairs.backend.encode_batch_fast(texts, add_special_tokens=False)
    for place, (end, count) in enumerate(zip(ends, counts, strict=True)):
        if ids[end - count : end].tolist() != wanted[place].ids:
            return place
    return None
