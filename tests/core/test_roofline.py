"""The GPU catalogue and the roofline: plausible times, against measured ones where there are some, and monotone."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from spotserve.core.cost import decode_ms, prefill_ms
from spotserve.core.gpu_catalogue import GPU_TYPES, GpuType, gpu_type
from spotserve.core.model_tables import model_table
from spotserve.core.paper_profiles import TIMES, paper_profile
from spotserve.core.roofline import Efficiencies, roofline_profile
from spotserve.core.sizing import size_limits
from spotserve.core.slices import shard_bytes, stage_shard
from spotserve.core.spec import DType, Limits, ModelSpec, ServingSpec
from spotserve.errors import ModelError, SpecError
from tests.specs import small_model, with_experts

ALL = sorted(GPU_TYPES)


def half(gpu: GpuType) -> DType:
    return "bfloat16" if gpu.has_bf16 else "float16"


def served(model: ModelSpec, gpu: GpuType) -> ServingSpec:
    limits = Limits(max_model_len=min(1024, model.max_model_len))
    return ServingSpec(model=model, profile=roofline_profile(model, gpu), limits=limits)


@pytest.mark.parametrize("name", ALL)
def test_catalogue_is_consistent(name: str) -> None:
    """Tests that each GPU is found by its name, spot is cheaper, prices have a source, and rates have their order."""
    gpu = gpu_type(name.upper())
    assert gpu.name == name
    assert 0 < gpu.spot_usd < gpu.on_demand_usd < 20
    assert gpu.price_source
    assert gpu.price_date.startswith("20")
    assert gpu.fp32_flops < gpu.fp16_flops
    assert gpu.nic_bytes_per_s < gpu.memory_bytes_per_s
    assert gpu.link_bytes_per_s < gpu.memory_bytes_per_s
    assert 10e9 < gpu.memory_bytes < 200e9


def test_refuses_unknown_gpus() -> None:
    """Tests that a GPU that is not in the catalogue is refused with those that are."""
    with pytest.raises(SpecError, match="'v100'") as caught:
        gpu_type("v100")
    assert "a100-40" in (caught.value.hint or "")


@pytest.mark.parametrize("name", sorted(TIMES))
def test_meets_the_t4_figures_of_the_paper(name: str) -> None:
    """Tests that each measured time of the paper's T4 is met within a factor of 1.5, and 12 % on average."""
    measured = paper_profile(name)
    made = roofline_profile(model_table(name), gpu_type("t4"), context_tokens=576)
    estimated = {(point.tokens, point.tensor): point.layer_ms for point in made.latencies}
    ratios = [abs(math.log(estimated[point.tokens, point.tensor] / point.layer_ms)) for point in measured.latencies]
    assert math.exp(max(ratios)) < 1.5
    assert math.exp(statistics.mean(ratios)) < 1.12


def test_seven_billion_on_an_a100_decode_as_they_do() -> None:
    """Tests that a token of a 7B model on one A100 takes 7 to 15 ms and a prompt of 512 tokens 25 to 80 ms."""
    spec = served(model_table("opt-6.7b", dtype="bfloat16"), gpu_type("a100-80"))
    assert 7 < decode_ms(spec, pipeline=1, tensor=1, running=1) < 15
    assert 25 < prefill_ms(spec, pipeline=1, tensor=1, tokens=512) < 80


def test_seventy_billion_on_eight_h100_decode_as_they_do() -> None:
    """Tests that a token of a 70B model on eight H100 takes 7 to 20 ms, and on eight A100 longer."""
    model = model_table("llama-70b")
    h100 = decode_ms(served(model, gpu_type("h100")), pipeline=1, tensor=8, running=1)
    a100 = decode_ms(served(model, gpu_type("a100-80")), pipeline=1, tensor=8, running=1)
    assert 7 < h100 < a100 < 25


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("model_name", ["opt-6.7b", "llama-70b"])
def test_more_rows_take_longer(name: str, model_name: str) -> None:
    """Tests that at every degree more rows take longer, and that inside an instance more ranks prefill faster."""
    gpu = gpu_type(name)
    profile = roofline_profile(model_table(model_name, dtype=half(gpu)), gpu)
    for tensor, points in profile.points[""].items():
        times = [point.layer_ms for point in points]
        assert times == sorted(times), tensor
        assert times[0] < times[-1]
    largest = [points[-1].layer_ms for tensor, points in profile.points[""].items() if tensor <= gpu.gpus_per_instance]
    assert largest == sorted(largest, reverse=True)


