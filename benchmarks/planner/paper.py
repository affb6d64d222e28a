"""The GPT-20B transitions of the SpotServe paper: our plans beside the estimates of its artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_file import say
from spotserve.cli.plan_file import spec_of
from spotserve.core.check import check_plan
from spotserve.core.cost import most_kv_blocks, replica_shards
from spotserve.core.ids import GpuId, InstanceId, ReplicaId, RequestId, instance_of
from spotserve.core.plan import CopyKv, CopyWeights, LoadWeights, Plan, PlanningProblem, Trigger
from spotserve.core.slices import layer_split
from spotserve.core.snapshot import (
    ChoiceProgress,
    Gpu,
    Holding,
    InstanceView,
    Replica,
    RequestProgress,
    Snapshot,
    Stage,
    World,
)
from spotserve.core.spec import ServingSpec
from spotserve.solvers.paper.mapper import CarriedBatch
from spotserve.solvers.paper.models import GPT_20B, Shape
from spotserve.solvers.paper.transfer import Transition, estimate_transfer, least_transfer, place_by_matching
from spotserve.solvers.planner import make_plan
from spotserve.solvers.steps import busiest_port_s

GPUS_PER_INSTANCE = 4
GPU_MEMORY_BYTES = 16 * 10**9
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
SEQUENCES = 4
EPOCH = 3


@dataclass(frozen=True, slots=True)
class Scenario:
    """Instances there are, those under notice, those that have just joined, and the shapes before and after."""

    name: str
    num_instances: int
    old: Shape
    new: Shape
    dying: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()


SCENARIOS = (
    Scenario("8 instances, one (used) lost; trace B_S, t = 240 s", 8, Shape(2, 2, 8), Shape(2, 3, 4), dying=(0,)),
    Scenario("8 instances, the last lost", 8, Shape(2, 2, 8), Shape(2, 3, 4), dying=(7,)),
    Scenario("7 instances, one joins", 8, Shape(2, 3, 4), Shape(2, 2, 8), joined=(7,)),
    Scenario("9 instances, to more throughput", 9, Shape(2, 2, 8), Shape(3, 3, 4)),
    Scenario("12 instances, to less latency", 12, Shape(3, 3, 4), Shape(3, 2, 8)),
    Scenario("9 instances, one lost, the spare takes over", 9, Shape(2, 2, 8), Shape(2, 2, 8), dying=(0,)),
)


def measure(sizes: Sequence[int], *, cases: int, seed: int) -> list[dict[str, Any]]:
    """One row per scenario, with and without KV; there is nothing random in it."""
    del sizes, cases, seed
    rows = [compared(scenario, with_kv=with_kv) for scenario in SCENARIOS for with_kv in (True, False)]
    say("paper")
    return rows


def compared(scenario: Scenario, *, with_kv: bool) -> dict[str, Any]:
    """Bytes and seconds of the artifact's estimate and of our plan."""
    change = transition(scenario, with_kv=with_kv)
    theirs = estimate_transfer(change, place_by_matching(change))
    plan = make_plan(problem_of(scenario, with_kv=with_kv))
    findings = check_plan(plan)
    assert not findings, f"{scenario.name}: {findings[0].line()}"
    between, inside, stored = moved_bytes(plan)
    return {
        "scenario": scenario.name,
        "kv": with_kv,
        "old": (scenario.old.data, scenario.old.pipeline, scenario.old.tensor),
        "new": (scenario.new.data, scenario.new.pipeline, scenario.new.tensor),
        "least_weight_bytes": least_transfer(change).moved_bytes,
        "artifact_between_bytes": theirs.between_mbit * 1e6 / 8,
        "artifact_inside_bytes": theirs.inside_mbit * 1e6 / 8,
        "artifact_s": theirs.transfer_s,
        "mode": plan.mode,
        "between_bytes": between,
        "inside_bytes": inside,
        "storage_bytes": stored,
        "port_s": busiest_port_s(plan.steps, link_bytes_per_s=plan.spec.profile.link_bytes_per_s),
        "copy_s": plan.estimates.copy_s,
        "stall_s": plan.estimates.stall_s,
    }


