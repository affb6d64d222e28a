"""Workloads from the files of others: what they hold, and everything that is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from spotserve.errors import SpecError
from spotserve.sim.workloads import (
    Arrival,
    arrival_rates,
    azure_requests,
    mooncake_requests,
    our_requests,
    paper_requests,
    read_workload,
    workload_json,
)


@pytest.mark.parametrize(
    ("name", "count", "rate_rps", "cv"),
    [
        ("query_tpt0.35_cv6", 1024, 0.350, 0.0457),
        ("query_realAr_cv6", 681, 0.597, 0.098),
        ("query_tpt0.2_cv6", 1024, 0.2, 0.035),
        ("query6144_tpt1.5_cv6", 6144, 1.5, 0.094),
    ],
)
def test_the_papers_files_have_the_measured_statistics(
    shared_data: Path, name: str, count: int, rate_rps: float, cv: float
) -> None:
    """Tests that the files called cv6 are read whole and have the CV below 0.1 that was measured on them."""
    path = shared_data / "spotserve-paper/traces/workload" / f"{name}.txt"
    workload = read_workload(path.read_bytes(), where=str(path))
    assert (name, count) == (workload.name, len(workload.arrivals))
    assert math.isclose(rate_rps, workload.rate_rps, rel_tol=0.005)
    assert math.isclose(cv, workload.cv, abs_tol=0.0006)
    assert {(512, 128)} == {(each.prompt_tokens, each.output_tokens) for each in workload.arrivals}
    assert "128 output tokens each" in workload.notes[0]


def test_every_published_request_file_is_accepted(shared_data: Path) -> None:
    """Tests that all request files of the artifact are read, and written in our format they stay the same."""
    paths = sorted((shared_data / "spotserve-paper/traces/workload").glob("query*.txt"))
    assert len(paths) >= 30
    for path in paths:
        workload = read_workload(path.read_bytes(), where=str(path))
        assert workload == our_requests(workload_json(workload).encode(), where="again.json"), path.name


def test_the_papers_rates(shared_data: Path) -> None:
    """Tests that the rescaled MAF segment has 19 rates and as many requests as the file drawn from it."""
    path = shared_data / "spotserve-paper/traces/workload/arrival-rates.csv"
    curve = arrival_rates(path.read_bytes(), where=str(path))
    assert 681 == round(curve.expected(19 * 60.0))
    assert math.isclose(0.58596315, curve.expected(60.0) / 60.0)


def test_azure(shared_data: Path) -> None:
    """Tests that the hour of Azure requests is read whole, from 0 and in order, with its token counts."""
    path = shared_data / "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
    workload = read_workload(path.read_bytes(), where=str(path))
    assert 19_366 == len(workload.arrivals)
    assert Arrival(0.0, 374, 44) == workload.arrivals[0]
    assert (22_361_870, 4_088_665) == workload.tokens
    assert math.isclose(3501.721937, workload.duration_s)
    assert [each.at_s for each in workload.arrivals] == sorted(each.at_s for each in workload.arrivals)


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_lines() -> None:
    """Tests fractions of every length, the zone of the 2024 files, silent answers, and rows out of order."""
    text = (
        "\ufeff" + HEADER + "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2024-02-29 00:00:00+00:00,1,0\n"
        "2023-11-16 18:15:47,5,6\n"
    )
    workload = azure_requests(text.encode(), where="a/azure.csv")
    assert "azure" == workload.name
    assert [(374, 44), (5, 6), (1, 1)] == [(each.prompt_tokens, each.output_tokens) for each in workload.arrivals]
    assert math.isclose(0.31941, workload.arrivals[1].at_s)
    assert (
        "time counts from the first request",
        "1 requests of no output token have 1",
        "requests out of order were sorted",
    ) == workload.notes


def mooncake_line(timestamp: object, prompt: object = 6758, output: object = 500, extra: str = "") -> str:
    fields = f'"timestamp": {timestamp}, "input_length": {prompt}, "output_length": {output}'
    return f'{{{fields}, "hash_ids": [0, 1, 2]{extra}}}'


def test_mooncake() -> None:
    """Tests that JSON lines of timestamps in milliseconds are read, sorted, and the lost prefixes are told."""
    text = "\n".join([mooncake_line(0), mooncake_line(3000, 10, 0), "", mooncake_line(1500, 20, 30)])
    workload = read_workload(text.encode(), where="conversation_trace.jsonl")
    assert (Arrival(0.0, 6758, 500), Arrival(1.5, 20, 30), Arrival(3.0, 10, 1)) == workload.arrivals
    assert "hash_ids" in workload.notes[0]
    assert "1 requests of no output token have 1" == workload.notes[1]
    assert "requests out of order were sorted" == workload.notes[2]


PAPER = "0,1.5,512,0\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (PAPER + "1,1.4,512,0", 2, "before the request above"),
        (PAPER + "1,-1,512,0", 2, "is not request_id"),
        (PAPER + "1,nan,512,0", 2, "is not request_id"),
        (PAPER + "\n1,2.0,512", 3, "is not request_id"),
        (PAPER + "1,2.0,0,0", 2, "0 prompt tokens"),
        (PAPER + "1,999999999,5,0", 2, "not between 0 and one year"),
        (PAPER + "1,2.0,512,0,7", 2, "is not request_id"),
        (PAPER + "1,1٣,512,0", 2, "is not request_id"),
        (HEADER + "2023-11-16 18:15:46,374", 2, "is not TIMESTAMP"),
        (HEADER + "2023-02-30 18:15:46,374,4", 2, "time 2023-02-30"),
        (HEADER + "2023-11-16 18:15:46,0,4", 2, "0 prompt tokens"),
        (HEADER + "2023-11-16 18:15:46,99999999999,4", 2, "is not TIMESTAMP"),
        (HEADER + "2023-11-16 18:15:46,999999999,4", 2, "999999999 prompt tokens"),
        (HEADER + "2023-11-16 18:15:46,1,4\n2025-11-16 18:15:46,1,4", 3, "not between 0 and one year"),
        ("TIMESTAMP,Tokens\n1,2", 1, "is not the header"),
        (mooncake_line(0) + "\n" + mooncake_line(-1), 2, "timestamp"),
        (mooncake_line(0) + "\n" + mooncake_line(1, prompt=1.5), 2, "input_length"),
        (mooncake_line(0) + "\n" + mooncake_line(1, output=2**40), 2, "output_length"),
        (mooncake_line(0) + "\n" + mooncake_line(1, extra=', "model": "x"'), 2, "model"),
        (mooncake_line(0) + "\n" + '{"timestamp": 5', 2, "not JSON"),
        (mooncake_line(0) + "\n" + mooncake_line("NaN"), 2, "timestamp"),
    ],
)
def test_refuses_wrong_lines(text: str, line: int, words: str) -> None:
    """Tests that a wrong line of every format is refused with its number."""
    with pytest.raises(SpecError) as caught:
        read_workload(text.encode(), where="w")
    assert caught.value.message.startswith(f"w:{line}: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "of no known format"),
        (b"hello\x00world", "of no known format"),
        (HEADER.encode(), "has 0 requests"),
        (b"0,1.5,512,0\n\xff", "not UTF-8 text at byte 12"),
        (b"0,1.5,512,0" + b"0" * 2_000_000, "characters, more than"),
        (b'{"name": 1}', "malformed at"),
    ],
)
def test_refuses_documents(data: bytes, words: str) -> None:
    """Tests that an empty, a binary and an unknown file are refused in one line."""
    with pytest.raises(SpecError) as caught:
        read_workload(data, where="w")
    assert words in caught.value.message


def test_refuses_large_files() -> None:
    """Tests that a file beyond the bound of all JSON is refused by its size, whatever its format."""
    large = b"0,1.5,512,0\n" + b" " * 64 * 1024 * 1024
    for read in (paper_requests, azure_requests, mooncake_requests, our_requests):
        with pytest.raises(SpecError, match=r"exceeds|more than"):
            read(large, where="w")


@pytest.mark.parametrize("text", ["1.5,x", "1.5,-2", "1.5,1e9", "1.5,,2", "9999999"])
def test_refuses_wrong_rates(text: str) -> None:
    """Tests that what is no rate is refused with its line."""
    with pytest.raises(SpecError, match=r"w:1: .* is not a rate"):
        arrival_rates(text.encode(), where="w")


def test_a_name_can_be_given() -> None:
    """Tests that a workload has the given name, else the file's."""
    assert "mine" == read_workload(PAPER.encode(), where="a/b.txt", name="mine").name
    assert "b.c" == read_workload(PAPER.encode(), where="a/b.c.txt").name
