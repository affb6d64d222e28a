"""Synthetic traces: zones whose instances are taken one by one, and many at once, as zones of a cloud are.

Preemptions come together: a shock takes a share of a zone within moments, and then the zone gives nothing new for a
while. A shared shock does so to every zone. Between shocks instances go alone, each with its own hazard, and are
replaced after a while. Everything is drawn from one seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from spotserve.core.ids import InstanceId
from spotserve.core.trace import DEFAULT_GRACE_S, Trace, TraceEvent
from spotserve.errors import SpecError

DAY_S = 86_400.0
MAX_DURATION_S = 366 * DAY_S
MAX_INSTANCES = 10_000
MAX_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class ZoneHazard:
    """A zone and how it loses instances.

    `shock_share` of the zone goes within `shock_spread_s` of a shock; for `outage_s` (mean, exponential) after it
    nothing new comes. A lost instance is wanted back and comes `recovery_s` (mean, exponential) after its loss or after
    the end of the outage.
    """

    zone: str
    instances: int
    shocks_per_day: float = 2.0
    shock_share: float = 0.8
    shock_spread_s: float = 60.0
    singles_per_instance_day: float = 1.0
    outage_s: float = 600.0
    recovery_s: float = 180.0
    gpu_type: str = ""


@dataclass(slots=True)
class _Zone:
    """A zone as it stands."""

    hazard: ZoneHazard
    living: list[int] = field(default_factory=list)
    closed_until_s: float = 0.0


def zone_trace(
    zones: Sequence[ZoneHazard],
    *,
    duration_s: float,
    seed: int,
    grace_s: float = DEFAULT_GRACE_S,
    unnoticed_share: float = 0.0,
    shared_shocks_per_day: float = 0.0,
    name: str = "synthetic",
) -> Trace:
    """A trace drawn from the hazards of zones; every zone begins whole.

    Args:
        zones: the zones.
        duration_s: how long it is.
        seed: what it is drawn with; the same seed gives the same trace.
        grace_s: of a notice.
        unnoticed_share: how many of the losses come without a notice.
        shared_shocks_per_day: shocks that hit all zones at once.
        name: what it is called.

    Raises:
        SpecError: a value out of its bounds, or a trace of too many events.
    """
    _check(zones, duration_s, grace_s=grace_s, unnoticed_share=unnoticed_share, shared=shared_shocks_per_day)
    drawing = _Drawing(zones, random.Random(f"{seed}:{name}"), duration_s, grace_s, unnoticed_share)
    drawing.run(shared_shocks_per_day)
    return Trace(
        name=name,
        events=tuple(drawing.events),
        end_s=duration_s,
        source=f"synthetic, correlated zone preemptions, seed {seed}",
        notes=(
            *(_told(each) for each in zones),
            f"{shared_shocks_per_day:g} shocks a day hit all zones; {unnoticed_share:g} of the losses have no notice, "
            f"the others {grace_s:g} s",
        ),
    )


def _told(zone: ZoneHazard) -> str:
    kind = f" of {zone.gpu_type}" if zone.gpu_type else ""
    return (
        f"zone {zone.zone}: {zone.instances} instances{kind}, {zone.shocks_per_day:g} shocks a day take "
        f"{zone.shock_share:g} within {zone.shock_spread_s:g} s, {zone.singles_per_instance_day:g} single losses per "
        f"instance and day, outage {zone.outage_s:g} s, recovery {zone.recovery_s:g} s"
    )


def _check(
    zones: Sequence[ZoneHazard], duration_s: float, *, grace_s: float, unnoticed_share: float, shared: float
) -> None:
    names = [each.zone for each in zones]
    if not zones or len(set(names)) < len(names):
        raise SpecError(f"zones {names} are not one or more, each named once")
    bounds: list[tuple[str, float, float, float]] = [
        ("duration_s", duration_s, 1e-9, MAX_DURATION_S),
        ("grace_s", grace_s, 0.0, DAY_S),
        ("unnoticed_share", unnoticed_share, 0.0, 1.0),
        ("shared_shocks_per_day", shared, 0.0, 10_000.0),
        ("instances of all zones", sum(each.instances for each in zones), 1, MAX_INSTANCES),
    ]
    for each in zones:
        bounds += [
            (f"{each.zone}: instances", each.instances, 0, MAX_INSTANCES),
            (f"{each.zone}: shocks_per_day", each.shocks_per_day, 0.0, 10_000.0),
            (f"{each.zone}: shock_share", each.shock_share, 0.0, 1.0),
            (f"{each.zone}: shock_spread_s", each.shock_spread_s, 0.0, DAY_S),
            (f"{each.zone}: singles_per_instance_day", each.singles_per_instance_day, 0.0, 10_000.0),
            (f"{each.zone}: outage_s", each.outage_s, 0.0, MAX_DURATION_S),
            (f"{each.zone}: recovery_s", each.recovery_s, 0.0, MAX_DURATION_S),
        ]
    for what, value, least, most in bounds:
        if not least <= value <= most:
            raise SpecError(f"{what} {value:g} is not between {least:g} and {most:g}")
    per_day = sum(
        each.instances * (each.singles_per_instance_day + each.shock_share * (each.shocks_per_day + shared))
        for each in zones
    )
    if 2 * per_day * duration_s / DAY_S > MAX_EVENTS:
        raise SpecError(
            f"{per_day:g} losses a day for {duration_s:g} s are more than {MAX_EVENTS} events",
            hint="a shorter trace, or fewer losses",
        )


class _Drawing:
    """One drawing of a trace: what happens is on a heap, keyed by time and the order in which it was drawn."""

    def __init__(
        self,
        zones: Sequence[ZoneHazard],
        rng: random.Random,
        duration_s: float,
        grace_s: float,
        unnoticed_share: float,
    ) -> None:
        self.rng = rng
        self.zones = [_Zone(hazard) for hazard in zones]
        self.duration_s = duration_s
        self.grace_s = grace_s
        self.unnoticed_share = unnoticed_share
        self.events: list[TraceEvent] = []
        self._arrived = 0
        self._gone: set[int] = set()
        self._heap: list[tuple[float, int, str, int, int]] = []
        self._drawn = 0

    def run(self, shared_shocks_per_day: float) -> None:
        """Draw everything until the end of the trace."""
        for number, zone in enumerate(self.zones):
            if zone.hazard.instances:
                self._add(0.0, number, zone.hazard.instances)
            self._again(0.0, "shock", number, zone.hazard.shocks_per_day)
        self._again(0.0, "shared", 0, shared_shocks_per_day)
        while self._heap:
            at_s, _, what, number, instance = heapq.heappop(self._heap)
            if at_s >= self.duration_s:
                return
            if what == "add":
                self._return(at_s, number)
            elif what == "loss":
                self._lose(at_s, number, instance)
            elif what == "shock":
                self._shock(at_s, number)
                self._again(at_s, "shock", number, self.zones[number].hazard.shocks_per_day)
            else:
                for each in range(len(self.zones)):
                    self._shock(at_s, each)
                self._again(at_s, "shared", 0, shared_shocks_per_day)
            if len(self.events) > 2 * MAX_EVENTS:
                raise SpecError(f"more than {2 * MAX_EVENTS} events were drawn", hint="a shorter trace")

    def _push(self, at_s: float, what: str, number: int, instance: int = 0) -> None:
        self._drawn += 1
        heapq.heappush(self._heap, (at_s, self._drawn, what, number, instance))

    def _again(self, at_s: float, what: str, number: int, per_day: float) -> None:
        """The next one of a Poisson process."""
        if per_day > 0:
            self._push(at_s + self.rng.expovariate(per_day / DAY_S), what, number)

    def _exponential_s(self, mean_s: float) -> float:
        return self.rng.expovariate(1.0 / mean_s) if mean_s > 0 else 0.0

    def _add(self, at_s: float, number: int, count: int) -> None:
        zone = self.zones[number]
        added = range(self._arrived, self._arrived + count)
        self._arrived += count
        zone.living.extend(added)
        names = tuple(InstanceId(f"i{index}") for index in added)
        hazard = zone.hazard
        self.events.append(
            TraceEvent(at_s=at_s, kind="add", instances=names, zone=hazard.zone, gpu_type=hazard.gpu_type)
        )
        if hazard.singles_per_instance_day > 0:
            for index in added:
                loss_s = at_s + self.rng.expovariate(hazard.singles_per_instance_day / DAY_S)
                self._push(loss_s, "loss", number, index)

    def _return(self, at_s: float, number: int) -> None:
        """A lost instance is replaced, unless the zone is closed: then after it opens."""
        zone = self.zones[number]
        if at_s < zone.closed_until_s:
            self._push(zone.closed_until_s + self._exponential_s(zone.hazard.recovery_s), "add", number)
        else:
            self._add(at_s, number, 1)

    def _lose(self, at_s: float, number: int, instance: int) -> None:
        """A notice or a kill, at this moment; twice for the same instance is once."""
        if instance in self._gone:
            return
        self._gone.add(instance)
        zone = self.zones[number]
        zone.living.remove(instance)
        names = (InstanceId(f"i{instance}"),)
        gone_s = at_s
        if not self.grace_s or self.rng.random() < self.unnoticed_share:
            self.events.append(TraceEvent(at_s=at_s, kind="kill", instances=names))
        else:
            gone_s = at_s + self.grace_s
            self.events.append(TraceEvent(at_s=at_s, kind="notice", instances=names, grace_s=self.grace_s))
        self._push(gone_s + self._exponential_s(zone.hazard.recovery_s), "add", number)

    def _shock(self, at_s: float, number: int) -> None:
        zone = self.zones[number]
        hit = [instance for instance in zone.living if self.rng.random() < zone.hazard.shock_share]
        for instance in hit:
            self._push(at_s + self.rng.uniform(0.0, zone.hazard.shock_spread_s), "loss", number, instance)
        zone.closed_until_s = max(zone.closed_until_s, at_s + self._exponential_s(zone.hazard.outage_s))
