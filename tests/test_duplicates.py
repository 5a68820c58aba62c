"""Equal records are found and counted as brute force does, whatever the number of units and ranges."""

import hashlib
import io
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import duplicates

NAMES = ["train", "test"]
# For each unit, records as (content, split); few contents, so that most are repeated.
UNITS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 1, duplicates.REMOVED])), max_size=12), max_size=4
)


def id_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def write_runs(folder, units) -> list:
    """Runs of at most three entries; the line of record n is n + 1."""
    for unit, found in enumerate(units):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(duplicates, "RUN_ENTRIES", 3)
            runs = duplicates.RunWriter(folder, unit)
            for line, (content, number) in enumerate(found, 1):
                runs.add([id_of(content)], [line], [number])
            runs.close()
    return sorted(folder.glob("*.run"))


def count(folder, units):
    listing = io.StringIO()
    members, facts = duplicates.count(
        write_runs(folder, units), NAMES, place=lambda unit, line: f"{unit}:{line}", listing=listing
    )
    return {name: member.facts() for name, member in members.items()}, facts, listing.getvalue().splitlines()


@pytest.fixture(params=[40, 200, 1 << 20], ids=["a range an entry", "some ranges", "one range"])
def range_bytes(request, monkeypatch):
    monkeypatch.setattr(duplicates, "RANGE_BYTES", request.param)


@settings(max_examples=40)
@given(units=UNITS)
@pytest.mark.usefixtures("range_bytes")
def test_counts_are_those_of_brute_force(tmp_path_factory, units):
    members, facts, lines = count(tmp_path_factory.mktemp("runs"), units)
    records = [record for unit in units for record in unit]
    per_split = [[id_of(content) for content, number in records if number == split] for split in (0, 1)]
    for split, name in enumerate(NAMES):
        mine, others = per_split[split], set(per_split[1 - split])
        assert members[name] == {
            "num_records": len(mine),
            "num_duplicates": len(mine) - len(set(mine)),
            "num_shared": sum(id_ in others for id_ in mine),
            "members_sha256": hashlib.sha256(b"".join(sorted(mine))).hexdigest(),
        }
    sizes = Counter(content for content, _ in records)
    assert facts["num_groups"] == len(lines) == sum(size > 1 for size in sizes.values())
    assert facts["num_duplicates"] == sum(size - 1 for size in sizes.values())
    assert facts["num_removed"] == sum(number == duplicates.REMOVED for _, number in records)
    assert facts["num_shared"] == sum(member["num_shared"] for member in members.values())


@settings(max_examples=40)
@given(units=UNITS)
def test_listing_names_every_place_of_each_repeated_content(tmp_path_factory, units):
    _, _, lines = count(tmp_path_factory.mktemp("runs"), units)
    places: dict[str, list[str]] = {}
    for unit, found in enumerate(units):
        for line, (content, _) in enumerate(found, 1):
            places.setdefault(id_of(content).hex(), []).append(f"{unit}:{line}")
    listed = {line["record_id"]: line["places"] for line in map(json.loads, lines)}
    assert listed == {id_: found for id_, found in places.items() if len(found) > 1}


def test_largest_groups_come_first(tmp_path):
    _, facts, _ = count(tmp_path, [[(1, 0)] * 3 + [(2, 0)] * 5, [(2, 1), (3, 0), (3, 0)]])
    assert [(group["count"], group["splits"]) for group in facts["largest"]] == [
        (6, ["train", "test"]), (3, ["train"]), (2, ["train"]),
    ]  # fmt: skip


@settings(max_examples=40)
@given(units=UNITS)
@pytest.mark.usefixtures("range_bytes")
def test_first_of_each_content_is_kept(tmp_path_factory, units):
    runs = write_runs(tmp_path_factory.mktemp("runs"), units)
    gone = {(unit, int(i)) for unit, indices in duplicates.superfluous(runs, prefer_last_split=False) for i in indices}
    seen, expected = set(), set()
    for unit, found in enumerate(units):
        for index, (content, _) in enumerate(found):
            (expected if content in seen else seen).add((unit, index) if content in seen else content)
    assert gone == expected


def test_last_split_keeps_what_training_gives_away(tmp_path):
    """One content in train twice and in test twice: the first of test stays."""
    runs = write_runs(tmp_path, [[(1, 0), (1, 1)], [(1, 1), (1, 0), (2, 0)]])
    gone = [(unit, indices.tolist()) for unit, indices in duplicates.superfluous(runs, prefer_last_split=True)]
    assert gone == [(0, [0]), (1, [0, 1])]


def test_entries_come_back_in_the_order_of_the_records(tmp_path):
    units = [[(n * 7 % 10, n % 2) for n in range(10)], [], [(1, 0)]]
    write_runs(tmp_path, units)
    for unit, found in enumerate(units):
        entries = [entry for run in duplicates.read_unit(tmp_path, unit) for entry in run]
        assert [(int(e["index"]), int(e["line"]), int(e["split"])) for e in entries] == [
            (n, n + 1, number) for n, (_, number) in enumerate(found)
        ]
        heads = [int.from_bytes(id_of(content)[:8], "big") for content, _ in found]
        assert [int(entry["high"]) for entry in entries] == heads
        assert duplicates.num_entries(tmp_path, unit) == len(found)
