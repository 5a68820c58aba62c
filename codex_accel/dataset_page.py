"""The report of a dataset as one web page, `report.html`, made from nothing but `report.json`.

Rule: every number of the page stands in an element that names its place in the report (`data-key`) and repeats it
exactly (`data-value`), and whatever a record holds is shown as text, never obeyed. The page needs no script, no network
and no font.

`data-key` is the path into the report with dots between its parts; a dot inside of a part is written `\\.`, and other
characters as in a JSON string. `data-value` is the value as JSON. What is read between the tags:

- an amount: whole numbers with a comma every three digits (`12,345`); a share (`*_fraction`) in percent and any other
  number with four digits that count (`12.35 %`, `3.478`); None is `none`. Hovering shows a rounded number in full.
- a setting, a line number or a name: as it stands in the report.
- a bin of a histogram, in the title of its bar: `64 to 127 tokens: 1,234 documents`.
"""

import html
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class At:
    """A value of the report and the path that leads to it, so that no element can show another place's number."""

    value: Any
    key: str = ""

    def __getitem__(self, name: str | int) -> "At":
        part = json.dumps(str(name))[1:-1].replace(".", "\\.")
        return At(self.value[name], f"{self.key}.{part}" if self.key else part)

    def items(self) -> list[tuple[str, "At"]]:
        """Names and places of a mapping or a list, in its order."""
        names = self.value if isinstance(self.value, dict) else range(len(self.value))
        return [(str(name), self[name]) for name in names]

    def __iter__(self) -> Iterator["At"]:
        return (place for _, place in self.items())

    @property
    def is_group(self) -> bool:
        """Whether there are places below this one."""
        return isinstance(self.value, dict | list)


# ---------------------------------------------------------------------------------------------- values and hostile text


def _element(tag: str, at: At, content: str, attributes: str = "") -> str:
    value = html.escape(json.dumps(at.value))
    return f'<{tag} data-key="{html.escape(at.key)}" data-value="{value}"{attributes}>{content}</{tag}>'


def _amount(at: At, tag: str = "span", attributes: str = "") -> str:
    """An element with a number that counts or measures something."""
    text = amount_text(at.value, is_share=at.key.endswith("_fraction"))
    if isinstance(at.value, float):
        attributes += f' title="{at.value!r}"'
    return _element(tag, at, text, attributes)


def amount_text(value: float | None, *, is_share: bool = False) -> str:
    """`12345` as "12,345", `0.12345` as "0.1235", as a share "12.35 %"; None as "none"."""
    if value is None:
        return "none"
    if isinstance(value, int) and not is_share:
        return f"{value:,}"
    scaled = 100 * value if is_share else value
    places = max(0, 3 - math.floor(math.log10(abs(scaled)))) if scaled else 0
    text = f"{scaled:,.{places}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text} %" if is_share else text


def _verbatim(at: At) -> str:
    """An element with a name, a line number or a setting, as it stands."""
    if isinstance(at.value, str):
        return _element("bdi", at, _visible(at.value))
    return _element("span", at, "none" if at.value is None else html.escape(json.dumps(at.value)))


def _visible(text: str, *, in_tokens: bool = False) -> str:
    """Escaped text in which nothing is invisible: characters that control or reorder what is seen become labels.

    In tokens a line feed is marked and kept, a tab and each space are marked. The joiners U+200C and U+200D stay, since
    scripts and emoji are made with them.
    """
    return "".join(map(_token_character if in_tokens else _character, text))


def _character(character: str) -> str:
    if character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return html.escape(character)
    return f'<span class="control">U+{ord(character):04X}</span>'


def _token_character(character: str) -> str:
    marks = {"\n": '<i class="mark">↵</i>\n', "\t": '<i class="mark">⇥</i>\t', " ": '<i class="space"> </i>'}
    return marks.get(character) or _character(character)


def _plain(text: str) -> str:
    """A label of ours or a name of the report where no element can stand."""
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in text))


