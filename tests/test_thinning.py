"""What `make quick` leaves out: cases of tests with many, never a test."""

from __future__ import annotations

from tests.conftest import thinned


def test_every_test_keeps_a_case() -> None:
    """Tests that of many cases every fourth stays, of one or two all, and that no test is left out."""
    many = [f"a.py::many[{index}]" for index in range(9)]
    few = ["a.py::one", "a.py::two[x]", "a.py::two[y]", "b.py::many[0]"]
    assert [many[0], many[4], many[8], *few] == thinned([*many, *few], 4)


def test_nothing_is_left_out_unasked() -> None:
    """Tests that without the option all cases run."""
    names = [f"a.py::many[{index}]" for index in range(9)]
    assert names == thinned(names, 1)
