"""Ranges of parameters: each operation against sets of single rows."""

from __future__ import annotations

import itertools
import random

from spotserve.core.cells import Cells, Interval, common, join, merged, minus, overlap, shared, without


def drawn(rng: random.Random, most: int = 5) -> list[Interval]:
    """Some runs below 20, in any order, overlapping or not."""
    starts = [rng.randrange(18) for _ in range(rng.randrange(most + 1))]
    return [(start, rng.randrange(start + 1, 20)) for start in starts]


def rows(runs: list[Interval]) -> set[int]:
    """The single rows of some runs."""
    return {row for start, stop in runs for row in range(start, stop)}


def is_tidy(runs: list[Interval]) -> bool:
    """Whether runs are sorted, not empty, and do not touch."""
    return all(start < stop for start, stop in runs) and all(
        before[1] < behind[0] for before, behind in itertools.pairwise(runs)
    )


def test_runs_are_sets_of_rows(rng: random.Random) -> None:
    """Tests that union, difference, intersection and overlap of runs are those of their rows."""
    for most in (1, 5):
        for _ in range(2000):
            left, right = drawn(rng, most), drawn(rng, most)
            assert rows(left) == rows(merged(left))
            assert is_tidy(merged(left))
            assert rows(left) - rows(right) == rows(minus(left, right))
            assert is_tidy(minus(left, right))
            assert rows(left) & rows(right) == rows(shared(left, right))
            assert is_tidy(shared(left, right))
            twice = overlap(left)
            assert (twice is not None) == (len(rows(left)) < sum(stop - start for start, stop in left))
            assert twice is None or sum(start <= twice[0] and twice[1] <= stop for start, stop in left) > 1


def test_many_runs_at_once(rng: random.Random) -> None:
    """Tests that taking thousands of runs from thousands gives what taking them one by one gives."""
    left = [(3 * number, 3 * number + 2) for number in range(5000)]
    taken = [(7 * number, 7 * number + 3) for number in range(2500)]
    rng.shuffle(left)
    rng.shuffle(taken)
    assert rows(left) - rows(taken) == rows(minus(left, taken))


def test_cells(rng: random.Random) -> None:
    """Tests that cells are joined, cut and compared name by name, and that none of the operations changes its lists."""
    for _ in range(500):
        left: Cells = {(name, 0): runs for name in "abc" if (runs := drawn(rng))}
        right: Cells = {(name, 0): runs for name in "bcd" if (runs := drawn(rng))}
        kept = {cell: list(runs) for cell, runs in (*left.items(), *right.items())}
        joined = dict(left)
        join(joined, right)
        for cell in {*left, *right}:
            one, other = rows(left.get(cell, [])), rows(right.get(cell, []))
            assert one | other == rows(joined[cell])
            assert one - other == rows(without(left, right).get(cell, []))
            assert one & other == rows(common(left, right).get(cell, []))
        assert all((*without(left, right).values(), *common(left, right).values()))
        assert all(runs in (left.get(cell), right.get(cell)) for cell, runs in kept.items())
