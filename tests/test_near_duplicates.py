"""Records like an earlier one are found by their signatures, whatever the blocks, threads and processes."""

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import near_duplicates
from codex_accel.near_duplicates import find, shingles, signatures


@pytest.fixture(scope="module")
def texts(shared) -> list[str]:
    """600 problems of GSM8K and 300 passages of Dolly, each of more than 12 words, no two alike at 0.6."""
    found = []
    with open(shared / "instruct" / "gsm8k_train.jsonl", encoding="utf-8") as stream:
        found += [" ".join(json.loads(line).values()) for line, _ in zip(stream, range(600), strict=False)]
    with open(shared / "instruct" / "dolly15k_part0.jsonl", encoding="utf-8") as stream:
        found += [json.loads(line)["context"] for line in stream]
    return [text for text in found if len(text.split()) > 12][:900]


def edited(text: str, *, num_changes: int, seed: int) -> str:
    """`text` with words at random places replaced."""
    words, generator = text.split(), random.Random(seed)
    for _ in range(num_changes):
        words[generator.randrange(len(words))] = f"changed{generator.randrange(1000)}"
    return " ".join(words)


def resemblance(one: str, other: str) -> float:
    """Broder's definition, by sets."""
    a, b = set(shingles(one)), set(shingles(other))
    return len(a & b) / len(a | b)


def by_definition(rows: np.ndarray, *, threshold: float) -> list[tuple[int, int, float]]:
    """What `find` would give if every pair were compared."""
    kept, found = list[int](), []
    for number, row in enumerate(rows):
        similarity = (rows[kept] == row).mean(axis=1) if kept else np.zeros(1)
        best = int(similarity.argmax())
        if similarity[best] >= threshold:
            found.append((number, kept[best], float(similarity[best])))
        else:
            kept.append(number)
    return found


# --- signatures ---------------------------------------------------------------------------------------------------


def test_shingles_are_runs_of_five_words_without_case_and_spacing():
    """Broder 1997, section 2: "a rose is a rose is a rose" has three different 4-shingles; these are its 5-shingles."""
    expected = ["a rose is a rose", "rose is a rose is", "is a rose is a", "a rose is a rose"]
    assert shingles("A rose\tis a rose is\n a  ROSE") == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("", [""]), (" \n", [""]), ("Four words  are few", ["four words are few"])]
)
def test_text_shorter_than_a_shingle_is_one_shingle(text, expected):
    assert shingles(text) == expected


def test_signatures_are_rows_of_unsigned_integers(texts):
    rows = signatures(texts[:3], num_permutations=64)
    assert rows.shape == (3, 64)
    assert rows.dtype == np.uint32
    assert signatures([]).shape == (0, 128)


def test_signature_estimates_the_jaccard_similarity(texts):
    """No bias, and no more noise than the binomial distribution has: Broder 1997, section 3."""
    copies = [edited(text, num_changes=1 + seed % 12, seed=seed) for seed, text in enumerate(texts)]
    true = np.array([resemblance(*pair) for pair in zip(texts, copies, strict=True)])
    error = (signatures(texts) == signatures(copies)).mean(axis=1) - true
    deviation = np.sqrt(true * (1 - true) / 128)
    assert abs(error.mean()) < 3 * deviation.mean() / np.sqrt(len(texts))
    assert 0.5 < error.std() / deviation.mean() < 1.1


def test_signature_of_a_text_does_not_depend_on_its_neighbours(texts):
    together = signatures(texts[:50])
    assert all((signatures([text]) == row).all() for text, row in zip(texts[:50], together, strict=True))


