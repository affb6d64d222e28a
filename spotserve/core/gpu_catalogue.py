"""A catalogue of GPUs as clouds rent them: memory, rates, links, prices.

Memory, bandwidth and dense FLOP/s are those of NVIDIA's data sheets (without sparsity; SXM modules for A100, H100 and
H200). Memory is what the cloud's instance reports. Prices are AWS us-east-1, Linux, per GPU-hour: an instance's price
divided by its GPUs. Spot prices move by the hour and differ by zone by a factor of three: one median is a guide for
comparisons, not a quote. `price_source` and `price_date` say for each where it was read and of when it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from spotserve.errors import SpecError

GIGA = 1e9
TERA = 1e12
MIB = 2**20

Link = Literal["pcie", "nvlink"]
Network = Literal["tcp", "efa"]

SKYPILOT_CATALOGUE = (
    "SkyPilot catalogue v8, aws/vms.csv at commit 00148f2a: list price; spot is the median over the zones of us-east-1"
)
CATALOGUE_DATE = "2026"
"""The file itself has no date; its list prices are those after AWS's reduction of June 2025."""


@dataclass(frozen=True, slots=True)
class GpuType:
    """A GPU and the usual instance that carries it; rates are per direction, prices in USD per GPU-hour."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    fp16_flops: float
    """Dense, FP16 and, where `has_bf16`, BF16, of the tensor cores."""
    fp32_flops: float
    """Of the ordinary cores, without TF32."""
    has_bf16: bool
    link: Link
    link_bytes_per_s: float
    """Between two GPUs of an instance."""
    instance: str
    gpus_per_instance: int
    network: Network
    nic_bytes_per_s: float
    on_demand_usd: float
    spot_usd: float
    price_source: str
    price_date: str


def _catalogue(*types: GpuType) -> Mapping[str, GpuType]:
    return MappingProxyType({each.name: each for each in types})


GPU_TYPES: Mapping[str, GpuType] = _catalogue(
    GpuType(
        name="t4",
        memory_bytes=15_360 * MIB,
        memory_bytes_per_s=320 * GIGA,
        fp16_flops=65 * TERA,
        fp32_flops=8.1 * TERA,
        has_bf16=False,
        link="pcie",
        link_bytes_per_s=15.75 * GIGA,
        instance="g4dn.12xlarge",
        gpus_per_instance=4,
        network="tcp",
        nic_bytes_per_s=6.25 * GIGA,
        on_demand_usd=3.912 / 4,
        spot_usd=1.9046 / 4,
        price_source="SpotServe artifact (es/tradeoff_plot.py); the list price was the same in 2026",
        price_date="2024",
    ),
    GpuType(
        name="l4",
        memory_bytes=22_888 * MIB,
        memory_bytes_per_s=300 * GIGA,
        fp16_flops=121 * TERA,
        fp32_flops=30.3 * TERA,
        has_bf16=True,
        link="pcie",
        link_bytes_per_s=31.5 * GIGA,
        instance="g6.12xlarge",
        gpus_per_instance=4,
        network="tcp",
        nic_bytes_per_s=5 * GIGA,
        on_demand_usd=4.6016 / 4,
        spot_usd=2.00 / 4,
        price_source=SKYPILOT_CATALOGUE,
        price_date=CATALOGUE_DATE,
    ),
    GpuType(
        name="a10g",
        memory_bytes=22_888 * MIB,
        memory_bytes_per_s=600 * GIGA,
        fp16_flops=70 * TERA,
        fp32_flops=35 * TERA,
        has_bf16=True,
        link="pcie",
        link_bytes_per_s=31.5 * GIGA,
        instance="g5.12xlarge",
        gpus_per_instance=4,
        network="tcp",
        nic_bytes_per_s=5 * GIGA,
        on_demand_usd=5.672 / 4,
        spot_usd=2.18 / 4,
        price_source=SKYPILOT_CATALOGUE,
        price_date=CATALOGUE_DATE,
    ),
    GpuType(
        name="l40s",
        memory_bytes=45_776 * MIB,
        memory_bytes_per_s=864 * GIGA,
        fp16_flops=362 * TERA,
        fp32_flops=91.6 * TERA,
        has_bf16=True,
        link="pcie",
        link_bytes_per_s=31.5 * GIGA,
        instance="g6e.12xlarge",
        gpus_per_instance=4,
        network="tcp",
        nic_bytes_per_s=12.5 * GIGA,
        on_demand_usd=10.49264 / 4,
        spot_usd=5.28 / 4,
        price_source=SKYPILOT_CATALOGUE,
        price_date=CATALOGUE_DATE,
    ),
    GpuType(
        name="a100-40",
        memory_bytes=40_960 * MIB,
        memory_bytes_per_s=1555 * GIGA,
        fp16_flops=312 * TERA,
        fp32_flops=19.5 * TERA,
        has_bf16=True,
        link="nvlink",
        link_bytes_per_s=300 * GIGA,
        instance="p4d.24xlarge",
        gpus_per_instance=8,
        network="efa",
        nic_bytes_per_s=50 * GIGA,
        on_demand_usd=21.957642 / 8,
        spot_usd=8.00 / 8,
        price_source=SKYPILOT_CATALOGUE,
        price_date=CATALOGUE_DATE,
    ),
    GpuType(
        name="a100-80",
        memory_bytes=81_920 * MIB,
        memory_bytes_per_s=2039 * GIGA,
        fp16_flops=312 * TERA,
        fp32_flops=19.5 * TERA,
        has_bf16=True,
        link="nvlink",
        link_bytes_per_s=300 * GIGA,
        instance="p4de.24xlarge",
        gpus_per_instance=8,
        network="efa",
        nic_bytes_per_s=50 * GIGA,
        on_demand_usd=27.44705 / 8,
        spot_usd=9.31 / 8,
        price_source=SKYPILOT_CATALOGUE,
        price_date=CATALOGUE_DATE,
    ),
    GpuType(
        name="h100",
        memory_bytes=81_559 * MIB,
        memory_bytes_per_s=3350 * GIGA,
        fp16_flops=989 * TERA,
        fp32_flops=67 * TERA,
        has_bf16=True,
        link="nvlink",
        link_bytes_per_s=450 * GIGA,
        instance="p5.48xlarge",
        gpus_per_instance=8,
        network="efa",
        nic_bytes_per_s=400 * GIGA,
        on_demand_usd=55.04 / 8,
        spot_usd=23.45 / 8,
        price_source=f"{SKYPILOT_CATALOGUE} (four of six zones)",
        price_date=CATALOGUE_DATE,
    ),
    GpuType(
        name="h200",
        memory_bytes=143_771 * MIB,
        memory_bytes_per_s=4800 * GIGA,
        fp16_flops=989 * TERA,
        fp32_flops=67 * TERA,
        has_bf16=True,
        link="nvlink",
        link_bytes_per_s=450 * GIGA,
        instance="p5en.48xlarge",
        gpus_per_instance=8,
        network="efa",
        nic_bytes_per_s=400 * GIGA,
        on_demand_usd=63.296 / 8,
        spot_usd=27.1988 / 8,
        price_source="dstack offer list, us-east-1 (dstackai/dstack pull request 4110)",
        price_date="2026-08-06",
    ),
)
"""Name -> GPU."""


def gpu_type(name: str) -> GpuType:
    """The GPU of this name, upper or lower case. Raises SpecError for one that is not in the catalogue."""
    found = GPU_TYPES.get(name.lower())
    if found is None:
        raise SpecError(f"GPU type {name!r} is not in the catalogue", hint=f"known: {', '.join(GPU_TYPES)}")
    return found
