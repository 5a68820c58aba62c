"""The page of an evaluation shows the numbers of its files and nothing else, as a browser reads it."""

import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
from evaluations import choice_line, loss_line, of_losses, of_predictions, of_tasks, run_line, text_line
from hypothesis import given, settings
from hypothesis import strategies as st
from web_page import HOSTILE, TAGS, Page, leaves, luminance, numbers_in, parts_of, value_at

from codex_accel import report, report_page
from codex_accel.curves import Curves

NAMES = {"exact_match": {}, "f1": {}}
ALLOWED = {*TAGS.split(), "small", "polyline", "circle"}


def text_lines(number: int = 60, text: str = "") -> list[dict]:
    lines = [
        text_line(n, " ".join(["red", "green", "blue"][: n % 4]) + text, ["red green", "blue"], prompt=f"{n}: {text}")
        for n in range(1, number + 1)
    ]
    for line in lines:
        line |= {"finish_reason": "length" if line["line"] % 5 else "stop", "num_prompt_tokens": 7, "num_cut_tokens": 3}
        line |= {"num_output_tokens": line["line"] % 4, "num_near_ties": line["line"] % 2}
    return [*lines, {"task": None, "line": number + 1, "skipped": f"no reference: {text}"}]


def choice_lines(number: int = 12, text: str = "") -> list[dict]:
    return [
        choice_line(n, [-5.5 - n, -3.25 - n % 5, -4.0], n % 3, prompt=f"{n} {text}", choices=[text, "b", f"c{text}"])
        for n in range(number)
    ]


def run_curves(step: int | None = 20) -> Curves:
    lines = {n: run_line(10 * n, loss=5 / n, learning_rate=n * 1e-4, tokens_per_s=1000.5 + n) for n in range(1, 9)}
    lines |= {9: run_line(40, "validation", loss=2.5), 12: run_line(80, "validation", loss=1.75, perplexity=5.75)}
    return Curves("run", lines, 2, step)