@pytest.mark.parametrize("num_threads", ["1", "4"])
def test_signatures_are_the_same_in_every_process_with_any_number_of_threads(texts, num_threads):
    program = (
        "import hashlib, json, sys\nfrom codex_accel.near_duplicates import signatures\n"
        "print(hashlib.sha256(signatures(json.load(sys.stdin)).tobytes()).hexdigest())"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": num_threads, "PYTHONHASHSEED": num_threads}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(texts), text=True, capture_output=True, check=True, env=environment)
    assert done.stdout.strip() == hashlib.sha256(signatures(texts).tobytes()).hexdigest()


def test_signatures_do_not_change_with_the_library():
    """From rensa 0.5.0. A new version that gives others changes which records a given dataset keeps: say so, then."""
    rows = signatures(["the quick brown fox jumps over the lazy dog", "short"], num_permutations=4)
    assert rows.tolist() == [
        [276067326, 588097241, 1013775296, 1742321781],
        [3757651780, 398204048, 1297257137, 2783234242],
    ]


# --- find ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_show_a_pair_at_the_threshold_and_are_as_long_as_can_be(threshold):
    """Leskovec et al., section 3.4.2: a pair is a candidate with a chance of 1 - (1 - s**r)**b."""
    bands, rows = near_duplicates.bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= near_duplicates.RECALL
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < near_duplicates.RECALL


def test_unrelated_texts_are_not_found(texts):
    assert list(find([signatures(texts[:600])], threshold=0.3)) == []


def test_exact_copies_are_found_with_the_first_of_them(texts):
    rows = signatures([texts[0], texts[1], texts[0], texts[1], texts[0].upper()])
    assert list(find([rows], threshold=1.0)) == [(2, 0, 1.0), (3, 1, 1.0), (4, 0, 1.0)]


def test_one_changed_word_in_a_long_text_is_found(texts):
    long = [text for text in texts if len(text.split()) > 80]
    assert len(long) > 200
    copies = [edited(text, num_changes=1, seed=seed) for seed, text in enumerate(long)]
    found = {number: earlier for number, earlier, _ in find([signatures(long + copies)], threshold=0.8)}
    assert found == {len(long) + number: number for number in range(len(long))}


def test_found_records_are_those_of_comparing_every_pair(texts):
    copies = [edited(text, num_changes=seed % 9, seed=seed) for seed, text in enumerate(texts[:300])]
    rows = signatures(texts[:300] + copies)
    found = list(find([rows], threshold=0.8))
    assert found == by_definition(rows, threshold=0.8)
    assert 100 < len(found) < 250


def test_no_record_below_the_threshold_is_found_however_many_share_a_bucket(texts):
    """All signatures have the same first 24 places, which fill four bands; nothing else of them is equal."""
    rows = signatures(texts[:200])
    rows[:, :24] = 7
    assert list(find([rows], threshold=0.8)) == []
    assert [similarity for _, _, similarity in find([rows], threshold=24 / 128)] == [24 / 128] * 199


def test_record_that_was_found_does_not_make_others_found():
    rows = np.arange(128, dtype=np.uint32)[None].repeat(3, axis=0)
    rows[1, :20] += 1000  # 0.84 like the first
    rows[2, :40] += np.repeat([1000, 2000], 20).astype(np.uint32)  # 0.84 like the second, 0.69 like the first
    assert list(find([rows], threshold=0.8)) == [(1, 0, 108 / 128)]


def test_most_similar_record_is_named_and_the_earliest_of_equals():
    rows = np.arange(128, dtype=np.uint32)[None].repeat(4, axis=0)
    rows[0, :48] += 1000
    rows[1, 40:80] += 2000
    rows[2, 80:120] += 3000  # by the last row 0.63, 0.69 and 0.69 are equal; among themselves less than 0.4
    assert list(find([rows], threshold=0.6)) == [(3, 1, 88 / 128)]


@settings(max_examples=30)
@given(data=st.data())
def test_blocks_of_the_input_make_no_difference(texts, data):
    copies = [edited(text, num_changes=seed % 7, seed=seed) for seed, text in enumerate(texts[:60])]
    rows = signatures([text for pair in zip(texts[:60], copies, strict=True) for text in pair])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=8)))
    assert list(find(np.split(rows, cuts), threshold=0.7)) == list(find([rows], threshold=0.7))


def test_growing_tables_lose_nothing():
    """Random signatures, each of them twice, more than a table of the first size holds."""
    rows = np.random.default_rng(0).integers(0, 2**32, (5000, 32), dtype=np.uint32)
    found = list(find([rows[:700], rows[700:], rows], threshold=0.9))
    assert found == [(5000 + number, number, 1.0) for number in range(5000)]
