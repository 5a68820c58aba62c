"""Vocabularies: trained from text, and kept as a folder that `AutoTokenizer` loads.

Rule: the same texts in the same order, with the same settings, give the same bytes, in any process and under any path.
"""

import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from codex_accel import byte_pairs, chat, files, pieces, redaction, screening, tokenizer
from codex_accel.errors import UserError
from codex_accel.records import Part
from codex_accel.schema import TokenizerConfig
from codex_accel.sources import FileFacts

VERSION = 2  # of what a training writes: another one is another input digest
# Keys that do not change what a training gives, and those whose content is digested apart.
NOT_INPUT = {
    "output_dir", "overwrite", "dry_run", "sources", "verify", "allow_network", "base", "chat_template", "safety",
}  # fmt: skip

MAX_WORDS = 1 << 21  # distinct words that unigram counts at once, about 300 MB
# sentencepiece writes each word out as often as it counts, at 20 to 30 bytes of memory a byte.
MAX_BYTES_COUNTED = 16 << 20
MAX_PIECE_LENGTH = 32  # bytes of a unigram token; sentencepiece's own 16 are eight letters of Cyrillic

NORMALIZERS = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, "lowercase": normalizers.Lowercase}


def _byte_level(pattern: str | None) -> pre_tokenizers.PreTokenizer:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return bytes_
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "gpt4": lambda: _byte_level(byte_pairs.GPT4_PATTERN),
    "whitespace": lambda: _byte_level(byte_pairs.WHITESPACE_PATTERN),
    "none": lambda: _byte_level(None),
}


@dataclass(frozen=True)
class Trained:
    """What a training gives."""

    backend: tokenizers.Tokenizer
    sentencepiece_model: bytes | None = None  # type sentencepiece: the model that `backend` repeats
    facts: dict[str, Any] = field(default_factory=dict)  # counts of what was left out of the training


def special_names(config: TokenizerConfig) -> list[str]:
    """The special tokens in order of their ids 0, 1, 2, ...; the unknown token only where the type has one."""
    special = config.special_tokens
    return [special.pad, special.bos, special.eos, *([special.unk] if _has_unk(config) else []), *special.additional]


def _has_unk(config: TokenizerConfig) -> bool:
    return config.type in ("char", "sentencepiece")


def train(config: TokenizerConfig, texts: Iterable[str]) -> Trained:
    """A tokenizer of the configured type, trained on `texts`, which are read once.

    Raises: UserError for a vocabulary too small, no text to estimate from, and a special token that text would become.
    """
    names = special_names(config)
    trained = TRAINERS[config.type](config, texts, names)
    trained.backend.add_special_tokens(names)  # their ids, 0, 1, 2, ..., are given already; this marks them as special
    trained.backend.encode_special_tokens = True
    for number, name in enumerate(names):
        if trained.backend.token_to_id(name) != number or _is_made_by_text(trained.backend, name):
            what = f"the text {_text_of(trained.backend, name)!r} alone makes the token {name!r}."
            raise UserError(config.problem("special_tokens", f"{what} Choose a name that is no word of the data."))
    return trained


def _is_made_by_text(backend: tokenizers.Tokenizer, name: str) -> bool:
    """Whether a text becomes the token `name` alone: `name` itself, or on bytes what it spells, as Ġthe does " the"."""
    if isinstance(backend.decoder, decoders.ByteLevel) and byte_pairs.bytes_of(name) is not None:
        return [token.value for token in backend.model.tokenize(name)] == [name]
    return backend.encode(name, add_special_tokens=False).tokens == [name]


def _text_of(backend: tokenizers.Tokenizer, name: str) -> str:
    data = byte_pairs.bytes_of(name) if isinstance(backend.decoder, decoders.ByteLevel) else None
    return name if data is None else data.decode(errors="backslashreplace")


def _on_bytes(config: TokenizerConfig, model: models.Model) -> tokenizers.Tokenizer:
    """A tokenizer of the configured normalizer and pattern that gives `model` bytes, each as a character."""
    result = tokenizers.Tokenizer(model)
    if config.normalizer != "none":
        result.normalizer = NORMALIZERS[config.normalizer]()
    result.pre_tokenizer = PRE_TOKENIZERS[config.pre_tokenizer]()
    result.decoder = decoders.ByteLevel()
    return result


# --- byte-level BPE -----------------------------------------------------------------------------------------------


