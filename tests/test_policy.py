"""Policy files: what they may say, what is refused and how it is told."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secret_grammar import fill

from codex_accel import policy
from codex_accel.errors import UserError
from codex_accel.patterns import Alphabet, Unfit, compile_pattern
from codex_accel.safety import StreamMasker, mask
from codex_accel.secret_families import PERSONAL, SECRETS

SHIPPED = Path(__file__).parents[1] / "configs" / "safety" / "policy.yaml"


@pytest.fixture
def draw(request) -> random.Random:
    """A generator of its own for each test, seeded by its name, so that a failure comes again."""
    return random.Random(request.node.name)


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(f'version: "1"\n{text}', encoding="utf-8")
    return path


def of_rules(tmp_path, *rules: str, more: str = "") -> policy.Policy:
    return policy.load(written(tmp_path, more + "rules:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules)))


def problems(tmp_path, text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        policy.load(written(tmp_path, text))
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def in_pieces(text: str, chosen: policy.Policy, size: int) -> tuple[str, str | None]:
    stream = StreamMasker(chosen)
    sent = "".join(stream.feed(text[start : start + size]) for start in range(0, len(text), size)) + stream.flush()
    return sent, stream.blocked


# --- what rules do ---------------------------------------------------------------------------------------------------


def test_the_shipped_policy_does_what_its_comments_say(draw):
    chosen = policy.load(SHIPPED)
    key = fill("AKIA{16:K}", draw)
    text = f"AKIAIOSFODNN7EXAMPLE and {key} on db1.corp.example.com"
    assert mask(text, policy=chosen).text == "AKIAIOSFODNN7EXAMPLE and [SECRET] on [HOST]"
    assert mask("before [NOT FOR RELEASE] after", policy=chosen).text == "before "
    assert chosen.version == "2026-11-22"
    assert len(chosen.digest) == 64


def test_a_rule_of_the_file_goes_before_the_families(tmp_path, draw):
    token = fill("ghp_{36:A}", draw)
    allowing = of_rules(tmp_path, f"id: ours, action: allow, literals: [{token}]")
    naming = of_rules(tmp_path, "id: ours, action: redact, pattern: 'ghp_[A-Za-z0-9]{36}', replacement: <gone>")
    assert mask(f"a {token} b", policy=allowing).text == f"a {token} b"
    assert mask(f"a {token} b", policy=naming).text == "a <gone> b"
    for chosen in (allowing, naming):  # as the value of a name, too
        assert token not in mask(f"API_KEY={token}", policy=naming).text
        assert "[SECRET]" not in mask(f"API_KEY={token}", policy=chosen).text


def test_what_is_allowed_is_allowed_whole_only(tmp_path, draw):
    """An allowed beginning does not let a longer token through."""
    token = fill("ghp_{36:A}", draw)
    chosen = of_rules(tmp_path, f"id: ours, action: allow, literals: [{token[:20]}]")
    assert mask(f"a {token} b", policy=chosen).text == "a [SECRET] b"


def test_of_two_rules_at_one_place_the_first_decides(tmp_path):
    rules = ("id: a, action: redact, literals: [abc], replacement: A", "id: b, action: redact, literals: [abcd]")
    assert mask("abcd", policy=of_rules(tmp_path, *rules)).text == "Ad"
    assert mask("abcd", policy=of_rules(tmp_path, *reversed(rules))).text == "[SECRET]"


def test_of_the_literals_of_a_rule_the_longest_is_masked(tmp_path):
    chosen = of_rules(tmp_path, "id: a, action: redact, literals: [night, nightjar]")
    assert mask("nightjar night", policy=chosen).text == "[SECRET] [SECRET]"


def test_groups_say_what_is_masked(tmp_path):
    chosen = of_rules(tmp_path, "id: a, action: redact, pattern: 'from ([a-z]{1,20}) to ([a-z]{1,20})'")
    masked = mask("from rome to oslo", policy=chosen)
    assert masked.text == "from [SECRET] to [SECRET]"
    assert [(f.type, f.start, f.end) for f in masked.findings] == [("a", 5, 9), ("a", 13, 17)]


def test_letters_beyond_ascii_are_found_in_either_case(tmp_path):
    chosen = of_rules(
        tmp_path,
        "id: a, action: redact, literals: [Проект Буревестник, 秘密], ignore_case: true",
        "id: b, action: redact, pattern: 'дом-[а-яё]{2,9}', replacement: дом",
    )
    text = "ПРОЕКТ БУРЕВЕСТНИК, 秘密, проект, 秘, дом-лесной ДОМ-2 Ünïcode"
    assert mask(text, policy=chosen).text == "[SECRET], [SECRET], проект, 秘, дом ДОМ-2 Ünïcode"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_block_ends_the_text_in_pieces_of_any_size(tmp_path, size):
    chosen = of_rules(tmp_path, "id: stop, action: block, literals: [STOP HERE]")
    assert in_pieces("one two STOP HERE three", chosen, size) == ("one two ", "stop")
    assert in_pieces("one two STOP HER three", chosen, size) == ("one two STOP HER three", None)
    assert mask("one two STOP HERE three", policy=chosen).blocked == "stop"


def test_families_can_be_off_and_personal_data_on(tmp_path, draw):
    key, mail = fill("AKIA{16:K}", draw), "ann@example.org"
    text = f"{key} {mail}"
    assert mask(text, policy=policy.load(written(tmp_path, ""))).text == f"[SECRET] {mail}"
    assert mask(text, policy=policy.load(written(tmp_path, "off: [aws-access-key-id]"))).text == text
    chosen = policy.load(written(tmp_path, "secrets: false\npersonal_data: [email]\nshow_type: true"))
    assert mask(text, policy=chosen).text == f"{key} [SECRET:email]"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            "pattern: 'a+'",
            "can match without a limit, and 512 are the most. Give its repeats upper limits, as in {1,40}.",
        ),
        ("pattern: 'a{600}'", "can match 600 characters, and 512 are the most."),
        ("pattern: 'a(?=b)'", "has look-ahead or look-behind, which has no bound on its time. Write it without."),
        ("pattern: '(?<!a)b'", "has look-ahead or look-behind"),
        (r"pattern: '(a|b)\1'", "has a back-reference"),
        ("pattern: '(?P<x>a)(?(x)b|c)'", "has a conditional group"),
        ("pattern: '(a'", "not a regular expression (missing ), unterminated subpattern at position 0)."),
        ("pattern: '[[:alpha:]]'", "not a regular expression (Possible nested set at position"),
        ("pattern: 'a{0,3}'", "can match the empty text. Make some part of it required."),
        ("pattern: '[一-鿿]{2}'", "of more than 256 characters. Shorten it."),
        ("", "finds nothing. Give it literals or a pattern."),
        ("literals: ['']", "literals.0: '': String should have at least 1 character."),
        ("literals: [x], patern: y", "patern: unknown key. Did you mean 'pattern'?"),
        ("literals: x", "literals: 'x': should be a valid list."),
    ],
)
def test_a_broken_rule_is_refused_with_its_line_and_id(tmp_path, rule, words):
    rest = f", {rule}" if rule else ""
    [problem] = problems(
        tmp_path, f"rules:\n  - {{id: fine, action: allow, literals: [a]}}\n  - {{id: mine, action: redact{rest}}}\n"
    )
    assert problem.startswith("policy.yaml:4: rule 'mine': ")
    assert words in problem


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    found = problems(
        tmp_path,
        "off: [githb]\npersonal_data: [emial]\nrules:\n"
        "  - {id: github, action: allow, literals: [a]}\n  - {id: x, action: block, literals: [a], replacement: b}\n"
        "  - {id: x, action: allow, pattern: 'b*'}\n",
    )
    assert [problem.partition(": ")[2].partition(". ")[0] for problem in found] == [
        "rule 'github': has the id of a built-in family",
        "rule 'x': has a replacement, which the action block does not write",
        "rule 'x': has the id of an earlier rule",
        "rule 'x': can match without a limit, and 512 are the most",
        "personal_data: no such family: 'emial'",
        "off: no such family: 'githb'",
    ]
    assert found[-1].endswith("Did you mean 'github'?")


def test_a_file_without_a_version_or_with_another_format_is_refused(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("schema_version: 2\n")
    with pytest.raises(UserError) as caught:
        policy.load(path)
    assert len(caught.value.problems) == 2
    assert "policy.yaml:1: schema_version: 2: should be 1." in str(caught.value)
    assert "version: required and not given" in str(caught.value)


def test_more_letters_than_there_are_bytes_are_refused(tmp_path):
    letters = "".join(chr(0x4E00 + n) for n in range(130))
    [problem] = problems(tmp_path, f"rules:\n  - {{id: mine, action: allow, literals: [{letters}]}}\n")
    assert "rule 'mine': more than 127 different characters beyond ASCII in one policy." in problem


# --- patterns: RE2 gives what Python's re gives ----------------------------------------------------------------------

ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", "é", "[à-ö]", "x", r"\.", "-"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{1,3}", "{2}", "{0,2}?", "{1,4}?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"(?i:{text})"),
        inner.map(lambda text: rf"\b{text}"),
        inner.map(lambda text: rf"{text}\b"),
        inner.map(lambda text: rf"(?:{text}$|{text}x)"),
    ),
    max_leaves=6,
)
TEXTS = st.text(st.sampled_from("abxAB12 .-é\nö"), max_size=12)


def compiled(source: str, alphabet: Alphabet):
    try:
        return compile_pattern(source, alphabet=alphabet, max_width=512)
    except Unfit:
        return None


@settings(max_examples=150, deadline=None)
@given(PATTERNS, TEXTS)
def test_a_pattern_matches_where_python_says(source, text):
    """Python's own engine, with ASCII classes and letters; `$` is the very end, which Python writes as \\Z."""
    alphabet = Alphabet()
    found = compiled(source, alphabet)
    if found is None:
        return
    ours = found.whole.search(alphabet.view(text))
    theirs = re.compile(source.replace("$", r"\Z").replace(r"\w", "[a-zA-Z0-9_]").replace(r"\b", r"(?a:\b)")).search(
        text
    )
    if not theirs or "(?i:" not in source:  # É and é: Python's re and ours agree on letters of ASCII
        assert (ours and ours.span()) == (theirs and theirs.span())


