"""What a hostile plan file may cost, each bound at its last value, and tables that contradict themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from spotserve.core import check
from spotserve.core.check import MAX_FINDINGS, check_plan
from spotserve.core.check_world import check_snapshot, check_spec
from spotserve.core.finding import Facts, Finding
from spotserve.core.plan import CopyWeights, Plan, Release
from tests.core.plan_edges import named, piece, step
from tests.core.test_check_rules import Raw, codes, layered_plan, spare_plan, told


def spoiled(change: Raw) -> Raw:
    """The spare plan with another entry of what the second GPU holds."""
    data = named(spare_plan())
    data["snapshot"]["world"]["holdings"][0].update(change)
    return data


def renamed(data: Raw, old: str, new: str) -> None:
    """Call parameters otherwise, in the table and in all slices."""
    for row in data["spec"]["model"]["parameters"]:
        row["name"] = row["name"].replace(old, new)
    for one in data["steps"]:
        for part in one.get("slices", ()):
            part["parameter"] = part["parameter"].replace(old.format(layer=""), new.format(layer=""))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (piece("model.layers.7.mlp.up_proj.weight", 255, 256), []),
        (piece("model.layers.7.mlp.up_proj.weight", 255, 257), ["snapshot.world.holdings[0]"]),
        (piece("model.layers.7.mlp.up_proj.weight", 5, 5), ["snapshot.world.holdings[0]"]),
        (piece("model.layers.7.mlp.up_proj.weight", -1, 5), ["snapshot.world.holdings[0]"]),
        (piece("model.layers.7.mlp.up_proj.weight", 0, 1, 1), ["snapshot.world.holdings[0]"]),
        (piece("model.layers.8.mlp.up_proj.weight", 0, 1), ["snapshot.world.holdings[0]"]),
        (piece("nothing", 0, 1), ["snapshot.world.holdings[0]"]),
    ],
)
def test_loose_slices(part: Raw, expected: list[str]) -> None:
    """Tests that what a GPU has left of an aborted plan is in the parameter table."""
    assert expected == [one.path for one in told(spoiled({"slices": [part]})) if one.code == "corrupt"]


@pytest.mark.parametrize("name", ["steps", "holdings"])
def test_slices_of_unknown_parameters(name: str) -> None:
    """Tests that a first row of a parameter that there is not is no row."""
    data = named(spare_plan())
    parts = step(data, "release:i1/0") if name == "steps" else data["snapshot"]["world"]["holdings"][1]
    parts["slices"] = [piece("nothing", 0, 1)]
    assert {"corrupt"} == codes(data)


def test_layer_numbers_anywhere() -> None:
    """Tests that a table may put the layer's number into its names as it likes."""
    data = named(spare_plan())
    renamed(data, "layers.{layer}", "block{layer}")
    assert set() == codes(data)


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_one_name_for_two_parameters(name: str) -> None:
    """Tests that a parameter outside of the layers is not called like one inside: either could be left out unseen."""
    data = named(spare_plan())
    data["spec"]["model"]["parameters"][0]["name"] = name
    assert ["spec.model.parameters"] == [one.path for one in check_spec(Facts(Plan.model_validate(data)))]


def test_parameters_of_every_layer_have_a_name_each() -> None:
    """Tests that a parameter of every layer is not called the same in all of them."""
    data = named(spare_plan())
    data["spec"]["model"]["parameters"][3]["name"] = "shared"
    assert ["spec.model.parameters"] == [one.path for one in check_spec(Facts(Plan.model_validate(data)))]


def test_the_largest_table() -> None:
    """Tests that the parameters of all layers are counted before they are named, to the last one."""
    data = named(spare_plan())
    model = data["spec"]["model"]
    first, row = model["parameters"][:2]
    rows = [{**row, "name": f"{{layer}}.{number}"} for number in range(64)]
    for layers, extra, expected in ((4096, [], []), (4096, [first], ["spec.model.parameters"])):
        model.update(num_layers=layers, parameters=[*rows, *extra])
        assert expected == [one.path for one in check_spec(Facts(Plan.model_validate(data)))]


def test_the_most_pairs_of_steps() -> None:
    """Tests that steps on one GPU are counted before each is compared with each: copies into it, and what is freed."""
    plan = spare_plan()
    copy = next(one for one in plan.steps if isinstance(one, CopyWeights))
    release = next(one for one in plan.steps if isinstance(one, Release))
    elsewhere = release.model_copy(update={"workers": ("i9/0",)})
    there = release.model_copy(update={"workers": (copy.destination,)})
    for more, expected in ((elsewhere, []), (there, ["steps"])):
        many = plan.model_copy(update={"steps": (*[copy] * 4000, more)})
        assert expected == [one.path for one in check_snapshot(Facts(many))]


def test_findings_beyond_the_most_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a rule that would find faults without end is asked for no more than are told."""

    def endless(_: Facts) -> Iterator[Finding]:
        return (Finding(code="cycle", path=f"{number}", message="") for number in itertools.count())

    def never(_: Facts) -> Iterator[Finding]:
        yield from ()
        raise AssertionError("nothing is left to be told")

    monkeypatch.setattr(check, "MEANING_RULES", (endless, never))
    found = check_plan(spare_plan())
    assert [str(number) for number in range(MAX_FINDINGS)] == [one.path for one in found]


def test_a_wrong_spec_is_told_alone() -> None:
    """Tests that a snapshot is not judged by a model that contradicts itself."""
    data = spoiled({"slices": [piece("nothing", 0, 1)]})
    data["spec"]["model"]["parameters"][0]["dim"] = 7
    assert ["spec.model.parameters[0]"] == [one.path for one in told(data) if one.code == "corrupt"]


def test_shared_cells_stay_as_they_are() -> None:
    """Tests that judging a plan twice by the same facts finds the same: no rule changes what another one reads."""
    for plan in (spare_plan(), layered_plan()):
        facts = Facts(plan)
        rules = (*check.GROUND_RULES, *check.FORM_RULES, *check.MEANING_RULES)
        assert [[]] * 2 * len(rules) == [list(rule(facts)) for rule in (*rules, *rules)]
