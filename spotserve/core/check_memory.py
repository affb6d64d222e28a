"""The most memory that any order of a plan's steps can take: an exact bound, whatever runs beside what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def worst_excess(takes: Sequence[int], gives: Sequence[int], needs: Sequence[Sequence[int]]) -> tuple[int, int | None]:
    """The largest sum of some `takes` less the `gives` that they wait for, and the last of the takes that make it.

    `needs[i]` are the gives that must have happened before take i. Which takes are worth their gives is a project
    selection: what no flow from takes to the gives they wait for can pay is the excess (max-flow min-cut).

    Args:
        takes: bytes that each step takes, in an order that the dependencies allow.
        gives: bytes that each step gives back.
        needs: for each take, indices into `gives`.
    """
    unpaid, unused = list(takes), list(gives)
    paid: list[dict[int, int]] = [{} for _ in takes]
    payers: list[set[int]] = [set() for _ in gives]
    for take in range(len(takes)):
        while unpaid[take] and (path := _payment(take, needs, payers, unused)):
            _pay(path, unpaid, unused, paid, payers)
    last = max((take for take, left in enumerate(unpaid) if left), default=None)
    return sum(unpaid), last


def _payment(
    start: int,
    needs: Sequence[Sequence[int]],
    payers: Sequence[set[int]],
    unused: Sequence[int],
) -> list[tuple[int, int]]:
    """The pairs (take, give) of a shortest path from a take to a give with something left; empty if there is none."""
    came: dict[int, tuple[int, int] | None] = {start: None}
    seen: set[int] = set()
    waiting = [start]
    for take in waiting:
        for give in needs[take]:
            if give in seen:
                continue
            seen.add(give)
            if unused[give]:
                path = [(take, give)]
                while (step := came[path[-1][0]]) is not None:
                    path.append(step)
                return path[::-1]
            for payer in sorted(payers[give]):
                if payer not in came:
                    came[payer] = (take, give)
                    waiting.append(payer)
    return []


def _pay(
    path: list[tuple[int, int]],
    unpaid: list[int],
    unused: list[int],
    paid: list[dict[int, int]],
    payers: list[set[int]],
) -> None:
    """Let every take on the path pay by its give; the next take hands that give over."""
    amount = min(unpaid[path[0][0]], unused[path[-1][1]])
    for (_, give), (payer, _) in pairwise(path):
        amount = min(amount, paid[payer][give])
    unpaid[path[0][0]] -= amount
    unused[path[-1][1]] -= amount
    for number, (take, give) in enumerate(path):
        paid[take][give] = paid[take].get(give, 0) + amount
        payers[give].add(take)
        if number + 1 < len(path):
            payer = path[number + 1][0]
            paid[payer][give] -= amount
            if not paid[payer][give]:
                del paid[payer][give]
                payers[give].discard(payer)