@settings(max_examples=300, deadline=None)
@given(PATTERNS, TEXTS, TEXTS)
def test_what_is_not_open_cannot_be_changed_by_more_text(source, text, more):
    alphabet = Alphabet()
    found = compiled(source, alphabet)
    if found is None or not text:
        return
    view, longer = alphabet.view(text), alphabet.view(text + more)
    for start in range(len(view)):
        if not found.is_open(view, start):
            before, after = found.match(view, start), found.match(longer, start)
            assert (before and before.span()) == (after and after.span())
    first = found.first_open(view, 0)
    assert not any(found.is_open(view, start) for start in range(first))


# --- the table -------------------------------------------------------------------------------------------------------


def sample(tree, draw: random.Random, ignore_case: bool) -> str:
    """A text that the parsed pattern `tree` matches."""
    text = ""
    for op, argument in tree:
        name = str(op)
        if name == "LITERAL":
            letter = chr(argument)
            text += draw.choice([letter.lower(), letter.upper()]) if ignore_case else letter
        elif name in ("IN", "NOT_LITERAL", "ANY"):
            one = re._compiler.compile(re._parser.SubPattern(tree.state, [(op, argument)]), tree.state.flags)
            text += draw.choice([letter for letter in map(chr, range(32, 127)) if one.match(letter)])
        elif name == "BRANCH":
            text += sample(draw.choice(argument[1]), draw, ignore_case)
        elif name == "SUBPATTERN":
            text += sample(argument[3], draw, ignore_case)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            lowest, highest, inner = argument
            text += "".join(
                sample(inner, draw, ignore_case) for _ in range(min(highest, lowest + draw.choice([0, 0, 1, 3])))
            )
        else:
            assert name == "AT"
    return text


@pytest.mark.parametrize("family", SECRETS, ids=lambda family: f"{family.id}-{family.meaning[:20]}")
def test_every_match_of_a_family_begins_at_one_of_its_anchors(family, draw):
    """Or so many characters before it; else a secret would pass unseen."""
    tree = re._parser.parse(family.pattern, re.IGNORECASE if family.ignore_case else 0)
    for _ in range(20):
        text = sample(tree, draw, family.ignore_case)
        assert re.match(family.pattern, text, re.IGNORECASE if family.ignore_case else 0), "the sampler is wrong"
        found = text[family.offset :].lower() if family.ignore_case else text[family.offset :]
        assert found.startswith(family.anchors), text


def test_a_name_in_a_table_means_something():
    assert all(family.meaning for family in (*SECRETS, *PERSONAL))
    assert not {family.id for family in SECRETS} & {family.id for family in PERSONAL}
