"""The content rules of a plan: every position has its layers, and every weight a source, a place and one owner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from spotserve.core.cells import NOTHING, Cells, join, minus, overlap, shared, without
from spotserve.core.check_world import most_ranks, well_formed
from spotserve.core.finding import Facts, Finding
from spotserve.core.ids import GpuId, ReplicaId
from spotserve.core.plan import CopyKv, CopyKvDelta, CopyWeights, LoadWeights, Release, Reserve, Step
from spotserve.core.snapshot import Replica


def check_layout(facts: Facts) -> Iterator[Finding]:
    """Every replica of the target covers all layers once, on living GPUs, and no GPU sits in two positions."""
    seated: dict[GpuId, ReplicaId] = {}
    for number, replica in enumerate(facts.plan.target.replicas):
        path = f"target.replicas[{number}]"
        yield from _layers(facts, replica, path)
        for gpu in replica.gpus:
            if gpu in seated:
                yield Finding(
                    code="double_owner",
                    path=path,
                    message=f"{gpu} sits in a position of {seated[gpu]} and in one of {replica.id}",
                )
            seated[gpu] = replica.id
            if gpu not in facts.living:
                yield Finding(code="coverage_hole", path=path, message=f"{replica.id} needs {gpu}, which is not there")
            elif gpu in facts.doomed:
                yield Finding(code="coverage_hole", path=path, message=f"{replica.id} needs {gpu}, which is doomed")
        yield from _identity(facts, replica, path)


def _layers(facts: Facts, replica: Replica, path: str) -> Iterator[Finding]:
    runs = [stage.layers for stage in replica.stages]
    twice = overlap(runs)
    if twice is not None:
        message = f"layers {list(twice)} belong to two stages of {replica.id}"
        yield Finding(code="double_owner", path=path, message=message)
    for hole in minus([(0, facts.model.num_layers)], runs):
        message = f"layers {list(hole)} belong to no stage of {replica.id}"
        yield Finding(code="coverage_hole", path=path, message=message)
    if not well_formed(facts, replica):
        message = (
            f"stages of {replica.id} are not in layer order with one tensor degree of 1 to {most_ranks(facts.model)}"
        )
        yield Finding(code="corrupt", path=path, message=message)


def _identity(facts: Facts, replica: Replica, path: str) -> Iterator[Finding]:
    """An untouched replica is as it was; a new one has the generation of this epoch."""
    old = facts.before.get(replica.id)
    if old is not None and old != replica:
        message = f"{replica.id} keeps its id but is not the replica that runs"
        yield Finding(code="double_owner", path=path, message=message)
    if old is None and replica.generation != facts.plan.epoch.to:
        message = f"new replica {replica.id} has generation {replica.generation}, the epoch is {facts.plan.epoch.to}"
        yield Finding(code="stale", path=path, message=message)


def check_slices(facts: Facts) -> Iterator[Finding]:
    """Every slice names a range that the parameter table has."""
    for number, step in facts.of(CopyWeights, LoadWeights, Release):
        for piece in () if facts.in_table(step.slices) else step.slices:
            if not facts.has_run((piece.parameter, piece.dim), (piece.start, piece.stop)):
                message = f"the parameter table has no {piece.parameter}[{piece.dim}: {piece.start}, {piece.stop})"
                yield Finding(code="corrupt", step=step.id, path=f"steps[{number}].slices", message=message)


def check_bytes(facts: Facts) -> Iterator[Finding]:
    """The bytes that a step claims are those of its slices."""
    for number, step in facts.of(CopyWeights, LoadWeights):
        if step.bytes != facts.slice_bytes(step.slices):
            message = f"{step.bytes} bytes are claimed, the slices have {facts.slice_bytes(step.slices)}"
            yield Finding(code="corrupt", step=step.id, path=f"steps[{number}].bytes", message=message)


def check_weights(facts: Facts) -> Iterator[Finding]:
    """What each new position needs is held or delivered exactly once, by someone who holds it."""
    released = _released_before_arrival(facts)
    arrivals: dict[GpuId, list[CopyWeights | LoadWeights]] = defaultdict(list)
    delivered: dict[GpuId, Cells] = defaultdict(dict)
    for _, step in facts.of(CopyWeights, LoadWeights):
        gpu = step.destination if isinstance(step, CopyWeights) else step.workers[0]
        arrivals[gpu].append(step)
        join(delivered[gpu], facts.cells_of(step.slices))
    for number, copy in facts.of(CopyWeights):
        yield from _source_holds(facts, copy, arrivals[copy.source], number)
    for gpu in sorted(delivered.keys() - facts.new_seat.keys()):
        yield Finding(
            code="double_owner", path="steps", message=f"{gpu} receives weights but has no position in a new replica"
        )
    for gpu, seat in facts.new_seat.items():
        needs, held, lacking = facts.needs(seat), facts.held.get(gpu, NOTHING), facts.lacking(seat)
        if gone := released.get(gpu):
            held = without(held, gone)
            lacking = without(needs, held)
        yield from _covered(needs, held, lacking, delivered.get(gpu, NOTHING), gpu)


def _covered(needs: Cells, held: Cells, lacking: Cells, delivered: Cells, gpu: GpuId) -> Iterator[Finding]:
    """What a position lacks arrives, once, and nothing else does."""
    # Where both are the same runs nothing is wrong: what is lacking is needed, not held, and disjoint.
    differing = [cell for cell in {**lacking, **delivered} if lacking.get(cell) != delivered.get(cell)]
    for cell in sorted(differing):
        name, arriving = cell[0], delivered.get(cell, [])
        for hole in minus(lacking.get(cell, []), arriving):
            message = f"nothing brings {name} [{hole[0]}, {hole[1]}) to {gpu}"
            yield Finding(code="coverage_hole", path="steps", message=message)
        twice = overlap([*arriving, *held.get(cell, [])])
        if twice is not None:
            message = f"{name} [{twice[0]}, {twice[1]}) is delivered to {gpu} twice"
            yield Finding(code="double_owner", path="steps", message=message)
        for extra in minus(arriving, needs.get(cell, [])):
            message = f"{name} [{extra[0]}, {extra[1]}) is delivered to {gpu} but belongs to another position"
            yield Finding(code="double_owner", path="steps", message=message)


def _source_holds(
    facts: Facts, step: CopyWeights, arrivals: Sequence[CopyWeights | LoadWeights], number: int
) -> Iterator[Finding]:
    """A source holds what it sends from the start, or gets it by `arrivals` that the copy waits for."""
    held, path = facts.held.get(step.source), f"steps[{number}]"
    lacking = facts.unheld(step.slices, step.source)
    come = _come_by_then(facts, step, arrivals) if lacking else NOTHING
    if held is None and not come:
        message = f"{step.source} holds no weights or is not there"
        yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
        return
    for (name, _), runs in without(lacking, come).items():
        message = f"{step.source} does not hold {name} [{runs[0][0]}, {runs[0][1]})"
        yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
        return
    if step.source == step.destination:
        message = f"{step.source} copies weights to itself"
        yield Finding(code="double_owner", step=step.id, path=path, message=message)


def _come_by_then(facts: Facts, reader: Step, arrivals: Iterable[CopyWeights | LoadWeights]) -> Cells:
    """What of some arrivals is there when a step begins that waits for them."""
    come: Cells = {}
    for arrival in arrivals:
        if facts.follows(reader, arrival):
            join(come, facts.cells_of(arrival.slices))
    return come


def _released_before_arrival(facts: Facts) -> dict[GpuId, Cells]:
    """Weights that a GPU frees before its new position's weights arrive: they count as not held."""
    result: dict[GpuId, Cells] = {}
    reserves = {step.workers[0]: step for _, step in facts.of(Reserve)}
    for _, step in facts.of(Release):
        if step.workers[0] in facts.new_seat:
            reserve = reserves.get(step.workers[0])
            if reserve is not None and facts.follows(reserve, step):
                join(result.setdefault(step.workers[0], {}), facts.cells_of(step.slices))
    return result


