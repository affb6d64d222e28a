"""Names: their natural order, whatever they are made of."""

from __future__ import annotations

import random

from spotserve.core.ids import GpuId, instance_of, natural_key


def test_numbers_count_as_numbers(rng: random.Random) -> None:
    """Tests that shuffled ids come into the order a person would give them, prefixes first."""
    names = ["i1", "i2", "i2/0", "i2/9", "i2/10", "i10", "r4", "r4.1", "r4.2", "r4.10", "r10"]
    shuffled = rng.sample(names, len(names))
    assert names == sorted(shuffled, key=natural_key)


def test_any_name_has_a_place() -> None:
    """Tests that leading zeros count for nothing and that numbers of thousands of digits are compared as numbers."""
    assert natural_key("i007") == natural_key("i7")
    assert natural_key("i0") == natural_key("i00")
    long, longer = "i" + "9" * 5000, "i1" + "0" * 5000
    assert [long, longer] == sorted([longer, long], key=natural_key)
    assert ["", "i", "i0", "٣"] == sorted(["٣", "i0", "i", ""], key=natural_key)


def test_instance_of_a_gpu() -> None:
    """Tests that the instance is what stands before the slash."""
    assert [instance_of(GpuId(gpu)) for gpu in ("i3/0", "i3/12", "i3")] == ["i3", "i3", "i3"]
