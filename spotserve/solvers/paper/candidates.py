"""Algorithm 1 (section 3.2) over the planner's own table of configurations: as the artifact runs it, and as printed.

The table says what fits. The artifact's l_exe is its own, over micro-batches, with the layer times of our profile; as
printed the planner's cost model judges, which has the wait in the queue that the artifact leaves out. Neither has
hysteresis, a second replica for safety, or a look at what a change disturbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spotserve.core.cost import Workload, latency_curve
from spotserve.core.spec import ServingSpec
from spotserve.solvers.paper.optimizer import SIMILAR_PERMILLE
from spotserve.solvers.result import Result

MICRO = 1_000_000

Columns = Mapping[str, NDArray[np.int64]]
"""`data`, `pipeline`, `tensor`, `max_running`, `gpus`, `unserved` (1: the load is more than it serves, with a margin),
`latency_us` (l_req), `throughput_urps`."""


@dataclass(frozen=True, slots=True)
class _Batched:
    """Rows of a table with one B and its micro-batches: l_exe in ms and phi in requests per second."""

    rows: NDArray[np.int64]
    execution_ms: NDArray[np.float64]
    throughput_rps: NDArray[np.float64]


def algorithm_1(spec: ServingSpec, columns: Columns, workload: Workload) -> Result[int]:
    """The row that the artifact takes: the least l_exe where phi >= alpha, else the most phi; the first of equals.

    It uses every GPU, so of each (P, M) only the most replicas count; M, B and micro-batches are powers of two. An
    unknown load (0) is more than anything serves. Objective and bound are in microseconds, or millionths of a request
    per second where nothing serves the load.
    """
    tried = list(_micro_batched(spec, columns, workload))
    rows = np.concatenate([each.rows for each in tried])
    execution_ms = np.concatenate([each.execution_ms for each in tried])
    throughput_rps = np.concatenate([each.throughput_rps for each in tried])
    served = np.flatnonzero(throughput_rps >= workload.load_rps) if workload.load_rps > 0 else rows[:0]
    statistics = {"rows": len(rows), "serving": len(served)}
    if not len(served):
        taken = int(throughput_rps.argmax())
        most = round(float(throughput_rps[taken]) * MICRO)
        return Result(int(rows[taken]), "optimal", most, most, _certificate("throughput_urps"), statistics)
    taken = int(served[execution_ms[served].argmin()])
    least = round(float(execution_ms[taken]) * 1000)
    return Result(int(rows[taken]), "optimal", least, least, _certificate("execution_us"), statistics)


def algorithm_1_as_published(columns: Columns, *, load_known: bool) -> Result[int]:
    """The row that the text asks for: of latencies within 5 % of the least the one with the fewest GPUs.

    Fewer replicas than fit are allowed. An unknown load counts as more than anything serves.
    """
    serving = np.flatnonzero((columns["unserved"] == 0) & load_known)
    statistics = {"rows": len(columns["gpus"]), "serving": len(serving)}
    if not len(serving):
        throughput = columns["throughput_urps"]
        best = int(throughput.max())
        return Result(int(throughput.argmax()), "optimal", best, best, _certificate("throughput_urps"), statistics)
    latency = columns["latency_us"][serving]
    least = int(latency.min())
    similar = serving[latency * 1000 <= least * (1000 + SIMILAR_PERMILLE)]
    cheapest = similar[np.lexsort((columns["latency_us"][similar], columns["gpus"][similar]))[0]]
    taken = int(columns["latency_us"][cheapest])
    return Result(int(cheapest), "optimal", taken, least, _certificate("latency_us"), statistics)


def _micro_batched(spec: ServingSpec, columns: Columns, workload: Workload) -> Iterator[_Batched]:
    """Every (M, B, M1, M2, P) in the order of the artifact's loops, which settles its ties.

    A prompt phase passes P + M1 - 1 micro-batches' turns, each token P + M2 - 1 (its cost model, section 5).
    """
    offered = np.flatnonzero(_most_replicas(columns) & _is_power_of_two(columns["tensor"]))
    for tensor in np.unique(columns["tensor"][offered]).tolist():
        layer_ms = _layer_times(spec, tensor=tensor)
        of_degree = offered[columns["tensor"][offered] == tensor]
        of_degree = of_degree[np.argsort(columns["pipeline"][of_degree], kind="stable")]
        for batch in _powers_of_two(int(columns["max_running"][of_degree].max())):
            rows = of_degree[columns["max_running"][of_degree] >= batch]
            stages = columns["pipeline"][rows]
            layers = -(-spec.model.num_layers // stages)
            for prompt_parts in _powers_of_two(batch):
                prompt_ms = layer_ms(batch // prompt_parts * max(1, workload.prompt_tokens))
                phase_ms = prompt_ms * layers * (stages + prompt_parts - 1) / prompt_parts
                for token_parts in _powers_of_two(batch):
                    token_ms = layer_ms(batch // token_parts) * layers * (stages + token_parts - 1)
                    ends_ms = 2 * spec.profile.stage_overhead_ms
                    execution_ms = phase_ms + workload.output_tokens * token_ms + ends_ms
                    yield _Batched(rows, execution_ms, columns["data"][rows] * batch / execution_ms * 1000)


def _layer_times(spec: ServingSpec, *, tensor: int) -> Callable[[int], float]:
    """Milliseconds of a layer by rows: as measured, noise and all, as the artifact takes its table; else in between."""
    measured = {point.tokens: point.layer_ms for point in spec.profile.points[""].get(tensor, ())}
    curve = latency_curve(spec.profile, tensor=tensor)
    return lambda tokens: measured.get(tokens) or curve.ms(tokens)


def _certificate(measure: str) -> dict[str, str | int | float]:
    return {"kind": "algorithm_1", "measure": measure}


def _most_replicas(columns: Columns) -> NDArray[np.bool_]:
    """Marks the rows with the most GPUs of their (P, M)."""
    shapes = np.stack([columns["pipeline"], columns["tensor"]])
    _, shape_of = np.unique(shapes, axis=1, return_inverse=True)
    most = np.zeros(len(shape_of), dtype=np.int64)
    np.maximum.at(most, shape_of.ravel(), columns["gpus"])
    marks: NDArray[np.bool_] = columns["gpus"] == most[shape_of.ravel()]
    return marks


def _is_power_of_two(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    marks: NDArray[np.bool_] = (values & (values - 1)) == 0
    return marks


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << power for power in range(most.bit_length())]
