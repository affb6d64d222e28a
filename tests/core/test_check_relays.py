"""Weights that a GPU passes on before it ever served with them: the checker believes it if they are there by then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spotserve.core.plan import Plan
from spotserve.solvers.planner import make_plan
from tests.core.test_check_rules import Raw, raw, steps, told
from tests.planning_worlds import MIB, notice, running_problem, tiny_spec


def relay_plan() -> Plan:
    """Two replicas move to another instance: `s5` brings weights to its first GPU, `s6` from there to the second."""
    return make_plan(
        running_problem(
            tiny_spec(data=2, pipeline=1, tensor=1),
            shape=(2, 1, 1),
            memory_bytes=8 * MIB,
            trigger=notice("i0"),
            spare=1,
            gpus_per_instance=2,
        )
    )


def found(data: Raw) -> set[str]:
    """Code and step of every finding."""
    return {f"{finding.code} {finding.step or '-'}" for finding in told(data)}


def the_two(data: Raw) -> tuple[Raw, Raw]:
    """The copy over the network and the one inside the instance."""
    across, inside = steps(data, "copy_weights")
    assert ("s5", "s6") == (across["id"], inside["id"])
    assert ("i0/0", "i1/0", "i1/0", "i1/1") == (
        across["source"],
        across["destination"],
        inside["source"],
        inside["destination"],
    )
    return across, inside


def unawaited(data: Raw) -> None:
    """Let the second copy not wait for the first; all that waits for the second still waits for both."""
    _, inside = the_two(data)
    inside["depends_on"] = [name for name in inside["depends_on"] if name != "s5"]
    for one in data["steps"]:
        if "s6" in one["depends_on"]:
            one["depends_on"].append("s5")


def awaited_by_another(data: Raw) -> None:
    """Let it wait for a step that waits for the first."""
    unawaited(data)
    across, inside = the_two(data)
    detour = next(one for one in steps(data, "join_group") if across["destination"] in one["workers"])
    detour["depends_on"].append("s5")
    inside["depends_on"].append(detour["id"])


def from_storage(data: Raw) -> None:
    """Let the first GPU read the weights from storage."""
    across, _ = the_two(data)
    across.update(kind="load_weights", workers=[across.pop("destination")])
    across.pop("source")


def brought_elsewhere(data: Raw) -> None:
    """Let the first copy go to the second GPU, which passes nothing on, and the second bring it there again."""
    across, inside = the_two(data)
    across.update(destination=inside["destination"], replica=inside["replica"])


def brought_in_part(data: Raw) -> None:
    """Let the first copy leave out a row of what the second passes on."""
    across, _ = the_two(data)
    piece = next(one for one in across["slices"] if one["parameter"].endswith("q_proj.weight"))
    piece["stop"] -= 1
    across["bytes"] -= data["spec"]["model"]["hidden_size"] * 4


def each_from_the_other(data: Raw) -> None:
    """Let both GPUs get the weights from each other."""
    across, _ = the_two(data)
    across["source"] = "i1/1"
    across["depends_on"].append("s6")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda data: None, set()),
        (awaited_by_another, set()),
        (from_storage, set()),
        (unawaited, {"not_a_holder s6"}),
        (brought_elsewhere, {"not_a_holder s6", "coverage_hole -", "double_owner -", "wrong_order s5"}),
        (brought_in_part, {"not_a_holder s6", "coverage_hole -"}),
        (each_from_the_other, {"cycle s5", "not_a_holder s5", "not_a_holder s6", "wrong_order s16", "wrong_order s17"}),
    ],
    ids=["as planned", "transitively", "storage", "unawaited", "elsewhere", "in part", "each other"],
)
def test_a_holder_from_its_arrival_on(spoil: Callable[[Raw], object], expected: set[str]) -> None:
    """Tests that a copy may read what a step has brought that it waits for, all of that and nothing else."""
    data = raw(relay_plan())
    spoil(data)
    assert expected == found(data)


def test_weights_of_nobody_in_particular() -> None:
    """Tests what is said where the source holds nothing at all and nothing comes, and where a part of it comes."""
    data = raw(relay_plan())
    unawaited(data)
    assert ["i1/0 holds no weights or is not there"] == [finding.message for finding in told(data)]
    data = raw(relay_plan())
    brought_in_part(data)
    (message,) = (finding.message for finding in told(data) if finding.step == "s6")
    assert message.startswith("i1/0 does not hold ")