def check_releases(facts: Facts) -> Iterator[Finding]:
    """Nothing is freed that the new layout still needs, unless it arrives again, or before it has been read."""
    released = _released_before_arrival(facts)
    readers: dict[GpuId, list[CopyWeights]] = defaultdict(list)
    kv_readers: dict[tuple[GpuId, ReplicaId], list[CopyKv | CopyKvDelta]] = defaultdict(list)
    for _, copy in facts.of(CopyWeights):
        readers[copy.source].append(copy)
    for _, kv_copy in facts.of(CopyKv, CopyKvDelta):
        kv_readers[kv_copy.source, kv_copy.route.from_replica].append(kv_copy)
    freed_before: dict[GpuId, Cells] = defaultdict(dict)
    for number, step in facts.of(Release):
        gpu, path = step.workers[0], f"steps[{number}]"
        yield from _freed(facts, step, released.get(gpu, NOTHING), freed_before[gpu], path)
        join(freed_before[gpu], facts.cells_of(step.slices))
        for kv_reader in kv_readers[gpu, step.replica]:
            if step.kv:
                yield from _read_first(facts, step, kv_reader, path)
            elif step.keep_blocks is not None and not facts.follows(kv_reader, step):
                message = f"{kv_reader.id} does not wait until the pool that it reads has shrunk"
                yield Finding(code="wrong_order", step=kv_reader.id, path=path, message=message)
        yield from _kept_pool(facts, step, path)
        for reader in readers[gpu]:
            if facts.follows(step, reader) and not facts.follows(reader, step):
                continue
            freed, wanted = facts.cells_of(step.slices), facts.cells_of(reader.slices)
            if any(shared(runs, wanted[cell]) for cell, runs in freed.items() if cell in wanted):
                yield from _read_first(facts, step, reader, path)


