"""Capacity traces: both formats, the mapping of names, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spotserve.cloud.traces import Trace, TraceEvent, instance_seconds, read_trace
from spotserve.errors import SpecError


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.txt"
    path.write_text(text, encoding="utf-8")
    return path


def ours(*events: dict[str, object]) -> str:
    """A trace in our format with one event per line, the first on line 3."""
    body = ",\n".join(json.dumps(event) for event in events)
    return f'{{"format_version": "0.1",\n"events": [\n{body}\n]}}\n'


def counts(trace: Trace) -> list[tuple[float, int]]:
    """(time, instances) at every change, an instance being gone at its deadline."""
    changes: dict[float, int] = {}
    for event in trace.events:
        if event.kind == "add":
            changes[event.at_s] = changes.get(event.at_s, 0) + len(event.instances)
        elif event.kind in {"notice", "kill"}:
            gone_at_s = event.at_s + (event.grace_s or 0)
            changes[gone_at_s] = changes.get(gone_at_s, 0) - len(event.instances)
    total, steps = 0, []
    for at_s in sorted(changes):
        total += changes[at_s]
        steps.append((at_s, total))
    return steps


ADD_A = '[0, "add", {"nodes": ["a"]}]\n'


def test_reads_our_format(tmp_path: Path) -> None:
    """Tests that every kind of event arrives in order, with names mapped to the next ids of ours."""
    text = ours(
        {"at_s": 0, "kind": "add", "instances": ["east", "west"]},
        {"at_s": 5, "kind": "load", "rps": 2.5},
        {"at_s": 10, "kind": "notice", "instances": ["i1", "west"], "grace_s": 4},
        {"at_s": 20, "kind": "add", "count": 1},
        {"at_s": 30, "kind": "kill", "count": 2},
    )
    expected = (
        TraceEvent(at_s=0, kind="add", instances=("i2", "i3")),
        TraceEvent(at_s=5, kind="load", rps=2.5),
        TraceEvent(at_s=10, kind="notice", instances=("i1", "i3"), grace_s=4),
        TraceEvent(at_s=20, kind="add", instances=("i4",)),
        TraceEvent(at_s=30, kind="kill", instances=("i0", "i2")),
    )
    assert Trace(name="trace", events=expected) == read_trace(write(tmp_path, text), living=2)


def test_notice_has_thirty_seconds_of_grace(tmp_path: Path) -> None:
    """Tests that a notice without grace_s gets the paper's grace period."""
    trace = read_trace(write(tmp_path, ours({"at_s": 1, "kind": "notice", "count": 1})), living=1)
    assert (TraceEvent(at_s=1, kind="notice", instances=("i0",), grace_s=30.0),) == trace.events


def test_reads_the_papers_format(tmp_path: Path) -> None:
    """Tests that comments are skipped, events act 30 s early, and a removal is a notice with its deadline kept."""
    text = (
        '#[0, "add", {"nodes": ["x"]}]\n'
        '[0, "add", {"nodes": ["node-0", "node-1"]}]\n\n'
        '[20000, "remove", {"nodes": ["node-0"]}]\n'
        '[60000, "other", {"nodes": [], "required_tpt": 0.6}]\n'
        '[90000, "remove", {"nodes": ["node-1"], "required_tpt": 0.2}]\n'
        '[95000, "DONE", {"nodes": []}]\n'
    )
    expected = (
        TraceEvent(at_s=0, kind="add", instances=("i0", "i1")),
        TraceEvent(at_s=0, kind="notice", instances=("i0",), grace_s=20),
        TraceEvent(at_s=30, kind="load", rps=0.6),
        TraceEvent(at_s=60, kind="notice", instances=("i1",), grace_s=30),
        TraceEvent(at_s=60, kind="load", rps=0.2),
    )
    assert Trace(name="trace", events=expected, end_s=95) == read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "removals", "end_s"),
    [
        ("trace_0304_real", {600: 9, 1200: 8}, 1320),
        ("trace_0506_real", {120: 8, 240: 7}, 1020),
        ("trace_0304_ondemand", {600: 9, 1200: 8}, 1380),
        ("trace_0506_ondemand", {120: 8, 240: 9}, 720),
    ],
)
def test_published_counts(shared_data: Path, name: str, removals: dict[float, int], end_s: float) -> None:
    """Tests that each removal of the paper's traces leaves the published instance count at its stamp."""
    trace = read_trace(shared_data / "spotserve-paper/traces/availability" / f"{name}.txt")
    found = dict(counts(trace))
    assert removals == {at_s: found[at_s] for at_s in removals}
    assert end_s == trace.end_s


