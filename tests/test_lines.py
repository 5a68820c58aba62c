"""Lines are those of the file, whatever packs or encodes it, and damage is never mistaken for an end."""

import codecs
import gzip
import io
import tracemalloc

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import lines, sources
from codex_accel.errors import UserError
from codex_accel.lines import Reading
from codex_accel.schema import Source


def pack(data: bytes, compression: str) -> bytes:
    return gzip.compress(data) if compression == "gz" else pyarrow.compress(data, codec="zstd", asbytes=True)


def unit_of(path, data: bytes, **options):
    path.write_bytes(data)
    [raw] = sources.resolve([Source(path=str(path), **options)], config_problem=lambda key, what: f"{key}: {what}")
    return sources.whole(raw)


def listed(found) -> list:
    """(number, line), or None in place of one that is too long."""
    return [(number, line if isinstance(line, bytes) else None) for number, line in found]


def read(path, data: bytes, *, limit: int = 1 << 20, **options):
    return listed(lines.physical(unit_of(path, data, **options), Reading(limit)))


def failure(path, data: bytes, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, data, **options)
    return str(caught.value).removeprefix(str(path))


# --- compression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("name", ["udhr_20lang.txt", "botchan.txt"])
def test_packed_file_has_the_lines_of_the_plain_one(shared, tmp_path, compression, name):
    data = (shared / "text" / name).read_bytes()
    plain = read(tmp_path / "a.txt", data)
    assert read(tmp_path / f"a.txt.{compression}", pack(data, compression)) == plain
    assert len(plain) > 100


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_several_members_are_one_text(tmp_path, compression):
    data = pack(b"a\nb", compression) + pack(b"c\n", compression)
    assert read(tmp_path / f"a.txt.{compression}", data) == [(1, b"a\n"), (2, b"bc\n")]


@pytest.mark.security
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_cut_packed_file_is_told_wherever_it_is_cut(tmp_path, compression):
    """The package zstandard ends without an error here."""
    packed = pack(bytes(range(48, 91)) * 20 + b"\n", compression)
    for stop in range(1, len(packed)):
        told = failure(tmp_path / f"a.txt.{compression}", packed[:stop])
        assert "file is cut off before byte" in told or "file is damaged before byte" in told, (stop, told)
        assert "fetch or make the file again" in told


@pytest.mark.security
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_garbage_behind_or_instead_of_packed_data_is_told(tmp_path, compression):
    path = tmp_path / f"a.txt.{compression}"
    assert "damaged" in failure(path, pack(b"a\n", compression) + b"garbage")
    assert "damaged" in failure(path, b"not packed at all\n")


@pytest.mark.security
def test_flipped_bit_in_gzip_is_told_with_its_place(tmp_path):
    packed = bytearray(gzip.compress(b"a\n" * 99, compresslevel=0))
    packed[-30] ^= 1
    told = failure(tmp_path / "a.txt.gz", bytes(packed))
    assert told.startswith(":")
    assert f"the gz file is damaged before byte {len(packed)} (CRC check failed" in told


def test_packed_nothing_is_told(tmp_path):
    assert failure(tmp_path / "a.txt.gz", gzip.compress(b"")) == (
        ": is empty once it is unpacked. Remove it or name others."
    )


@pytest.mark.security
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_memory_is_bounded_for_a_long_line_that_is_packed_small(tmp_path, compression):
    """200 MB in one line, packed to a thousandth."""
    path = tmp_path / f"a.txt.{compression}"
    block = b"x" * (1 << 20)
    if compression == "gz":
        with gzip.open(path, "wb", compresslevel=1) as stream:
            for _ in range(200):
                stream.write(block)
            stream.write(b"\nb\n")
    else:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            for _ in range(200):
                stream.write(block)
            stream.write(b"\nb\n")
    [raw] = sources.resolve([Source(path=str(path))], config_problem=lambda key, what: f"{key}: {what}")
    unit = sources.whole(raw)
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    found, most = [], 0
    for item in lines.physical(unit, Reading(1 << 20)):
        found += listed([item])
        most = max(most, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, None), (2, b"b\n")]
    assert peak < 12 << 20
    assert most < 16 << 20


# --- encodings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037", "iso2022_jp"])
def test_transcoded_lines_are_those_of_utf_8(tmp_path, encoding):
    text = (
        "one\n\r\nähm\nend"
        if encoding == "cp037"
        else "one\n\r\n平和\nend"
        if encoding == "iso2022_jp"
        else "o\n\r\né𝄞\nend"
    )
    found = read(tmp_path / "a.txt", text.encode(encoding), encoding=encoding)
    assert found == list(enumerate(io.BytesIO(text.encode()), 1))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_real_text_in_wide_encoding_equals_utf_8(shared, tmp_path, encoding):
    data = (shared / "text" / "udhr_20lang.txt").read_bytes()
    wide = data.decode().encode(encoding)
    assert read(tmp_path / "b.txt", wide, encoding=encoding) == read(tmp_path / "a.txt", data)


