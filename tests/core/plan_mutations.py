"""Ways to spoil a plan, each with the code that the checker must find: what `test_check_mutations.py` draws from.

A mutation changes the plain data of one plan in place. It answers False where the plan has nothing that it could
spoil; then nothing has changed. Where it changes spec or world it renews the digests, so that only its own fault is
there to be found.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spotserve.core.canonical import digest
from spotserve.core.snapshot import World
from spotserve.core.spec import ServingSpec

Raw = dict[str, Any]
Spoil = Callable[[Raw, random.Random], bool]
Change = Callable[[Raw, random.Random, Any], None]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to spoil a plan, and the code of the finding that it must give."""

    name: str
    code: str
    spoil: Spoil


MUTATIONS: list[Mutation] = []


def finds(code: str) -> Callable[[Spoil], Spoil]:
    """Put a mutation into the table under its function's name."""

    def register(spoil: Spoil) -> Spoil:
        MUTATIONS.append(Mutation(spoil.__name__, code, spoil))
        return spoil

    return register


def finds_in(code: str, among: Callable[[Raw], list[Any]]) -> Callable[[Change], Change]:
    """Put a mutation into the table that changes one of some things, wherever there are any."""

    def register(change: Change) -> Change:
        def spoil(data: Raw, draw: random.Random) -> bool:
            things = among(data)
            if things:
                change(data, draw, draw.choice(things))
            return bool(things)

        MUTATIONS.append(Mutation(change.__name__, code, spoil))
        return change

    return register


def steps_of(data: Raw, *kinds: str) -> list[Raw]:
    """The steps of some kinds."""
    return [step for step in data["steps"] if step["kind"] in kinds]


def picked(draw: random.Random, things: list[Any]) -> Any:
    """One of them, None of none."""
    return draw.choice(things) if things else None


def drop(data: Raw, dropped: Raw) -> None:
    """Take a step out, and let what waited for it wait for what it waited for."""
    data["steps"] = [step for step in data["steps"] if step is not dropped]
    for step in data["steps"]:
        if dropped["id"] in step["depends_on"]:
            step["depends_on"] = sorted({*step["depends_on"], *dropped["depends_on"]} - {dropped["id"]})


def renew(data: Raw) -> None:
    """Digests of a changed spec or world."""
    data["spec_digest"] = digest(ServingSpec.model_validate(data["spec"]))
    data["snapshot_digest"] = digest(World.model_validate(data["snapshot"]["world"]))


def row(data: Raw, piece: Raw) -> int:
    """Bytes of one index of a slice's dimension."""
    name = ".".join("{layer}" if part.isdigit() else part for part in piece["parameter"].split("."))
    table = next(one for one in data["spec"]["model"]["parameters"] if one["name"] in (name, piece["parameter"]))
    total = 4
    for number, extent in enumerate(table["shape"]):
        total *= 1 if number == table["dim"] else extent
    return total


def recount(data: Raw, step: Raw) -> None:
    """Let a step claim the bytes of its slices."""
    step["bytes"] = sum((piece["stop"] - piece["start"]) * row(data, piece) for piece in step["slices"])


def living(data: Raw) -> set[str]:
    """GPUs that have a worker, doomed ones too."""
    lost = set(data["trigger"]["instances"]) if data["trigger"]["kind"] == "lost" else set()
    return {
        gpu["id"]
        for instance in data["snapshot"]["world"]["instances"]
        if instance["state"] in ("ready", "doomed") and not (instance["state"] == "ready" and instance["id"] in lost)
        for gpu in instance["gpus"]
    }


def old_ids(data: Raw) -> set[str]:
    """The replicas of the snapshot."""
    return {one["id"] for one in data["snapshot"]["world"]["replicas"]}


def fresh(data: Raw) -> list[Raw]:
    """The target's new replicas."""
    return [one for one in data["target"]["replicas"] if one["id"] not in old_ids(data)]


def gpus_of(replica: Raw) -> list[str]:
    """The GPUs of a replica."""
    return [gpu for stage in replica["stages"] for gpu in stage["gpus"]]


