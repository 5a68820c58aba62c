"""A YAML value means what it looks like, or is refused with its line."""

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codex_accel.errors import UserError
from codex_accel.yaml_reader import MAX_NODES, Reader, dotted, read_yaml


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(folder: Path, text: str | bytes) -> str:
    """The single problem of a text that cannot be read at all."""
    with pytest.raises(UserError) as caught:
        read_yaml(written(folder, text))
    (problem,) = caught.value.problems
    return problem


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("1:30", "1:30"), ("0x1f", "0x1f"),
        ("2024-01-01", "2024-01-01"), ("=", "="), ("1.2.3", "1.2.3"), ("1e", "1e"), ("_1", "_1"), ("tRue", "tRue"),
        ("'3'", "3"), ('"true"', "true"), ("'.inf'", ".inf"), ("'~'", "~"), ('"1e999"', "1e999"),
        ("true", True), ("True", True), ("FALSE", False), ("false", False),
        ("null", None), ("~", None), ("", None), ("Null", None),
        ("3", 3), ("-7", -7), ("+7", 7), ("010", 10), ("1_000", 1000), ("0", 0),
        ("3e-4", 3e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2.5", -2.5), ("1.5e+3", 1500.0), ("1e5", 100000.0),
        ("[1, no, 3e-4]", [1, "no", 3e-4]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("[]", []), ("{}", {}),
        ("|\n  one\n  two\n", "one\ntwo\n"), (">\n  3\n", "3\n"),
    ],
)  # fmt: skip
def test_scalar_follows_the_core_schema(tmp_path, text, value):
    """Values by hand from YAML 1.2.2, section 10.3.2 (core schema); underscores in numbers are an extension of ours."""
    values, _, problems = read_yaml(written(tmp_path, f"key: {text}"))
    assert problems == []
    assert values == {"key": value}
    assert type(values["key"]) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.inf", "+.INF", ".nan", ".NaN", "1e999", "-1e999", "9" * 400])
def test_non_finite_number_is_refused_with_its_line(tmp_path, text):
    _, _, problems = read_yaml(written(tmp_path, f"a: 1\nb:\n  c: {text}\n"))
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path / 'c.yaml'}:3: b.c = {text}: ")


def test_non_finite_number_stays_what_it_was_for_the_checks_that_follow(tmp_path):
    values, _, _ = read_yaml(written(tmp_path, "[a, b, c, d]: 0\nw: .inf\nx: -.inf\ny: .nan\nz: 1e999"))
    assert (values["w"], values["x"], values["z"]) == (math.inf, -math.inf, math.inf)
    assert math.isnan(values["y"])


# --- places -------------------------------------------------------------------------------------------------------


def test_each_value_knows_its_line(tmp_path):
    values, origins, _ = read_yaml(written(tmp_path, "a: 1\nb:\n  c: [10,\n    20]\n\n  d:\n    - e: 5\n"))
    assert values == {"a": 1, "b": {"c": [10, 20], "d": [{"e": 5}]}}
    lines = {dotted(path): int(origin.rpartition(":")[2]) for path, origin in origins.items() if path}
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.c.0": 3, "b.c.1": 4, "b.d": 6, "b.d.0": 7, "b.d.0.e": 7}


def test_dotted_joins_keys_and_places():
    assert dotted(("sources", 0, "path")) == "sources.0.path"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_duplicate_key_is_refused_with_both_lines(tmp_path):
    path = written(tmp_path, "a:\n  b: 1\n  c: 2\n  b: 3\n")
    values, _, problems = read_yaml(path)
    assert problems == [f"{path}:4: a.b: duplicate key, first given at {path}:2. Remove one of them."]
    assert values == {"a": {"b": 1, "c": 2}}


def test_every_duplicate_key_is_reported(tmp_path):
    _, _, problems = read_yaml(written(tmp_path, "a: 1\na: 2\na: 3\nb: {c: 1, c: 2}\n"))
    assert len(problems) == 3


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system", "!!python/name:os.system", "!!str", "!!int", "!!binary", "!!set", "!own"],
)
@pytest.mark.parametrize("form", ["k: {tag} 3", "k: {tag} [3]", "k: {tag} {{a: 3}}", "{tag} k: 3"])
def test_tag_is_refused_with_its_line(tmp_path, tag, form):
    _, _, problems = read_yaml(written(tmp_path, "first: 1\n" + form.format(tag=tag)))
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path / 'c.yaml'}:2: ")


@pytest.mark.security
def test_python_object_tag_runs_nothing(tmp_path):
    path = written(tmp_path, f"k: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    _, _, problems = read_yaml(path)
    assert len(problems) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.security
def test_alias_bomb_is_refused(tmp_path):
    """The "billion laughs" of ten anchors, each nine times the one before: 9**10 values if expanded."""
    lines = ["a0: &a0 x"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11)]
    assert f"more than {MAX_NODES} values" in refusal(tmp_path, "\n".join(lines))


