"""Whether what looks like a secret can be one: check digits, randomness, and the values that only stand for one.

Rule: a check sees a match and the part of it that would be masked, and answers how many characters of that part are
secret, 0 for none. It takes time linear in the match, which is bounded.
"""

import ipaddress
import re
from collections.abc import Callable

from codex_accel.secret_families import STRONG_NAMES

# What documentation, templates and code write where a value goes.
PLACEHOLDER = re.compile(
    rb"(?i)[\[<({$%]*(?:your|my|the|an?|some|insert|enter|example|sample|dummy|fake|placeholder|replace|change|redacted"
    rb"|secret|hidden|none|null|nil|true|false|undefined|optional|required|default|str|string|bytes|int|bool|any|pass"
    rb"|password|passwd|passphrase|token|key|env|process|os|self|cls|args|config|settings|request|getpass|user|test)"
    rb"(?![A-Za-z0-9])"
)
EMPTY = re.compile(rb"(.)\1*|[xX*.#_-]+|\.\.\.+.*|%[sdr(].*|[{$<\[].*|@[{$].*|0x[0-9a-fA-F]{1,8}")
WORD = re.compile(rb"[A-Za-z]+")
LOOKS_LIKE_PATH = re.compile(rb"(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[A-Za-z0-9_. -]{1,40}[/\\]?)+|https?:.*|file:.*")
IDENTIFIER = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")
SPECIAL = re.compile(rb"[!@#$%^&*+=?~]")
VOWELS = frozenset(b"aeiouyAEIOUY")
MIN_PASSWORD, MIN_CLEAR, MIN_WEAK = 5, 8, 12  # characters of a value, by how clear its name is

IBAN_LENGTHS = dict(
    AD=24, AE=23, AL=28, AT=20, AZ=28, BA=20, BE=16, BG=22, BH=22, BR=29, BY=28, CH=21, CR=22, CY=28, CZ=24, DE=22,
    DK=18, DO=28, EE=20, EG=29, ES=24, FI=18, FO=18, FR=27, GB=22, GE=22, GI=23, GL=18, GR=27, GT=28, HR=21, HU=28,
    IE=22, IL=23, IQ=23, IS=26, IT=27, JO=30, KW=30, KZ=20, LB=28, LC=32, LI=21, LT=20, LU=20, LV=21, LY=25, MC=27,
    MD=24, ME=22, MK=19, MR=27, MT=31, MU=30, NL=18, NO=15, PK=24, PL=28, PS=29, PT=25, QA=29, RO=24, RS=22, SA=24,
    SC=31, SE=24, SI=19, SK=24, SM=27, ST=25, SV=28, TL=23, TN=24, TR=26, UA=29, VA=22, VG=24, XK=20,
)  # fmt: skip

# --- tokens -----------------------------------------------------------------------------------------------------------


def has_digit(match: bytes, part: bytes) -> int:
    """A digit after the beginning, which a word or an identifier seldom has."""
    return len(part) if re.search(rb"[0-9]", part) else 0