def pair_of(data: Raw, copy: Raw) -> list[Raw]:
    """A copy_kv and its delta."""
    keys = ("source", "destination", "route")
    return [one for one in steps_of(data, "copy_kv", "copy_kv_delta") if all(one[key] == copy[key] for key in keys)]


# coverage_hole


@finds_in("coverage_hole", lambda data: steps_of(data, "copy_weights", "load_weights"))
def weight_slice_dropped(data: Raw, draw: random.Random, step: Raw) -> None:
    step["slices"].pop(draw.randrange(len(step["slices"])))
    recount(data, step)


@finds_in("coverage_hole", lambda data: steps_of(data, "copy_weights", "load_weights"))
def weight_slice_shortened(data: Raw, draw: random.Random, step: Raw) -> None:
    piece = draw.choice(step["slices"])
    end = draw.choice(["start", "stop"])
    piece[end] += 1 if end == "start" else -1
    if piece["start"] == piece["stop"]:
        step["slices"].remove(piece)
    recount(data, step)


@finds_in(
    "coverage_hole", lambda data: [one for one in steps_of(data, "copy_weights", "load_weights") if one["slices"]]
)
def weight_step_dropped(data: Raw, draw: random.Random, step: Raw) -> None:
    drop(data, step)


@finds("coverage_hole")
def kv_head_hole(data: Raw, draw: random.Random) -> bool:
    copies = [one for one in steps_of(data, "copy_kv") if one["route"]["kv_heads"][1] - one["route"]["kv_heads"][0] > 1]
    copy = picked(draw, copies)
    if copy is None:
        return False
    low, high = copy["route"]["kv_heads"]
    for one in pair_of(data, copy):
        one["route"] = {**one["route"], "kv_heads": draw.choice([[low + 1, high]])}
    return True


@finds("coverage_hole")
def kv_layer_hole(data: Raw, draw: random.Random) -> bool:
    copies = [one for one in steps_of(data, "copy_kv") if one["route"]["layers"][1] - one["route"]["layers"][0] > 1]
    copy = picked(draw, copies)
    if copy is None:
        return False
    first, last = copy["route"]["layers"]
    for one in pair_of(data, copy):
        one["route"] = {**one["route"], "layers": [first, last - 1]}
    return True


@finds("coverage_hole")
def layer_of_nobody(data: Raw, draw: random.Random) -> bool:
    stages = [stage for one in fresh(data) for stage in one["stages"] if stage["layers"][1] - stage["layers"][0] > 1]
    stage = picked(draw, stages)
    if stage is None:
        return False
    stage["layers"] = [stage["layers"][0] + 1, stage["layers"][1]]
    return True


@finds("coverage_hole")
def target_on_a_gpu_that_goes(data: Raw, draw: random.Random) -> bool:
    stages = [stage for one in data["target"]["replicas"] for stage in one["stages"]]
    if not stages or data["trigger"]["kind"] not in ("notice", "lost") or not data["trigger"]["instances"]:
        return False
    draw.choice(stages)["gpus"][0] = f"{draw.choice(data['trigger']['instances'])}/0"
    return True


@finds("coverage_hole")
def request_forgotten(data: Raw, draw: random.Random) -> bool:
    if not data["requests"]:
        return False
    data["requests"].pop(draw.randrange(len(data["requests"])))
    return True


@finds("coverage_hole")
def route_forgotten(data: Raw, draw: random.Random) -> bool:
    if not data["routes"] or not data["target"]["replicas"]:
        return False
    data["routes"].pop(draw.randrange(len(data["routes"])))
    return True


@finds("coverage_hole")
def needed_weights_freed(data: Raw, draw: random.Random) -> bool:
    kept = {gpu for one in fresh(data) for gpu in gpus_of(one)}
    releases = [one for one in steps_of(data, "release") if one["workers"][0] in kept]
    if data["mode"] != "live" or not releases:
        return False
    release = draw.choice(releases)
    table = data["spec"]["model"]["parameters"]
    norm = next(one for one in table if one["stage"] == "layer" and one["kind"] == "replicated")
    for one in fresh(data):
        for stage in one["stages"]:
            if release["workers"][0] in stage["gpus"]:
                name = norm["name"].replace("{layer}", str(stage["layers"][0]))
                piece = {"parameter": name, "dim": norm["dim"], "start": 0, "stop": norm["shape"][norm["dim"]]}
                release["slices"].append(piece)
    return True


