"""Pieces: sentencepiece models, estimated from sentences, and repeated by `tokenizers`.

Rule: the same sentences with the same settings give the same bytes, and both libraries give a text the same ids.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from codex_accel import seeds
from codex_accel.errors import UserError
from codex_accel.schema import TokenizerConfig

NUM_THREADS = 4  # of sentencepiece, whose bytes depend on it
MAX_SENTENCE = 8192  # characters of what sentencepiece takes at once
RESERVED = re.compile("[\0\t\r\n\u2585]")  # characters that sentencepiece keeps for itself: never inside of a token
UNREACHABLE = -1e6  # score of a token that text must not make: any other way to cover a text is better
SCORE_STEPS = 64  # to a nat; see round_scores


def sentences_of(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, without the characters that sentencepiece keeps for itself, long ones in pieces."""
    for text in texts:
        for line in RESERVED.split(text):
            for start in range(0, len(line), MAX_SENTENCE):
                yield line[start : start + MAX_SENTENCE]


def draw(sentences: Iterable[str], *, max_bytes: int, seed: int) -> tuple[list[str], dict[str, int]]:
    """As many sentences as fit, in their order, and the counts: those whose hash of seed and place is smallest.

    Every sentence is as likely as another, whatever its place, and no more than these are ever held.
    """
    kept: list[tuple[int, int, str]] = []  # (-hash, place, sentence): a heap with the largest hash on top
    size = total = number = 0
    key = seeds.derive(seed, "tokenizer", "sentences").to_bytes(8, "big")
    for number, sentence in enumerate(sentences, 1):
        place = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=8, key=key).digest()
        heapq.heappush(kept, (-int.from_bytes(place, "big"), number, sentence))
        num_bytes = len(sentence.encode())
        size, total = size + num_bytes, total + num_bytes
        while size > max_bytes:
            size -= len(heapq.heappop(kept)[2].encode())
    facts = {"num_lines": number, "num_lines_left_out": number - len(kept), "bytes_left_out": total - size}
    return [sentence for _, _, sentence in sorted(kept, key=lambda item: item[1])], facts


def require_size(config: TokenizerConfig, needed: int) -> None:
    """Raise UserError if the vocabulary may not have `needed` ids."""
    if config.vocab_size < needed:
        raise UserError(config.problem("vocab_size", f"{config.vocab_size} is too small: {needed} or more are needed."))


def estimate(config: TokenizerConfig, sentences: Iterable[str], **options: Any) -> bytes:
    """A model that sentencepiece trains on `sentences` as they are.

    Raises: UserError for too small a vocabulary, and for a special token that text makes.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=written,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            max_sentence_length=1 << 20,
            num_threads=NUM_THREADS,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, OSError) as error:
        if found := re.search("smaller than required_chars. [0-9]+ vs ([0-9]+)", str(error)):
            require_size(config, int(found.group(1)))
        if found := re.search(r"(\S.*) is already defined", str(error).rpartition("] ")[2].removeprefix("INTERNAL: ")):
            what = f"{found.group(1)!r} is a character of the data or a byte already. Choose another name."
            raise UserError(config.problem("special_tokens", what)) from error
        reason = str(error).rpartition("] ")[2].strip(" .\n") or str(error)
        what = f"{config.vocab_size}: sentencepiece cannot train with it ({reason}). Try another size, or more text."
        raise UserError(config.problem("vocab_size", what)) from error
    return written.getvalue()


def round_scores(model: bytes) -> bytes:
    """The model with each score rounded to 1/64 nat.

    sentencepiece adds up scores in 32-bit floats and `tokenizers` in 64-bit ones. Two ways to cut a run of `#` have the
    same sum in another order, so rounding errors would decide. Multiples of 1/64 add up without an error in both as
    long as the sum is below 262,144 nats (some 40,000 tokens), and then both take the same way.
    """
    from sentencepiece import sentencepiece_model_pb2

    document = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    document.ParseFromString(model)
    for piece in document.pieces:
        piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    return document.SerializeToString(deterministic=True)


def as_tokenizer(model: bytes, *, algorithm: str) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizers` that gives the ids of a sentencepiece model trained here.

    sentencepiece makes control tokens and byte tokens of no text. `tokenizers` would: in Unigram their scores keep them
    out, in BPE no merge leads to them.
    """
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(trained.get_piece_size())
    pieces = [trained.id_to_piece(i) for i in ids]
    is_text = [not (trained.is_control(i) or trained.is_unknown(i) or trained.is_byte(i)) for i in ids]
    byte_fallback = any(map(trained.is_byte, ids))
    scores = [trained.get_score(i) if is_text[i] else UNREACHABLE for i in ids]
    if algorithm == "unigram":
        backend: models.Model = models.Unigram(
            list(zip(pieces, scores, strict=True)), unk_id=trained.unk_id(), byte_fallback=byte_fallback
        )
    else:
        backend = models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=_merges([piece for i, piece in enumerate(pieces) if is_text[i]]),
            unk_token=pieces[trained.unk_id()],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    result = tokenizers.Tokenizer(backend)
    result.normalizer = normalizers.Replace(" ", "\u2581")
    result.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return result


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to make each piece of two others, in the order of the pieces, which is that of their scores."""
    place = {piece: number for number, piece in enumerate(pieces)}
    result = []
    for piece in pieces:
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        possible = [(left, right) for left, right in ways if left in place and right in place]
        result += sorted(possible, key=lambda pair: (place[pair[0]], place[pair[1]]))
    return result