def of_kind(kind: str, text: str = "") -> tuple[dict, list[dict], Curves | None]:
    if kind == "losses":
        lines = [loss_line(n, n * n // 2, 2 + (n * 37 % 100) / 50) for n in range(100)]
        return of_losses(lines, note=text, split=f"test{text}"), lines, run_curves()
    if kind == "predictions":
        lines = [{**line, "id": text or line["line"]} if "output" in line else line for line in text_lines(text=text)]
        return of_predictions(lines, NAMES, note=text), lines, None
    tasks = {
        "first": ("generate", text_lines(text=text), NAMES),
        "second": ("choice", choice_lines(text=text), {"acc": {}, "acc_norm": {}}),
    }
    document, lines = of_tasks(tasks, note=text)
    return document, lines, None


KINDS = ("losses", "predictions", "tasks")


def dom(path) -> str:
    """What a browser makes of the page, if there is one; else the page itself."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        return path.read_text(encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent}/profile"]
    found = subprocess.run(
        [*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=60, check=True
    )
    return found.stdout


def sources(folder, curves: Curves | None) -> dict:
    """All that the keys of a page lead into, read from the files."""
    lines = (folder / "samples.ndjson").read_text(encoding="utf-8").splitlines()
    run = {str(n): line for n, line in curves.lines.items()} | {"num_damaged": curves.num_damaged} if curves else {}
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {**document, "lines": {str(n): json.loads(line) for n, line in enumerate(lines, 1)}, "run": run}


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """(files by key, page as the browser has it) of an evaluation of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    document, lines, curves = of_kind(request.param)
    report.write(folder, report=document, samples=lines, curves=curves)
    return sources(folder, curves), Page(dom(folder / "report.html").removeprefix("<!DOCTYPE html>"))


# ------------------------------------------------------------------------------------------------------------- numbers


def test_every_element_with_a_key_repeats_its_file_exactly(written):
    files, page = written
    assert len(page.keyed) > 150
    for element in page.keyed:
        value, found = value_at(files, element.attributes["data-key"]), json.loads(element.attributes["data-value"])
        assert (type(found), found) == (type(value), value), element.attributes["data-key"]


def test_what_is_read_is_the_value_of_the_file(written):
    """Whole numbers to the last digit, others rounded right at the last digit shown, with four digits at least."""
    files, page = written
    for element in page.keyed:
        value, text = value_at(files, element.attributes["data-key"]), element.text
        if isinstance(value, str):
            assert text == value
        elif value is None or isinstance(value, bool):
            assert text == {None: "none", True: "true", False: "false"}[value]
        elif isinstance(value, dict):
            numbers = [number for number, _ in numbers_in(text)]
            assert numbers[0] == pytest.approx(value["low"], rel=0.0005)
            assert numbers[-1] == value.get("count", value.get("num_documents"))
        elif isinstance(value, int):
            assert [number for number, _ in numbers_in(text)] == [value]
        else:
            [(number, half)] = numbers_in(text)
            assert abs(number - value) <= half * (1 + 1e-9)
            assert abs(number - value) <= 0.0005 * abs(value)


def test_every_metric_interval_and_count_is_on_the_page(written):
    files, page = written
    shown = {tuple(parts_of(element.attributes["data-key"])) for element in page.keyed}
    for part in ("metrics", "intervals", "counts", "digests", "settings"):
        expected = {path for path, value in leaves(files[part], (part,)) if not (part == "intervals" and value is None)}
        assert expected <= shown


FIGURES = ("counts", "scores", "distributions", "training")


def test_figures_have_no_digit_outside_of_an_element_with_a_key(written):
    _, page = written
    seen = 0
    for text, around in page.texts:
        in_figures = any(e.tag == "header" or e.attributes.get("id") in FIGURES for e in around)
        if not in_figures or not re.search(r"\d", re.sub(r"\bf1\b|SHA-256|\.\d+ (?=\w)", "", text)):
            continue
        scale = any(e.attributes.get("class") == "scale" for e in around)
        seen += not scale
        assert scale or any("data-key" in e.attributes for e in around), text
    assert seen > 40


@pytest.mark.parametrize("kind", KINDS)
def test_equal_reports_give_equal_pages(kind, tmp_path):
    for name in ("a", "b"):
        document, lines, curves = of_kind(kind)
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, report=document, samples=lines, curves=curves)
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()


def rendered(kind: str, text: str = "", **more) -> tuple[dict, list[dict], Page]:
    document, lines, curves = of_kind(kind, text)
    overview = report.Overview()
    for number, line in enumerate(lines, 1):
        overview.add(number, line)
    tasks = report.tasks_of(document)
    together = {task: overview.of(task) for task in tasks} if tasks else overview.of()
    source = report_page.render({**document, "overview": together}, lines=overview.shown(), curves=curves)
    return document, lines, Page(source)


# ------------------------------------------------------------------------------------------------------------- samples


def box_texts(page: Page) -> list[str]:
    return [e.text for e in page.of_class("tokens")]


def test_prompt_output_and_references_of_the_ends_stand_side_by_side():
    _, lines, page = rendered("predictions")
    [sample, *_] = page.of_class("sample")
    worst = min((x for x in lines if "scores" in x), key=lambda x: (*x["scores"].values(), x["line"]))
    inside = [e.text for e in page.of_class("tokens") if sample in e.parents]
    assert inside == [text for text in (worst["prompt"], worst["output"]) if text] + ["red green", "blue"]
    assert worst["output"] == ""
    assert "empty" in sample.text
    assert len(page.of_class("sample")) == 40


def test_right_and_chosen_choices_are_marked():
    _, lines, page = rendered("tasks")
    samples = [
        e
        for e in page.of_class("sample")
        if any("choice" in (c.attributes.get("class") or "") and e in c.parents for c in page.elements)
    ]
    assert len(samples) == 12
    for sample in samples:
        choices = [e for e in page.of_class("choice") if sample in e.parents]
        key = next(e.attributes["data-key"] for e in page.keyed if sample in e.parents)
        line = lines[int(parts_of(key)[1]) - 1]
        assert [n for n, e in enumerate(choices) if "right" in e.attributes["class"].split()] == [line["answer"]]
        assert [n for n, e in enumerate(choices) if "chosen" in e.attributes["class"].split()] == [line["predicted"]]


def test_documents_stand_by_their_loss():
    _, lines, page = rendered("losses")
    tables = [e for e in page.elements if e.tag == "table" and "records" in (e.attributes.get("class") or "")]
    found = [
        [
            json.loads(e.attributes["data-value"])
            for e in page.keyed
            if table in e.parents and e.attributes["data-key"].endswith(".loss")
        ]
        for table in tables
    ]
    losses = sorted(line["loss"] for line in lines if line["loss"] is not None)
    assert found == [losses[::-1][:20], losses[:20]]


def test_what_was_skipped_is_shown_first_and_with_its_reason():
    _, _, page = rendered("predictions")
    [first, *_] = [e for e in page.keyed if any("cards" in (p.attributes.get("class") or "") for p in e.parents)]
    assert (first.attributes["data-key"], first.text, first.attributes["class"]) == (
        "overview.skipped.num_samples", "1", "doubtful",
    )  # fmt: skip
    assert "no reference: " in [e.text for e in page.keyed]


def test_counts_worth_a_look_are_marked():
    _, _, page = rendered("predictions")
    marked = {e.attributes["data-key"] for e in page.of_class("doubtful") if "data-key" in e.attributes}
    assert {"counts.num_skipped", "counts.num_empty_outputs"} <= marked
    assert "counts.num_samples" not in marked


def test_a_long_text_is_cut_and_says_so():
    _, _, page = rendered("predictions", text="y" * 5000)
    assert max(map(len, box_texts(page))) == report_page.CHARS_OF_A_TEXT
    assert "and more, left out here" in [e.text for e in page.of_class("note")]


def test_many_tasks_make_no_large_page(tmp_path):
    tasks = {f"t{n}": ("generate", text_lines(40, text="z" * 2500), {"f1": {}}) for n in range(30)}
    document, lines = of_tasks(tasks)
    report.write(tmp_path, report=document, samples=lines)
    assert (tmp_path / "report.html").stat().st_size < 3 * report_page.CHARS_OF_A_PAGE


def test_the_curves_of_the_run_are_on_the_page():
    _, _, page = rendered("losses")
    [training] = [e for e in page.elements if e.attributes.get("id") == "training"]
    shown = {e.attributes["data-key"]: e.text for e in page.keyed if training in e.parents}
    assert shown["run.8.loss"] == "0.625"
    assert shown["run.12.loss"] == "1.75"
    assert {"run.1.learning_rate", "run.8.tokens_per_s", "run.num_damaged"} <= set(shown)
    assert len([e for e in page.of_class("curve") if training in e.parents]) == 4
    assert len(page.of_class("mark-line")) == 3


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.security
@settings(max_examples=8)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    | st.sampled_from([HOSTILE.replace("\ud800", ""), "<!--", "<![CDATA[", "&#0;"])
)
def test_text_of_samples_is_never_obeyed(text):
    for kind in KINDS:
        _, _, page = rendered(kind, text)
        assert {element.tag for element in page.elements} <= ALLOWED
        for element in page.elements:
            assert not [name for name in element.attributes if name.startswith("on") or name in ("src", "style")]
            assert (element.attributes.get("href") or "#").startswith("#")
        seen = "".join(data for data, _ in page.texts)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", seen)