# double_owner


@finds_in("double_owner", lambda data: steps_of(data, "copy_weights", "load_weights"))
def weight_slice_doubled(data: Raw, draw: random.Random, step: Raw) -> None:
    step["slices"].append(dict(draw.choice(step["slices"])))
    recount(data, step)


@finds_in("double_owner", lambda data: steps_of(data, "copy_weights", "load_weights"))
def weight_step_doubled(data: Raw, draw: random.Random, step: Raw) -> None:
    data["steps"].append({**step, "id": "s900"})
    for one in steps_of(data, "quiesce", "activate"):
        if data["mode"] == "live" or one["kind"] == "activate":
            one["depends_on"] = [*one["depends_on"], "s900"]


@finds_in("double_owner", lambda data: steps_of(data, "copy_kv"))
def kv_step_doubled(data: Raw, draw: random.Random, step: Raw) -> None:
    data["steps"].append({**step, "id": "s900"})


@finds("double_owner")
def kv_goes_to_a_stranger(data: Raw, draw: random.Random) -> bool:
    copy = picked(draw, steps_of(data, "copy_kv"))
    if copy is None:
        return False
    seated = gpus_of(next(one for one in data["target"]["replicas"] if one["id"] == copy["route"]["to_replica"]))
    others = sorted(living(data) - set(seated))
    if not others:
        return False
    data["steps"].append({**copy, "id": "s900", "destination": draw.choice(others)})
    return True


@finds("double_owner")
def gpu_in_two_positions(data: Raw, draw: random.Random) -> bool:
    stages = [stage for one in data["target"]["replicas"] for stage in one["stages"]]
    seats = [(stage, rank) for stage in stages for rank in range(len(stage["gpus"]))]
    if len(seats) < 2:
        return False
    (first, i), (second, j) = draw.sample(seats, 2)
    first["gpus"][i] = second["gpus"][j]
    return True


@finds_in("double_owner", lambda data: [one for one in fresh(data) if len(one["stages"]) > 1])
def layer_of_two_stages(data: Raw, draw: random.Random, replica: Raw) -> None:
    replica["stages"][0]["layers"][1] += 1


@finds("double_owner")
def weights_for_nobody(data: Raw, draw: random.Random) -> bool:
    seated = {gpu for one in fresh(data) for gpu in gpus_of(one)}
    others = sorted(living(data) - seated)
    step = picked(draw, steps_of(data, "copy_weights"))
    if step is None or not others:
        return False
    data["steps"].append({**step, "id": "s900", "destination": draw.choice(others)})
    return True


@finds_in("double_owner", lambda data: steps_of(data, "reserve", "join_group", "activate", "release"))
def wrong_generation(data: Raw, draw: random.Random, step: Raw) -> None:
    step["generation"] += draw.choice([-1, 1])


@finds_in("double_owner", lambda data: steps_of(data, "reserve"))
def wrong_rank(data: Raw, draw: random.Random, step: Raw) -> None:
    step[draw.choice(["stage", "rank"])] += draw.choice([-1, 1])


@finds_in(
    "double_owner", lambda data: [one for one in steps_of(data, "join_group", "activate") if len(one["workers"]) > 1]
)
def mesh_in_another_order(data: Raw, draw: random.Random, step: Raw) -> None:
    step["workers"] = draw.choice([step["workers"][1:] + step["workers"][:1], step["workers"][:-1]])


@finds("double_owner")
def stop_told_to_another_rank(data: Raw, draw: random.Random) -> bool:
    step = picked(draw, steps_of(data, "quiesce"))
    others = sorted(living(data) - {step["workers"][0]}) if step is not None else []
    if step is None or not others:
        return False
    step["workers"] = [draw.choice(others)]
    return True


@finds("double_owner")
def release_of_a_stranger(data: Raw, draw: random.Random) -> bool:
    step = picked(draw, steps_of(data, "release"))
    if step is None:
        return False
    replica = next(one for one in data["snapshot"]["world"]["replicas"] if one["id"] == step["replica"])
    others = sorted(living(data) - set(gpus_of(replica)))
    if not others:
        return False
    data["steps"].append({**step, "id": "s900", "workers": [draw.choice(others)], "slices": []})
    return True


