"""Training gives the same vocabulary each time, of the size and kind asked for."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import sources, tokenizer, vocabulary
from codex_accel.errors import UserError
from codex_accel.records import Part
from codex_accel.schema import Source, SpecialTokens, TokenizerConfig

TYPES = {
    "bpe": {"type": "bpe", "vocab_size": 400},
    "unigram": {"type": "unigram", "vocab_size": 400},
    "sentencepiece-unigram": {"type": "sentencepiece", "algorithm": "unigram", "vocab_size": 500},
    "sentencepiece-bpe": {"type": "sentencepiece", "algorithm": "bpe", "vocab_size": 500},
    "char": {"type": "char"},
}
TRAIN = """
import hashlib, json, pathlib, sys
from codex_accel import tokenizer, vocabulary
from codex_accel.schema import Source, TokenizerConfig
types, texts = json.load(sys.stdin)
for name, options in types.items():
    folder = pathlib.Path(sys.argv[1], name)
    folder.mkdir()
    config = TokenizerConfig(output_dir=str(folder), sources=[Source(path=name)], **options)
    vocabulary.save(vocabulary.train(config, iter(texts)), folder, config)
"""


def config(**options) -> TokenizerConfig:
    return TokenizerConfig(output_dir="out", sources=[Source(path="x")], **options)


def trained(folder, texts, **options) -> tokenizer.Tokenizer:
    """Trained on `texts`, saved to `folder` and loaded."""
    settings = config(**options)
    folder.mkdir(exist_ok=True)
    vocabulary.save(vocabulary.train(settings, texts), folder, settings)
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def udhr(shared) -> list[str]:
    """Paragraphs of the Universal Declaration of Human Rights in four languages."""
    lines = (shared / "text" / "udhr_20lang.jsonl").read_text().splitlines()[:360:3]
    return [json.loads(line)["text"] for line in lines]


# --- the same each time -------------------------------------------------------------------------------------------


def test_another_process_writes_the_same_bytes(tmp_path, udhr):
    """Every type, in two processes with different paths and hash seeds."""
    folders = [tmp_path / "a", tmp_path / "b" / "c"]
    jobs = []
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        command = [sys.executable, "-W", "error", "-c", TRAIN, str(folder)]
        environment = {"PYTHONHASHSEED": str(number), "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": str(number + 1)}
        jobs.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=folder, text=True))
        jobs[-1].stdin.write(json.dumps([TYPES, udhr[::2]]))
        jobs[-1].stdin.close()
    assert [job.wait(60) for job in jobs] == [0, 0]
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    )
    assert len(first) == 2 * len(TYPES) + 2
    assert first == second


def test_the_order_of_the_texts_is_nothing_to_characters(udhr):
    settings = config(type="char")
    forward, backward = (vocabulary.train(settings, texts).backend for texts in (udhr, udhr[::-1]))
    assert forward.to_str() == backward.to_str()


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["bpe", "unigram"])
def test_vocabulary_below_the_bytes_is_refused(type_):
    """Three special tokens and 256 bytes."""
    with pytest.raises(UserError, match="vocab_size: 258 is too small: 259 or more are needed"):
        vocabulary.train(config(type=type_, vocab_size=258), ["a"])
    assert vocabulary.train(config(type=type_, vocab_size=259), ["a"]).backend.get_vocab_size() == 259


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_vocabulary_below_the_characters_of_sentencepiece_is_refused(byte_fallback):
    """The message names a size that does."""
    options = {"type": "sentencepiece", "byte_fallback": byte_fallback}
    texts = ["the quick brown fox jumps over the lazy dog"] * 5
    with pytest.raises(UserError, match="vocab_size: 9 is too small") as caught:
        vocabulary.train(config(vocab_size=9, **options), texts)
    needed = int(str(caught.value).split("small: ")[1].split()[0])
    if byte_fallback:
        assert needed == 4 + 256 + 1
        with pytest.raises(UserError, match=f"vocab_size: {needed} is too small") as caught:
            vocabulary.train(config(vocab_size=needed, **options), texts)
        needed = int(str(caught.value).split("small: ")[1].split()[0])
    assert vocabulary.train(config(vocab_size=needed, **options), texts).backend.get_vocab_size() == needed


def test_characters_without_room_for_one_are_refused():
    with pytest.raises(UserError, match="vocab_size: 4 is too small: 5 or more are needed"):
        vocabulary.train(config(type="char", vocab_size=4), ["a"])


def test_small_input_gives_fewer_ids_than_the_limit(tmp_path):
    for name, options in TYPES.items():
        assert trained(tmp_path / name, ["abc ab"] * 3, **options | {"vocab_size": 5000}).vocab_size < 400


@pytest.mark.parametrize("texts", [[], ["\n\t\x00"]])
def test_sentencepiece_without_text_is_told(texts):
    with pytest.raises(UserError, match="sources: hold no text to train on"):
        vocabulary.train(config(type="sentencepiece"), texts)


# --- what is learned ----------------------------------------------------------------------------------------------


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


def test_rarest_characters_give_way_to_the_limit_and_are_counted(tmp_path):
    loaded = trained(tmp_path / "t", ["aaabbc"], type="char", vocab_size=6)
    assert loaded.encode(["abc"]) == [[4, 5, 3]]
    assert vocabulary.train(config(type="char", vocab_size=6), ["aaabbc"]).facts == {"num_characters_left_out": 1}


def test_frequent_words_become_tokens(tmp_path):
    """Each type but char takes the word that stands ninety times as one token."""
    for name in set(TYPES) - {"char"}:
        loaded = trained(
            tmp_path / name, ["zebra zebra zebra"] * 30 + ["quick lazy dogs jump over boxes"], **TYPES[name]
        )
        assert len(loaded.encode([" zebra"])[0]) <= 2, name


def test_spaces_join_to_tokens_of_sentencepiece(tmp_path):
    """Indented code would cost a token a space otherwise."""
    loaded = trained(tmp_path / "t", ["        return x", "    return y"] * 50, type="sentencepiece", vocab_size=320)
    assert len(loaded.encode(["        "])[0]) < 8


def test_no_byte_fallback_gives_the_unknown_token(tmp_path):
    options = {"type": "sentencepiece", "byte_fallback": False, "vocab_size": 60}
    loaded = trained(tmp_path / "t", ["plain words of text"] * 9, **options)
    ids = loaded.encode(["text\U0010ffff"])[0]
    assert ids[-1] == loaded.unk_id == 3


@pytest.mark.parametrize("type_", ["bpe", "unigram", "char"])
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
    pieces = vocabulary.PRE_TOKENIZERS[name]().pre_tokenize_str("I'll pay 12345 $\n\nx")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == expected


@pytest.mark.parametrize("name", ["gpt4", "whitespace", "none"])
@pytest.mark.parametrize("type_", ["bpe", "unigram"])
def test_text_comes_back_by_any_pattern(tmp_path, udhr, type_, name):
    texts = [*udhr[::40], "x'LL 12345!\r\n\r\n  \t y "]
    loaded = trained(tmp_path / "t", udhr[:100], type=type_, pre_tokenizer=name, vocab_size=300)
    assert [loaded.decode(ids) for ids in loaded.encode(texts)] == texts


# --- special tokens -----------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"special_tokens": SpecialTokens(additional=["the"])}, "the the the"),
        ({"pre_tokenizer": "whitespace"}, " ".join(["[EOS]"] * 9)),
        ({"pre_tokenizer": "none"}, "[EOS][EOS]\n" * 9),
        ({"type": "char", "special_tokens": SpecialTokens(pad="e")}, "hello"),
        ({"special_tokens": SpecialTokens(additional=["Ġthe"])}, "the the the"),
        ({"type": "unigram", "special_tokens": SpecialTokens(additional=["Ġthe"])}, "the the the"),
        ({"special_tokens": SpecialTokens(additional=["Ã"])}, "the"),
    ],
    ids=["word", "whitespace", "none", "char", "spelled", "spelled unigram", "byte"],
)
def test_special_token_that_text_would_make_is_refused(options, text):
    """Merges learned from the text would reach the special id, so nothing could tell the two apart."""
    with pytest.raises(UserError, match=r"special_tokens: the text .* alone makes the token"):
        vocabulary.train(config(vocab_size=512, **options), [text] * 9)


@pytest.mark.security
@pytest.mark.parametrize("name", ["unigram", "sentencepiece-unigram", "sentencepiece-bpe"])
def test_special_name_that_fills_the_text_stays_text(tmp_path, name):
    loaded = trained(tmp_path / "t", ["[EOS] [EOS]", "<0x41> [EOS]", "free beings"] * 30, **TYPES[name])
    for text in ("[EOS]", "[EOS][EOS] [PAD]", "<0x41><0x0A>"):
        ids = loaded.encode([text])[0]
        assert not set(loaded.special_ids.values()) & set(ids)
        assert loaded.decode(ids) == text


# --- bounds -------------------------------------------------------------------------------------------------------


def test_words_beyond_the_bound_are_forgotten_rarest_first_and_counted():
    """At 5 distinct words, above the bound of 4, the two most frequent stay; of equals the first by code points."""
    cutter = vocabulary.PRE_TOKENIZERS["whitespace"]()
    counts, num_forgotten = vocabulary.count_words(["a", "b", "c", "b", "d", "c", "e", "f"], cutter, max_words=4)
    assert counts == {"b": 2, "c": 2, "f": 1}
    assert num_forgotten == 3


@given(texts=st.lists(st.text("ab c\n", max_size=12)))
def test_words_within_the_bound_are_all_counted(texts):
    cutter = vocabulary.PRE_TOKENIZERS["gpt2"]()
    counts, num_forgotten = vocabulary.count_words(iter(texts), cutter)
    assert (counts, num_forgotten) == (Counter(word for t in texts for word, _ in cutter.pre_tokenize_str(t)), 0)


def test_counts_shrink_in_proportion_and_no_word_is_lost():
    """100 + 2 * 100 + 1 bytes to about 30: a tenth of each count, at least one."""
    counts = Counter({"a": 100, "bb": 100, "c": 1})
    assert vocabulary.shrink(counts, max_bytes=30) == {"a": 10, "bb": 10, "c": 1}
    assert vocabulary.shrink(counts, max_bytes=301) is counts


# --- the input digest ---------------------------------------------------------------------------------------------


def digest(path, **options) -> str:
    settings = TokenizerConfig(sources=[Source(path=str(path))], **{"output_dir": "out"} | options)
    raw_files = sources.resolve(settings.sources, config_problem=settings.problem)
    return vocabulary.input_digest(settings, [sources.inventory(raw, unit_bytes=1 << 62) for raw in raw_files])


def test_input_digest_follows_from_content_and_settings_alone(tmp_path):
    for name, text in (("a.txt", "one\n"), ("b.txt", "one\n"), ("c.txt", "two\n")):
        (tmp_path / name).write_text(text)
    first = digest(tmp_path / "a.txt")
    assert first == digest(tmp_path / "b.txt", output_dir="elsewhere", overwrite=True, verify=False, dry_run=True)
    others = [
        digest(tmp_path / "c.txt"),
        digest(tmp_path / "a.txt", vocab_size=300),
        digest(tmp_path / "a.txt", seed=1),
    ]
    assert len({first, *others}) == 4


def test_contents_of_messages_come_without_a_template():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    assert vocabulary.contents(messages) == (Part("Hi", True), Part("", True))


def test_normalizer_of_sentencepiece_is_refused():
    with pytest.raises(ValueError, match="does not go with type: sentencepiece"):
        config(type="sentencepiece", normalizer="nfkc")