def mixed_case(match: bytes, part: bytes) -> int:
    """Capitals and small letters among the last two thirds, so that the beginning does not count."""
    end = part[len(part) // 3 :]
    return len(part) if re.search(rb"[a-z]", end) and re.search(rb"[A-Z]", end) else 0


def random(match: bytes, part: bytes) -> int:
    """Letters with digits, or letters that no word is made of."""
    return len(part) if looks_random(part) else 0


def never(match: bytes, part: bytes) -> int:
    """A family that another one stands for."""
    return 0


def access_key_id(match: bytes, part: bytes) -> int:
    """A digit, or a letter that is no amino acid: a stretch of a protein may begin with AKIA."""
    return len(part) if re.search(rb"[0-9BJOUXZ]", part[4:]) else 0


def not_data_url(match: bytes, part: bytes) -> int:
    """More than one letter; what a source map begins with is no token."""
    return 0 if part.startswith(b"eyJ2ZXJzaW9uIjoz") or len(set(part)) < 16 else len(part)


def looks_random(value: bytes) -> bool:
    """Whether letters and digits are in an order that names and words do not have.

    >>> looks_random(b"Xk39dkQz"), looks_random(b"deadline"), looks_random(b"python3.11"), looks_random(b"qzxkvjwp")
    (True, False, False, True)
    """
    parts = [part for part in re.split(rb"[^A-Za-z0-9]+", value) if part]
    return any(_random_part(part) for part in parts) or _hexadecimal(b"".join(parts))


def _hexadecimal(value: bytes) -> bool:
    """Sixteen or more hexadecimal digits, of both kinds."""
    return len(value) >= 16 and re.fullmatch(rb"(?=.*[0-9])(?=.*[a-fA-F])[0-9a-fA-F]+", value) is not None


def _random_part(part: bytes) -> bool:
    """One run of letters and digits: three or more changes between them, or letters that are no words."""
    pieces = re.findall(rb"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", part)
    changes = sum(a[:1].isdigit() != b[:1].isdigit() for a, b in zip(pieces, pieces[1:], strict=False))
    if changes >= 3 or (changes == 2 and len(part) >= 8):
        return True
    letters = b"".join(piece for piece in pieces if not piece[:1].isdigit())
    words = [piece for piece in pieces if piece[:1].isalpha()]
    if len(words) >= 3 and len(letters) / len(words) < 3:  # capitals in odd places
        return True
    return any(len(word) >= 6 and not _pronounceable(word) for word in words)


def _pronounceable(word: bytes) -> bool:
    """Whether vowels come as often as in words: one letter in six, and never six consonants in a row."""
    consonants = max(map(len, re.split(rb"[aeiouyAEIOUY]", word)))
    return consonants < 6 and 6 * sum(letter in VOWELS for letter in word) >= len(word)


# --- values of names ----------------------------------------------------------------------------------------------------


def quoted_value(match: bytes, part: bytes) -> int:
    """A value in quotes."""
    return _value(match, part, quoted=True)


def plain_value(match: bytes, part: bytes) -> int:
    """A value without quotes, which may be code: a name, a call, an attribute."""
    value = part.rstrip(b".,;:!?)]}")
    if match.endswith((b"(", b"[")) and IDENTIFIER.fullmatch(value) and not looks_random(value):
        return 0
    return min(len(value), _value(match, value, quoted=False))


def _value(match: bytes, value: bytes, *, quoted: bool) -> int:
    name = match[: match.find(value)].lower()
    is_placeholder = PLACEHOLDER.match(value) and not looks_random(value)
    if is_placeholder or EMPTY.fullmatch(value) or (LOOKS_LIKE_PATH.fullmatch(value) and not looks_random(value)):
        return 0
    is_strong = any(strong.encode() in name for strong in STRONG_NAMES)
    if is_strong:
        is_code = not quoted and IDENTIFIER.fullmatch(value) and not re.search(rb"[0-9]", value)
        secret = len(value) >= MIN_PASSWORD and (
            looks_random(value) or not is_code and bool(re.search(rb"[0-9]", value) or SPECIAL.search(value))
        )
    else:
        least = MIN_WEAK if re.search(rb"token|credential", name) and b"_token" not in name else MIN_CLEAR
        secret = len(value) >= least and not value.isdigit() and looks_random(value)
    return len(value) if secret else 0


def url_password(match: bytes, part: bytes) -> int:
    """A password in a URL, unless it only stands for one."""
    if EMPTY.fullmatch(part) or re.fullmatch(
        rb"(?i)pass(?:w(?:or)?d|phrase)?|pwd|secret|token|port|x-oauth-basic", part
    ):
        return 0
    return len(part)


# --- personal data ------------------------------------------------------------------------------------------------------


def card(match: bytes, part: bytes) -> int:
    """Luhn's check digit (ISO/IEC 7812-1), 13 to 19 digits."""
    digits = [byte - 48 for byte in part if 48 <= byte < 58]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(part) if 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 else 0


def iban(match: bytes, part: bytes) -> int:
    """The country's length and the remainder 1 modulo 97 (ISO 13616)."""
    wanted, kept = IBAN_LENGTHS.get(part[:2].decode(), 0), 0
    for num_characters, byte in enumerate(part, 1):
        kept += byte != 32
        if wanted and kept == wanted:
            text = part[:num_characters].replace(b" ", b"").decode()
            number = int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4]))
            return num_characters if number % 97 == 1 else 0
    return 0


def us_ssn(match: bytes, part: bytes) -> int:
    """No group of zeros, and not the area 666."""
    area, group, serial = part.split(b"-")
    return len(part) if area not in (b"000", b"666") and group != b"00" and serial != b"0000" else 0


def ip_address(match: bytes, part: bytes) -> int:
    """An address that is written right and is neither a loopback nor nowhere; a version number has no such parts."""
    try:
        address = ipaddress.ip_address(part.decode())
    except ValueError:
        return 0
    return 0 if address.is_loopback or address.is_unspecified or part in (b"255.255.255.255",) else len(part)


CHECKS: dict[str, Callable[[bytes, bytes], int]] = {
    check.__name__: check
    for check in (
        has_digit, mixed_case, random, never, access_key_id, not_data_url, quoted_value, plain_value, url_password, card,
        iban, us_ssn, ip_address,
    )
}  # fmt: skip