@finds("double_owner")
def request_with_two_actions(data: Raw, draw: random.Random) -> bool:
    if not data["requests"]:
        return False
    data["requests"].append(dict(draw.choice(data["requests"])))
    return True


@finds_in("double_owner", lambda data: data["requests"])
def request_off_its_route(data: Raw, draw: random.Random, action: Raw) -> None:
    action["to_replica"] = "r99"


@finds("double_owner")
def recomputed_twice(data: Raw, draw: random.Random) -> bool:
    step = picked(draw, steps_of(data, "recompute"))
    if step is None or not step["requests"]:
        return False
    step["requests"].append(step["requests"][0])
    return True


@finds("double_owner")
def moved_and_recomputed(data: Raw, draw: random.Random) -> bool:
    moved = [one["request"] for one in data["requests"] if one["action"] != "recompute"]
    step = picked(draw, steps_of(data, "recompute"))
    if step is None or not moved:
        return False
    step["requests"].append(draw.choice(moved))
    return True


@finds("double_owner")
def running_replica_changed(data: Raw, draw: random.Random) -> bool:
    kept = [one for one in data["target"]["replicas"] if one["id"] in old_ids(data)]
    replica = picked(draw, kept)
    if replica is None:
        return False
    replica[draw.choice(["max_running", "kv_blocks", "generation"])] += 1
    return True


@finds("double_owner")
def two_routes(data: Raw, draw: random.Random) -> bool:
    route = picked(draw, data["routes"])
    others = [one["id"] for one in data["target"]["replicas"] if route is not None and one["id"] != route["to_replica"]]
    if not others:
        return False
    data["routes"].append({**route, "to_replica": draw.choice(others)})
    return True


# not_a_holder


@finds("not_a_holder")
def weights_from_a_non_holder(data: Raw, draw: random.Random) -> bool:
    holders = {one["gpu"] for one in data["snapshot"]["world"]["holdings"]}
    blank = sorted(living(data) - holders)
    step = picked(draw, steps_of(data, "copy_weights"))
    if step is None or not blank:
        return False
    step["source"] = draw.choice(blank)
    return True


@finds_in("not_a_holder", lambda data: steps_of(data, "copy_weights"))
def weights_from_nowhere(data: Raw, draw: random.Random, step: Raw) -> None:
    step["source"] = "i99/0"


@finds("not_a_holder")
def kv_from_a_non_holder(data: Raw, draw: random.Random) -> bool:
    copy = picked(draw, steps_of(data, "copy_kv", "copy_kv_delta"))
    if copy is None:
        return False
    replicas = data["snapshot"]["world"]["replicas"]
    old = next(one for one in replicas if one["id"] == copy["route"]["from_replica"])
    others = sorted(living(data) - set(gpus_of(old)))
    if not others:
        return False
    copy["source"] = draw.choice(others)
    return True


@finds_in("not_a_holder", lambda data: steps_of(data, "copy_kv", "copy_kv_delta"))
def kv_heads_beyond_the_source(data: Raw, draw: random.Random, copy: Raw) -> None:
    low, _ = copy["route"]["kv_heads"]
    copy["route"] = {**copy["route"], "kv_heads": [low, data["spec"]["model"]["num_kv_heads"] + 1]}


@finds_in("not_a_holder", lambda data: [one for one in data["steps"] if one.get("workers")])
def worker_that_is_not_there(data: Raw, draw: random.Random, step: Raw) -> None:
    step["workers"] = ["i99/0", *step["workers"][1:]]


@finds("not_a_holder")
def frees_what_it_has_not(data: Raw, draw: random.Random) -> bool:
    blank = living(data) - {one["gpu"] for one in data["snapshot"]["world"]["holdings"]}
    release = picked(draw, steps_of(data, "release"))
    if release is None or not blank:
        return False
    release["workers"] = [sorted(blank)[0]]
    norm = next(one for one in data["spec"]["model"]["parameters"] if one["stage"] == "last")
    piece = {"parameter": norm["name"], "dim": norm["dim"], "start": 0, "stop": 1}
    release["slices"] = [*release["slices"], piece]
    return True


