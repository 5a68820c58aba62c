"""The report of an evaluation as one web page, for people who have to answer for the model.

Rule: that of `page`: every number names its place and repeats it exactly. A key is a path into `report.json`, or begins
with `lines`, the lines of `samples.ndjson` by number from 1, or with `run`, those of the run's `metrics.ndjson`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from codex_accel import charts, page
from codex_accel.curves import Curves
from codex_accel.page import At, amount, plain, row, settings, table, verbatim, visible

CHARS_OF_A_TEXT, CHARS_OF_A_PAGE = 2000, 4_000_000  # of the samples' texts; what is beyond is left out
MOST_TEXTS = 20  # references or choices shown of one sample
NUM_OPEN = 3  # samples that are unfolded at each end
FOOTER = """Every number here stands in <code>report.json</code>, of single samples in <code>samples.ndjson</code>, of
the training run in its <code>metrics.ndjson</code>; hover over a rounded one to see it in full."""
# Where a count with such a name is not 0, somebody should look.
DOUBTFUL = (
    "skipped", "empty", "cut", "truncated", "near_ties", "unknown", "missing", "without", "too_long", "length", "masked"
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One task of a report, or all of it where there are no tasks."""

    task: str
    metrics: At
    intervals: At | None
    counts: At | None
    facts: At | None
    overview: At


def render(report: Mapping[str, Any], *, lines: Mapping[int, Mapping[str, Any]], curves: Curves | None = None) -> str:
    """The page as one string of HTML; equal arguments give equal pages.

    `lines` are those of `samples.ndjson` that `report["overview"]` names. Raises KeyError where a part is missing.
    """
    at = At(report)
    tasks = list(report.get("settings", {}).get("tasks") or [""])
    parts = [_part(at, task) for task in tasks]
    shown = At(lines, "lines")
    sections = [
        ("counts", "What was scored", _what(at, parts)),
        ("scores", "Scores", "".join(map(_scores, parts))),
        ("distributions", "Distributions", "".join(map(_distributions, parts))),
        ("samples", "Worst and best", "".join(_ends(part, shown, _room(lines)) for part in parts)),
    ]
    if any(part.overview["skipped"]["num_samples"].value for part in parts):
        sections.append(("skipped", "Skipped", "".join(_skipped(part, shown) for part in parts)))
    if curves is not None:
        sections.append(("training", "Training", _training(curves)))
    sections.append(("settings", "Settings", _settings(at)))
    title, name = _title(at, tasks)
    return page.frame(
        sections,
        title=f"{title}: evaluation report",
        kicker="Evaluation report",
        name=name,
        headline=_headline(parts),
        footer=FOOTER,
        style=STYLE,
    )


def _part(at: At, task: str) -> Part:
    def below(key: str) -> At | None:
        found = at.get(key)
        return found.get(task) if found is not None and task else found

    return Part(
        task,
        at["metrics"][task] if task else at["metrics"],
        below("intervals"),
        below("counts"),
        below("facts"),
        at["overview"][task] if task else at["overview"],
    )


