"""GPU types by name, and their way from a registration into the state, the snapshot and `status`."""

from __future__ import annotations

import json

import pytest

from spotserve.core import events as ev
from spotserve.core.controller import Controller
from spotserve.core.gpu_types import type_called
from spotserve.core.ids import GpuId, InstanceId
from spotserve.core.spec import DeviceProfile, Profile, ServingSpec
from spotserve.core.state import world_of
from spotserve.core.status import service_status
from spotserve.errors import SpecError
from tests.specs import small_spec


def with_types(*names: str, own: str = "cpu, one thread") -> Profile:
    """A profile that knows these types beside its own."""
    profile = small_spec().profile
    devices = tuple(DeviceProfile(type=name, latencies=profile.latencies) for name in names)
    return profile.model_copy(update={"device": own, "devices": devices})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("", ""),
        ("own", ""),
        ("cpu, one thread", ""),
        ("a100", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Tesla T4", "Tesla T4"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_which_type_a_name_means(name: str, meant: str) -> None:
    """Tests that a name means the type of that name, else the one whose words it has, the longest first."""
    assert meant == type_called(with_types("a100", "a100-80gb", "l4", "Tesla T4"), name)


def test_own_type_by_its_words() -> None:
    """Tests that the profile's own type is found by its words as well."""
    assert "" == type_called(with_types("l4", own="t4"), "Tesla T4")


def test_names_without_times() -> None:
    """Tests that a name that no type has, or that two have, is refused with what there is."""
    profile = with_types("a100", "l4")
    with pytest.raises(SpecError, match="GPU type 'NVIDIA L40' has no times in profile 'test'") as caught:
        type_called(profile, "NVIDIA L40")
    assert caught.value.hint is not None
    assert "known: cpu, one thread; a100; l4" in caught.value.hint
    with pytest.raises(SpecError, match="has no times") as caught:
        type_called(profile, "a10")
    assert "did you mean a100?" == caught.value.hint
    with pytest.raises(SpecError, match="fits a100 and l4 equally well"):
        type_called(profile, "A100 or L4")


def registered(instance: str, gpu_type: str) -> ev.WorkerRegistered:
    """The only GPU of an instance dials in."""
    return ev.WorkerRegistered(
        at_s=1.0,
        instance=InstanceId(instance),
        worker=GpuId(f"{instance}/0"),
        num_gpus=1,
        memory_bytes=1 << 20,
        incarnation="one",
        gpu_type=gpu_type,
    )


def begun(spec: ServingSpec) -> Controller:
    """A controller whose two instances have dialled in, the second of type `slow`."""
    controller = Controller()
    controller.step(ev.JournalBegun(at_s=0.0, spec=spec, num_instances=2))
    controller.step(registered("i0", ""))
    controller.step(registered("i1", "slow"))
    return controller


def test_types_reach_snapshot_and_status() -> None:
    """Tests that the type of a registration is in the world that plans are made for, and in `status`."""
    spec = small_spec().model_copy(update={"profile": with_types("slow", own="cpu")})
    state = begun(spec).state
    assert {"i1/0": "slow"} == dict(world_of(state).gpu_types)
    assert [["cpu"], ["slow"]] == [one["gpu_types"] for one in service_status(state)["instances"]]


def test_one_type_is_not_told() -> None:
    """Tests that `status` has no word of types where there is one, and a registration of it reads as ever."""
    controller = Controller()
    controller.step(ev.JournalBegun(at_s=0.0, spec=small_spec(), num_instances=1))
    assert "gpu_types" not in service_status(controller.state)["instances"][0]
    event = registered("i0", "")
    assert "gpu_type" not in event.model_dump(mode="json")
    assert event == ev.EVENT.validate_json(json.dumps(event.model_dump(mode="json")))
