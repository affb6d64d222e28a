"""What a plan sends over which link and through which port."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.core.ids import instance_of, natural_key
from spotserve.core.plan import COPY_KINDS, WEIGHT_KINDS
from spotserve.core.plan_text.schedule import ports_of
from spotserve.core.plan_text.table import Json, columns, count_text, seconds_text, size_text

STORAGE = "storage"


@dataclass(frozen=True, slots=True)
class Port:
    """One direction of an instance's network interface, with all bytes that pass it and how long that takes."""

    instance: str
    direction: str
    bytes: int
    seconds: float

    @property
    def words(self) -> str:
        """`i2 receives 17.9 GB in 2.86 s`."""
        verb = "receives" if self.direction == "in" else "sends"
        return f"{self.instance} {verb} {size_text(self.bytes)} in {seconds_text(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Link:
    """All copies from one instance (or storage) to another; `share` is its part of the busiest port's time."""

    source: str
    destination: str
    num_steps: int
    weight_bytes: int
    kv_bytes: int
    seconds: float
    share: float | None

    @property
    def bytes(self) -> int:
        """Weights and KV."""
        return self.weight_bytes + self.kv_bytes


def ports(plan: Json) -> list[Port]:
    """Every port that bytes pass, the busiest first."""
    rate = plan["spec"]["profile"]["link_bytes_per_s"]
    loads: dict[tuple[str, str], int] = defaultdict(int)
    for step in plan["steps"]:
        for port in ports_of(step):
            loads[port] += step["bytes"]
    found = [Port(instance, direction, size, size / rate) for (instance, direction), size in loads.items() if size]
    return sorted(found, key=lambda port: (-port.bytes, port.direction, natural_key(port.instance)))


def links(plan: Json) -> list[Link]:
    """The links in natural order of their ends: instance to instance, inside one, from storage."""
    groups: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for step in plan["steps"]:
        if step["kind"] in COPY_KINDS:
            groups[instance_of(step["source"]), instance_of(step["destination"])].append(step)
        elif step["kind"] == "load_weights":
            groups[STORAGE, instance_of(step["workers"][0])].append(step)
    busiest = ports(plan)[:1]
    busiest_s = busiest[0].seconds if busiest else 0.0
    order = sorted(groups, key=lambda ends: (ends[0] == STORAGE, natural_key(ends[0]), natural_key(ends[1])))
    return [_link(plan, ends, groups[ends], busiest_s) for ends in order]


def _link(plan: Json, ends: tuple[str, str], steps: Sequence[Json], busiest_s: float) -> Link:
    profile = plan["spec"]["profile"]
    weights = sum(step["bytes"] for step in steps if step["kind"] in WEIGHT_KINDS)
    kv = sum(step["bytes"] for step in steps if step["kind"] not in WEIGHT_KINDS)
    crosses = ends[0] not in (ends[1], STORAGE)
    rate = profile["storage_bytes_per_s"] if ends[0] == STORAGE else profile["link_bytes_per_s"]
    # Inside an instance nothing passes a port: what the copies are expected to take, one beside the other.
    takes_s = (weights + kv) / rate if ends[0] != ends[1] else max(step["estimated_s"] for step in steps)
    share = takes_s / busiest_s if crosses and busiest_s else None
    return Link(ends[0], ends[1], len(steps), weights, kv, takes_s, share)


def link_table(plan: Json, *, most_rows: int) -> str:
    """Bytes by link, the largest ones if there are too many, and the busiest port."""
    found = links(plan)
    shown = found
    if len(found) > most_rows:
        largest = sorted(found, key=lambda link: -link.bytes)[:most_rows]
        shown = [link for link in found if link in largest]
    rows = [
        (
            f"{link.source} -> {link.destination}" if link.source != link.destination else f"inside {link.source}",
            link.num_steps,
            size_text(link.weight_bytes) if link.weight_bytes else "-",
            size_text(link.kv_bytes) if link.kv_bytes else "-",
            seconds_text(link.seconds),
            "-" if link.share is None else f"{link.share:.0%}",
        )
        for link in shown
    ]
    text = columns(("LINK", "STEPS", "WEIGHTS", "KV", "TAKES", "OF BUSIEST PORT"), rows)
    if len(found) > len(shown):
        rest = sum(link.bytes for link in found) - sum(link.bytes for link in shown)
        text += f"\n… and {count_text(len(found) - len(shown), 'more link')} with {size_text(rest)}"
    return "\n".join(part for part in (text, busiest_line(plan)) if part)


def busiest_line(plan: Json) -> str:
    """Which port carries most."""
    found = ports(plan)
    if not found:
        return ""
    rate = size_text(plan["spec"]["profile"]["link_bytes_per_s"])
    return f"busiest port: {found[0].words} at {rate}/s"
