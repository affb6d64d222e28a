"""Traces from counts of instances per zone, as the SkyPilot spot traces have them (NSDI'24).

A file is JSON: `{"metadata": {"gap_seconds": g}, "data": [counts]}`, one count every `g` seconds. Counts have no names:
an instance is made for every rise, in the order of arrival over all zones, and a fall takes some of the zone's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from spotserve.cloud.traces.reading import trace_text
from spotserve.core.frozen import Frozen
from spotserve.core.ids import InstanceId
from spotserve.core.strict_json import JsonFaultError, read_as
from spotserve.core.trace import DEFAULT_GRACE_S, Trace, TraceEvent
from spotserve.errors import SpecError

Victims = Literal["oldest", "newest", "random"]
MAX_COUNT = 100_000
MAX_SAMPLES = 1_000_000
MAX_INSTANCES = 1_000_000
"""Of a whole trace: each has an id of its own."""
MAX_PER_ZONE = 10_000


class ZoneMetadata(Frozen):
    """Seconds from one count to the next."""

    gap_seconds: float = Field(gt=0, le=86_400)


class ZoneFile(Frozen):
    """One zone of the SkyPilot spot traces."""

    metadata: ZoneMetadata
    data: tuple[int, ...] = Field(min_length=1, max_length=MAX_SAMPLES)


@dataclass(frozen=True, slots=True)
class ZoneCounts:
    """How many nodes a zone has, one count every `gap_s` seconds from 0 on."""

    zone: str
    gap_s: float
    counts: tuple[int, ...]


def zone_counts(path: Path, *, zone: str | None = None) -> ZoneCounts:
    """The counts in a file; the zone is called like the file where no name is given.

    Raises:
        SpecError: the file cannot be read or is no count of a zone, with what is wrong and where.
    """
    try:
        read = read_as(ZoneFile, trace_text(path).encode())
    except JsonFaultError as fault:
        raise SpecError(
            f"trace {path} is malformed at {fault.path or 'file'}: {fault.message}",
            hint='one zone is {"metadata": {"gap_seconds": 300}, "data": [4, 4, 3]}',
        ) from fault
    for index, count in enumerate(read.data):
        if not 0 <= count <= MAX_COUNT:
            raise SpecError(f"trace {path} is malformed at data[{index}]: {count} is not between 0 and {MAX_COUNT}")
    return ZoneCounts(path.stem if zone is None else zone, read.metadata.gap_seconds, read.data)


@dataclass(slots=True)
class _ZoneFleet:
    """The instances of one zone, in order of arrival."""

    living: list[InstanceId] = field(default_factory=list)

    def take(self, count: int, victims: Victims, rng: random.Random) -> tuple[InstanceId, ...]:
        """Remove so many of them."""
        indices = range(len(self.living))
        if victims == "random":
            taken = sorted(rng.sample(indices, count))
        else:
            taken = list(indices[:count] if victims == "oldest" else indices[len(indices) - count :])
        gone = tuple(self.living[index] for index in taken)
        chosen = set(taken)
        self.living = [instance for index, instance in enumerate(self.living) if index not in chosen]
        return gone


def skypilot_trace(
    zones: Sequence[ZoneCounts],
    *,
    name: str,
    instances_per_node: int = 1,
    most_per_zone: int | None = None,
    grace_s: float = DEFAULT_GRACE_S,
    victims: Victims = "oldest",
    seed: int = 0,
    gpu_types: Mapping[str, str] | None = None,
) -> Trace:
    """One trace from the counts of several zones, with how it was made in `notes`.

    Args:
        zones: the zones; their counts begin at the same moment.
        name: what the trace is called.
        instances_per_node: instances of ours for one counted node.
        most_per_zone: instances that are held of a zone at most; None is as many as there are.
        grace_s: how long before a count falls its notice is given; 0 is a kill without notice.
        victims: which instances of a zone go when its count falls.
        seed: what `random` victims are drawn with.
        gpu_types: GPU type by zone; a zone without one has the profile's own.

    Raises:
        SpecError: no zone, a zone twice, a scale without bounds, or a grace period longer than a gap.
    """
    gpu_types = {} if gpu_types is None else gpu_types
    _check_zones(zones, gpu_types, instances_per_node=instances_per_node, most_per_zone=most_per_zone, grace_s=grace_s)
    targets = {
        each.zone: _targets(each, instances_per_node=instances_per_node, most_per_zone=most_per_zone) for each in zones
    }
    changes = tuple(_changes(zones, targets))
    num_added = sum(max(0, change) for _, _, change in changes)
    if num_added > MAX_INSTANCES:
        raise SpecError(f"trace {name} has {num_added} instances, more than {MAX_INSTANCES}", hint="most_per_zone")
    rng = random.Random(f"{seed}:{name}")
    fleets = {each.zone: _ZoneFleet() for each in zones}
    events: list[TraceEvent] = []
    arrived = 0
    for stamp_s, zone, change in changes:
        if change > 0:
            added = tuple(InstanceId(f"i{arrived + index}") for index in range(change))
            arrived += change
            fleets[zone].living.extend(added)
            gpu_type = gpu_types.get(zone, "")
            events.append(TraceEvent(at_s=stamp_s, kind="add", instances=added, zone=zone, gpu_type=gpu_type))
        else:
            events.append(_loss(stamp_s, fleets[zone].take(-change, victims, rng), grace_s))
    return Trace(
        name=name,
        events=tuple(sorted(events, key=lambda event: event.at_s)),
        end_s=max(each.gap_s * len(each.counts) for each in zones),
        source="SkyPilot spot traces (NSDI'24), counts of instances per zone",
        notes=(
            f"zones: {', '.join(each.zone for each in zones)}",
            f"instances_per_node {instances_per_node}, most_per_zone {most_per_zone or 'unbounded'}",
            f"counts have no names: the {victims} instances of a zone go when its count falls"
            + (f", seed {seed}" if victims == "random" else ""),
            f"notice {grace_s:g} s before the count falls" if grace_s else "no notice: instances are killed",
        ),
    )


def _check_zones(
    zones: Sequence[ZoneCounts],
    gpu_types: Mapping[str, str],
    *,
    instances_per_node: int,
    most_per_zone: int | None,
    grace_s: float,
) -> None:
    names = [each.zone for each in zones]
    if not zones or len(set(names)) < len(names):
        raise SpecError(f"zones {names} are not one or more, each named once")
    unknown = sorted(set(gpu_types) - set(names))
    if unknown:
        raise SpecError(f"gpu_types names zone {unknown[0]!r}", hint=f"zones: {', '.join(names)}")
    if not 1 <= instances_per_node <= MAX_PER_ZONE:
        raise SpecError(f"instances_per_node {instances_per_node} is not between 1 and {MAX_PER_ZONE}")
    if most_per_zone is not None and not 1 <= most_per_zone <= MAX_PER_ZONE:
        raise SpecError(f"most_per_zone {most_per_zone} is not between 1 and {MAX_PER_ZONE}")
    shortest_s = min(each.gap_s for each in zones)
    if not 0 <= grace_s <= shortest_s:
        # A longer one would notice an instance before it has arrived.
        raise SpecError(f"grace_s {grace_s:g} is not between 0 and the shortest gap of {shortest_s:g} s")


def _targets(zone: ZoneCounts, *, instances_per_node: int, most_per_zone: int | None) -> tuple[int, ...]:
    """Instances of ours at each sample of a zone."""
    most = MAX_PER_ZONE if most_per_zone is None else most_per_zone
    wanted = tuple(count * instances_per_node for count in zone.counts)
    if most_per_zone is None and max(wanted) > most:
        raise SpecError(f"zone {zone.zone} has {max(wanted)} instances, more than {most}", hint="most_per_zone")
    return tuple(min(count, most) for count in wanted)


def _changes(zones: Sequence[ZoneCounts], targets: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[float, str, int]]:
    """(time, zone, rise or fall) over all zones in order of time, falls first where times are equal."""
    changes = [
        (index * each.gap_s, number, after - before)
        for number, each in enumerate(zones)
        for index, (before, after) in enumerate(zip((0, *targets[each.zone]), targets[each.zone], strict=False))
        if after != before
    ]
    for stamp_s, number, change in sorted(changes, key=lambda item: (item[0], item[2] > 0, item[1])):
        yield stamp_s, zones[number].zone, change


def _loss(stamp_s: float, gone: tuple[InstanceId, ...], grace_s: float) -> TraceEvent:
    if not grace_s:
        return TraceEvent(at_s=stamp_s, kind="kill", instances=gone)
    return TraceEvent(at_s=stamp_s - grace_s, kind="notice", instances=gone, grace_s=grace_s)
