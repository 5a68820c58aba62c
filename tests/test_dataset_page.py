"""The page shows the numbers of report.json and nothing else, and no record can do more than be read."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from web_page import HOSTILE, TAGS, Page, leaves, luminance, numbers_in, parts_of, value_at

from codex_accel import dataset_page, packing_cost


def split_report(lengths: np.ndarray, **facts) -> dict:
    distinct, counts = np.unique(lengths, return_counts=True)
    num_tokens = int(lengths.sum())
    return {
        "num_records": len(lengths),
        "num_duplicates": 7,
        "num_shared": 0,
        "members_sha256": "0f" * 32,
        "num_tokens": num_tokens,
        "num_target_tokens": num_tokens // 3,
        "num_bytes": 4 * num_tokens + 1,
        "bytes_per_token": (4 * num_tokens + 1) / num_tokens,
        "num_unknown_tokens": 2,
        "unknown_fraction": 2 / num_tokens,
        "num_without_eos": None,
        "num_without_target": 0,
        "length_percentiles": packing_cost.percentiles(distinct, counts),
        "length_histogram": packing_cost.histogram(distinct, counts),
        "packing": packing_cost.costs(distinct, counts, [lengths]),
        **facts,
    }


def example(*tokens: tuple[str, str], num_left_out: int = 0, file: str = "a.jsonl") -> dict:
    return {
        "record_id": "ab" * 16,
        "file": file,
        "line": 12345,
        "num_tokens": len(tokens) + num_left_out,
        "num_left_out": num_left_out,
        "tokens": [{"text": text, "kind": kind} for text, kind in tokens],
    }


def make_report(text: str = "What is 2 + 2?", **parts) -> dict:
    """A report with a bit of everything; `text` stands wherever a record or a file name can be seen."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, 3000).astype(np.int64) + 1
    tokens = [(text, "prompt"), ("\n", "prompt"), (" 4", "target"), (text, "target"), ("<|end|>", "special")]
    near = {"threshold": 0.85, "num_found": 1234, "num_removed": 3}
    largest = {"record_id": "cd" * 16, "count": 5, "splits": ["train", "test.v2"], "places": [f"{text}:1", "b:2"]}
    return {
        "format_version": 1,
        "name": text,
        "num_records": 3030,
        "num_bad": 1212,
        "bad_by_reason": {"not JSON": 1200, "field 'a.b' is missing": 11, text: 1},
        "secrets": {
            "action": "redact", "policy": text, "sha256": "34" * 32, "bypass_reason": None, "num_records": 5,
            "num_findings": 1007, "by_type": {"github": 1000, "assignment": 7},
        },
        "tokenizer": {"path": text, "vocab_size": 16384, "engine": "tiktoken", "content_digest": "ef" * 32},
        "settings": {
            "split": {"ratios": {"train": 0.9, "test.v2": 0.123456789}, "seed": 20240615, "key": None},
            "limits": [1024, 2.5],
            "add_bos": False,
            "sources": [{"path": text}],
            "remove": [],
        },
        "sources": [
            {"path": text, "format": "jsonl", "size": 123456789, "sha256": "12" * 32, "num_records": 9, "num_bad": 0}
        ],
        "splits": {"train": split_report(lengths), "test.v2": split_report(lengths[:30], num_shared=4)},
        "duplicates": {
            "num_groups": 6, "num_duplicates": 14, "num_shared": 4, "num_removed": 0, "near": near,
            "listed_in": "duplicates.jsonl", "largest": [largest],
        },
        "examples": {"train": [example(*tokens, num_left_out=1500, file=text)], "test.v2": []},
        "quarantine": {"num_listed": 1212, "first": [{"file": text, "line": 1001, "reason": f"not JSON: {text}"}]},
        **parts,
    }  # fmt: skip


