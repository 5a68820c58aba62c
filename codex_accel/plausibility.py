"""Whether what looks like a secret can be one: check digits, randomness, and the values that only stand for one.

Rule: a check sees a match and the part of it that would be masked, and answers how many characters of that part are
secret, 0 for none. It takes time linear in the match, which is bounded.
"""

import ipaddress
import itertools
from collections.abc import Callable

from codex_accel.patterns import linear
from codex_accel.secret_families import STRONG_NAMES

# What documentation, templates and code write where a value goes. All expressions here run in linear time.
PLACEHOLDER = linear(
    "[\\[<({$%]*(?:your|my|the|an?|some|insert|enter|example|sample|dummy|fake|placeholder|replace|change|redacted|secret"
    "|hidden|none|null|nil|true|false|undefined|optional|required|default|str|string|bytes|int|bool|any|pass|password"
    "|passwd|passphrase|token|key|env|process|os|self|cls|args|config|settings|request|getpass|user|test)"
    "(?:[^A-Za-z0-9].*)?", ignore_case=True,
)  # fmt: skip
EMPTY = linear(
    r"[xX*.#_-]+|\.\.\.+.*|%[sdr(].{0,10}|\{\{.*|\$\(.*|0x[0-9a-fA-F]{1,8}|\W{1,7}"
    r"|!(?:vault|secret|env|Ref|Sub|GetAtt)\b.*|(?:Alt|Cmd|Ctrl|Meta|Shift)\+.*|--[a-z]+(?:-[a-z]+)*(?:=.*)?"
)  # the last line: tags of YAML, keys to press, options
TEMPLATE = linear(
    r"[$@%]?\{[A-Za-z_][A-Za-z0-9_.!:\[\]-]*\}?|\$[A-Za-z_][A-Za-z0-9_]*|<[A-Za-z][^>]*>?|\[[A-Za-z_ -]+\]?"
)
WORDS = linear(r"[A-Z]?[a-z]+(?:[_. -]?[A-Z]?[a-z]+)*|[A-Z]+(?:[_. -][A-Z]+)*")
FILE_NAME = linear(r"[A-Za-z0-9_.-]{1,60}\.(?:pem|key|crt|pub|json|yaml|yml|toml|ini|cfg|env|txt|py|sh)")
PATH = linear(r"(?:~|\.{1,2}|[A-Za-z]:)?[/\\][A-Za-z0-9_. /\\-]+|(?:https?|file):.*")
OWN_NAME = linear(r"(?:\A|[_.-])(?:password|passwd|secret|token|key|credential)s?(?:\z|[_.-])", ignore_case=True)
NEXT_SETTING = linear("(?:[&;,]|&amp;)[ ]?[A-Za-z_][A-Za-z0-9_.-]{0,30}=")
CALL = linear(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*[(\[]")
IDENTIFIER = linear(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")
STANDS_FOR_PASSWORD = linear(r"pass(?:w(?:or)?d|phrase)?|pwd|secret|token|port|x-oauth-basic", ignore_case=True)
PIECES = linear(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
SEPARATORS = linear(r"[^A-Za-z0-9]+")
DIGIT, SMALL, CAPITAL, HEXADECIMAL = linear("[0-9]"), linear("[a-z]"), linear("[A-Z]"), linear("[0-9a-fA-F]+")
NO_AMINO_ACID = linear("[0-9BJOUXZ]")
SPECIAL = linear("[!@#$%^&*+=?~]")
# The 180 commonest pairs of letters in English prose and in the names of Python's library: `abc` is ab and ac. Counted
# over alice_pg11, botchan, tinyshakespeare, wikitext2_valid and python311_stdlib. At least 60 % of its pairs are among
# them for 97 of 100 words of six letters and more, and for 3 of 100 random texts of eight to twelve (November 2026).
_PAIRS = (
    "abcdgilmnprstuvy baeloru caehiklortu daeios eacdefglmnprstvx faefioru gaehir haeio iacdefglmnoprstv ke ladeilostuy"
    " maeiop nacdegiost ocdlmnoprstuvw paeiloprt qu racdegimnorstuy sacehiopstu taehilorstuy ucelmnprst vaei waeio"
)
STRONG = tuple(name.encode() for name in STRONG_NAMES)
COMMON_PAIRS = frozenset((row[0] + letter).encode() for row in _PAIRS.split() for letter in row[1:])
LEAST_COMMON = 0.6
MIN_PASSWORD, MIN_CLEAR, MIN_WEAK = 5, 8, 12  # characters of a value, by how clear its name is

IBAN_LENGTHS = dict(  # noqa: C408, many short pairs
    AD=24, AE=23, AL=28, AT=20, AZ=28, BA=20, BE=16, BG=22, BH=22, BR=29, BY=28, CH=21, CR=22, CY=28, CZ=24, DE=22,
    DK=18, DO=28, EE=20, EG=29, ES=24, FI=18, FO=18, FR=27, GB=22, GE=22, GI=23, GL=18, GR=27, GT=28, HR=21, HU=28,
    IE=22, IL=23, IQ=23, IS=26, IT=27, JO=30, KW=30, KZ=20, LB=28, LC=32, LI=21, LT=20, LU=20, LV=21, LY=25, MC=27,
    MD=24, ME=22, MK=19, MR=27, MT=31, MU=30, NL=18, NO=15, PK=24, PL=28, PS=29, PT=25, QA=29, RO=24, RS=22, SA=24,
    SC=31, SE=24, SI=19, SK=24, SM=27, ST=25, SV=28, TL=23, TN=24, TR=26, UA=29, VA=22, VG=24, XK=20,
)  # fmt: skip

# --- tokens ----------------------------------------------------------------------------------------------------------


def has_digit(match: bytes, part: bytes) -> int:
    """A digit after the beginning, which a word or an identifier seldom has."""
    return len(part) if DIGIT.search(part) else 0


def varied(match: bytes, part: bytes) -> int:
    """A digit, or capitals and small letters: no name in small letters."""
    return has_digit(match, part) or mixed_case(match, part)


def mixed_case(match: bytes, part: bytes) -> int:
    """Capitals and small letters among the last two thirds, so that the beginning does not count."""
    end = part[len(part) // 3 :]
    return len(part) if SMALL.search(end) and CAPITAL.search(end) else 0


def random(match: bytes, part: bytes) -> int:
    """Letters with digits, or letters that no word is made of."""
    return len(part) if looks_random(part) else 0


def random_token(match: bytes, part: bytes) -> int:
    """A piece of sixteen or more letters and digits, without marks between, that is random."""
    return len(part) if any(len(piece) >= 16 and looks_random(piece) for piece in SEPARATORS.split(part)) else 0


def access_key_id(match: bytes, part: bytes) -> int:
    """A digit, or a letter that is no amino acid: a stretch of a protein may begin with AKIA."""
    return len(part) if NO_AMINO_ACID.search(part[4:]) else 0


def not_data_url(match: bytes, part: bytes) -> int:
    """More than one letter; what a source map begins with is no token."""
    return 0 if part.startswith(b"eyJ2ZXJzaW9uIjoz") or len(set(part)) < 16 else len(part)


def looks_random(value: bytes) -> bool:
    """Whether letters and digits are in an order that names and words do not have.

    >>> [looks_random(value) for value in (b"Xk39dkQz", b"deadline", b"python3.11", b"qzxkvjwp", b"getUserName")]
    [True, False, False, True, False]
    """
    pieces = PIECES.findall(value)
    length = sum(map(len, pieces))
    if len(pieces) >= 4 and length >= 6 and length / len(pieces) < 3:  # base62 has 2 on average, words 4 and more
        return True
    parts = [part for part in SEPARATORS.split(value) if part]
    return any(_random_part(part) for part in parts) or _hexadecimal(b"".join(parts))


def _hexadecimal(value: bytes) -> bool:
    """Sixteen or more hexadecimal digits, letters among them."""
    return len(value) >= 16 and bool(HEXADECIMAL.fullmatch(value) and DIGIT.search(value) and not value.isdigit())


def _random_part(part: bytes) -> bool:
    """One run of letters and digits: digits in two places, or letters that no words are."""
    pieces = PIECES.findall(part)
    changes = sum(a.isdigit() != b.isdigit() for a, b in itertools.pairwise(pieces))
    if changes >= 3 or (changes == 2 and len(part) >= 8):
        return True
    words = [piece for piece in pieces if not piece.isdigit()]
    if len(words) >= 3 and sum(map(len, words)) / len(words) < 3.5:  # capitals in odd places
        return True
    pairs = [word[start : start + 2].lower() for word in words for start in range(len(word) - 1)]
    return len(pairs) >= 5 and sum(pair in COMMON_PAIRS for pair in pairs) < LEAST_COMMON * len(pairs)


# --- values of names -------------------------------------------------------------------------------------------------


def quoted_value(match: bytes, part: bytes) -> int:
    """A value in quotes."""
    return _value(_name(match, part), part, quoted=True)


def plain_value(match: bytes, part: bytes) -> int:
    """A value without quotes: up to the next setting or what closes a bracket, and not what is code."""
    name = _name(match, part)
    if len(part) < _least(name):
        return 0
    following = NEXT_SETTING.search(part)
    value = (part[: following.start()] if following else part).rstrip(b".,;:)]}")
    call = CALL.match(value)
    if call and not (CAPITAL.search(call.group()) and looks_random(call.group())):
        return 0
    if value[:1] in (b"(", b"[", b"{") and not (looks_random(value) and DIGIT.search(value) and b":" not in value[:3]):
        return 0
    return _value(name, value, quoted=False)


def _name(match: bytes, part: bytes) -> bytes:
    return match[: match.find(part)].lower()


def _is_strong(name: bytes) -> bool:
    return any(strong in name for strong in STRONG)


def _least(name: bytes) -> int:
    """How many characters a value of this name has at least."""
    if _is_strong(name):
        return MIN_PASSWORD
    is_weak = (b"token" in name and b"_token" not in name) or b"credential" in name
    return MIN_WEAK if is_weak else MIN_CLEAR


def _value(name: bytes, value: bytes, *, quoted: bool) -> int:
    is_strong = _is_strong(name)
    if len(value) < _least(name) or (value.isdigit() and not is_strong):
        return 0
    if EMPTY.fullmatch(value) or FILE_NAME.fullmatch(value) or len(set(value)) == 1:
        return 0
    is_random = looks_random(value)
    if not is_random and any(kind.fullmatch(value) for kind in (PLACEHOLDER, PATH, TEMPLATE)):
        return 0
    if OWN_NAME.search(value) and not DIGIT.search(value):  # secret=webhook_secret
        return 0
    if is_random or not is_strong:
        return len(value) if is_random else 0
    if quoted:
        return 0 if WORDS.fullmatch(value) else len(value)
    return len(value) if DIGIT.search(value) or (SPECIAL.search(value) and not IDENTIFIER.fullmatch(value)) else 0


def url_password(match: bytes, part: bytes) -> int:
    """A password in a URL, unless it only stands for one."""
    if EMPTY.fullmatch(part) or len(set(part)) == 1 or STANDS_FOR_PASSWORD.fullmatch(part):
        return 0
    return 0 if TEMPLATE.fullmatch(part) and not looks_random(part) else len(part)


# --- personal data ---------------------------------------------------------------------------------------------------


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
        has_digit, varied, mixed_case, random, random_token, access_key_id, not_data_url, quoted_value,
        plain_value, url_password, card, iban, us_ssn, ip_address,
    )
}  # fmt: skip
