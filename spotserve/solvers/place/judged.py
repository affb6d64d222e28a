"""One placement, weighed by every goal: what the solvers compare, and what their reports say of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spotserve.solvers.place.ports import Bottleneck, Ports
from spotserve.solvers.place.problem import Integers, Overlaps, Placement, PlacementProblem
from spotserve.solvers.result import Certificate, Statistics


@dataclass(frozen=True, slots=True)
class Judged:
    """A placement (`rows[q]` takes position q) and its goals in the order in which they count."""

    rows: tuple[int, ...]
    squeezed: int
    group_parts: int
    bottleneck: Bottleneck
    reused_bytes: int
    stayed: int
    candidates: int
    """GPUs that have a home: those that are not among `stayed` are relabelled."""

    @property
    def rank(self) -> tuple[int, int, int, int, int]:
        """Less is better: pairs without room, instances that groups touch, time, then reuse and GPUs at home."""
        return self.squeezed, self.group_parts, self.bottleneck.num_bytes, -self.reused_bytes, -self.stayed

    def placement(self, problem: PlacementProblem) -> Placement:
        """The answer."""
        return Placement(tuple(problem.gpus[row] for row in self.rows))

    def certificate(self, ports: Ports) -> Certificate:
        """The busiest port (or set of out-ports) in plain values."""
        if not self.bottleneck.num_bytes:
            return {"kind": "nothing_to_copy", "bytes": 0}
        names = [ports.instances[port] for port in self.bottleneck.ports]
        if self.bottleneck.is_in_port:
            return {"kind": "in_port", "port": names[0], "bytes": self.bottleneck.total_bytes}
        return {"kind": "out_ports", "ports": ",".join(names), "bytes": self.bottleneck.total_bytes}

    def statistics(self) -> Statistics:
        """The goals, in plain values."""
        return {
            "makespan_bytes": self.bottleneck.num_bytes,
            "reused_bytes": self.reused_bytes,
            "relabelled": self.candidates - self.stayed,
            "group_parts": self.group_parts,
            "without_room": self.squeezed,
        }


def judge(problem: PlacementProblem, ports: Ports, overlaps: Overlaps, rows: tuple[int, ...]) -> Judged:
    """Weigh a placement by every goal."""
    chosen, positions = np.array(rows, np.int64), np.arange(len(rows))
    replica, seat = np.divmod(positions, problem.seats)
    inherits = overlaps.heir[chosen] == replica
    reused = overlaps.weights[chosen, seat] + inherits * overlaps.kv[chosen, seat]
    where: Integers = ports.instance_of[chosen]
    return Judged(
        rows=rows,
        squeezed=int((~overlaps.fits[chosen, seat]).sum()),
        group_parts=len(np.unique(positions // problem.tensor * len(ports.num_gpus) + where)),
        bottleneck=ports.bottleneck(ports.load(where)),
        reused_bytes=int(reused.sum()),
        stayed=int((overlaps.home[chosen] == positions).sum()),
        candidates=int((overlaps.home >= 0).sum()),
    )