@pytest.mark.parametrize(("name", "minutes", "acquired"), [("trace_0304_real", 195, 4), ("trace_0506_real", 133, 2)])
def test_published_bills(shared_data: Path, name: str, minutes: int, acquired: int) -> None:
    """Tests that A_S and B_S have the billed instance-minutes: acting early, an addition has half a minute more."""
    trace = read_trace(shared_data / "spotserve-paper/traces/availability" / f"{name}.txt")
    assert trace.end_s is not None
    assert minutes + acquired / 2 == instance_seconds(trace, until_s=trace.end_s) / 60


def test_every_published_trace_is_accepted(shared_data: Path) -> None:
    """Tests that all published availability traces are read, in order of time and without an id used twice."""
    paths = sorted((shared_data / "spotserve-paper/traces/availability").glob("*.txt"))
    assert len(paths) >= 20
    for path in paths:
        events = read_trace(path).events
        times = [event.at_s for event in events]
        added = [instance for event in events if event.kind == "add" for instance in event.instances]
        assert sorted(times) == times, path.name
        assert [f"i{index}" for index in range(len(added))] == added, path.name


ADD = {"at_s": 10, "kind": "add", "count": 1}
NOTICE = {"at_s": 1, "kind": "notice", "instances": ["i0"], "grace_s": 2}