def test_what_binds_is_what_counts() -> None:
    """Tests that decoding follows the memory bandwidth and prefill the FLOP/s, each by its own factor."""
    model, gpu = model_table("opt-6.7b", dtype="bfloat16"), gpu_type("a100-80")

    def times(one: GpuType) -> tuple[float, float]:
        points = roofline_profile(model, one).points[""][1]
        return points[0].layer_ms, points[-1].layer_ms

    decode, prefill = times(gpu)
    wide, same = times(replace(gpu, memory_bytes_per_s=2 * gpu.memory_bytes_per_s))
    assert math.isclose(2, decode / wide, rel_tol=0.1)
    assert prefill == same
    same, fast = times(replace(gpu, fp16_flops=2 * gpu.fp16_flops))
    assert decode == same
    assert math.isclose(2, prefill / fast, rel_tol=0.01)


def test_a_token_reads_every_weight() -> None:
    """Tests that one decoding step reads all layers and the head once, and little else for a short context."""
    model, gpu = model_table("llama-70b"), gpu_type("h200")
    spec = ServingSpec(
        model=model, profile=roofline_profile(model, gpu, context_tokens=1), limits=Limits(max_model_len=1024)
    )
    shard = stage_shard(model, layers=(0, model.num_layers), tensor=1, rank=0)
    embedding_bytes = model.vocab_size * model.hidden_size * model.element_bytes
    read_ms = 1000 * (shard_bytes(model, shard) - embedding_bytes) / (0.8 * gpu.memory_bytes_per_s)
    launched_ms = 0.02 * model.num_layers + 0.3
    assert math.isclose(read_ms + launched_ms, decode_ms(spec, pipeline=1, tensor=1, running=1), rel_tol=1e-3)


def test_long_prefills_are_of_many_prompts() -> None:
    """Tests that rows beyond the longest prompt cost no attention over one another: twice the rows, twice the time."""
    model, gpu = model_table("llama-70b"), gpu_type("h100")
    times = {p.tokens: p.layer_ms for p in roofline_profile(model, gpu, context_tokens=512).points[""][1]}
    assert math.isclose(2, (times[8192] - 0.02) / (times[4096] - 0.02), rel_tol=0.002)


def test_a_group_across_instances_waits_for_the_network() -> None:
    """Tests that the same tensor degree is slower over two instances, and does not change inside one."""
    model, gpu = model_table("llama-70b"), gpu_type("l40s")
    wide = roofline_profile(model, gpu, gpus_per_instance=8).points[""]
    narrow = roofline_profile(model, gpu, gpus_per_instance=4).points[""]
    assert wide[4] == narrow[4]
    assert all(far.layer_ms > near.layer_ms for far, near in zip(narrow[8], wide[8], strict=True))


def test_short_models_have_short_contexts() -> None:
    """Tests that a model of 640 tokens gets a profile without being told, that of its longest sequences."""
    model, gpu = model_table("gpt-20b"), gpu_type("l4")
    assert roofline_profile(model, gpu).latencies == roofline_profile(model, gpu, context_tokens=640).latencies


def test_context_costs_decoding() -> None:
    """Tests that a longer context makes decoding slower by the bytes of its KV, and only while rows decode."""
    model, gpu = model_table("llama-70b"), gpu_type("h100")
    short = roofline_profile(model, gpu, context_tokens=128, decode_rows=64).points[""][1]
    long = roofline_profile(model, gpu, context_tokens=8192, decode_rows=64).points[""][1]
    kv_bytes = 64 * (8192 - 128) * 2 * 8 * 128 * 2
    at_64 = {point.tokens: point.layer_ms for point in long}[64] - {point.tokens: point.layer_ms for point in short}[64]
    assert math.isclose(1000 * kv_bytes / (0.8 * gpu.memory_bytes_per_s), at_64, rel_tol=0.01)