def _freed(facts: Facts, step: Release, again: Cells, before: Cells, path: str) -> Iterator[Finding]:
    """A GPU frees what it holds and does not need, once; `again` arrives again, `before` is freed already."""
    gpu, freed = step.workers[0], facts.cells_of(step.slices)
    seat = facts.new_seat.get(gpu)
    needed = NOTHING if seat is None else without(facts.needed_of(step.slices, seat), again)
    for (name, _), runs in needed.items():
        for start, stop in runs:
            message = f"{gpu} frees {name} [{start}, {stop}), which its new position needs"
            yield Finding(code="coverage_hole", step=step.id, path=path, message=message)
    for (name, _), runs in facts.unheld(step.slices, gpu).items():
        for start, stop in runs:
            message = f"{gpu} does not hold {name} [{start}, {stop}), which it is to free"
            yield Finding(code="not_a_holder", step=step.id, path=path, message=message)
    for cell, runs in freed.items():
        if (len(runs) > 1 or cell in before) and overlap([*runs, *before.get(cell, [])]) is not None:
            message = f"{gpu} frees some of {cell[0]} twice"
            yield Finding(code="duplicate_step", step=step.id, path=path, message=message)


def _kept_pool(facts: Facts, release: Release, path: str) -> Iterator[Finding]:
    """A pool that shrinks keeps what moves, and does so only where nobody decodes with it any more."""
    if release.keep_blocks is None:
        return
    if facts.plan.mode == "live" or release.kv:
        message = "a pool shrinks only in in_place mode, and not when it goes"
        yield Finding(code="wrong_order", step=release.id, path=path, message=message)
    tokens, _ = facts.moving_tokens(release.replica)
    if release.keep_blocks * facts.plan.spec.limits.kv_block_tokens < tokens:
        message = f"{release.keep_blocks} blocks are kept of {release.replica}, {tokens} tokens of it move"
        yield Finding(code="coverage_hole", step=release.id, path=path, message=message)


def _read_first(
    facts: Facts, release: Release, reader: CopyWeights | CopyKv | CopyKvDelta, path: str
) -> Iterator[Finding]:
    if facts.follows(reader, release):
        message = f"{reader.id} reads what {release.workers[0]} has freed by then"
        yield Finding(code="not_a_holder", step=reader.id, path=path, message=message)
    elif not facts.follows(release, reader):
        message = f"it may free what {reader.id} still reads"
        yield Finding(code="wrong_order", step=release.id, path=path, message=message)
