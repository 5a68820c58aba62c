"""The report of a dataset as one web page, `report.html`, made from nothing but `report.json`.

Rule: that of `page`: every number names its place in `report.json` and repeats it exactly. What is read between the
tags of a bin of a histogram is the title of its bar: `64 to 127 tokens: 1,234 documents`.
"""

from typing import Any

from codex_accel import charts, page
from codex_accel.page import At, amount, listing, plain, row, settings, table, verbatim, visible


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
        ("secrets", "Secrets", _secrets(at["secrets"])),
        ("origin", "Made from", _origin(at)),
    ]
    return page.frame(
        sections,
        title=f"{report['name']}: dataset report",
        kicker="Dataset report",
        name=verbatim(at["name"]),
        headline=_headline(at),
        footer="Every number here stands in <code>report.json</code>; hover over a rounded one to see it in full.\n"
        f"Format version {verbatim(at['format_version'])}.",
        style=STYLE,
    )


def _headline(at: At) -> str:
    cards = [
        ("Records", at["num_records"]),
        ("In quarantine", at["num_bad"]),
        ("Secrets found", at["secrets"]["num_findings"]),
        ("Duplicates", at["duplicates"]["num_duplicates"]),
        ("In more than one split", at["duplicates"]["num_shared"]),
        ("Ids in the vocabulary", at["tokenizer"]["vocab_size"]),
        *((f"Tokens in {name}", split["num_tokens"]) for name, split in at["splits"].items()),
    ]
    return page.cards((plain(label), amount(value)) for label, value in cards)


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
        return amount(split[key], attributes=' class="doubtful"' if doubtful else "")

    rows = [row(label, [cell(split, key) for split in splits]) for key, label in SPLIT_ROWS.items()]
    digests = "".join(
        f"<div><dt>{plain(name)}</dt><dd>{verbatim(split['members_sha256'])}</dd></div>"
        for name, split in splits.items()
    )
    records = table("Records and tokens by split", ["", *map(plain, splits.value)], rows, "numbers")
    return (
        f'<div class="pair"><div>{records}</div><div>'
        '<p class="help"><span class="doubtful">Marked</span> figures are worth a look before training.</p>'
        f'<h3>Digests of the sorted record ids</h3><dl class="digests">{digests}</dl></div></div>'
    )


def _lengths(splits: At) -> str:
    names = list(next(iter(splits))["length_percentiles"].value)
    rows = [
        row(plain(name), [amount(split["length_percentiles"][percentile]) for percentile in names])
        for name, split in splits.items()
    ]
    figures = "".join(
        charts.histogram(
            split["length_histogram"],
            caption=plain(name),
            name=f"{name} by length",
            columns=("Tokens", "Documents"),
            tell=lambda one: f"{one['low']:,} to {one['high']:,} tokens: {one['count']:,} documents",
        )
        for name, split in splits.items()
    )
    return (
        '<p class="help">How many documents have which length in tokens. A bar counts the lengths from the number '
        "below it up to the next bar; these ranges widen from left to right.</p>"
        f'<div class="charts">{figures}</div>'
        + table("Percentiles of the lengths in tokens", ["Split", *map(plain, names)], rows, "numbers")
    )


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
        longer = amount(packings["best_fit"]["num_over_long"])
        rows = "".join(f"<tr>{_packing_row(name, cost)}</tr>\n" for name, cost in packings.items())
        bodies.append(
            f'<tbody><tr><th scope="rowgroup" colspan="4"><b>{plain(size)}</b> tokens a block '
            f'<span class="note">{longer} documents are longer</span></th></tr>\n{rows}</tbody>'
        )
    caption = f"Packings of {plain(split)}"
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
    padding = f'{amount(share)} <span class="note">{amount(cost["padding_tokens"])}</span>{bar}'
    sequences = cost["num_blocks" if "num_blocks" in cost.value else "num_batches"]
    return row(f"<code>{plain(name)}</code>", [padding, amount(cost["documents_cut"]), amount(sequences)])


# ------------------------------------------------------------------------------------------------------------- records

TOKEN_MARKS = {"\n": '<i class="mark">↵</i>\n', "\t": '<i class="mark">⇥</i>\t', " ": '<i class="space"> </i>'}
KINDS = {"prompt": "prompt", "target": "target, learnt", "special": "special token"}


def _examples(examples: At) -> str:
    legend = "".join(f'<li><span class="{kind}">{text}</span></li>' for kind, text in KINDS.items())
    marks = (
        '<li><i class="space"> </i> space</li><li><i class="mark">↵</i> line feed</li>'
        '<li><i class="mark">⇥</i> tab</li>'
        '<li><span class="control">U+001B</span> invisible character</li>'
    )
    parts = [
        f"<h3>{plain(split)}</h3>" + ("".join(map(_example, records)) or "<p>none</p>")
        for split, records in examples.items()
    ]
    return (
        '<p class="help">Drawn at random. Each change of shade is a border between two tokens.</p>'
        f'<ul class="legend" aria-label="Legend">{legend}{marks}</ul>{"".join(parts)}'
    )


