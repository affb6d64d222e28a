"""The profiles that the SpotServe paper's evaluation uses: 4 T4 on a g4dn.12xlarge, fp32, 512 tokens in.

Figures of the artifact (branch artifact of Hsword/SpotServe, elastic-switch/profile/T4-4x, Apache-2.0): milliseconds of
one decoder layer. One decoding step of 1, 2, 4 and 8 sequences, and the prefill of as many prompts of 512 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from spotserve.core.spec import LatencyPoint, Profile
from spotserve.errors import SpecError

SPOT_USD_PER_INSTANCE_HOUR = 1.9046
ON_DEMAND_USD_PER_INSTANCE_HOUR = 3.912
"""What the artifact bills (es/tradeoff_plot.py); an instance has four GPUs."""
GPUS_PER_INSTANCE = 4
BATCHES = (1, 2, 4, 8)
PROMPT_TOKENS = 512
T4_MEMORY_BYTES = 16_000_000_000

Times = Mapping[int, tuple[tuple[float, float, float, float], tuple[float, float, float, float]]]
"""Tensor degree -> (decoding step, prefill), each for the four batches."""

OPT_6_7B: Times = {
    1: ((3.224, 3.31, 3.632, 4.435), (44.087, 97.182, 191.815, 404.76)),
    2: ((1.841, 1.701, 1.898, 2.26), (26.411, 50.779, 105.607, 218.979)),
    4: ((1.056, 0.932, 1.021, 1.314), (19.567, 31.043, 61.566, 124.341)),
    8: ((1.278, 1.05, 1.309, 1.442), (17.733, 26.569, 44.562, 85.833)),
}
GPT_20B: Times = {
    1: ((7.144, 7.259, 7.949, 9.919), (107.203, 224.025, 454.014, 912.695)),
    2: ((3.808, 3.759, 4.076, 4.702), (54.478, 115.698, 244.748, 509.399)),
    4: ((1.968, 1.938, 2.13, 2.484), (37.562, 64.61, 132.855, 275.512)),
    8: ((1.758, 1.764, 1.932, 2.149), (32.2, 42.778, 80.624, 165.775)),
}
LLAMA_30B: Times = {
    1: ((9.541, 10.286, 10.838, 11.402), (160.742, 347.878, 823.624, 1326.51)),
    2: ((4.98, 5.235, 5.657, 5.91), (84.197, 173.763, 362.301, 798.263)),
    4: ((2.618, 2.632, 2.837, 3.172), (66.079, 93.799, 191.445, 422.916)),
    8: ((2.263, 2.493, 2.418, 2.618), (41.947, 67.061, 109.761, 232.918)),
}
TIMES: Mapping[str, tuple[str, Times]] = {
    "opt-6.7b": ("OPT-6.7B", OPT_6_7B),
    "gpt-20b": ("GPT-20B (h6144)", GPT_20B),
    "llama-30b": ("LLaMA-30B (h7168)", LLAMA_30B),
}
"""Model name -> what the artifact's file measures, and its times."""


def paper_profile(name: str) -> Profile:
    """The T4 profile of one of the paper's models; prices are spot, per GPU-hour.

    Raises:
        SpecError: the paper measured no model of this name.
    """
    if name.lower() not in TIMES:
        raise SpecError(f"the paper has no profile of model {name!r}", hint=f"known: {', '.join(TIMES)}")
    model, times = TIMES[name.lower()]
    points = tuple(
        LatencyPoint(tokens=tokens, tensor=tensor, layer_ms=layer_ms)
        for tensor, (step, prefill) in times.items()
        for tokens, layer_ms in (
            *zip(BATCHES, step, strict=True),
            *((batch * PROMPT_TOKENS, layer_ms) for batch, layer_ms in zip(BATCHES, prefill, strict=True)),
        )
    )
    return Profile(
        name="T4-4x",
        source=(
            f"SpotServe (ASPLOS 2024) artifact, elastic-switch/profile/T4-4x, {model}, ms per layer in fp32; "
            "50 Gbit/s network; storage 100 MB/s per instance (S3 log of the artifact); price: one of the four T4 of a "
            f"spot g4dn.12xlarge at {SPOT_USD_PER_INSTANCE_HOUR:g} USD an hour "
            "(es/tradeoff_plot.py of the artifact, 2024)"
        ),
        device="cuda",
        latencies=points,
        stage_overhead_ms=0.3,
        link_bytes_per_s=6_250_000_000.0,
        storage_bytes_per_s=100_000_000.0,
        round_trip_s=0.005,
        start_s=120.0,
        price_per_hour=SPOT_USD_PER_INSTANCE_HOUR / GPUS_PER_INSTANCE,
    )
