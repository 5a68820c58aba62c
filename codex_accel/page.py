"""A web page of ours: its frame and style, tables, and values that name the place where they stand in a file.

Rule: every number of a page stands in an element that names its place in the report (`data-key`) and repeats it exactly
(`data-value`), and whatever a record holds is shown as text, never obeyed. A page needs no script, no network, no font.

`data-key` is the path into the report with dots between its parts; a dot inside of a part is written `\\.`, and other
characters as in a JSON string. `data-value` is the value as JSON. What is read between the tags:

- an amount: whole numbers with a comma every three digits (`12,345`); a share (`*_fraction`) in percent and any other
  number with four digits that count (`12.35 %`, `3.478`); None is `none`. Hovering shows a rounded number in full.
- a setting, a line number or a name: as it stands in the report.
"""

import html
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from codex_accel.visible import is_hidden


@dataclass(frozen=True)
class At:
    """A value of a report and the path that leads to it, so that no element can show another place's number."""

    value: Any
    key: str = ""

    def __getitem__(self, name: str | int) -> "At":
        part = json.dumps(str(name))[1:-1].replace(".", "\\.")
        return At(self.value[name], f"{self.key}.{part}" if self.key else part)

    def __contains__(self, name: str) -> bool:
        return name in self.value

    def get(self, name: str) -> "At | None":
        """The place called `name`; None if there is none."""
        return self[name] if name in self.value else None

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


def element(tag: str, at: At, content: str, attributes: str = "") -> str:
    """An element that names the place of its value and repeats it; `content` and `attributes` are HTML."""
    value = html.escape(json.dumps(at.value))
    return f'<{tag} data-key="{html.escape(at.key)}" data-value="{value}"{attributes}>{content}</{tag}>'


def amount(at: At, tag: str = "span", attributes: str = "") -> str:
    """An element with a number that counts or measures something."""
    text = amount_text(at.value, is_share=at.key.endswith("_fraction"))
    if isinstance(at.value, float):
        attributes += f' title="{at.value!r}"'
    return element(tag, at, text, attributes)


def amount_text(value: float | None, *, is_share: bool = False) -> str:
    """`12345` as "12,345", `0.12345` as "0.1235", as a share "12.35 %"; None as "none"."""
    if value is None:
        return "none"
    if isinstance(value, int) and not is_share:
        return f"{value:,}"
    scaled = 100 * value if is_share else value
    if scaled and not 1e-6 <= abs(scaled) < 1e15:  # as many digits would tell nothing
        text = f"{scaled:.3e}"
    else:
        places = max(0, 3 - math.floor(math.log10(abs(scaled)))) if scaled else 0
        text = f"{scaled:,.{places}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text} %" if is_share else text


def verbatim(at: At) -> str:
    """An element with a name, a line number or a setting, as it stands."""
    if isinstance(at.value, str):
        return element("bdi", at, visible(at.value))
    return element("span", at, "none" if at.value is None else html.escape(json.dumps(at.value)))


def visible(text: str, *, kept: str = "") -> str:
    """Escaped text in which hidden characters (`is_hidden`), but those in `kept`, have become labels."""
    return "".join(character if character in kept else visible_character(character) for character in text)


def visible_character(character: str) -> str:
    """One character as `visible` shows it."""
    return f'<span class="control">U+{ord(character):04X}</span>' if is_hidden(character) else html.escape(character)


def plain(text: str) -> str:
    """A label of ours or a name of the report where no element can stand."""
    return html.escape("".join("\ufffd" if is_hidden(c) else c for c in text))


# ------------------------------------------------------------------------------------------------------------ the frame

FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="kicker">{kicker}</p>
<h1>{name}</h1>
{headline}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{bodies}</main>
<footer>{footer}</footer>
</body>
</html>
"""


def frame(
    sections: Iterable[tuple[str, str, str]],
    *,
    title: str,
    kicker: str,
    name: str,
    headline: str,
    footer: str,
    style: str,
) -> str:
    """The whole page; a section is (id, heading, body). All but `title` are HTML."""
    sections = list(sections)
    links = "".join(f'<a href="#{id_}">{heading}</a>' for id_, heading, _ in sections)
    bodies = "".join(
        f'<section id="{id_}" aria-labelledby="{id_}-title"><h2 id="{id_}-title">{heading}</h2>{body}</section>\n'
        for id_, heading, body in sections
    )
    return FRAME.format(
        title=plain(title),
        style=style,
        kicker=kicker,
        name=name,
        headline=headline,
        links=links,
        bodies=bodies,
        footer=footer,
    )


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """The figures to see first: a label and the HTML of an amount each."""
    found = "".join(f"<div><dt>{label}</dt><dd>{text}</dd></div>" for label, text in figures)
    return f'<dl class="cards">{found}</dl>'


def facts(figures: Iterable[tuple[str, str]]) -> str:
    """A row of labelled figures."""
    found = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in figures)
    return f"<dl class='facts'>{found}</dl>"


# ----------------------------------------------------------------------------------------------------- tables and lists


def table(caption: str, head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    """A table in a frame that scrolls by itself where the window is narrow; `rows` are cells of one row each."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="{kind}">'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def row(label: str, cells: Iterable[str]) -> str:
    """The cells of a row that begins with its label."""
    return f'<th scope="row">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)


def listing(items: At) -> str:
    """The items of a list as they stand."""
    return "<ul>" + "".join(f"<li>{verbatim(item)}</li>" for item in items) + "</ul>" if items.value else "none"


def settings(at: At, name: str = "") -> Iterator[str]:
    """A row for each setting; those of a group are named `group.name`, an empty group or list is `none`."""
    if at.value and (isinstance(at.value, dict) or (at.is_group and any(item.is_group for item in at))):
        for part, place in at.items():
            yield from settings(place, f"{name}.{part}" if name else part)
    else:
        yield row(visible(name), [listing(at) if at.is_group else verbatim(at)])


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
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 48px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 8px; padding: 0; list-style: none;
  font-size: .875rem; }
.tokens { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; font-size: .8125rem; line-height: 1.75;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.control { padding: 0 2px; border: 1px solid var(--doubt); border-radius: 3px; color: var(--doubt); font-size: .85em; }
@media (max-width: 600px) { body { padding: 16px 10px 32px; } section { padding: 16px 14px; } h1 { font-size: 1.6rem; }
  th, td { padding: 6px 8px; } }
@media print { nav { display: none; } section { break-inside: auto; } body { max-width: none; } }
"""
