"""Algorithm 1 (section 3.2) over the planner's own table of configurations, in place of the paper's profile.

The columns bring latency (as published with the wait in the queue, which the artifact leaves out), throughput and
memory from the planner's cost model; the choice among the rows is the paper's: no hysteresis, no second replica for
safety, no look at what a change disturbs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from spotserve.solvers.paper.optimizer import SIMILAR_PERMILLE
from spotserve.solvers.result import Result

Columns = Mapping[str, NDArray[np.int64]]
"""`pipeline`, `tensor`, `gpus`, `unserved` (1: the load is more than it serves), `latency_us` (l_req), `execution_us`
(l_exe), `throughput_urps`."""


def algorithm_1(columns: Columns, *, load_known: bool, as_published: bool = False) -> Result[int]:
    """The row that Algorithm 1 takes; the first of equals.

    The artifact uses every GPU, so of each (P, M) only the most replicas count. As published, fewer are allowed and of
    latencies within 5 % the one with the fewest GPUs wins. An unknown load counts as more than anything serves.
    Objective and bound are in microseconds, or millionths of a request per second where nothing serves the load.
    """
    offered = np.arange(len(columns["gpus"])) if as_published else np.flatnonzero(_most_replicas(columns))
    serving = offered[columns["unserved"][offered] == 0] if load_known else offered[:0]
    statistics = {"rows": len(offered), "serving": len(serving)}
    if not len(serving):
        throughput = columns["throughput_urps"][offered]
        best = int(throughput.max())
        certificate = _certificate("throughput_urps")
        return Result(int(offered[throughput.argmax()]), "optimal", best, best, certificate, statistics)
    measure = "latency_us" if as_published else "execution_us"
    certificate = _certificate(measure)
    latency = columns[measure][serving]
    least = int(latency.min())
    if not as_published:
        return Result(int(serving[latency.argmin()]), "optimal", least, least, certificate, statistics)
    similar = serving[latency * 1000 <= least * (1000 + SIMILAR_PERMILLE)]
    cheapest = similar[np.lexsort((columns["latency_us"][similar], columns["gpus"][similar]))[0]]
    taken = int(columns["latency_us"][cheapest])
    return Result(int(cheapest), "optimal", taken, least, certificate, statistics)


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