# ------------------------------------------------------------------------------------------------------------ the page


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: dataset report</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="kicker">Dataset report</p>
<h1>{name}</h1>
{headline}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{bodies}</main>
<footer>Every number here stands in <code>report.json</code>; hover over a rounded one to see it in full.
Format version {format_version}.</footer>
</body>
</html>
"""


def render(report: dict[str, Any]) -> str:
    """The page as one string of HTML; equal reports give equal pages. Raises KeyError where the report lacks a part."""
    at = At(report)
    sections = [
        ("splits", "Splits", _splits(at["splits"])),
        ("lengths", "Lengths of documents", _lengths(at["splits"])),
        ("packing", "What packing costs", _packing(at["splits"])),
        ("examples", "Examples as the model sees them", _examples(at["examples"])),
        ("duplicates", "Duplicates", _duplicates(at["duplicates"])),
        ("quarantine", "Quarantine", _quarantine(at)),
        ("origin", "Made from", _origin(at)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    bodies = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>\n'
        for name, title, body in sections
    )
    return PAGE.format(
        title=_plain(report["name"]),
        style=STYLE,
        name=_verbatim(at["name"]),
        headline=_headline(at),
        links=links,
        bodies=bodies,
        format_version=_verbatim(at["format_version"]),
    )


def _headline(at: At) -> str:
    cards = [
        ("Records", at["num_records"]),
        ("In quarantine", at["num_bad"]),
        ("Duplicates", at["duplicates"]["num_duplicates"]),
        ("In more than one split", at["duplicates"]["num_shared"]),
        ("Ids in the vocabulary", at["tokenizer"]["vocab_size"]),
        *((f"Tokens in {name}", split["num_tokens"]) for name, split in at["splits"].items()),
    ]
    figures = "".join(f"<div><dt>{_plain(label)}</dt><dd>{_amount(value)}</dd></div>" for label, value in cards)
    return f'<dl class="cards">{figures}</dl>'


def _table(caption: str, head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table in a frame that scrolls by itself where the window is narrow; `rows` are cells of one row each."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="{kind}">'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _row(label: str, cells: Iterable[str]) -> str:
    return f'<th scope="row">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)


# ------------------------------------------------------------------------------------------------------------- figures

SPLIT_ROWS = {
    "num_records": "Records",
    "num_tokens": "Tokens",
    "num_target_tokens": "Target tokens",
    "num_bytes": "Bytes of text",
    "bytes_per_token": "Bytes per token",
    "num_unknown_tokens": "Unknown tokens",
    "unknown_fraction": "Share of unknown tokens",
    "num_duplicates": "Repeats of an earlier record",
    "num_shared": "Also in another split",
    "num_without_eos": "Targets that do not end in EOS",
    "num_without_target": "Without a target token",
}
# Where these are not 0, somebody should look.
DOUBTFUL = {"num_unknown_tokens", "num_duplicates", "num_shared", "num_without_eos", "num_without_target"}


def _splits(splits: At) -> str:
    def cell(split: At, key: str) -> str:
        doubtful = key in DOUBTFUL and split[key].value
        return _amount(split[key], attributes=' class="doubtful"' if doubtful else "")

    rows = [_row(label, [cell(split, key) for split in splits]) for key, label in SPLIT_ROWS.items()]
    digests = "".join(
        f"<div><dt>{_plain(name)}</dt><dd>{_verbatim(split['members_sha256'])}</dd></div>"
        for name, split in splits.items()
    )
    table = _table("Records and tokens by split", ["", *map(_plain, splits.value)], rows, "numbers")
    return (
        f'<div class="pair"><div>{table}</div><div>'
        '<p class="help"><span class="doubtful">Marked</span> figures are worth a look before training.</p>'
        f'<h3>Digests of the sorted record ids</h3><dl class="digests">{digests}</dl></div></div>'
    )


def _lengths(splits: At) -> str:
    names = list(next(iter(splits))["length_percentiles"].value)
    rows = [
        _row(_plain(name), [_amount(split["length_percentiles"][percentile]) for percentile in names])
        for name, split in splits.items()
    ]
    charts = "".join(
        f"<figure><figcaption>{_plain(name)}</figcaption>{_chart(split['length_histogram'], name)}"
        f"<details><summary>The bars as a table</summary>{_bins(split['length_histogram'], name)}</details></figure>"
        for name, split in splits.items()
    )
    return (
        '<p class="help">How many documents have which length in tokens. A bar counts the lengths from the number '
        "below it up to the next bar; these ranges widen from left to right.</p>"
        f'<div class="charts">{charts}</div>'
        + _table("Percentiles of the lengths in tokens", ["Split", *map(_plain, names)], rows, "numbers")
    )


def _chart(bins: At, split: str) -> str:
    """A histogram with a bar a bin, drawn at equal widths; the tallest is labelled, and at most six bins are."""
    width, height, top, bottom = 360, 190, 24, 166
    tallest = max(bins, key=lambda one: one.value["count"], default=None)
    if tallest is None:
        return "<p>none</p>"
    step, most = width / len(bins.value), max(1, tallest.value["count"])
    every = -(-len(bins.value) // 6)
    parts = [f'<line x1="0" x2="{width}" y1="{bottom}" y2="{bottom}" class="axis"/>']
    for index, one in enumerate(bins):
        count, x = one.value["count"], index * step
        bar = max(1.5, (bottom - top) * count / most) if count else 0  # a single document can still be seen
        text = f"{one.value['low']:,} to {one.value['high']:,} tokens: {count:,} documents"
        parts.append(
            f'<g>{_element("title", one, text)}<rect x="{x:.2f}" y="{top}" width="{step:.2f}" '
            f'height="{bottom - top}" class="catch"/><rect x="{x + 1:.2f}" y="{bottom - bar:.2f}" '
            f'width="{max(1, step - 2):.2f}" height="{bar:.2f}" rx="1.5" class="bar"/></g>'
        )
        if index % every == 0:
            parts.append(_amount(one["low"], "text", f' x="{x + 1:.2f}" y="{height - 8}"'))
        if one == tallest:
            anchor = "end" if x > width / 2 else "start"
            label = x + step - 1 if x > width / 2 else x + 1
            parts.append(_amount(one["count"], "text", f' x="{label:.2f}" y="{top - 8}" text-anchor="{anchor}"'))
    name = f"Histogram of the lengths in {_plain(split)}; the table below has the same numbers"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _bins(bins: At, split: str) -> str:
    rows = [f"<td>{_amount(one['low'])} to {_amount(one['high'])}</td><td>{_amount(one['count'])}</td>" for one in bins]
    return _table(f"Documents of {_plain(split)} by length", ["Tokens", "Documents"], rows, "numbers")


PACKINGS = {
    "concat": "documents in one row, cut every block",
    "best_fit": "whole documents, each into the fullest block with room",
    "group_by_length": "batches of similar length, padded to the longest (blocks: batches)",
}


def _packing(splits: At) -> str:
    meanings = "".join(f"<div><dt><code>{name}</code></dt><dd>{text}</dd></div>" for name, text in PACKINGS.items())
    tables = "".join(_packing_of(name, split["packing"]) for name, split in splits.items())
    return (
        '<p class="help">Padding is computed and thrown away, a cut document is learnt from in parts: '
        "choose the block size and the packing with little of both.</p>"
        f'<dl class="meanings">{meanings}</dl><div class="packings">{tables}</div>'
    )


def _packing_of(split: str, sizes: At) -> str:
    bodies = []
    for size, packings in sizes.items():
        longer = _amount(packings["best_fit"]["num_over_long"])
        rows = "".join(f"<tr>{_packing_row(name, cost)}</tr>\n" for name, cost in packings.items())
        bodies.append(
            f'<tbody><tr><th scope="rowgroup" colspan="4"><b>{_plain(size)}</b> tokens a block '
            f'<span class="note">{longer} documents are longer</span></th></tr>\n{rows}</tbody>'
        )
    caption = f"Packings of {_plain(split)}"
    columns = "".join(f'<th scope="col">{name}</th>' for name in ("Packing", "Padding, in tokens", "Cut", "Blocks"))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="numbers packing">'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead>{''.join(bodies)}</table></div>"
    )


def _packing_row(name: str, cost: At) -> str:
    share = cost["padding_fraction"]
    bar = (
        f'<svg class="share" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="100" height="4" class="rest"/><rect width="{100 * (share.value or 0):.2f}" height="4" '
        f'class="bar"/></svg>'
    )
    padding = f'{_amount(share)} <span class="note">{_amount(cost["padding_tokens"])}</span>{bar}'
    sequences = cost["num_blocks" if "num_blocks" in cost.value else "num_batches"]
    return _row(f"<code>{_plain(name)}</code>", [padding, _amount(cost["documents_cut"]), _amount(sequences)])


# ------------------------------------------------------------------------------------------------------------- records

KINDS = {"prompt": "prompt", "target": "target, learnt", "special": "special token"}


def _examples(examples: At) -> str:
    legend = "".join(f'<li><span class="{kind}">{text}</span></li>' for kind, text in KINDS.items())
    marks = (
        '<li><i class="space"> </i> space</li><li><i class="mark">↵</i> line feed</li>'
        '<li><i class="mark">⇥</i> tab</li>'
        '<li><span class="control">U+001B</span> invisible character</li>'
    )
    parts = [
        f"<h3>{_plain(split)}</h3>" + ("".join(map(_example, records)) or "<p>none</p>")
        for split, records in examples.items()
    ]
    return (
        '<p class="help">Drawn at random. Each change of shade is a border between two tokens.</p>'
        f'<ul class="legend" aria-label="Legend">{legend}{marks}</ul>{"".join(parts)}'
    )


def _example(record: At) -> str:
    tokens = "".join(
        f'<span class="{_plain(token["kind"])}{" odd" * (index % 2)}">{_visible(token["text"], in_tokens=True)}</span>'
        for index, token in enumerate(record.value["tokens"])
    )
    left_out = record["num_left_out"]
    more = f'<p class="note">and {_amount(left_out)} more tokens</p>' if left_out.value else ""
    return (
        f'<article class="example"><h4>{_verbatim(record["file"])}:{_verbatim(record["line"])} '
        f'<span class="note">{_amount(record["num_tokens"])} tokens · record {_verbatim(record["record_id"])}'
        f"</span></h4>"
        f'<div class="tokens" lang="" dir="auto" translate="no">{tokens}</div>{more}</article>'
    )


def _duplicates(duplicates: At) -> str:
    facts = {
        "num_groups": "Contents that occur more than once",
        "num_duplicates": "Repeats of an earlier record",
        "num_shared": "Records also in another split",
        "num_removed": "Removed",
    }
    figures = [(label, _amount(duplicates[key])) for key, label in facts.items()]
    near = duplicates["near"]
    if near.value is None:
        figures.append(("Near-duplicates", _amount(near)))
    else:
        figures += [
            ("Similarity that counts as near", _verbatim(near["threshold"])),
            ("Near-duplicates found", _amount(near["num_found"])),
            ("Near-duplicates removed", _amount(near["num_removed"])),
        ]
    rows = [
        f"<td>{_amount(one['count'])}</td><td>{_list(one['splits'])}</td><td>{_list(one['places'])}</td>"
        f'<td class="digest">{_verbatim(one["record_id"])}</td>'
        for one in duplicates["largest"]
    ]
    table = _table("The contents that occur most often", ["Times", "Splits", "Places", "Record"], rows) if rows else ""
    return _facts(figures) + f"<p>All of them are listed in {_verbatim(duplicates['listed_in'])}.</p>" + table


def _list(items: At) -> str:
    return "<ul>" + "".join(f"<li>{_verbatim(item)}</li>" for item in items) + "</ul>" if items.value else "none"


def _facts(figures: Iterable[tuple[str, str]]) -> str:
    return (
        "<dl class='facts'>" + "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in figures) + "</dl>"
    )


def _quarantine(at: At) -> str:
    if not at["num_bad"].value:
        return f"<p>{_amount(at['num_bad'])} records are in quarantine: every record could be used.</p>"
    reasons = [f"<td>{_visible(reason)}</td><td>{_amount(count)}</td>" for reason, count in at["bad_by_reason"].items()]
    quarantine = at["quarantine"]
    first = [
        f"<td>{_verbatim(one['file'])}</td><td>{_verbatim(one['line'])}</td><td>{_verbatim(one['reason'])}</td>"
        for one in quarantine["first"]
    ]
    return (
        f"<p>{_amount(at['num_bad'])} records could not be used; {_amount(quarantine['num_listed'])} are listed in "
        f"<code>quarantine.jsonl</code>.</p>"
        + _table("Records by reason", ["Reason", "Records"], reasons, "last-number")
        + _table("The first of them", ["File", "Line", "Reason"], first)
    )


# -------------------------------------------------------------------------------------------------------------- origin


def _origin(at: At) -> str:
    sources = [
        f"<td>{_verbatim(one['path'])}<br><span class='digest'>{_verbatim(one['sha256'])}</span></td>"
        f"<td>{_verbatim(one['format'])}</td><td>{_amount(one['size'])}</td><td>{_amount(one['num_records'])}</td>"
        f"<td>{_amount(one['num_bad'])}</td>"
        for one in at["sources"]
    ]
    return (
        _table("Raw files with their SHA-256", ["File", "Format", "Bytes", "Records", "Bad"], sources, "sources")
        + _table("Tokenizer", ["Key", "Value"], _settings(at["tokenizer"]), "settings")
        + _table("Settings", ["Key", "Value"], _settings(at["settings"]), "settings")
    )


def _settings(at: At, name: str = "") -> Iterator[str]:
    """A row for each setting; those of a group are named `group.name`, an empty group or list is `none`."""
    if at.value and (isinstance(at.value, dict) or (at.is_group and any(item.is_group for item in at))):
        for part, place in at.items():
            yield from _settings(place, f"{name}.{part}" if name else part)
    else:
        yield _row(_visible(name), [_list(at) if at.is_group else _verbatim(at)])


STYLE = """
:root { --page: #f7f7f5; --card: #ffffff; --text: #1b1d21; --muted: #5a606b; --line: #dfe1e6; --bar: #3464c9;
  --rest: #e6e8ee; --doubt: #9a3b00; --prompt: #e6edfb; --prompt-odd: #cfdcf6; --target: #d9f2e0;
  --target-odd: #b9e3c6; --special: #f7e3c0; --special-odd: #eed09c; }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1a1d22; --text: #e7e9ec; --muted: #a4abb6;
  --line: #31363f; --bar: #7fa5f5; --rest: #2b3038; --doubt: #ffb27a; --prompt: #212e4a; --prompt-odd: #2f4168;
  --target: #1b3a28; --target-odd: #285239; --special: #46371a; --special-odd: #5e4a22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 28px 20px 48px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
h1 { margin: 0 0 20px; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 1.3rem; }
h3 { margin: 24px 0 8px; font-size: 1rem; }
h4 { margin: 0 0 8px; font-size: .9rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 75ch; }
a { color: var(--bar); }
code, .digest, .digests dd, .tokens {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; }
section, .cards div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { margin-top: 20px; padding: 22px; }
footer { margin-top: 20px; color: var(--muted); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .9rem; }
.kicker { margin: 0; color: var(--muted); font-size: .875rem; }
.help, .note, figcaption, caption { color: var(--muted); }
.note { font-size: .8125rem; font-weight: 400; }
.doubtful { color: var(--doubt); font-weight: 600; }
.doubtful::before { content: "\\25B2\\00A0"; font-size: .7em; }
dl, dd, dt { margin: 0; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.cards div { flex: 1 1 136px; max-width: 280px; display: flex; flex-direction: column; justify-content: space-between;
  padding: 12px 16px; }
.cards dt, .facts dt { color: var(--muted); font-size: .8125rem; }
.cards dd { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 32px; margin-bottom: 14px; }
.facts dd { font-size: 1.125rem; font-weight: 600; }
.meanings { margin-bottom: 16px; font-size: .9rem; }
.meanings div { display: grid; grid-template-columns: 140px 1fr; }
.digests dd { margin-bottom: 8px; }
.digests { font-size: .875rem; }
.digests dd, .digest { color: var(--muted); font-size: .75rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-bottom: 16px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding: 0 0 6px; text-align: left; font-size: .875rem; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--muted); font-size: .8125rem; font-weight: 600; vertical-align: bottom; }
tbody th { min-width: 14ch; font-weight: 400; }
.sources td:nth-child(n+3), .sources th:nth-child(n+3) { text-align: right; }
.numbers td, .numbers thead th:not(:first-child), .last-number td:last-child { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 4ch; }
td span[data-key] { white-space: nowrap; overflow-wrap: normal; }
td ul { margin: 0; padding: 0; list-style: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 20px 32px; }
figure { margin: 0 0 12px; max-width: 560px; }
figcaption { font-weight: 600; font-size: .9rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
.bar { fill: var(--bar); } .rest { fill: var(--rest); } .axis { stroke: var(--line); } .catch { fill: transparent; }
g:hover .bar { fill: var(--text); }
summary { cursor: pointer; color: var(--muted); font-size: .8125rem; }
.packings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 20px 48px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 48px; }
.packing { width: 100%; }
.packing th[scope=rowgroup] { padding-top: 16px; }
.packing .note { display: inline; }
.share { display: block; width: 100%; min-width: 80px; height: 4px; margin-top: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 8px; padding: 0; list-style: none;
  font-size: .875rem; }
.example { margin: 0 0 18px; }
.tokens { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; font-size: .8125rem; line-height: 1.75;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.prompt { background: var(--prompt); } .prompt.odd { background: var(--prompt-odd); }
.target { background: var(--target); text-decoration: underline 1px; text-underline-offset: 4px; }
.target.odd { background: var(--target-odd); }
.special { background: var(--special); font-weight: 700; } .special.odd { background: var(--special-odd); }
.space { white-space: pre-wrap;
  background: radial-gradient(circle at 50% 60%, var(--muted) 0 .07em, transparent .09em); }
.mark { color: var(--muted); font-style: normal; }
.control { padding: 0 2px; border: 1px solid var(--doubt); border-radius: 3px; color: var(--doubt); font-size: .85em; }
@media (max-width: 600px) { body { padding: 16px 10px 32px; } section { padding: 16px 14px; } h1 { font-size: 1.6rem; }
  th, td { padding: 6px 8px; } }
@media print { nav { display: none; } section { break-inside: auto; } body { max-width: none; } }
"""