def _example(record: At) -> str:
    tokens = "".join(
        f'<span class="{plain(token["kind"])}{" odd" * (index % 2)}">{_token(token["text"])}</span>'
        for index, token in enumerate(record.value["tokens"])
    )
    left_out = record["num_left_out"]
    more = f'<p class="note">and {amount(left_out)} more tokens</p>' if left_out.value else ""
    return (
        f'<article class="example"><h4>{verbatim(record["file"])}:{verbatim(record["line"])} '
        f'<span class="note">{amount(record["num_tokens"])} tokens · record {verbatim(record["record_id"])}'
        f"</span></h4>"
        f'<div class="tokens" lang="" dir="auto" translate="no">{tokens}</div>{more}</article>'
    )


def _token(text: str) -> str:
    """The text of a token; a line feed is marked and kept, a tab and each space are marked."""
    return "".join(TOKEN_MARKS.get(character) or page.visible_character(character) for character in text)


def _duplicates(duplicates: At) -> str:
    facts = {
        "num_groups": "Contents that occur more than once",
        "num_duplicates": "Repeats of an earlier record",
        "num_shared": "Records also in another split",
        "num_removed": "Removed",
    }
    figures = [(label, amount(duplicates[key])) for key, label in facts.items()]
    near = duplicates["near"]
    if near.value is None:
        figures.append(("Near-duplicates", amount(near)))
    else:
        figures += [
            ("Similarity that counts as near", verbatim(near["threshold"])),
            ("Near-duplicates found", amount(near["num_found"])),
            ("Near-duplicates removed", amount(near["num_removed"])),
        ]
    rows = [
        f"<td>{amount(one['count'])}</td><td>{listing(one['splits'])}</td><td>{listing(one['places'])}</td>"
        f'<td class="digest">{verbatim(one["record_id"])}</td>'
        for one in duplicates["largest"]
    ]
    largest = table("The contents that occur most often", ["Times", "Splits", "Places", "Record"], rows) if rows else ""
    return page.facts(figures) + f"<p>All of them are listed in {verbatim(duplicates['listed_in'])}.</p>" + largest


def _quarantine(at: At) -> str:
    if not at["num_bad"].value:
        return f"<p>{amount(at['num_bad'])} records are in quarantine: every record could be used.</p>"
    reasons = [f"<td>{visible(reason)}</td><td>{amount(count)}</td>" for reason, count in at["bad_by_reason"].items()]
    quarantine = at["quarantine"]
    first = [
        f"<td>{verbatim(one['file'])}</td><td>{verbatim(one['line'])}</td><td>{verbatim(one['reason'])}</td>"
        for one in quarantine["first"]
    ]
    return (
        f"<p>{amount(at['num_bad'])} records could not be used; {amount(quarantine['num_listed'])} are listed in "
        f"<code>quarantine.jsonl</code>.</p>"
        + table("Records by reason", ["Reason", "Records"], reasons, "last-number")
        + table("The first of them", ["File", "Line", "Reason"], first)
    )


DONE = {"redact": "masked where they stood", "quarantine": "set aside with their records"}


def _secrets(secrets: At) -> str:
    if secrets["bypass_reason"].value is not None:
        return f"<p>Nobody looked for secrets: {verbatim(secrets['bypass_reason'])}.</p>"
    counts = [f"<td>{visible(name)}</td><td>{amount(count)}</td>" for name, count in secrets["by_type"].items()]
    found = (
        f"<p>{amount(secrets['num_findings'])} secrets in {amount(secrets['num_records'])} records were found and "
        f"{DONE[secrets['action'].value]}, by policy {verbatim(secrets['policy'])} "
        f"<span class='digest'>{verbatim(secrets['sha256'])}</span>.</p>"
    )
    return found + (table("Secrets by type", ["Type", "Secrets"], counts, "last-number") if counts else "")


# -------------------------------------------------------------------------------------------------------------- origin


def _origin(at: At) -> str:
    sources = [
        f"<td>{verbatim(one['path'])}<br><span class='digest'>{verbatim(one['sha256'])}</span></td>"
        f"<td>{verbatim(one['format'])}</td><td>{amount(one['size'])}</td><td>{amount(one['num_records'])}</td>"
        f"<td>{amount(one['num_bad'])}</td>"
        for one in at["sources"]
    ]
    return (
        table("Raw files with their SHA-256", ["File", "Format", "Bytes", "Records", "Bad"], sources, "sources")
        + table("Tokenizer", ["Key", "Value"], settings(at["tokenizer"]), "settings")
        + table("Settings", ["Key", "Value"], settings(at["settings"]), "settings")
    )


STYLE = (
    page.STYLE
    + """
.meanings { margin-bottom: 16px; font-size: .9rem; }
.meanings div { display: grid; grid-template-columns: 140px 1fr; }
.sources td:nth-child(n+3), .sources th:nth-child(n+3) { text-align: right; }
.packings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 20px 48px; }
.packing { width: 100%; }
.packing th[scope=rowgroup] { padding-top: 16px; }
.packing .note { display: inline; }
.share { display: block; width: 100%; min-width: 80px; height: 4px; margin-top: 4px; }
.example { margin: 0 0 18px; }
.prompt { background: var(--prompt); } .prompt.odd { background: var(--prompt-odd); }
.target { background: var(--target); text-decoration: underline 1px; text-underline-offset: 4px; }
.target.odd { background: var(--target-odd); }
.special { background: var(--special); font-weight: 700; } .special.odd { background: var(--special-odd); }
.space { white-space: pre-wrap;
  background: radial-gradient(circle at 50% 60%, var(--muted) 0 .07em, transparent .09em); }
.mark { color: var(--muted); font-style: normal; }
"""
)