def test_mixed_gpus_and_prices() -> None:
    """Tests that a profile of several types has each one's times and the price of the wanted market."""
    model = model_table("llama-70b")
    own, other = gpu_type("a100-80"), gpu_type("l40s")
    mixed = roofline_profile(model, own, others=[other])
    assert {"", "l40s"} == set(mixed.points)
    assert mixed.points["l40s"] == roofline_profile(model, other).points[""]
    assert (own.spot_usd, other.spot_usd) == (mixed.price_of("a100-80"), mixed.price_of("l40s"))
    bought = roofline_profile(model, own, others=[other], market="ondemand")
    assert (own.on_demand_usd, other.on_demand_usd) == (bought.price_of(""), bought.price_of("l40s"))


@pytest.mark.parametrize(
    ("model", "gpu", "num_gpus", "fits"),
    [
        (model_table("opt-6.7b", dtype="bfloat16"), "a100-40", 1, True),
        (model_table("opt-6.7b"), "t4", 1, False),
        (model_table("opt-6.7b"), "t4", 4, True),
        (model_table("llama-70b"), "a100-80", 1, False),
        (model_table("llama-70b"), "a100-80", 2, True),
        (model_table("llama-70b"), "h200", 1, True),
        (model_table("llama-70b"), "t4", 8, False),
        (model_table("llama-70b"), "t4", 16, True),
    ],
    ids=lambda value: value.name if isinstance(value, ModelSpec) else str(value),
)
def test_models_fit_where_they_do(model: ModelSpec, gpu: str, num_gpus: int, fits: bool) -> None:
    """Tests the catalogue's memory against the tables: which models so many GPUs hold."""

    def sized() -> Limits:
        return size_limits(
            model,
            gpu_memory_bytes=gpu_type(gpu).memory_bytes,
            num_gpus=num_gpus,
            max_model_len=640,
            max_running=4,
            degrees=(None, None, None),
        )

    if fits:
        assert 640 == sized().max_model_len
    else:
        with pytest.raises(ModelError, match="exceed"):
            sized()


def test_a_network_is_that_of_the_slowest_type() -> None:
    """Tests that the rate which plans count on is one that instances of every type of the fleet have."""
    model, h100, l4 = model_table("llama-70b"), gpu_type("h100"), gpu_type("l4")
    alone, mixed = roofline_profile(model, h100), roofline_profile(model, h100, others=(l4,))
    assert (0.9 * h100.nic_bytes_per_s, 0.9 * l4.nic_bytes_per_s) == (alone.link_bytes_per_s, mixed.link_bytes_per_s)
    assert alone.latencies == mixed.latencies


@pytest.mark.parametrize("name", ["memory", "flops", "link", "nic"])
def test_efficiencies(name: str) -> None:
    """Tests that each efficiency is of 0 to 1 and changes what it is of, or the network's rate."""
    for value in (0.0, 1.01, math.nan):
        with pytest.raises(SpecError, match=f"{name} efficiency"):
            Efficiencies(**{name: value})
    model, gpu = model_table("llama-70b"), gpu_type("l40s")
    usual = roofline_profile(model, gpu)
    worse = roofline_profile(model, gpu, efficiencies=Efficiencies(**{name: 0.05}))
    assert usual.link_bytes_per_s / worse.link_bytes_per_s == pytest.approx(0.9 / 0.05 if name == "nic" else 1.0)
    slower = [one.layer_ms > other.layer_ms for one, other in zip(worse.latencies, usual.latencies, strict=True)]
    assert any(slower)


@pytest.mark.parametrize(
    ("model", "gpu", "options", "words"),
    [
        (model_table("llama-70b"), "t4", {}, "bfloat16"),
        (with_experts(small_model()), "a100-40", {"context_tokens": 64}, "experts"),
        (model_table("gpt-20b"), "t4", {"context_tokens": 641}, "context_tokens 641"),
        (model_table("gpt-20b"), "t4", {"context_tokens": 64, "decode_rows": 0}, "decode_rows 0"),
    ],
    ids=["dtype", "experts", "context", "rows"],
)
def test_refuses_what_it_does_not_know(model: ModelSpec, gpu: str, options: dict[str, int], words: str) -> None:
    """Tests that experts, a dtype without units and values out of bounds are refused."""
    with pytest.raises(SpecError, match=words):
        roofline_profile(model, gpu_type(gpu), **options)