@finds("not_a_holder")
def move_from_a_lost_replica(data: Raw, draw: random.Random) -> bool:
    alive = living(data)
    lost = {one["id"] for one in data["snapshot"]["world"]["replicas"] if any(gpu not in alive for gpu in gpus_of(one))}
    of_lost = {one["request"] for one in data["snapshot"]["requests"] if one["replica"] in lost}
    action = picked(draw, [one for one in data["requests"] if one["request"] in of_lost])
    if action is None:
        return False
    action["action"] = "move"
    return True


# over_memory


@finds_in("over_memory", lambda data: [gpu for one in fresh(data) for gpu in gpus_of(one)])
def smaller_gpu(data: Raw, draw: random.Random, seat: Raw) -> None:
    for instance in data["snapshot"]["world"]["instances"]:
        for gpu in instance["gpus"]:
            if gpu["id"] == seat:
                gpu["memory_bytes"] = 64 * 1024
    renew(data)


@finds_in("over_memory", lambda data: [one for one in steps_of(data, "reserve") if one["bytes"]])
def reserve_too_small(data: Raw, draw: random.Random, step: Raw) -> None:
    step["bytes"] -= 1


@finds_in("over_memory", lambda data: steps_of(data, "reserve"))
def reserve_too_large(data: Raw, draw: random.Random, step: Raw) -> None:
    step["bytes"] += 2**40


@finds_in("over_memory", lambda data: fresh(data))
def pool_too_large(data: Raw, draw: random.Random, replica: Raw) -> None:
    replica["kv_blocks"] += 2**30


@finds("over_memory")
def more_sequences_than_b(data: Raw, draw: random.Random) -> bool:
    counts: dict[str, int] = {}
    for action in data["requests"]:
        if action["action"] == "move":
            counts[action["to_replica"]] = counts.get(action["to_replica"], 0) + 1
    crowded = [one for one in fresh(data) if counts.get(one["id"], 0) > 1]
    replica = picked(draw, crowded)
    if replica is None:
        return False
    replica["max_running"] = counts[replica["id"]] - 1
    return True


@finds_in("over_memory", lambda data: [one for one in data["requests"] if one["action"] == "move"])
def more_kv_than_the_pool(data: Raw, draw: random.Random, action: Raw) -> None:
    request = next(one for one in data["snapshot"]["requests"] if one["request"] == action["request"])
    request["choices"][0]["kv_tokens"] = 10**7


# cycle, duplicate_step, missing_step


@finds_in("cycle", lambda data: data["steps"])
def waits_for_itself(data: Raw, draw: random.Random, step: Raw) -> None:
    step["depends_on"] = [*step["depends_on"], step["id"]]


@finds_in("cycle", lambda data: [one for one in data["steps"] if one["depends_on"]])
def waits_for_a_follower(data: Raw, draw: random.Random, follower: Raw) -> None:
    name = draw.choice(follower["depends_on"])
    first = next(one for one in data["steps"] if one["id"] == name)
    first["depends_on"] = [*first["depends_on"], follower["id"]]


@finds("duplicate_step")
def id_twice(data: Raw, draw: random.Random) -> bool:
    if len(data["steps"]) < 2:
        return False
    first, second = draw.sample(data["steps"], 2)
    first["id"] = second["id"]
    return True


@finds("duplicate_step")
def effect_twice(data: Raw, draw: random.Random) -> bool:
    kinds = ("commit", "quiesce", "activate", "join_group", "reserve", "copy_kv_delta")
    step = picked(draw, [*steps_of(data, *kinds), *(one for one in steps_of(data, "release") if one["kv"])])
    if step is None:
        return False
    data["steps"].append({**step, "id": "s900"})
    return True


@finds_in("duplicate_step", lambda data: [one for one in steps_of(data, "release") if one["slices"]])
def weights_freed_twice(data: Raw, draw: random.Random, release: Raw) -> None:
    release["slices"] = [*release["slices"], release["slices"][0]]


@finds("missing_step")
def step_dropped(data: Raw, draw: random.Random) -> bool:
    kinds = ("commit", "quiesce", "activate", "join_group", "reserve", "copy_kv_delta", "copy_kv", "recompute")
    step = picked(draw, [*steps_of(data, *kinds), *(one for one in steps_of(data, "release") if one["kv"])])
    if step is None:
        return False
    drop(data, step)
    return True


