"""Text of a record or a model, made safe to look at.

Rule: what a terminal or a browser would obey instead of show becomes something to read: control and format characters,
among them those that turn the direction, lone surrogates, and the separators of lines and paragraphs (Cc, Cf, Cs, Zl
and Zp of Unicode). Only the joiners U+200C and U+200D stay, since scripts and emoji are made with them.
"""

import unicodedata

JOINERS = "\u200c\u200d"
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # general categories: The Unicode Standard, 4.5


def is_hidden(character: str) -> bool:
    """Whether one character commands what is seen, or cannot be seen itself; so does a line end, and so does a tab."""
    return unicodedata.category(character) in HIDDEN and character not in JOINERS


def escaped(text: str, *, kept: str = "") -> str:
    """Text with escapes, as in a string of Python, in place of hidden characters but those in `kept`.

    >>> escaped("one\\ttwo\\x1b[2J")
    'one\\\\ttwo\\\\x1b[2J'
    """
    return "".join(_escape(c) if is_hidden(c) and c not in kept else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