EMPTY = {
    "num_bad": 0,
    "bad_by_reason": {},
    "duplicates": {
        "num_groups": 0, "num_duplicates": 0, "num_shared": 0, "num_removed": 0, "near": None, "listed_in": None,
        "largest": [],
    },
    "examples": {"train": []},
    "quarantine": {"num_listed": 0, "first": []},
    "secrets": {
        "action": None, "policy": None, "sha256": None, "bypass_reason": "a reason", "num_records": None,
        "num_findings": None, "by_type": {},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict:
    return make_report()


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(dataset_page.render(report))


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("parts", [{}, EMPTY], ids=["full", "empty"])
def test_every_element_with_a_key_repeats_the_report_exactly(parts):
    report = json.loads(json.dumps(make_report(HOSTILE, **parts)))
    keyed = Page(dataset_page.render(report)).keyed
    assert len(keyed) > 200
    for element in keyed:
        value, found = value_at(report, element.attributes["data-key"]), json.loads(element.attributes["data-value"])
        assert (type(found), found) == (type(value), value), element.attributes["data-key"]


def test_what_is_read_is_the_value_of_the_report(report, page):
    """Whole numbers to the last digit, others rounded right at the last digit shown, with four digits at least."""
    for element in page.keyed:
        value, text = value_at(report, element.attributes["data-key"]), element.text
        if isinstance(value, str):
            assert text == value
        elif value is None or isinstance(value, bool):
            assert text == {None: "none", True: "true", False: "false"}[value]
        elif isinstance(value, dict):
            assert [number for number, _ in numbers_in(text)] == [value["low"], value["high"], value["count"]]
        else:
            [(number, half)] = numbers_in(text)
            if isinstance(value, int):
                assert number == value
            else:
                assert abs(number - value) <= half * (1 + 1e-9)
                assert abs(number - value) <= 0.0005 * value


FIGURES = ("splits", "lengths", "packing")


def test_figures_have_no_digit_outside_of_an_element_with_a_key(report, page):
    labels = {*report["splits"], *report["splits"]["train"]["packing"], "p1", "p10", "p50", "p90", "p99"}
    labels |= {f"{label} {name}" for label in ("Tokens in", "Packings of") for name in report["splits"]}
    labels |= {f"Documents of {name} by length" for name in report["splits"]}
    seen = 0
    for text, around in page.texts:
        in_figures = any(e.tag == "header" or e.attributes.get("id") in FIGURES for e in around)
        if in_figures and re.search(r"\d", text):
            seen += 1
            assert any("data-key" in e.attributes for e in around) or text.strip() in labels, text
    assert seen > 200


def test_every_fact_of_a_split_is_on_the_page(report, page):
    """Over-long documents stand once a block size, and not again for `group_by_length`."""
    shown = {tuple(parts_of(element.attributes["data-key"])) for element in page.keyed}
    missing = {path for path, _ in leaves(report["splits"], ("splits",))} - shown
    assert {path[-2:] for path in missing} == {("group_by_length", "num_over_long")}


def test_a_bar_is_as_high_as_its_count(report, page):
    bins = report["splits"]["train"]["length_histogram"]
    bars = [e for e in page.of_class("bar") if any(p.tag == "g" for p in e.parents)][: len(bins)]
    counts, heights = np.array([b["count"] for b in bins]), np.array([float(b.attributes["height"]) for b in bars])
    seen = heights > 1.5  # what is lower is drawn so high, to be seen at all
    assert seen.sum() > 8
    assert heights[seen] / heights.max() == pytest.approx(counts[seen] / counts.max(), abs=0.001)
    assert (heights[counts == 0] == 0).all()


def test_rounded_numbers_show_themselves_in_full_when_hovered(report, page):
    [element, *_] = [e for e in page.keyed if e.attributes["data-key"] == "splits.train.bytes_per_token"]
    assert float(element.attributes["title"]) == report["splits"]["train"]["bytes_per_token"]


def test_doubtful_figures_are_marked(page):
    marked = {e.attributes["data-key"] for e in page.of_class("doubtful") if "data-key" in e.attributes}
    rows = ("num_duplicates", "num_unknown_tokens")
    assert marked == {f"splits.{s}.{r}" for s in ("train", "test\\.v2") for r in rows} | {"splits.test\\.v2.num_shared"}


def test_equal_reports_give_equal_pages(report):
    assert dataset_page.render(report) == dataset_page.render(json.loads(json.dumps(report)))


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.security
@settings(max_examples=25)
@given(text=st.text(st.characters(), max_size=30) | st.sampled_from([HOSTILE, "<!--", "<![CDATA[", "\\.", "&#0;", ""]))
def test_text_of_records_is_never_obeyed(text):
    source = dataset_page.render(make_report(text, examples={text: [example((text, "target"), file=text)]}))
    source.encode()  # lone surrogates could not be written
    assert not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", re.sub("⇥</i>\t", "", source)
    )
    page = Page(source)
    assert {element.tag for element in page.elements} <= set(TAGS.split())
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on") or name in ("src", "style")]
        assert (element.attributes.get("href") or "#").startswith("#")


@pytest.mark.security
def test_page_can_load_nothing_and_has_no_script():
    source = dataset_page.render(make_report())
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    metas = [e.attributes for e in Page(source).elements if e.tag == "meta"]
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in metas
    assert not re.search(r"https?:|//|url\(|@import|@font-face", source.split("</style>")[0])


@pytest.mark.security
def test_control_and_bidi_characters_are_labels():
    report = make_report(examples={"train": [example(("a\x1b\u202eb", "target"))]})
    page = Page(dataset_page.render(report))
    [tokens] = page.of_class("tokens")
    assert tokens.text == "aU+001BU+202Eb"
    assert [e.text for e in page.of_class("control") if tokens in e.parents] == ["U+001B", "U+202E"]


def tokens_of(page: Page) -> list[list[tuple[str, str]]]:
    """Text and class of the tokens of each example, without the marks for line feeds and tabs."""
    marks = {id(e) for e in page.of_class("mark")}
    found = []
    for box in page.of_class("tokens"):
        spans = [e for e in page.elements if e.parents and e.parents[-1] is box]
        texts = {id(span): "" for span in spans}
        for text, around in page.texts:
            if box in around and id(around[-1]) not in marks:
                texts[id(around[around.index(box) + 1])] += text
        found.append([(texts[id(span)], span.attributes["class"]) for span in spans])
    return found


def test_tokens_keep_their_text_and_kind_and_alternate_in_shade():
    tokens = [
        ("def", "prompt"),
        (" f", "prompt"),
        (":\n", "prompt"),
        ("\t ", "target"),
        ("é", "target"),
        ("</s>", "special"),
    ]
    [found] = tokens_of(Page(dataset_page.render(make_report(examples={"train": [example(*tokens)]}))))
    assert found == [(text, kind + " odd" * (i % 2)) for i, (text, kind) in enumerate(tokens)]


def test_line_feeds_tabs_and_spaces_are_seen():
    page = Page(dataset_page.render(make_report(examples={"train": [example(("a b\n\tc", "target"))]})))
    [box] = page.of_class("tokens")
    assert box.text == "a b↵\n⇥\tc"
    assert [e.text for e in page.of_class("space") if box in e.parents] == [" "]


def test_examples_of_twenty_languages_are_shown_as_they_are(shared):
    """The joiners of Persian and Indic scripts too; no record of it has a character that needs a label."""
    lines = [json.loads(line) for line in (shared / "text" / "udhr_20lang.jsonl").read_text().splitlines()]
    first = {line["lang"]: line["text"] for line in reversed(lines)}
    report = make_report(examples={"train": [example((text, "target")) for text in first.values()]})
    assert [tokens[0][0] for tokens in tokens_of(Page(dataset_page.render(report)))] == list(first.values())
    assert len(first) == 20


def test_tokens_left_out_are_told():
    page = Page(dataset_page.render(make_report()))
    assert "and 1,500 more tokens" in [e.text for e in page.of_class("note")]


@pytest.mark.parametrize("part", ["splits", "duplicates", "quarantine", "secrets", "examples", "sources"])
def test_report_without_a_part_is_refused(report, part):
    with pytest.raises(KeyError, match=part):
        dataset_page.render({key: value for key, value in report.items() if key != part})


# ------------------------------------------------------------------------------------------------------- accessibility


def test_tables_pictures_and_headings_can_be_read_aloud(page):
    assert [e.attributes.get("lang") for e in page.elements if e.tag == "html"] == ["en"]
    tables = [e for e in page.elements if e.tag == "table"]
    captions = [e for e in page.elements if e.tag == "caption"]
    assert [e.parents[-1] for e in captions] == tables
    assert all(e.attributes.get("scope") for e in page.elements if e.tag == "th")
    pictures = [e for e in page.elements if e.tag == "svg"]
    assert all(e.attributes.get("aria-label") or e.attributes.get("aria-hidden") == "true" for e in pictures)
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch(r"h\d", e.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    assert {e.attributes["href"][1:] for e in page.elements if e.tag == "a"} <= set(ids)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast_of_at_least_4_5(scheme):
    """WCAG 2.2, 1.4.3: (L1 + 0.05) / (L2 + 0.05)."""
    palette = dict(re.findall(r"--([a-z-]+): (#\w{6})", dataset_page.STYLE.split(":root")[scheme + 1]))
    on_card = [
        ("text", "card"),
        ("muted", "card"),
        ("doubt", "card"),
        ("bar", "page"),
        ("text", "page"),
        ("muted", "page"),
    ]
    kinds = [kind + odd for kind in ("prompt", "target", "special") for odd in ("", "-odd")]
    for front, back in on_card + [("text", kind) for kind in kinds] + [("doubt", kind) for kind in kinds]:
        a, b = sorted([luminance(palette[front]), luminance(palette[back])])
        assert (b + 0.05) / (a + 0.05) >= 4.5, (front, back)