def test_mark_of_a_wide_encoding_is_no_text(tmp_path):
    data = codecs.BOM_UTF16_BE + "a\n".encode("utf-16-be")
    for encoding in ("utf-16", "utf-16-be"):
        assert read(tmp_path / "a.txt", data, encoding=encoding) == [(1, b"a\n")]


def test_wide_encoding_without_a_mark_does_not_guess_the_order(tmp_path):
    told = failure(tmp_path / "a.txt", "a\n".encode("utf-16-be"), encoding="utf-16")
    assert told == ":1: has no byte order mark. Set encoding to utf-16-le or utf-16-be, whichever it is."


@pytest.mark.parametrize("chunk_bytes", [4, 7, 1 << 18])
@pytest.mark.parametrize("bad", [b"\x00\xdc", b"\x00\xd8a\0", b"\x00\xd8", b"a"])
def test_wrong_wide_text_is_located_behind_all_good_lines(tmp_path, monkeypatch, chunk_bytes, bad):
    """A low half alone, a high half alone, a high half at the end, and half a character at the end."""
    monkeypatch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
    good = "a\né\n𝄞".encode("utf-16")
    told = failure(tmp_path / "a.txt", good + bad, encoding="utf-16")
    assert told == f":3: not utf-16 at byte {len(good)} of the text. Convert the file, or set encoding."


# --- chunking -----------------------------------------------------------------------------------------------------


@given(
    pieces=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"x" * 30, "é".encode(), codecs.BOM_UTF8]), min_size=1),
    chunk_bytes=st.integers(1, 40),
    unit_bytes=st.integers(1, 40),
    compression=st.sampled_from(["", ".gz"]),
)
def test_lines_do_not_depend_on_how_the_bytes_come(tmp_path_factory, pieces, chunk_bytes, unit_bytes, compression):
    """Against io.BytesIO, which splits at LF alone; the limit is 20 bytes."""
    data = b"".join(pieces)
    path = tmp_path_factory.mktemp("lines") / f"a.txt{compression}"
    whole = unit_of(path, gzip.compress(data) if compression else data)
    text = data.removeprefix(codecs.BOM_UTF8)
    expected = list(enumerate(io.BytesIO(text), 1)) or [(1, b"")]
    expected = [(n, line if len(line.removesuffix(b"\n").removesuffix(b"\r")) <= 20 else None) for n, line in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK_BYTES", chunk_bytes)
        units = sources.inventory(whole.raw, unit_bytes=unit_bytes).units
        reading = Reading(20)
        assert [item for unit in units for item in listed(lines.physical(unit, reading))] == expected
        assert reading.num_bytes == units[-1].num_bytes
        assert b"".join(lines.chunks(whole, Reading(20))) == text


# --- change -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_change_since_the_inventory_is_told(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    packed = [pack(text, compression[1:]) if compression else text for text in (b"a\nb\n", b"a\nc\n")]
    unit = unit_of(path, packed[0])
    path.write_bytes(packed[1])
    with pytest.raises(UserError, match=r"has changed while it was being read\. Run again"):
        list(lines.physical(unit, Reading(99)))


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_file_cut_short_since_the_inventory_has_changed(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    data = pack(b"a\nb\n" * 99, compression[1:]) if compression else b"a\nb\n" * 99
    unit = unit_of(path, data)
    path.write_bytes(data[:-5])
    with pytest.raises(UserError, match=r"has changed while it was being read\. Run again"):
        list(lines.physical(unit, Reading(99)))


def test_change_while_reading_is_told_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    unit = unit_of(path, b"a" * 99 + b"\n" + b"b\n" * 999_999)
    found = lines.physical(unit, Reading(99))
    assert next(found) == (1, b"a" * 99 + b"\n")
    with open(path, "r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"c")
    with pytest.raises(UserError, match="has changed while it was being read"):
        list(found)


def test_growth_is_told_to_every_unit(tmp_path):
    """What is appended lies behind the last unit, and its digest stays as it was."""
    path = tmp_path / "a.txt"
    units = sources.inventory(unit_of(path, b"a\n" * 9).raw, unit_bytes=6).units
    with open(path, "ab") as stream:
        stream.write(b"b\n")
    assert len(units) == 3
    for unit in units:
        with pytest.raises(UserError, match=r"has changed while it was being read\. Run again"):
            list(lines.physical(unit, Reading(99)))