def _room(lines: Mapping[int, Any]) -> int:
    """Characters to show of each text, so that no page grows beyond a few megabytes."""
    return min(CHARS_OF_A_TEXT, max(200, CHARS_OF_A_PAGE // (4 * max(1, len(lines)))))


def _title(at: At, tasks: list[str]) -> tuple[str, str]:
    """Title of the window as text, and of the page as HTML."""
    if tasks != [""]:
        return ", ".join(tasks), plain(", ".join(tasks))
    if "loss_by_length" not in at["overview"]:
        return "Predictions", "Predictions"
    split = at["settings"].get("split") if "settings" in at else None
    if split is None or split.value is None:
        return "Losses", "Losses on raw files"
    return f"Losses on {split.value}", f"Losses on {verbatim(split)}"


def _heading(part: Part) -> str:
    return f"<h3>{plain(part.task)}</h3>" if part.task else ""


def _headline(parts: list[Part]) -> str:
    """The first metric of each task, or the first ones of all; what was skipped comes first."""
    figures = []
    for part in parts:
        skipped = part.overview["skipped"]["num_samples"]
        if skipped.value:
            figures.append((plain(f"{part.task} skipped".strip()), amount(skipped, attributes=' class="doubtful"')))
    shown = 1 if parts[0].task else 4
    for part in parts[:8]:
        for name, value in list(part.metrics.items())[:shown]:
            if not value.is_group:
                figures.append((plain(f"{part.task} {name}".strip()), amount(value) + _bounds(part, name)))
    return page.cards(figures)


def _interval(part: Part, name: str) -> At | None:
    found = part.intervals.get(name) if part.intervals is not None else None
    return None if found is None or found.value is None else found


def _bounds(part: Part, name: str) -> str:
    found = _interval(part, name)
    return "" if found is None else f'<small class="bounds">{amount(found["low"])} to {amount(found["high"])}</small>'


# -------------------------------------------------------------------------------------------------------------- figures


def _label(name: str) -> str:
    """`num_empty_outputs` as "Empty outputs"."""
    return name.removeprefix("num_").replace("_", " ").capitalize()


def _what(at: At, parts: list[Part]) -> str:
    """The digests of model, data and tokenizer beside the counts."""
    digests, told = at.get("digests"), _of_secrets(at, parts)
    found = "".join(
        f"<div><dt>{visible(_label(name))}</dt><dd>{verbatim(digest)}</dd></div>"
        for name, digest in (digests.items() if digests is not None else ())
    )
    found = f'<div><h3>SHA-256 of what was read</h3><dl class="digests">{found}</dl></div>' if found else ""
    return f'{told}<div class="{"" if parts[0].task else "pair"}"><div>{_counts(parts)}</div>{found}</div>'


def _of_secrets(at: At, parts: list[Part]) -> str:
    """Whether secrets were masked, and how many in which task, if there is anything to tell."""
    safety = at["settings"].get("safety") if "settings" in at else None
    if safety is not None and safety["bypass_reason"].value is not None:
        return f"<p class='doubtful'>Secrets are not masked: {verbatim(safety['bypass_reason'])}</p>"
    found = [part for part in parts if part.overview["num_findings"].value]
    told = [
        f"{amount(part.overview['num_findings'])}{f' in {plain(part.task)}' if part.task else ''}" for part in found
    ]
    return f"<p>Secrets masked in the texts of samples: {', '.join(told)}.</p>" if told else ""


def _counts(parts: list[Part]) -> str:
    names = list(dict.fromkeys(name for part in parts if part.counts is not None for name in part.counts.value))

    def cell(part: Part, name: str) -> str:
        found = part.counts.get(name) if part.counts is not None else None
        if found is None:
            return ""
        return amount(found, attributes=' class="doubtful"' if _is_doubtful(name, found) else "")

    if not names:
        return "<p>none</p>"
    help_ = '<p class="help"><span class="doubtful">Marked</span> figures are worth a look before the scores.</p>'
    if not any(_is_doubtful(*one) for part in parts if part.counts is not None for one in part.counts.items()):
        help_ = ""
    if parts[0].task:
        rows = [row(plain(part.task), [cell(part, name) for name in names]) for part in parts]
        return help_ + table("Counts by task", ["", *(plain(_label(name)) for name in names)], rows, "numbers")
    rows = [row(plain(_label(name)), [cell(parts[0], name)]) for name in names]
    return help_ + table("Counts", ["", "Number"], rows, "numbers")


def _is_doubtful(name: str, count: At) -> bool:
    return any(word in name for word in DOUBTFUL) and bool(count.value)


def _scores(part: Part) -> str:
    places = list(_leaves(part.metrics, ""))
    shares = all(_is_share(part, name, value) for name, value in places if isinstance(value.value, float))
    rows = []
    for name, value in places:
        bounds = _interval(part, name)
        cells = [amount(value), *([amount(bounds["low"]), amount(bounds["high"])] if bounds else ["", ""])]
        rows.append(row(visible(name), [*cells, _drawn(part, name, value, shares=shares)]))
    facts = ""
    if part.facts is not None and part.facts.value:
        facts = table("What the metrics say of themselves", ["Key", "Value"], settings(part.facts), "settings")
        facts = f"<details><summary>How they were computed</summary>{facts}</details>"
    caption = f"Scores{f' of {plain(part.task)}' if part.task else ''}; low and high end the bootstrap interval"
    return _heading(part) + table(caption, ["Metric", "Value", "Low", "High", "Drawn"], rows, "numbers scores") + facts


def _leaves(at: At, prefix: str) -> Iterable[tuple[str, At]]:
    for name, place in at.items():
        if place.is_group:
            yield from _leaves(place, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", place


def _is_share(part: Part, name: str, value: At) -> bool:
    bounds = _interval(part, name)
    found = [value.value, *(bounds.value.values() if bounds else ())]
    return all(0 <= one <= 1 for one in found)


def _drawn(part: Part, name: str, value: At, *, shares: bool) -> str:
    """The score and its interval on a scale from 0; one scale for all where every score is from 0 to 1."""
    bounds = _interval(part, name)
    if bounds is None or value.value is None:
        return ""
    scale = (0.0, 1.0) if shares else charts.scale_of([value.value, bounds.value["low"], bounds.value["high"]])
    return charts.interval(value, bounds, scale=scale)


def _distributions(part: Part) -> str:
    figures = [_histogram(name, one) for name, one in part.overview["distributions"].items()]
    by_length = _by_length(part.overview["loss_by_length"]) if "loss_by_length" in part.overview else ""
    what = "documents" if by_length else "samples"
    return (
        _heading(part)
        + f'<p class="help">How many {what} have which score. A bar counts the scores from the number below it up to '
        f'the next bar.</p><div class="charts">{"".join(figures)}</div>' + by_length
    )


def _histogram(name: str, one: At) -> str:
    def tell(bin_: Mapping[str, Any]) -> str:
        low, high = page.amount_text(bin_["low"]), page.amount_text(bin_["high"])
        return f"{low if low == high else f'{low} to {high}'}: {bin_['count']:,}"

    without = one["num_without"]
    note = f' <span class="note">{amount(one["num_samples"])} scored</span>'
    if without.value:
        note += f' <span class="note">{amount(without, attributes=" class=doubtful")} without this score</span>'
    return charts.histogram(
        one["bins"], caption=visible(name) + note, name=name, columns=("Score", "Number"), tell=tell
    )


def _by_length(bins: At) -> str:
    def tell(one: Mapping[str, Any]) -> str:
        loss = page.amount_text(one["loss"])
        return f"{one['low']:,} to {one['high']:,} tokens: loss {loss}, {one['num_documents']:,} documents"

    rows = [
        f"<td>{amount(one['low'])} to {amount(one['high'])}</td><td>{amount(one['num_documents'])}</td>"
        f"<td>{amount(one['num_target_tokens'])}</td><td>{amount(one['loss'])}</td>"
        for one in bins
    ]
    return (
        "<h3>Loss by length of the document</h3>"
        '<p class="help">Nats a target token, over all targets of the documents of a bar; lengths in tokens. A bar '
        "goes up to the next one.</p>"
        f'<div class="pair"><figure>{charts.bars(bins, "Loss by length; the table has the same numbers", tell, "loss")}'
        f"</figure>{table('Loss by length', ['Tokens', 'Documents', 'Targets', 'Loss'], rows, 'numbers')}</div>"
    )


# -------------------------------------------------------------------------------------------------------------- samples


def _ends(part: Part, lines: At, room: int) -> str:
    ends = part.overview["ends"]
    order = ", then ".join(visible(name) for name in ends["ordered_by"].value)
    losses = "loss_by_length" in part.overview
    bodies = []
    for name in ("highest", "lowest") if losses else ("lowest", "highest"):
        numbers = [line.value for line in ends[name]]
        level = "h4" if part.task else "h3"
        title = f"<{level}>{name.capitalize()} by {order}</{level}>"
        if losses:
            bodies.append(title + _documents([lines[number] for number in numbers], name))
        else:
            bodies.append(title + "".join(_sample(n, lines[n], room, index) for index, n in enumerate(numbers)))
    kind = "documents" if losses else "samples"
    if not order:
        return _heading(part) + f"<p>No {kind[:-1]} has a score.</p>"
    explained = (
        '<p class="help">margin: log-likelihood of the right choice less that of the likeliest other, in nats.</p>'
        if "margin" in ends["ordered_by"].value
        else ""
    )
    num = amount(part.overview["num_samples"])
    of = f"<p>Of {num} {kind}, those at both ends; all are in <code>samples.ndjson</code>.</p>"
    return _heading(part) + of + explained + "".join(f"<div class='end'>{body}</div>" for body in bodies)


def _documents(lines: list[At], name: str) -> str:
    rows = [
        f"<td>{verbatim(one['record_id'])}</td><td>{amount(one['num_tokens'])}</td>"
        f"<td>{amount(one['num_target_tokens'])}</td><td>{amount(one['num_correct'])}</td><td>{amount(one['loss'])}</td>"
        f"<td>{amount(one['perplexity'])}</td>"
        for one in lines
    ]
    head = ["Record", "Tokens", "Targets", "Right", "Loss", "Perplexity"]
    return table(f"Documents with the {name} loss", head, rows, "numbers records")


def _sample(number: int, line: At, room: int, index: int) -> str:
    scores = " · ".join(f"{visible(name)} {amount(value)}" for name, value in line["scores"].items())
    boxes = [_box("Prompt", [line["prompt"].value], room)] if line.value.get("prompt") else []
    if "choices" in line:
        boxes.append(_choices(line, room))
    else:
        boxes.append(_box("Output", [line["output"].value], room))
        boxes.append(
            _box("References" if len(line["references"].value) > 1 else "Reference", line["references"].value, room)
        )
    notes = [
        f"{label} {amount(line[name])}"
        for name, label in (("num_prompt_tokens", "prompt tokens"), ("num_cut_tokens", "cut from it"),
                            ("num_output_tokens", "new tokens"), ("num_near_ties", "near ties"))
        if line.value.get(name) or (name == "num_output_tokens" and name in line)
    ]  # fmt: skip
    if line.value.get("finish_reason"):
        notes.append(f"ended by {verbatim(line['finish_reason'])}")
    names = [f"line {verbatim(line['line'])} of the input"] if line.value.get("line") is not None else []
    names += [f"id {verbatim(line['id'])}"] if "id" in line else []
    names.append(f"sample {verbatim(line['sample_id'])}")
    return (
        f'<details class="sample"{" open" if index < NUM_OPEN else ""}><summary>'
        f"<b>{scores}</b> {_opening(line)}</summary>"
        f'<p class="note">{" · ".join(names + notes)}</p><div class="boxes">{"".join(boxes)}</div></details>'
    )


def _opening(line: At) -> str:
    """The beginning of what was answered, to tell samples apart while they are folded."""
    value = line.value
    text = value["choices"][value["predicted"]] if "choices" in value else value["output"]
    short = " ".join(text[:300].split())[:80]
    return f'<bdi class="opening">{visible(short) if short else "empty"}</bdi>'


def _box(label: str, texts: list[str], room: int) -> str:
    bodies = [_text(text, room) for text in texts[:MOST_TEXTS]]
    more = '<p class="note">and more, left out here</p>' if len(texts) > MOST_TEXTS else ""
    return f'<div class="box"><p class="label">{label}</p>{"".join(bodies)}{more}</div>'


def _text(text: str, room: int) -> str:
    if not text:
        return '<p class="note">empty</p>'
    cut = '<p class="note">and more, left out here</p>' if len(text) > room else ""
    shown = visible(text[:room], kept="\n\t")
    return f'<div class="tokens" lang="" dir="auto" translate="no" tabindex="0" role="group">{shown}</div>{cut}'


def _choices(line: At, room: int) -> str:
    items = []
    for number, (text, likelihood) in enumerate(zip(line.value["choices"], line["loglikelihoods"], strict=True)):
        marks = [("right", "answer"), ("chosen", "predicted")]
        names = [label for label, key in marks if line.value[key] == number]
        kind = " ".join(["choice", *names])
        tags = "".join(f'<span class="tag {name}">{name}</span> ' for name in names)
        items.append(f'<div class="{kind}"><p>{tags}{amount(likelihood)} nats</p>{_text(text, room)}</div>')
    more = '<p class="note">and more, left out here</p>' if len(items) > MOST_TEXTS else ""
    return f'<div class="box"><p class="label">Choices</p>{"".join(items[:MOST_TEXTS])}{more}</div>'


def _skipped(part: Part, lines: At) -> str:
    skipped = part.overview["skipped"]
    if not skipped["num_samples"].value:
        return ""
    rows = [
        f"<td>{verbatim(lines[number.value]['line'])}</td><td>{verbatim(lines[number.value]['skipped'])}</td>"
        for number in skipped["first"]
    ]
    text = f"<p>{amount(skipped['num_samples'], attributes=' class=doubtful')} were not scored and enter no score.</p>"
    return _heading(part) + text + table("The first of them", ["Line of the input", "Reason"], rows)


# ------------------------------------------------------------------------------------------------------------- training

FIELDS = {
    "loss": "Loss, nats a token",
    "learning_rate": "Learning rate",
    "tokens_per_s": "Tokens a second in training",
}


def _training(curves: Curves) -> str:
    lines = At({**curves.lines, "num_damaged": curves.num_damaged}, "run")
    figures, rows = [], []
    for field, label in FIELDS.items():
        series = [(split, points) for split in curves.splits() if (points := curves.points(split, field))]
        if not series:
            continue
        chart = charts.curves(lines, series, name=f"{label} by step", field=field, mark=curves.step)
        legend = "".join(
            f'<li><span class="key key-{n % 4}"></span>{plain(split)}</li>' for n, (split, _) in enumerate(series)
        )
        legend = f'<ul class="legend">{legend}</ul>' if len(series) > 1 else ""
        figures.append(f"<figure><figcaption>{label}</figcaption>{chart}{legend}</figure>")
        for split, points in series:
            first, last, low, high = points[0], points[-1], *_lowest_and_highest(points)
            ends = [amount(lines[point[0]][field]) + _at_step(lines[point[0]]) for point in (first, last, low, high)]
            rows.append(row(f"{label}<br><span class='note'>{plain(split)}</span>", ends))
    damaged = f"<p class='doubtful'>{amount(lines['num_damaged'])} lines of the log are damaged.</p>"
    damaged = damaged if curves.num_damaged else ""
    whose = f"<p>The log of the run <bdi>{visible(curves.run)}</bdi>, in which the model was trained. "
    whose += "The dashed line is the checkpoint that was scored.</p>" if curves.step is not None else "</p>"
    ends_table = table("Ends of the curves", ["", "First", "Last", "Lowest", "Highest"], rows, "numbers")
    return whose + damaged + f'<div class="charts">{"".join(figures)}</div>' + (ends_table if rows else "<p>none</p>")


def _lowest_and_highest(points: list[charts.Point]) -> tuple[charts.Point, charts.Point]:
    return min(points, key=lambda point: point[2]), max(points, key=lambda point: point[2])


def _at_step(line: At) -> str:
    return f'<br><span class="note">step {amount(line["step"])}</span>'


# ------------------------------------------------------------------------------------------------------------- settings


def _settings(at: At) -> str:
    parts = [("settings", "Settings")]
    known = {"metrics", "intervals", "counts", "facts", "overview", "digests", "settings"}
    parts += [(key, _label(key)) for key in at.value if key not in known and at[key].is_group]
    return "".join(
        table(title, ["Key", "Value"], settings(at[key]), "settings")
        for key, title in parts
        if key in at and at[key].value
    )


STYLE = (
    page.STYLE
    + """
:root { --second: #b3540a; --third: #2e7d4f; --fourth: #8a3fa8; --span: #b9cdf3; }
@media (prefers-color-scheme: dark) {
  :root { --second: #f0a05a; --third: #7fce9f; --fourth: #d09be6; --span: #36528c; } }
.bounds { display: block; color: var(--muted); font-size: .75rem; font-weight: 400; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
figure { max-width: 460px; }
.scores td:last-child { width: 220px; padding: 2px 0 0 12px; }
@media (max-width: 600px) { .scores td:last-child, .scores th:last-child { display: none; } }
.interval { display: block; width: 200px; height: 30px; }
.interval .span { fill: var(--span); } .interval .bar { fill: var(--bar); }
.records td:first-child { text-align: left; color: var(--muted); font-size: .75rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { margin: 0 0 8px; padding: 8px 12px; border: 1px solid var(--line); border-radius: 8px; }
.sample summary { font-size: .875rem; overflow-wrap: anywhere; } .sample summary b { color: var(--text); }
.sample .note { margin: 8px 0; overflow-wrap: anywhere; max-width: none; }
.boxes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 12px 16px; }
.box { min-width: 0; } .box .tokens { max-height: 320px; margin: 0 0 6px; overflow: auto; }
.label { margin: 0 0 4px; color: var(--muted); font-size: .8125rem; font-weight: 600; }
.choice p { margin: 0 0 2px; font-size: .8125rem; }
.tag { padding: 0 6px; border: 1px solid var(--line); border-radius: 8px; font-size: .75rem; }
.tag.right { background: var(--target); } .tag.chosen { background: var(--prompt); }
.end { margin: 0 0 24px; }
.curve { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.mark-line { stroke: var(--muted); stroke-dasharray: 3 3; }
.curve-0 { stroke: var(--bar); } .dot-0 { fill: var(--bar); } .key-0 { background: var(--bar); }
.curve-1 { stroke: var(--second); } .dot-1 { fill: var(--second); } .key-1 { background: var(--second); }
.curve-2 { stroke: var(--third); } .dot-2 { fill: var(--third); } .key-2 { background: var(--third); }
.curve-3 { stroke: var(--fourth); } .dot-3 { fill: var(--fourth); } .key-3 { background: var(--fourth); }
.key { display: inline-block; width: 16px; height: 3px; margin-right: 6px; vertical-align: middle; }
"""
)