@pytest.mark.security
def test_nothing_runs_in_the_browser_and_nothing_is_loaded(tmp_path):
    document, lines, _ = of_kind("tasks", HOSTILE.replace("\ud800", ""))
    report.write(tmp_path, report=document, samples=lines)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    page = Page(dom(tmp_path / "report.html").removeprefix("<!DOCTYPE html>"))
    metas = [e.attributes for e in page.elements if e.tag == "meta"]
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in metas
    assert not re.search(r"https?:|//|url\(|@import|@font-face", source.split("</style>")[0])
    assert {element.tag for element in page.elements} <= ALLOWED


# ------------------------------------------------------------------------------------------------------- accessibility


@pytest.mark.parametrize("kind", KINDS)
def test_tables_pictures_and_headings_can_be_read_aloud(kind):
    _, _, page = rendered(kind)
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
def test_text_has_contrast_of_4_5_and_curves_of_3(scheme):
    """WCAG 2.2, 1.4.3 and 1.4.11: (L1 + 0.05) / (L2 + 0.05)."""
    parts = report_page.STYLE.split(":root")
    palette = dict(re.findall(r"--([a-z-]+): (#\w{6})", parts[scheme + 1] + parts[scheme + 3]))
    wanted = [("text", back, 4.5) for back in ("card", "page", "target", "prompt")]
    wanted += [("muted", "card", 4.5), ("doubt", "card", 4.5)]
    wanted += [(front, "card", 3) for front in ("bar", "second", "third", "fourth")]
    for front, back, least in wanted:
        a, b = sorted([luminance(palette[front]), luminance(palette[back])])
        assert (b + 0.05) / (a + 0.05) >= least, (front, back)
