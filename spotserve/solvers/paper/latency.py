"""The paper's latency model over an offline profile (sections 2.1 and 5): one table of milliseconds per layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

OUTPUT_TOKENS = 128
"""S_out of the evaluation."""


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Milliseconds of one decoder layer for a micro-batch: the prompt at once, and one token later on."""

    initial_ms: float
    token_ms: float


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """An offline profile of the artifact.

    `correction` multiplies a careful estimate and divides a hopeful one; `hop_*_ms` are the activations passed from
    stage to stage; `embedding_ms[log2 B]` is one pass through embedding or logits; `layer_times`: by (M, batch).
    """

    layers: int
    padded_layers: int
    max_tensor: int
    correction: float
    hop_initial_ms: float
    hop_token_ms: float
    embedding_ms: tuple[float, ...]
    layer_times: Mapping[tuple[int, int], LayerTime]

    def layer_time(self, *, tensor: int, batch: int) -> LayerTime:
        """The row of a tensor degree and micro-batch. Raises KeyError where it was not measured."""
        if (tensor, batch) not in self.layer_times:
            raise KeyError(f"no profile row of tensor degree {tensor} and micro-batch {batch}")
        return self.layer_times[tensor, batch]


def latency_table(text: str) -> LatencyTable:
    """The table in a profile file of the artifact (elastic-switch/profile). Raises KeyError for a missing field."""
    profile = json.loads(text)
    return LatencyTable(
        layers=profile["layer_num"],
        padded_layers=profile["padded_layer_num"],
        max_tensor=profile["max_tp"],
        correction=profile["final_fix_factor"],
        hop_initial_ms=profile["pp_init_comm"],
        hop_token_ms=profile["pp_incr_comm"],
        embedding_ms=tuple(profile["embed"]),
        layer_times={
            (int(degree[3:]), int(batch[4:])): LayerTime(cell["init"], cell["incr"])
            for degree, rows in profile.items()
            if degree.startswith("tp-")
            for batch, cell in rows.items()
        },
    )


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """(P, M, B) and into how many micro-batches B is cut: M1 in the initial phase, M2 in the token phase."""

    pipeline: int
    tensor: int
    batch: int
    initial_parts: int
    token_parts: int


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Milliseconds of the initial phase and of each token after it."""

    initial_ms: float
    token_ms: float


def phase_times(table: LatencyTable, plan: BatchPlan) -> PhaseTimes:
    """t1 and t2 without correction. A batch that its micro-batches do not divide runs as one."""
    initial_parts = _parts(plan.batch, plan.initial_parts)
    token_parts = _parts(plan.batch, plan.token_parts)
    stage_layers = ceil(table.layers / plan.pipeline)
    hops = plan.pipeline - 1
    initial = table.layer_time(tensor=plan.tensor, batch=plan.batch // initial_parts).initial_ms
    token = table.layer_time(tensor=plan.tensor, batch=plan.batch // token_parts).token_ms
    # The order of operations is the artifact's, so that ties between configurations fall as they fall there.
    t1 = initial * stage_layers * (plan.pipeline + initial_parts - 1) / initial_parts
    t1 += table.hop_initial_ms / initial_parts * hops
    t2 = token * stage_layers * (plan.pipeline + token_parts - 1)
    t2 += table.hop_token_ms / token_parts * hops
    return PhaseTimes(t1, t2)


def careful(table: LatencyTable, times: PhaseTimes) -> PhaseTimes:
    """Times that are rather too long: what must be over before a deadline."""
    return PhaseTimes(times.initial_ms * table.correction, times.token_ms * table.correction)


def hopeful(table: LatencyTable, times: PhaseTimes) -> PhaseTimes:
    """Times that are rather too short: what should last until somebody joins."""
    return PhaseTimes(times.initial_ms / table.correction, times.token_ms / table.correction)


def execution_ms(table: LatencyTable, plan: BatchPlan, *, output_tokens: int = OUTPUT_TOKENS) -> float:
    """l_exe (section 2.1, equations 1 and 2): initial phase, every token, and embedding and logits once each."""
    times = phase_times(table, plan)
    ends_ms = 2 * table.embedding_ms[plan.batch.bit_length() - 1]
    return (times.initial_ms + times.token_ms * output_tokens + ends_ms) * table.correction


def throughput_rps(*, data: int, batch: int, latency_ms: float) -> float:
    """phi: requests per second of D pipelines that each finish B requests per l_exe."""
    return data * batch / latency_ms * 1000


def _parts(batch: int, parts: int) -> int:
    return parts if batch % parts == 0 else 1