@finds_in("missing_step", lambda data: [one for one in steps_of(data, "release") if one["kv"]])
def pool_kept(data: Raw, draw: random.Random, release: Raw) -> None:
    release["kv"] = False


@finds_in("missing_step", lambda data: data["steps"])
def unknown_dependency(data: Raw, draw: random.Random, step: Raw) -> None:
    step["depends_on"] = [*step["depends_on"], "s999"]


@finds_in("missing_step", lambda data: steps_of(data, "copy_kv"))
def route_without_copies(data: Raw, draw: random.Random, copy: Raw) -> None:
    pair = ("from_replica", "to_replica")
    for one in steps_of(data, "copy_kv", "copy_kv_delta"):
        if all(one["route"][key] == copy["route"][key] for key in pair):
            drop(data, one)


@finds_in("missing_step", lambda data: [one for one in steps_of(data, "recompute") if one["requests"]])
def recompute_without_the_request(data: Raw, draw: random.Random, step: Raw) -> None:
    step["requests"].pop()


@finds("missing_step")
def no_steps_at_all(data: Raw, draw: random.Random) -> bool:
    if not data["steps"]:
        return False
    data["steps"] = []
    data["applyable"] = False
    return True


# wrong_order


@finds("wrong_order")
def other_mode(data: Raw, draw: random.Random) -> bool:
    if not steps_of(data, "reserve"):
        return False
    data["mode"] = "in_place" if data["mode"] == "live" else "live"
    return True


@finds("wrong_order")
def cut_over_before_the_commit(data: Raw, draw: random.Random) -> bool:
    kinds = ("activate", "recompute", "release") if data["mode"] == "live" else ("activate", "copy_weights")
    step = picked(draw, steps_of(data, *kinds))
    if step is None:
        return False
    step["depends_on"] = []
    return True


@finds("wrong_order")
def stop_before_the_copies(data: Raw, draw: random.Random) -> bool:
    step = picked(draw, steps_of(data, "quiesce"))
    if step is None or data["mode"] != "live" or not fresh(data):
        return False
    step["depends_on"] = []
    return True


@finds_in("wrong_order", lambda data: steps_of(data, "copy_kv_delta"))
def delta_before_the_stop(data: Raw, draw: random.Random, step: Raw) -> None:
    step["depends_on"] = []


@finds("wrong_order")
def content_before_its_memory(data: Raw, draw: random.Random) -> bool:
    reserved = {step["workers"][0] for step in steps_of(data, "reserve")}
    step = picked(draw, [one for one in steps_of(data, "copy_weights", "copy_kv") if one["destination"] in reserved])
    if step is None:
        return False
    step["depends_on"] = []
    return True


@finds("wrong_order")
def serves_before_its_content(data: Raw, draw: random.Random) -> bool:
    step = picked(draw, steps_of(data, "activate"))
    if step is None or data["mode"] != "in_place" or not steps_of(data, "join_group"):
        return False
    step["depends_on"] = [steps_of(data, "commit")[0]["id"]]
    return True


# past_deadline


def doomed_reads(data: Raw) -> list[Raw]:
    """Copies over the link from instances under notice, with something to bring."""
    doomed = set(data["trigger"]["instances"]) if data["trigger"]["kind"] == "notice" else set()
    return [
        one
        for one in steps_of(data, "copy_weights")
        if one["source"].split("/")[0] in doomed and one["source"] != one["destination"] and one["bytes"]
    ]


@finds("past_deadline")
def no_time_left(data: Raw, draw: random.Random) -> bool:
    if not doomed_reads(data):
        return False
    data["trigger"]["remaining_s"] = 0.0
    return True


@finds("past_deadline")
def slower_link(data: Raw, draw: random.Random) -> bool:
    if not doomed_reads(data):
        return False
    data["spec"]["profile"]["link_bytes_per_s"] = 10.0
    renew(data)
    return True


