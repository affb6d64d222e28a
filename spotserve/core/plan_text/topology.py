"""The layout before and after a plan: replicas, stages and what each instance is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from spotserve.core.ids import GpuId, InstanceId, natural_key
from spotserve.core.plan_text.table import (
    Json,
    by_instance,
    columns,
    count_text,
    cut,
    runs_text,
    seconds_text,
)

GPUS_WIDTH = 44
POSITIONS_WIDTH = 34


def replicas_before(plan: Json) -> Sequence[Json]:
    """The replicas that run."""
    found: Sequence[Json] = plan["snapshot"]["world"]["replicas"]
    return found


def replicas_after(plan: Json) -> Sequence[Json]:
    """The replicas that are to run."""
    found: Sequence[Json] = plan["target"]["replicas"]
    return found


def replica_change(plan: Json, replica: Json) -> str:
    """`untouched`, `changed`, `new` or `leaves`."""
    old = next((one for one in replicas_before(plan) if one["id"] == replica["id"]), None)
    new = next((one for one in replicas_after(plan) if one["id"] == replica["id"]), None)
    if old is None:
        return "new"
    if new is None:
        return "leaves"
    return "untouched" if old == new else "changed"


def shape_text(replica: Json) -> str:
    """`2 stages x 4 GPUs`: the pipeline and tensor parallel degrees."""
    degrees = sorted({len(stage["gpus"]) for stage in replica["stages"]})
    gpus = count_text(degrees[0], "GPU") if len(degrees) == 1 else f"{degrees[0]}-{degrees[-1]} GPUs"
    return f"{count_text(len(replica['stages']), 'stage')} x {gpus}"


def layout_line(plan: Json, replicas: Sequence[Json]) -> str:
    """`1 replica of 2 stages x 4 GPUs, 8 of 12 GPUs`."""
    shapes = sorted(shape_text(replica) for replica in replicas)
    counted = [(shape, len(list(same))) for shape, same in groupby(shapes)]
    kinds = ", ".join(f"{count_text(number, 'replica')} of {shape}" for shape, number in counted)
    used = sum(len(stage["gpus"]) for replica in replicas for stage in replica["stages"])
    total = sum(len(instance["gpus"]) for instance in plan["snapshot"]["world"]["instances"])
    return f"{kinds or 'no replica'}; {used} of {count_text(total, 'GPU')}"


def replica_table(plan: Json, replicas: Sequence[Json], *, most_rows: int) -> str:
    """One row for a stage of each replica; what changes comes first where there are too many."""
    heirs = {route["from_replica"]: route["to_replica"] for route in plan["routes"]}
    ordered = sorted(replicas, key=lambda one: natural_key(one["id"]))
    if sum(len(replica["stages"]) for replica in ordered) > most_rows:
        ordered.sort(key=lambda one: replica_change(plan, one) == "untouched")
    rows = []
    for replica in ordered:
        change = replica_change(plan, replica)
        heir = f", heir {heirs[replica['id']]}" if change == "leaves" and replica["id"] in heirs else ""
        for index, stage in enumerate(replica["stages"]):
            rows.append(
                (
                    replica["id"],
                    change + heir,
                    index,
                    f"{stage['layers'][0]}:{stage['layers'][1]}",
                    cut(runs_text(stage["gpus"]), GPUS_WIDTH),
                    replica["max_running"],
                    replica["kv_blocks"],
                )
            )
    text = columns(("REPLICA", "CHANGE", "STAGE", "LAYERS", "GPUS", "RUNNING", "KV BLOCKS"), rows[:most_rows])
    hidden = len(rows) - most_rows
    return f"{text}\n… and {count_text(hidden, 'more stage')}" if hidden > 0 else text


def instance_state(plan: Json, instance: Json) -> str:
    """`ready`, `notice, 30.00 s`, `lost`, `joined` and whatever else the snapshot says of it."""
    trigger, left_s = plan["trigger"], instance["remaining_s"]
    if instance["id"] in trigger["instances"] and instance["state"] in ("ready", "doomed"):
        if trigger["kind"] == "notice":
            known = [value for value in (left_s, trigger["remaining_s"]) if value is not None]
            return "notice" + (f", {seconds_text(min(known))}" if known else "")
        if trigger["kind"] in ("lost", "joined"):
            return str(trigger["kind"])
    if instance["state"] == "doomed":
        return "notice" + ("" if left_s is None else f", {seconds_text(left_s)}")
    return str(instance["state"])


def positions(replicas: Sequence[Json]) -> dict[str, tuple[str, int, int]]:
    """GPU -> (replica, stage, rank)."""
    return {
        gpu: (replica["id"], number, rank)
        for replica in replicas
        for number, stage in enumerate(replica["stages"])
        for rank, gpu in enumerate(stage["gpus"])
    }


def instance_table(plan: Json, *, most_rows: int) -> str:
    """What each instance is for, before and after; the unchanged ones are left out first where there are too many."""
    before, after = positions(replicas_before(plan)), positions(replicas_after(plan))
    generations = {replica["id"]: replica["generation"] for replica in replicas_before(plan)}
    rows = []
    for instance in sorted(plan["snapshot"]["world"]["instances"], key=lambda one: natural_key(one["id"])):
        gpus = [gpu["id"] for gpu in instance["gpus"]]
        same = all(before.get(gpu) == after.get(gpu) for gpu in gpus)
        same &= all(_generation(plan, after.get(gpu)) == generations.get(before.get(gpu, ("",))[0]) for gpu in gpus)
        state = instance_state(plan, instance)
        stays = not state.startswith(("notice", "lost"))
        old, new = _positions_text(gpus, before), _positions_text(gpus, after, idle="spare" if stays else "gone")
        change = "untouched" if same and stays else "changed"
        rows.append((instance["id"], state, len(gpus), old, new, change))
    shown = rows
    if len(rows) > most_rows:
        first = sorted(rows, key=lambda row: row[-1] == "untouched" and row[1] == "ready")[:most_rows]
        shown = [row for row in rows if row in first]
    text = columns(("INSTANCE", "STATE", "GPUS", "BEFORE", "AFTER", "CHANGE"), shown)
    hidden = len(rows) - len(shown)
    return f"{text}\n… and {count_text(hidden, 'more instance')}" if hidden else text


def _generation(plan: Json, position: tuple[str, int, int] | None) -> int | None:
    if position is None:
        return None
    return next((int(replica["generation"]) for replica in replicas_after(plan) if replica["id"] == position[0]), None)


def _positions_text(gpus: Sequence[str], taken: Mapping[str, tuple[str, int, int]], *, idle: str = "spare") -> str:
    """`r4:1 x4`: four GPUs for stage 1 of r4; `idle` where no replica uses a GPU."""
    if not gpus:
        return "-"
    names = [f"{taken[gpu][0]}:{taken[gpu][1]}" for gpu in gpus if gpu in taken]
    idling = [idle] * (len(gpus) - len(names))
    counted = Counter([*sorted(names, key=natural_key), *idling])
    parts = [name if number == len(gpus) == 1 else f"{name} x{number}" for name, number in counted.items()]
    return cut(", ".join(parts), POSITIONS_WIDTH)


def request_lines(plan: Json) -> str:
    """How many requests finish, move or are recomputed, by the replica that they go to."""
    requests = plan["requests"]
    if not requests:
        pairs = [f"{route['from_replica']} -> {route['to_replica']}" for route in plan["routes"]]
        return "\n".join(f"none now; later ones of {pair}" for pair in pairs)
    places = {progress["request"]: progress["replica"] for progress in plan["snapshot"]["requests"]}
    lines = [f"{count_text(len(requests), 'request')}: {actions_text(requests)}"]
    groups: dict[tuple[str, str], list[Json]] = {}
    for request in requests:
        ends = (places.get(request["request"]) or "none", request["to_replica"] or "none")
        groups.setdefault(ends, []).append(request)
    for ends in sorted(groups, key=lambda ends: (natural_key(ends[0]), natural_key(ends[1]))):
        lines.append(f"of {ends[0]} -> {ends[1]}: {actions_text(groups[ends])}")
    return "\n".join(lines)


def actions_text(requests: Sequence[Json]) -> str:
    """`4 move, 1 finish, 2 recompute`."""
    actions = [request["action"] for request in requests]
    return ", ".join(f"{actions.count(name)} {name}" for name in ("move", "finish", "recompute") if name in actions)


def gpus_of(plan: Json) -> dict[InstanceId, list[GpuId]]:
    """The GPUs of each instance of the snapshot and the target, in natural order."""
    gpus = {gpu["id"] for instance in plan["snapshot"]["world"]["instances"] for gpu in instance["gpus"]}
    replicas = [*replicas_before(plan), *replicas_after(plan)]
    gpus |= {gpu for replica in replicas for stage in replica["stages"] for gpu in stage["gpus"]}
    return by_instance(gpus)