def transition(scenario: Scenario, *, with_kv: bool) -> Transition:
    """The scenario as the artifact sees it."""
    gpus = range(GPUS_PER_INSTANCE * scenario.num_instances)
    return Transition(
        model=GPT_20B,
        old_shape=scenario.old,
        new_shape=scenario.new,
        old=tuple(range(scenario.old.gpus)),
        staying=tuple(gpu for gpu in gpus if gpu // GPUS_PER_INSTANCE not in scenario.dying),
        instance_of=tuple(gpu // GPUS_PER_INSTANCE for gpu in gpus),
        heirs=tuple(range(scenario.new.data)),
        batches=(CarriedBatch(SEQUENCES, PROMPT_TOKENS + OUTPUT_TOKENS),) * scenario.old.data if with_kv else (),
    )


def problem_of(scenario: Scenario, *, with_kv: bool) -> PlanningProblem:
    """The scenario as a planning problem: the old shape on the first GPUs, four sequences near their end on each."""
    base = spec_of(Path(__file__).parents[2] / "plans" / "gpt-20b-t4" / "spec.toml", what="model")
    new = scenario.new
    degrees = {"data": new.data, "pipeline": new.pipeline, "tensor": new.tensor}
    spec = base.model_copy(update={"limits": base.limits.model_copy(update=degrees)})
    replicas = tuple(_replica(spec, scenario.old, number) for number in range(scenario.old.data))
    world = World(
        epoch=EPOCH,
        instances=tuple(_instance(number) for number in range(scenario.num_instances)),
        replicas=replicas,
        holdings=tuple(
            Holding(gpu=gpu, shards=(shard,))
            for one in replicas
            for gpu, shard in zip(
                one.gpus, replica_shards(spec.model, pipeline=one.pipeline, tensor=one.tensor), strict=True
            )
        ),
    )
    requests = tuple(
        _request(number, index, one) for number, one in enumerate(replicas) for index in range(SEQUENCES) if with_kv
    )
    return PlanningProblem(
        spec=spec, snapshot=Snapshot(world=world, requests=requests), trigger=_trigger(scenario), epoch_to=EPOCH + 1
    )


def _trigger(scenario: Scenario) -> Trigger:
    if scenario.dying:
        dying = tuple(InstanceId(f"i{number}") for number in scenario.dying)
        return Trigger(kind="notice", instances=dying, remaining_s=30.0)
    if scenario.joined:
        return Trigger(kind="joined", instances=tuple(InstanceId(f"i{number}") for number in scenario.joined))
    return Trigger(kind="load")


def _instance(number: int) -> InstanceView:
    gpus = (Gpu(id=GpuId(f"i{number}/{gpu}"), memory_bytes=GPU_MEMORY_BYTES) for gpu in range(GPUS_PER_INSTANCE))
    return InstanceView(id=InstanceId(f"i{number}"), state="ready", gpus=tuple(gpus))


def _replica(spec: ServingSpec, shape: Shape, number: int) -> Replica:
    size = shape.pipeline * shape.tensor
    gpus = [
        GpuId(f"i{gpu // GPUS_PER_INSTANCE}/{gpu % GPUS_PER_INSTANCE}")
        for gpu in range(number * size, (number + 1) * size)
    ]
    stages = tuple(
        Stage(layers=layers, gpus=tuple(gpus[stage * shape.tensor : (stage + 1) * shape.tensor]))
        for stage, layers in enumerate(layer_split(spec.model.num_layers, shape.pipeline))
    )
    return Replica(
        id=ReplicaId(f"r{EPOCH}.{number + 1}"),
        generation=EPOCH,
        max_running=spec.limits.max_running,
        kv_blocks=most_kv_blocks(spec.limits),
        stages=stages,
    )


def _request(number: int, index: int, replica: Replica) -> RequestProgress:
    progress = ChoiceProgress(
        choice=0, kv_generation=0, tokens=OUTPUT_TOKENS - 1, kv_tokens=PROMPT_TOKENS + OUTPUT_TOKENS - 2
    )
    return RequestProgress(
        request=RequestId(f"{number * SEQUENCES + index:032x}"),
        replica=replica.id,
        state="decoding",
        prompt_tokens=PROMPT_TOKENS,
        max_tokens=OUTPUT_TOKENS,
        choices=(progress,),
    )


def moved_bytes(plan: Plan) -> tuple[int, int, int]:
    """Bytes that a plan moves between instances, inside them, and from storage."""
    between = inside = stored = 0
    for step in plan.steps:
        if isinstance(step, LoadWeights):
            stored += step.bytes
        elif isinstance(step, CopyWeights | CopyKv):
            if instance_of(step.source) == instance_of(step.destination):
                inside += step.bytes
            else:
                between += step.bytes
    return between, inside, stored


def render(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as markdown."""
    yield "## The paper's GPT-20B transitions"
    yield ""
    yield (
        "Four T4 of 16 GB and 50 Gbit/s per instance, fp32, four sequences of 640 tokens on each replica where KV "
        "moves. The artifact's figures are its own estimate (bytes sent plus received by the fullest instance, between "
        "and inside instances added up, over 50 Gbit/s; it stops for that long); its GPT-20B is padded from 44 to 48 "
        "layers and has the embedding on every GPU. `least` is what no placement undercuts for its weights. Ours: "
        "bytes of the plan's copies, the busiest port, the estimated copy time (decoding goes on) and the stop."
    )
    yield ""
    yield (
        "| transition | from | to | KV | artifact: between, GB | inside, GB | s | least, GB | ours: between, GB | "
        "inside, GB | busiest port, s | copy, s | stop, s | mode |"
    )
    yield "| --- |" + " --- |" * 13
    for row in rows:
        shapes = [f"({', '.join(str(degree) for degree in row[key])})" for key in ("old", "new")]
        cells = [
            row["scenario"],
            *shapes,
            "yes" if row["kv"] else "no",
            f"{row['artifact_between_bytes'] / 1e9:.1f}",
            f"{row['artifact_inside_bytes'] / 1e9:.1f}",
            f"{row['artifact_s']:.2f}",
            f"{row['least_weight_bytes'] / 1e9:.1f}",
            f"{row['between_bytes'] / 1e9:.1f}",
            f"{row['inside_bytes'] / 1e9:.1f}",
            f"{row['port_s']:.2f}",
            f"{row['copy_s']:.2f}",
            f"{row['stall_s']:.2f}",
            row["mode"],
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
