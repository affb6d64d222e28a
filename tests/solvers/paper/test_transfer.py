"""The artifact's estimates of transfers and the least that any placement moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from spotserve.solvers.paper.arranger import switch_cost_s
from spotserve.solvers.paper.mapper import CarriedBatch
from spotserve.solvers.paper.models import PAPER_MODELS, Shape
from spotserve.solvers.paper.transfer import (
    Transition,
    estimate_transfer,
    least_transfer,
    place_by_matching,
    place_by_rank,
)
from tests.solvers.paper.golden import golden_rows, shape


@dataclass(frozen=True, slots=True)
class Membership:
    """Instances of four GPUs in address order, those that have old positions first, and the ones that are lost."""

    instances: int
    lost: frozenset[int] = frozenset()


SCENARIOS = {
    "B_S t=240: 8 inst -> 7 (instance 0 lost)": Membership(8, frozenset({0})),
    "8 inst -> 7 (instance 7 lost)": Membership(8, frozenset({7})),
    "7 -> 8 (one acquired)": Membership(8),
    "9 inst, throughput switch": Membership(9),
    "12 inst, latency switch": Membership(12),
    "9 -> 8, same config, used instance 0 lost, spare takes over": Membership(9, frozenset({0})),
    "9 -> 10 acquired": Membership(10),
    "10 -> 8 (two lost)": Membership(10, frozenset({4, 8})),
    "8 -> 7 lost 0": Membership(8, frozenset({0})),
    "7 -> 8 acquired": Membership(8),
}


def transition(row: dict[str, str], *, with_kv: bool = False) -> Transition:
    """The change of shape of a golden row, the old shape on the first GPUs in address order."""
    old, new, fleet = shape(row["old_DPM"]), shape(row["new_DPM"]), SCENARIOS[row["scenario"]]
    gpus = range(4 * fleet.instances)
    return Transition(
        model=PAPER_MODELS[row["model"]],
        old_shape=old,
        new_shape=new,
        old=tuple(range(old.gpus)),
        staying=tuple(gpu for gpu in gpus if gpu // 4 not in fleet.lost),
        instance_of=tuple(gpu // 4 for gpu in gpus),
        heirs=tuple(range(new.data)),
        batches=(CarriedBatch(4, 640),) * old.data if with_kv else (),
    )


def test_every_row_of_min_transfer_bytes(shared_data: Path) -> None:
    """Tests needed, reusable, moved and naive bytes of every published transition, to the kilobyte printed."""
    for row in golden_rows(shared_data, "min_transfer_bytes_exact.csv"):
        least = least_transfer(transition(row))
        printed = [
            round(count / 1e6, 3)
            for count in (least.needed_bytes, least.reusable_bytes, least.moved_bytes, least.naive_moved_bytes)
        ]
        assert printed == [
            float(row["weights_needed_MB"]),
            float(row["max_reusable_MB_flat_KM"]),
            float(row["min_transfer_MB"]),
            float(row["transfer_MB_if_position_i_goes_to_ith_surviving_gpu"]),
        ], row


def test_every_row_of_transfer_cost(shared_data: Path) -> None:
    """Tests volumes, T_transfer and est_cost of every published transition in each of its three modes."""
    for row in golden_rows(shared_data, "transfer_cost_artifact.csv"):
        change = transition(row, with_kv=row["mode"] == "KM+KV")
        by_rank = row["mode"].startswith("by_rank")
        placed = place_by_rank(change) if by_rank else place_by_matching(change)
        estimate = estimate_transfer(change, placed, by_rank=by_rank)
        for name, mbit in (
            ("inter_instance_total_Mb", estimate.between_mbit),
            ("intra_instance_total_Mb", estimate.inside_mbit),
            ("max_inter_per_instance_Mb_send_plus_recv", estimate.most_between_mbit),
            ("max_intra_per_instance_Mb", estimate.most_inside_mbit),
        ):
            assert mbit == pytest.approx(float(row[name]), abs=0.0501, rel=0), (row, name)
        assert estimate.transfer_s == pytest.approx(float(row["T_transfer_s"]), abs=5.1e-5, rel=0), row
        assert switch_cost_s(estimate.transfer_s) == pytest.approx(float(row["est_cost_s"]), abs=5.1e-5, rel=0), row


def test_nothing_moves_where_nothing_changes() -> None:
    """Tests that the same shape on the same GPUs transfers nothing, KV included."""
    degrees = Shape(2, 3, 4)
    change = Transition(
        model=PAPER_MODELS["GPT-20B"],
        old_shape=degrees,
        new_shape=degrees,
        old=tuple(range(24)),
        staying=tuple(range(24)),
        instance_of=tuple(gpu // 4 for gpu in range(24)),
        heirs=(0, 1),
        batches=(CarriedBatch(4, 640),) * 2,
    )
    assert place_by_matching(change).gpus == tuple(range(24))
    assert estimate_transfer(change, place_by_matching(change)).transfer_s == 0
    assert least_transfer(change).moved_bytes == 0


def test_added_pipelines_leave_the_running_ones_alone() -> None:
    """Tests that a third pipeline of the same shape moves its own weights only, and no KV."""
    old, new = Shape(2, 3, 4), Shape(3, 3, 4)
    change = Transition(
        model=PAPER_MODELS["GPT-20B"],
        old_shape=old,
        new_shape=new,
        old=tuple(range(4, 28)),
        staying=tuple(range(36)),
        instance_of=tuple(gpu // 4 for gpu in range(36)),
        heirs=(0, 1, 2),
        batches=(CarriedBatch(4, 640),) * 2,
    )
    placed = place_by_matching(change)
    assert placed.gpus == (*range(4, 28), *range(4), *range(28, 36))
    estimate = estimate_transfer(change, placed)
    model = change.model
    weights = 12 * 32e-6 * (model.vocab + model.max_sequence) * model.hidden
    weights += 32e-6 * 48 * (12 * model.hidden**2 + 7 * model.hidden + 4 * 6 * model.hidden)
    weights += 4 * 32e-6 * (model.vocab + 2) * model.hidden
    assert estimate.inside_mbit == 0
    assert estimate.between_mbit == pytest.approx(weights)
