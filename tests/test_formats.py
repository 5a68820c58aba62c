"""Text is read by lines, paragraphs or files, and nothing in it is lost."""

from whole_files import read


def test_nul_is_bad_text_with_its_line(tmp_path):
    data = b"a\n\nb\nc\0\n\nd\n"
    bad = (4, "! raw NUL byte: at column 2")
    assert read(tmp_path / "a.txt", data) == [(1, "a"), (3, "b"), bad, (6, "d")]
    assert read(tmp_path / "a.txt", data, unit="paragraph") == [(1, "a"), bad, (6, "d")]
    assert read(tmp_path / "a.txt", data, unit="file") == [bad]


def test_whitespace_of_any_script_is_blank(tmp_path):
    assert read(tmp_path / "a.txt", "\u3000\n \x0b\na\n".encode()) == [(3, "a")]