def _train_bpe(config: TokenizerConfig, texts: Iterable[str], special: list[str]) -> Trained:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): any text has ids, so there is no unknown token."""
    pieces.require_size(config, len(special) + 256)
    result = _on_bytes(config, models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(byte_pairs.BYTE_OF),
        show_progress=False,
    )
    result.train_from_iterator(texts, trainer)
    return Trained(result)


# --- characters ---------------------------------------------------------------------------------------------------


def _train_char(config: TokenizerConfig, texts: Iterable[str], special: list[str]) -> Trained:
    """One id a character, in order of code points; the rarest ones beyond `vocab_size` become the unknown token."""
    normalizer = None if config.normalizer == "none" else NORMALIZERS[config.normalizer]()
    pieces.require_size(config, len(special) + 1)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text if normalizer is None else normalizer.normalize_str(text))
    room = config.vocab_size - len(special)
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(kept)])}
    result = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=config.special_tokens.unk))
    if normalizer is not None:
        result.normalizer = normalizer
    result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    result.decoder = decoders.Fuse()
    return Trained(result, facts={"num_characters_left_out": len(counts) - len(kept)})


# --- byte-level unigram -------------------------------------------------------------------------------------------


def _train_unigram(config: TokenizerConfig, texts: Iterable[str], special: list[str]) -> Trained:
    """Unigram language model (Kudo 2018) over bytes: any text has ids and comes back, so there is no unknown token.

    sentencepiece does the estimation, on counts of words in the byte alphabet, because the trainer of `tokenizers`
    gives another vocabulary each time (0.23: three runs, three digests).
    """
    pieces.require_size(config, len(special) + 256)
    normalizer = None if config.normalizer == "none" else NORMALIZERS[config.normalizer]()
    counts, num_pruned = count_words(
        texts if normalizer is None else map(normalizer.normalize_str, texts), PRE_TOKENIZERS[config.pre_tokenizer]()
    )
    num_words = counts.total()
    counts = shrink(counts, max_bytes=MAX_BYTES_COUNTED)
    counts.update(byte_pairs.BYTE_OF.keys())  # so that each byte is a token
    lines = (f"{word}\t{count}" for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    model = pieces.estimate(
        config,
        lines,
        model_type="unigram",
        input_format="tsv",
        vocab_size=config.vocab_size - len(special) + 1,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        required_chars="".join(sorted(byte_pairs.BYTE_OF)),
        character_coverage=1.0,
        max_sentencepiece_length=MAX_PIECE_LENGTH,
        split_by_unicode_script=False,
        split_by_number=False,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    learned = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(1, trained.get_piece_size())]
    vocabulary = [(name, pieces.UNREACHABLE) for name in special] + learned
    result = _on_bytes(config, models.Unigram(vocabulary, unk_id=None, byte_fallback=False))
    return Trained(result, facts={"num_words": num_words, "num_words_left_out": num_pruned})


def shrink(counts: Counter[str], *, max_bytes: int) -> Counter[str]:
    """The counts in proportion, each 1 or more, so that the words written out so often take about `max_bytes`."""
    size = sum(len(word) * count for word, count in counts.items())
    if size <= max_bytes:
        return counts
    return Counter({word: max(1, round(count * max_bytes / size)) for word, count in counts.items()})


def count_words(
    texts: Iterable[str], cutter: pre_tokenizers.PreTokenizer, *, max_words: int = MAX_WORDS
) -> tuple[Counter[str], int]:
    """Occurrences of each word, and how many were forgotten.

    When more than `max_words` distinct words have come together, the rarest half of them is forgotten.
    """
    counts: Counter[str] = Counter()
    num_pruned = 0
    for text in _bounded(texts):
        for word, _ in cutter.pre_tokenize_str(text):
            for start in range(0, len(word), pieces.MAX_SENTENCE):
                counts[word[start : start + pieces.MAX_SENTENCE]] += 1
        if len(counts) > max_words:
            kept = heapq.nsmallest(max_words // 2, counts.items(), key=lambda item: (-item[1], item[0]))
            num_pruned += counts.total() - sum(count for _, count in kept)
            counts = Counter(dict(kept))
    return counts, num_pruned


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    """Long texts in pieces, so that memory stays bounded."""
    for text in texts:
        yield from (piece for _, piece in byte_pairs.segments([text], byte_pairs.CUT))


# --- sentencepiece ------------------------------------------------------------------------------------------------


def _train_sentencepiece(config: TokenizerConfig, texts: Iterable[str], special: list[str]) -> Trained:
    """A sentencepiece model (Kudo and Richardson 2018), and a tokenizer.json that gives the same ids.

    Text is not normalized and no space is put before it, so with `byte_fallback` it comes back, but for U+2581, which
    stands for the space. Lines are trained on one by one: a line end, like a tab, is a byte and never part of a token.
    """
    fixed = len(special) + 256 * config.byte_fallback
    pieces.require_size(config, fixed + 1)
    sentences, facts = pieces.draw(pieces.sentences_of(texts), max_bytes=config.max_train_bytes, seed=config.seed)
    if not sentences:
        raise UserError(config.problem("sources", "hold no text to train on. Check the files."))
    pad, bos, eos, unk, *additional = special
    required = set("".join(special) + "<>x0123456789ABCDEF")  # so that the text "<0x41>" or "[EOS]" is characters
    model = pieces.estimate(
        config,
        sentences,
        model_type=config.algorithm,
        vocab_size=config.vocab_size,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece=pad,
        bos_piece=bos,
        eos_piece=eos,
        unk_piece=unk,
        control_symbols=additional,
        byte_fallback=config.byte_fallback,
        required_chars=re.sub(r"[\s\u2581\u2585]", "", "".join(sorted(required))),
        allow_whitespace_only_pieces=True,
    )
    model = pieces.round_scores(model) if config.algorithm == "unigram" else model
    return Trained(pieces.as_tokenizer(model, algorithm=config.algorithm), model, facts)


TRAINERS: dict[str, Callable[[TokenizerConfig, Iterable[str], list[str]], Trained]] = {
    "bpe": _train_bpe,
    "unigram": _train_unigram,
    "sentencepiece": _train_sentencepiece,
    "char": _train_char,
}


def contents(messages: list[dict[str, str]]) -> tuple[Part, ...]:
    """What is said in a conversation, without a template, whose special tokens are no text."""
    return tuple(Part(message.get("content") or "", True) for message in messages)


# --- folders ------------------------------------------------------------------------------------------------------


def save(trained: Trained, folder: Path, config: TokenizerConfig) -> None:
    """Write the files of `tokenizer.PAYLOAD`, which `AutoTokenizer.from_pretrained` reads."""
    special = config.special_tokens
    (folder / "tokenizer.json").write_text(trained.backend.to_str(pretty=True), encoding="utf-8")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": special.pad,
        "bos_token": special.bos,
        "eos_token": special.eos,
        **({"unk_token": special.unk} if _has_unk(config) else {}),
        "additional_special_tokens": special.additional,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    if trained.sentencepiece_model is not None:
        (folder / "tokenizer.model").write_bytes(trained.sentencepiece_model)


def chat_template(config: TokenizerConfig) -> str | None:
    """The text of the file `chat_template`; None if none is given. Raises: UserError if it is no chat template."""
    if config.chat_template is None:
        return None
    try:
        text = Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"'{config.chat_template}' cannot be read as UTF-8 text ({error}). Give a file with a Jinja template."
        raise UserError(config.problem("chat_template", what)) from error
    chat.template(text, (), where=config.chat_template)
    return text


def input_digest(config: TokenizerConfig, inventory: Sequence[FileFacts]) -> str:
    """SHA-256 over everything that the tokenizer follows from: settings, files with how they are read, and masking."""
    keys = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_INPUT}
    read = [[facts.sha256, _reading(facts)] for facts in inventory]
    document = {"version": VERSION, "settings": keys, "files": read, **given_besides(config)}
    if config.base is None:
        document["masking"] = screening.identity()
    return files.sha256_bytes(json.dumps(document, sort_keys=True).encode())


def given_besides(config: TokenizerConfig) -> dict[str, Any]:
    """Digests of what is taken over as it is: the files of the base, and the chat template."""
    found: dict[str, Any] = {}
    if config.base is not None:
        paths = [Path(config.base, name) for name in tokenizer.FILES]
        found["base"] = {path.name: files.sha256_file(path) for path in paths if path.is_file()}
    if config.chat_template is not None:
        found["chat_template"] = files.sha256_file(Path(config.chat_template))
    return found


def _reading(facts: FileFacts) -> dict[str, Any]:
    return {"format": facts.raw.format} | facts.raw.source.model_dump(mode="json", exclude={"path", "split", "format"})


def changes(document: dict[str, Any], config: TokenizerConfig, inventory: Sequence[FileFacts]) -> list[str]:
    """What is not as it was when the tokenizer of this manifest was trained: settings, files, and how they are read."""
    before, now = document["config"], config.model_dump(mode="json")
    found = [
        f"{key} was {before.get(key)!r}, is {value!r}"
        for key, value in now.items()
        if key not in NOT_INPUT and before.get(key) != value
    ]
    given = given_besides(config)
    found += [f"{key} is another" for key in ("base", "chat_template") if document["facts"].get(key) != given.get(key)]
    before = document["facts"].get("secrets", {})
    if config.base is None and any(before.get(key) != value for key, value in redaction.facts().items()):
        found.append("how secrets are masked is another")
    known = {source["sha256"] for source in document["sources"]}
    found += [f"'{facts.raw.path}' is new or has changed" for facts in inventory if facts.sha256 not in known]
    present = {facts.sha256 for facts in inventory}
    found += [
        f"a file of SHA-256 {source['sha256'][:12]} is gone ('{source['path']}')"
        for source in document["sources"]
        if source["sha256"] not in present
    ]
    return found or ["the order of the files, how they are read, or the version of the toolkit"]
