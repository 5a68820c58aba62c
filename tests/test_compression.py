"""Compressors are measured as their own libraries define it."""

import lzma
import subprocess

import pytest

from codex_accel.compression import compressed_bits_per_byte


@pytest.mark.parametrize(("name", "command"), [("zlib -9", ["gzip", "-9nc"]), ("lzma", ["xz", "-6c", "--check=crc64"])])
def test_together_is_what_the_command_line_tools_need(shared, name, command):
    """xz -6 writes the same file; GNU gzip -9 is another implementation of deflate, so it comes within 1 %."""
    data = (shared / "text" / "udhr_20lang.txt").read_bytes()
    size = len(subprocess.run(command, input=data, capture_output=True, check=True).stdout)
    found = compressed_bits_per_byte([data.decode()])[name]["together"] * len(data) / 8
    assert found == pytest.approx(size, rel=1e-2 if name == "zlib -9" else 0)


def test_each_alone_sums_the_sizes_and_together_joins_the_texts():
    """ "a" takes 9 bytes with zlib (RFC 1950: 2 header, 3 deflate, 4 Adler-32), "aa" 10 at level 9, twice "a" so 18."""
    found = compressed_bits_per_byte(["a", "a"])
    assert found["zlib -9"] == {"each_alone": 8 * 18 / 2, "together": 8 * 10 / 2}
    assert found["lzma"]["each_alone"] == 8 * 2 * len(lzma.compress(b"a")) / 2


def test_bytes_are_those_of_utf_8():
    two_bytes, one_byte = (compressed_bits_per_byte([text])["lzma"]["together"] for text in ("éé", "aaaa"))
    assert two_bytes == pytest.approx(one_byte, rel=0.1)


def test_repeated_text_is_cheaper_together(shared):
    lines = (shared / "text" / "udhr_20lang.txt").read_text().splitlines()[:200]
    for values in compressed_bits_per_byte([*lines, *lines]).values():
        assert values["together"] < values["each_alone"] / 2


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_has_no_rate(texts):
    with pytest.raises(ValueError, match="no bytes"):
        compressed_bits_per_byte(texts)
