"""A page of ours as a browser would read it, and what may stand on it."""

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "br"}
HOSTILE = (
    "</script><img src=x onerror=alert(1)>&lt; \"' \x00\x07\x1b[31m \u202egnp.exe\u202c \ufeff\u2028\x85 \ud800 ]]> -->"
)
TAGS = """
html head meta title style body header main footer nav section article figure figcaption details summary h1 h2 h3 h4 p a
b i br code span bdi div dl dt dd ul li table caption thead tbody tr th td svg g rect line text
"""


class Element:
    def __init__(self, tag: str, attributes: dict, parents: list):
        self.tag, self.attributes, self.parents, self.text = tag, attributes, parents, ""


class Page(HTMLParser):
    """All elements with what is read in them, and each stretch of text with the elements around it."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append(Element(tag, dict(attributes), list(self.open)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append(Element(tag, dict(attributes), list(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.texts.append((data, list(self.open)))
        for element in self.open:
            element.text += data

    def unknown_decl(self, data):
        raise AssertionError(data)

    def handle_comment(self, data):
        raise AssertionError(data)

    def handle_pi(self, data):
        raise AssertionError(data)

    @property
    def keyed(self) -> list[Element]:
        return [element for element in self.elements if "data-key" in element.attributes]

    def of_class(self, name: str) -> list[Element]:
        return [element for element in self.elements if name in (element.attributes.get("class") or "").split()]


def parts_of(key: str) -> list[str]:
    r"""`a.b\.c` is the path a, b.c; other characters are escaped as in a JSON string."""
    return [json.loads(f'"{part}"') for part in (p.replace("\\.", ".") for p in re.findall(r"(?:[^.\\]|\\.)+", key))]


def value_at(report: dict, key: str):
    value = report
    for part in parts_of(key):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def leaves(value, path: tuple = ()):
    if isinstance(value, dict | list):
        names = value if isinstance(value, dict) else range(len(value))
        for name in names:
            yield from leaves(value[name], (*path, str(name)))
    else:
        yield path, value


def numbers_in(text: str) -> list[tuple[float, float]]:
    """Numbers as they are read, in percent or not, with half a unit of their last digit."""
    share = 0.01 if text.endswith(" %") else 1
    found = [number.replace(",", "") for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]
    return [(share * float(number), share * 0.5 * 10.0 ** -len(number.partition(".")[2])) for number in found]


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