@pytest.mark.parametrize(
    ("events", "line", "words"),
    [
        ([ADD, {"at_s": 9, "kind": "add", "count": 1}], 4, "before the event above"),
        ([{"at_s": 1, "kind": "kill", "instances": ["i7"]}], 3, "'i7', which is not there"),
        ([{"at_s": 1, "kind": "kill", "count": 1}, {"at_s": 2, "kind": "kill", "count": 1}], 4, "1 instances of 0"),
        ([{"at_s": 1, "kind": "add", "instances": ["i0"]}], 3, "'i0', which is living"),
        ([{"at_s": 1, "kind": "add", "instances": ["i9"]}], 3, "the next id is i1"),
        ([{"at_s": 1, "kind": "add", "instances": ["a", "a"]}], 3, "'a', which is living"),
        ([NOTICE, {"at_s": 3, "kind": "kill", "instances": ["i0"]}], 4, "not there"),
        ([NOTICE, {"at_s": 3, "kind": "add", "instances": ["i0"]}], 4, "never returns"),
        ([ADD, {"at_s": -1, "kind": "add", "count": 1}], 4, "greater than or equal to 0"),
        ([ADD, {"at_s": 11, "kind": "add", "count": 0}], 4, "greater than or equal to 1"),
        ([ADD, {"at_s": 11, "kind": "vanish", "count": 1}], 4, "'add', 'notice', 'kill' or 'load'"),
        ([ADD, {"at_s": 11, "kind": "add"}], 4, "either count or instances"),
        ([ADD, {"at_s": 11, "kind": "load"}], 4, "a load has rps"),
        ([ADD, {"at_s": 11, "kind": "kill", "count": 1, "grace_s": 3}], 4, "kill has no grace_s"),
        ([ADD, {"at_s": 11, "kind": "add", "count": 1, "colour": "red"}], 4, "Extra inputs"),
        ([ADD, {"at_s": "soon", "kind": "add", "count": 1}], 4, "valid number"),
    ],
)  # fmt: skip
def test_refuses_the_impossible_in_our_format(
    tmp_path: Path, events: list[dict[str, object]], line: int, words: str
) -> None:
    """Tests that each impossible event is refused with the line it stands on."""
    path = write(tmp_path, ours(*events))
    with pytest.raises(SpecError) as caught:
        read_trace(path, living=1)
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[0, "add", {"nodes": ["a"]}]\n[-1, "add", {"nodes": ["b"]}]', 2, "not between 0"),
        ('[0, "add", {"nodes": ["a"]}]\n[NaN, "add", {"nodes": ["b"]}]', 2, "NaN is not a number"),
        ('[90000, "add", {"nodes": ["a"]}]\n[80000, "add", {"nodes": ["b"]}]', 2, "before the event above"),
        ('[0, "add", {"nodes": ["a"]}]\n\n[1, "remove", {"nodes": ["b"]}]', 3, "'b', which is not there"),
        ('[0, "add", {"nodes": ["a"]}]\n[1, "add", {"nodes": ["a"]}]', 2, "'a', which is living"),
        (ADD_A + '[1000, "remove", {"nodes": ["a"]}]\n[90000, "add", {"nodes": ["a"]}]', 3, "never returns"),
        ('[0, "add", {"nodes": ["a"]}]\n[1, "grow", {"nodes": ["b"]}]', 2, "operation 'grow'"),
        ('[0, "add", {"nodes": "a"}]', 1, "not a list of names"),
        ('[0, "add"]', 1, "is not [time_ms"),
        ('[true, "add", {"nodes": ["a"]}]', 1, "time True is no number"),
        ('[0, "add", {"nodes": ["a"], "zone": 1}]', 1, "'zone'"),
        ('[0, "other", {"nodes": [], "required_tpt": -1}]', 1, "required_tpt -1"),
        ('[0, "other", {"nodes": ["a"]}]', 1, "changes no membership"),
        ("what is this", 1, "not JSON"),
        ('[0, "add", {"nodes": ["a"], "nodes": ["b"]}]', 1, "is there twice"),
    ],
)  # fmt: skip
def test_refuses_the_impossible_in_the_papers_format(tmp_path: Path, text: str, line: int, words: str) -> None:
    """Tests that garbage and impossible lines are refused with their number."""
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read_trace(path)
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no event"),
        ("# nothing\n", "has no event"),
        ('{"format_version": "0.1",\n"events": [', ":2: not JSON"),
        ('{"format_version": "9.0", "events": []}', "format_version"),
        ('{"format_version": "0.1", "events": []}', "has no event"),
        ('{"metadata": {"gap_seconds": 300}, "data": [1]}', "counts of a zone"),
        ('{"format_version": "0.1", "events": [{"at_s": NaN, "kind": "add", "count": 1}]}', "NaN is not a number"),
        ("[" * 100_000, ":1: "),
    ],
)
def test_refuses_documents(tmp_path: Path, text: str, words: str) -> None:
    """Tests that a broken, empty or newer document is refused in one line."""
    with pytest.raises(SpecError) as caught:
        read_trace(write(tmp_path, text))
    assert words in caught.value.message


def test_refuses_what_is_no_text(tmp_path: Path) -> None:
    """Tests that a missing and a binary file are refused."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in ((tmp_path / "none", "cannot be read"), (binary, "not UTF-8")):
        with pytest.raises(SpecError, match=words):
            read_trace(path)


def test_second_notice_only_shortens(tmp_path: Path) -> None:
    """Tests that a longer second notice leaves the first deadline standing: the instance is gone at it."""
    text = ours(
        {"at_s": 0, "kind": "notice", "instances": ["i0"], "grace_s": 5},
        {"at_s": 1, "kind": "notice", "instances": ["i0"], "grace_s": 100},
        {"at_s": 6, "kind": "kill", "instances": ["i0"]},
    )
    with pytest.raises(SpecError, match="not there"):
        read_trace(write(tmp_path, text), living=1)
