"""What the paper and its plotting scripts report, read from the file of its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "GPT-20B"
"""The model whose absolute latencies are published; of the others only ratios are."""

SEQUENCES: Mapping[str, tuple[tuple[float, str], ...]] = {
    "A'_S+O": ((0, "(2,3,4)"), (120, "(2,2,8)"), (300, "(3,3,4)"), (360, "(3,2,8)"), (600, "(2,2,8)")),
    "B'_S+O": ((0, "(2,2,8)"), (300, "(3,3,4)"), (450, "(3,2,8)"), (600, "(2,2,8)")),
}
"""(D,P,M) of Figure 8 and the second of the trace that each is for."""


@dataclass(frozen=True, slots=True)
class Published:
    """The numbers by the names that this benchmark gives traces and systems."""

    numbers: Mapping[str, Any]

    @classmethod
    def read(cls, data: Path) -> Published:
        """The file among the paper's data."""
        return cls(json.loads((data / "results/paper_numbers.json").read_text(encoding="utf-8")))

    @property
    def table_1(self) -> Mapping[str, Mapping[str, float]]:
        """By model: size, fewest GPUs, (P, M), l_exe."""
        rows: Mapping[str, Mapping[str, float]] = self.numbers["table1"]
        return rows

    def latency_s(self, trace: str, system: str) -> tuple[float, float]:
        """(average, P99) of GPT-20B (es/scripts_ae/tradeoff_plot.py of the artifact)."""
        table = self.numbers["figure6_7_absolute_GPT20B_s"]
        column = table["columns"].index(system)
        return table["avg"][trace][column], table["p99"][trace][column]

    def p99_gain(self, trace: str, model: str, system: str) -> float:
        """A baseline's P99 over SpotServe's (Figure 6, and Figure 8 for GPT-20B)."""
        fluctuating = self.numbers["figure8_p99_improvement_over"]
        table = fluctuating if trace in fluctuating else self.numbers["figure6_p99_improvement_over"]
        gains = table[trace] if trace in fluctuating else table[trace][model]
        gain: float = gains[table["columns"].index(system)]
        return gain

    def ablation(self, trace: str) -> Sequence[tuple[float, float]]:
        """(average, P99) of each step of Figure 9 over those of SpotServe."""
        table = self.numbers["figure9_ratio_to_SpotServe"]
        return list(zip(table["avg"][trace], table["p99"][trace], strict=True))

    @property
    def on_demand_s(self) -> Mapping[int, tuple[float, float]]:
        """(average, P99) of fleets that stay, by instances, as measured: the figure shows them 4.5 and 9 s shorter."""
        table = self.numbers["figure7_on_demand_GPT20B_s"]
        pairs = zip(table["avg_measured"], table["p99_measured"], strict=True)
        return dict(zip(table["instances"], pairs, strict=True))

    @property
    def on_demand_s_billed(self) -> float:
        """So long were those fleets paid for."""
        return 60.0 * float(self.numbers["figure7_cost_inputs"]["on_demand_run_minutes"])

    def usd(self, trace: str) -> float:
        """Of a trace, by the instance-minutes that the artifact bills."""
        inputs = self.numbers["figure7_cost_inputs"]
        minutes = inputs["instance_minutes"][trace]
        hours = minutes["spot"] * inputs["spot_usd_h"] + minutes.get("on_demand", 0) * inputs["on_demand_usd_h"]
        return float(hours / 60)

    def on_demand_usd(self, instances: int) -> float:
        """Of a fleet that stays."""
        inputs = self.numbers["figure7_cost_inputs"]
        return float(instances * inputs["on_demand_usd_h"] * inputs["on_demand_run_minutes"] / 60)

    @property
    def saving(self) -> float:
        """The share of cost that the abstract promises."""
        return float(self.numbers["claims"]["cost_saving"])