@pytest.mark.security
@pytest.mark.parametrize("text", ["a: &x [1, *x]", "a: &x {b: *x}", "&x a: &y {b: [*y]}"])
def test_self_containing_alias_is_refused(tmp_path, text):
    assert f"{tmp_path / 'c.yaml'}:1: an alias that contains itself" in refusal(tmp_path, text)


def test_alias_that_does_not_contain_itself_is_read(tmp_path):
    values, _, problems = read_yaml(written(tmp_path, "a: &x {b: 1}\nc: [*x, *x]\n"))
    assert (values, problems) == ({"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}, [])


@pytest.mark.security
@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 600, "a: " + "{b: " * 600, f"x: &a {'[' * 300 + ']' * 300}\ny: {'[' * 300}*a{']' * 300}"],
    ids=["lists", "mappings", "through an alias"],
)
def test_deep_nesting_is_refused(tmp_path, text):
    assert "nested too deeply" in refusal(tmp_path, text)


@pytest.mark.parametrize("escape", [r"\UFFFFFFFF", r"\U00110000"])
def test_escape_beyond_unicode_is_refused(tmp_path, escape):
    assert "is not valid YAML" in refusal(tmp_path, f'a: "{escape}"')


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1", 1), ("a: 1\n b: 2", 2), ("a: 1\n\tb: 2", 2), ("a: *nothing", 1), ("a: 1\n---\nb: 2", 2), ("a: '1", 1)],
)
def test_broken_yaml_is_refused_with_its_line(tmp_path, text, line):
    problem = refusal(tmp_path, text)
    assert problem.startswith(f"{tmp_path / 'c.yaml'}:{line}: is not valid YAML (")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("text", "name"), [("- a\n- b\n", "list"), ("just text", "str"), ("3", "int"), ("", "NoneType")]
)
def test_top_level_must_be_a_mapping(tmp_path, text, name):
    assert refusal(tmp_path, text) == f"{tmp_path / 'c.yaml'}:1: must be a mapping of keys, not {name}."


@pytest.mark.parametrize("key", ["[a, b]", "{a: b}", "? [a]\n"])
def test_key_that_is_not_text_is_refused(tmp_path, key):
    _, _, problems = read_yaml(written(tmp_path, f"{key}: 1"))
    assert problems == [f"{tmp_path / 'c.yaml'}:1: a key must be plain text."]


@pytest.mark.parametrize("data", [b"a: \xff", b"a: \xc3", b"\xff\xfea\x00", b"a: \xed\xa0\x80"])
def test_file_that_is_not_utf8_is_refused(tmp_path, data):
    problem = refusal(tmp_path, data)
    assert str(tmp_path / "c.yaml") in problem
    assert "UTF-8" in problem


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    values, origins, problems = read_yaml(written(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n"))
    assert (values, problems) == ({"a": 1, "b": 2}, [])
    assert origins["b",].endswith(":2")


def test_missing_file_names_its_near_neighbour(tmp_path):
    (tmp_path / "train.yaml").touch()
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "trian.yaml")
    assert caught.value.problems == [
        f"command line: --config {tmp_path / 'trian.yaml'}: no such file. Did you mean '{tmp_path / 'train.yaml'}'?"
    ]


def test_folder_instead_of_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file\. Give the path"):
        read_yaml(tmp_path / "none" / "c.yaml")


# --- whatever the text --------------------------------------------------------------------------------------------

YAML_PIECES = st.sampled_from(
    ["a", "b", ": ", "\n", "- ", "  ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!", "!", "|", ">", "'", '"', "\\", "#",
     "? ", "%YAML 1.2\n", "---\n", "...\n", "<<", "~", "1", "1e9", ".inf", "\\u", "\\x", "\t", "\x85", "\0",
     "\ufeff", "é"]
)  # fmt: skip


@pytest.mark.security
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.lists(YAML_PIECES, max_size=20).map("".join), st.text(max_size=40)))
def test_any_text_is_a_mapping_or_a_user_error(tmp_path, text):
    problems: list[str] = []
    try:
        values, _, _ = read_yaml(written(tmp_path, text.encode("utf-8", "surrogatepass")))
        assert isinstance(values, dict)
    except UserError as error:
        problems = error.problems
    assert not any("\n" in problem for problem in problems)


@pytest.mark.security
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_mapping_or_a_user_error(tmp_path, data):
    try:
        values, _, _ = read_yaml(written(tmp_path, data))
    except UserError:
        return
    assert isinstance(values, dict)


@settings(max_examples=100)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_as_python_writes_it_is_read_back_exactly(number):
    reader = Reader("-", with_lines=False)
    assert reader.read(repr(number)) == number
    assert reader.problems == []