@finds("past_deadline")
def stops_too_late(data: Raw, draw: random.Random) -> bool:
    doomed = set(data["trigger"]["instances"]) if data["trigger"]["kind"] == "notice" else set()
    hit = {
        one["id"]
        for one in data["snapshot"]["world"]["replicas"]
        if any(gpu.split("/")[0] in doomed for gpu in gpus_of(one))
    }
    step = picked(draw, [one for one in steps_of(data, "quiesce") if one["replica"] in hit])
    if step is None:
        return False
    step["latest_s"] = draw.choice([None, data["trigger"]["remaining_s"] + 0.5])
    return True


@finds_in("past_deadline", lambda data: [one for one in steps_of(data, "quiesce") if one["latest_s"] is not None])
def stop_that_cannot_be(data: Raw, draw: random.Random, step: Raw) -> None:
    step["not_before_s"] = step["latest_s"] + 1.0


# stale


@finds("stale")
def other_membership(data: Raw, draw: random.Random) -> bool:
    instances = data["snapshot"]["world"]["instances"]
    draw.choice(instances)["market"] = "ondemand"
    return True


@finds("stale")
def other_spec(data: Raw, draw: random.Random) -> bool:
    data["spec"]["limits"]["migration_headroom_bytes"] += 1
    return True


@finds("stale")
def other_digest(data: Raw, draw: random.Random) -> bool:
    data[draw.choice(["spec_digest", "snapshot_digest"])] = "sha256:0"
    return True


@finds("stale")
def other_epoch(data: Raw, draw: random.Random) -> bool:
    data["epoch"]["from"] += 1
    data["epoch"]["to"] += 1
    return True


@finds("stale")
def epoch_that_does_not_follow(data: Raw, draw: random.Random) -> bool:
    data["epoch"]["to"] = data["epoch"]["from"]
    return True


@finds("stale")
def epoch_used_already(data: Raw, draw: random.Random) -> bool:
    data["snapshot"]["next_epoch"] = data["epoch"]["to"] + 1
    return True


@finds_in("stale", lambda data: fresh(data))
def generation_of_another_epoch(data: Raw, draw: random.Random, replica: Raw) -> None:
    replica["generation"] += draw.choice([-1, 1])


@finds("stale")
def other_policy(data: Raw, draw: random.Random) -> bool:
    data["policy_version"] += 1
    return True


# corrupt, bad_version


@finds_in("corrupt", lambda data: steps_of(data, "copy_weights", "load_weights"))
def false_bytes(data: Raw, draw: random.Random, step: Raw) -> None:
    step["bytes"] += draw.choice([-1, 1])


@finds_in("corrupt", lambda data: [one for one in data["steps"] if one.get("slices")])
def slice_outside_the_table(data: Raw, draw: random.Random, step: Raw) -> None:
    piece = draw.choice(step["slices"])
    piece.update(draw.choice([{"dim": 7}, {"parameter": "nothing"}, {"start": -1}, {"stop": 10**9}]))


@finds("corrupt")
def false_claim(data: Raw, draw: random.Random) -> bool:
    claim = draw.choice(["applyable", "complete"])
    data[claim] = not data[claim]
    return True


@finds("corrupt")
def name_twice(data: Raw, draw: random.Random) -> bool:
    world = data["snapshot"]["world"]
    lists = [world["instances"], world["replicas"], world["holdings"], data["snapshot"]["requests"]]
    chosen = draw.choice([one for one in lists if one])
    chosen.append(chosen[0])
    renew(data)
    return True


@finds("corrupt")
def gpu_of_another_instance(data: Raw, draw: random.Random) -> bool:
    draw.choice(data["snapshot"]["world"]["instances"])["gpus"][0]["id"] = "i99/0"
    renew(data)
    return True


@finds("corrupt")
def two_tensor_degrees(data: Raw, draw: random.Random) -> bool:
    spare = sorted(living(data) - {gpu for one in data["target"]["replicas"] for gpu in gpus_of(one)})
    replica = picked(draw, [one for one in fresh(data) if len(one["stages"]) > 1])
    if replica is None or not spare:
        return False
    replica["stages"][0]["gpus"].append(spare[0])
    return True


@finds("bad_version")
def other_version(data: Raw, draw: random.Random) -> bool:
    data["format_version"] = draw.choice(["1.0", "0.2", "", None, 0.1])
    return True
