"""The memory rules of a plan, and the most that any order of its steps can take: exact, whatever runs beside what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from spotserve.core.cells import NOTHING
from spotserve.core.finding import Facts, Finding, Seat
from spotserve.core.ids import GpuId, StepId
from spotserve.core.plan import Activate, CopyWeights, LoadWeights, Release, Reserve, Step
from spotserve.core.spec import weight_copies

Taking = tuple[Step, int]
"""A step and the bytes that it takes of a GPU's memory, or gives back."""


def check_memory(facts: Facts) -> Iterator[Finding]:
    """Live: old and new weights and both KV pools at once. In place: the peak in the order of the steps."""
    reserved: dict[GpuId, int] = {}
    for number, step in facts.of(Reserve):
        if step.workers[0] in facts.new_seat:
            reserved[step.workers[0]] = step.bytes
            yield from _reserve_covers(facts, step, number)
    if facts.plan.mode == "live":
        for gpu, seat in facts.new_seat.items():
            weights = facts.cells_bytes(facts.held.get(gpu, NOTHING)) + facts.cells_bytes(facts.lacking(seat))
            extra = reserved.get(gpu, 0) - _position_bytes(facts, seat)
            laid_out = _laid_out(facts, facts.old_seat.get(gpu)) + _laid_out(facts, seat)
            used = weights + laid_out + _old_pool(facts, gpu) + _second_pool(facts, seat) + max(0, extra)
            yield from _within(facts, gpu, used, None, "old and new weights and both KV pools")
        return
    yield from _peak(facts)


def _reserve_covers(facts: Facts, step: Reserve, number: int) -> Iterator[Finding]:
    seat = facts.new_seat[step.workers[0]]
    due = _position_bytes(facts, seat)
    if step.bytes < due:
        message = f"{step.bytes} bytes are reserved on {seat.gpu}, the position takes {due}"
        yield Finding(code="over_memory", step=step.id, path=f"steps[{number}].bytes", message=message)


def _position_bytes(facts: Facts, seat: Seat) -> int:
    """What a new position takes: its KV pool, and in live mode the weights that its GPU lacks."""
    if facts.plan.mode != "live":
        return facts.pool_bytes(facts.fresh[seat.replica], seat)
    return _second_pool(facts, seat) + facts.cells_bytes(facts.lacking(seat))


def _laid_out(facts: Facts, seat: Seat | None) -> int:
    """Bytes of the second copies of a position's weights, where weights are multiplied with in another layout."""
    if seat is None:
        return 0
    return (weight_copies(facts.plan.spec.linear) - 1) * facts.cells_bytes(facts.needs(seat))


def _peak(facts: Facts) -> Iterator[Finding]:
    """No order that the dependencies allow takes more than a GPU has, at any step that takes memory."""
    takes, gives = _memory_steps(facts)
    for gpu, taking in takes.items():
        before = facts.cells_bytes(facts.held.get(gpu, NOTHING)) + _old_pool(facts, gpu)
        giving = [give for give, _ in gives[gpu]]
        needs = [facts.awaited(take, giving) for take, _ in taking]
        excess, last = worst_excess([size for _, size in taking], [size for _, size in gives[gpu]], needs)
        step = None if last is None else taking[last][0].id
        yield from _within(facts, gpu, before + excess, step, "weights and KV pools at this step")


def _memory_steps(facts: Facts) -> tuple[dict[GpuId, list[Taking]], dict[GpuId, list[Taking]]]:
    """What each step takes of a GPU's memory, and what each gives back, in an order that the dependencies allow."""
    takes: dict[GpuId, list[Taking]] = defaultdict(list)
    gives: dict[GpuId, list[Taking]] = defaultdict(list)
    pools: dict[GpuId, int] = {}
    for step in facts.in_order:
        if isinstance(step, Reserve | LoadWeights):
            takes[step.workers[0]].append((step, step.bytes))
        elif isinstance(step, CopyWeights):
            takes[step.destination].append((step, step.bytes))
        elif isinstance(step, Activate) and step.replica in facts.fresh:
            for seat in facts.seats(facts.fresh[step.replica]):
                takes[seat.gpu].append((step, _laid_out(facts, seat)))
        elif isinstance(step, Release):
            gpu = step.workers[0]
            pool = pools.get(gpu, _old_pool(facts, gpu))
            pools[gpu] = min(pool, _pool_left(facts, step))
            gives[gpu].append((step, pool - pools[gpu] + facts.slice_bytes(step.slices)))
    return takes, gives


def _pool_left(facts: Facts, release: Release) -> int:
    """What a release leaves of the old KV pool."""
    gpu = release.workers[0]
    if release.kv or gpu not in facts.old_seat:
        return 0
    seat = facts.old_seat[gpu]
    replica = facts.leaving[seat.replica]
    if release.keep_blocks is None:
        return facts.pool_bytes(replica, seat)
    return facts.pool_bytes(replica.model_copy(update={"kv_blocks": release.keep_blocks}), seat)


def _within(facts: Facts, gpu: GpuId, used: int, step: StepId | None, what: str) -> Iterator[Finding]:
    budget = facts.memory.get(gpu, 0)
    if used > budget:
        message = f"{what} take {used} bytes on {gpu}, which has {budget}"
        yield Finding(code="over_memory", step=step, path=f"snapshot.world.gpus[{gpu}]", message=message)


def _old_pool(facts: Facts, gpu: GpuId) -> int:
    seat = facts.old_seat.get(gpu)
    return 0 if seat is None else facts.pool_bytes(facts.leaving[seat.replica], seat)


def _second_pool(facts: Facts, seat: Seat) -> int:
    """A new position's KV pool beside the old one; the same pool if layers, heads and size are what they were."""
    replica = facts.fresh[seat.replica]
    old = facts.old_seat.get(seat.gpu)
    if old is not None and (old.layers, old.heads) == (seat.layers, seat.heads):
        before = facts.leaving[old.replica]
        alive = all(gpu in facts.living for gpu in before.gpus)
        if alive and before.kv_blocks == replica.kv_blocks:
            return 0
    return facts.pool_bytes(replica, seat)


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
    spent: set[int] = set()
    for take in range(len(takes)):
        while unpaid[take] and (path := _payment(take, needs, payers, unused, spent)):
            _pay(path, unpaid, unused, paid, payers)
    last = max((take for take, left in enumerate(unpaid) if left), default=None)
    return sum(unpaid), last


def _payment(
    start: int,
    needs: Sequence[Sequence[int]],
    payers: Sequence[set[int]],
    unused: Sequence[int],
    spent: set[int],
) -> list[tuple[int, int]]:
    """The pairs (take, give) of a shortest path from a take to a give with something left; empty if there is none.

    All gives that a search in vain has seen become `spent`: no later payment opens a path from them.
    """
    came: dict[int, tuple[int, int] | None] = {start: None}
    seen: set[int] = set()
    waiting = [start]
    for take in waiting:
        for give in needs[take]:
            if give in seen or give in spent:
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
    spent |= seen
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
