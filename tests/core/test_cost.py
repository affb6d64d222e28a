"""The cost model: interpolation, throughput, waiting, and the memory of a position."""

from __future__ import annotations

import pytest

from spotserve.core.cost import (
    OVERLOAD_S,
    Degrees,
    Pool,
    ShardSizes,
    Workload,
    balanced,
    decode_ms,
    execution_ms,
    kv_blocks_within,
    layer_ms,
    least_kv_blocks,
    most_kv_blocks,
    pool_throughput_rps,
    pools_request_ms,
    prefill_ms,
    replica_shards,
    request_ms,
    running_bound,
    serves_load,
    slowest_stage_ms,
    throughput_rps,
)
from spotserve.core.slices import kv_block_bytes, shard_bytes
from spotserve.core.spec import LatencyPoint
from tests.planning_worlds import tiny_spec

WORKLOAD = Workload(prompt_tokens=64, output_tokens=32, load_rps=0.0)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0.4), (16, 0.8), (256, 8.0), (136, 4.4), (496, 15.2)])
def test_layer_time_is_linear_between_points(tokens: int, expected: float) -> None:
    """Tests that measured points are met, what is between is linear and what is beyond keeps the last slope."""
    assert layer_ms(tiny_spec().profile, tokens=tokens, tensor=1) == pytest.approx(expected)


def test_unmeasured_tensor_degrees() -> None:
    """Tests that no speed-up is made up above the measured degrees, and none below them is lost."""
    profile = tiny_spec().profile
    assert layer_ms(profile, tokens=16, tensor=4) == layer_ms(profile, tokens=16, tensor=1)
    only_two = profile.model_copy(update={"latencies": (LatencyPoint(tokens=1, tensor=2, layer_ms=1.0),)})
    assert layer_ms(only_two, tokens=1, tensor=1) == 2.0
    assert layer_ms(only_two, tokens=8, tensor=2) == 8.0


def test_falling_measurements_never_go_negative() -> None:
    """Tests that noise in a profile (more tokens, less time) does not extrapolate below the first point."""
    points = (LatencyPoint(tokens=1, tensor=1, layer_ms=1.0), LatencyPoint(tokens=2, tensor=1, layer_ms=0.9))
    noisy = tiny_spec().profile.model_copy(update={"latencies": points})
    assert layer_ms(noisy, tokens=1000, tensor=1) == 1.0


def test_execution_is_prefill_and_decode() -> None:
    """Tests that l_exe is the prefill and then one decode step for each output token."""
    spec, degrees = tiny_spec(), Degrees(data=1, pipeline=2, tensor=1, max_running=4)
    first = prefill_ms(spec, pipeline=2, tensor=1, tokens=64)
    later = decode_ms(spec, pipeline=2, tensor=1, running=1)
    assert execution_ms(spec, degrees, WORKLOAD, running=1) == pytest.approx(first + 32 * later)
    assert first == pytest.approx(2 * (4 * layer_ms(spec.profile, tokens=64, tensor=1) + 0.5))


def test_throughput_grows_with_replicas() -> None:
    """Tests that twice the replicas serve twice as much, and a larger batch more."""
    spec = tiny_spec()
    one, two = Degrees(1, 2, 1, 4), Degrees(2, 2, 1, 4)
    assert throughput_rps(spec, two, WORKLOAD) == pytest.approx(2 * throughput_rps(spec, one, WORKLOAD))
    assert throughput_rps(spec, Degrees(1, 2, 1, 8), WORKLOAD) > throughput_rps(spec, one, WORKLOAD)


def test_idle_stages_are_counted() -> None:
    """Tests that one running sequence in a deep pipeline is no faster than in sequence through all stages."""
    spec = tiny_spec()
    alone = throughput_rps(spec, Degrees(1, 4, 1, 1), WORKLOAD)
    assert alone == pytest.approx(1000 / execution_ms(spec, Degrees(1, 4, 1, 1), WORKLOAD, running=1))


def test_waiting_grows_with_the_load() -> None:
    """Tests that latency rises with the load until that exceeds the throughput, less the margin."""
    spec, degrees = tiny_spec(), Degrees(1, 2, 1, 4)
    capacity = throughput_rps(spec, degrees, WORKLOAD)
    loads = [Workload(64, 32, share * capacity) for share in (0.0, 0.3, 0.6, 0.9, 0.96, 1.2)]
    assert [True] * 4 + [False] * 2 == [serves_load(capacity, load) for load in loads]
    served = [request_ms(spec, degrees, load) for load in loads[:4]]
    assert served == sorted(served)
    assert len(set(served)) == 4


def test_overload_waits_for_what_is_left_over() -> None:
    """Tests that what cannot serve its load runs full, and lets wait for what came too much in half a minute."""
    spec, degrees = tiny_spec(), Degrees(1, 2, 1, 4)
    capacity = throughput_rps(spec, degrees, WORKLOAD)
    full_ms = execution_ms(spec, degrees, WORKLOAD, running=4)
    waiting = [request_ms(spec, degrees, Workload(64, 32, share * capacity)) - full_ms for share in (0.99, 1.2, 3.0)]
    assert waiting == pytest.approx([0.0, 0.2 * 1000 * OVERLOAD_S, 2.0 * 1000 * OVERLOAD_S])
    # Two pools of which one is twice as fast together: the mean of both by what they serve.
    shape = balanced(spec.model, pipeline=2, tensor=1)
    both = pools_request_ms(spec, [Pool(shape, 1, 4), Pool(shape, 2, 4)], Workload(64, 32, 6 * capacity))
    assert both == pytest.approx(full_ms + 1000 * OVERLOAD_S)


def test_shards_cover_the_model() -> None:
    """Tests that the positions of a replica hold every sharded byte once and replicated ones once per rank."""
    model = tiny_spec().model
    whole = sum(shard_bytes(model, shard) for shard in replica_shards(model, pipeline=1, tensor=1))
    assert whole == sum(shard_bytes(model, shard) for shard in replica_shards(model, pipeline=4, tensor=1))
    assert whole < sum(shard_bytes(model, shard) for shard in replica_shards(model, pipeline=1, tensor=4))


def test_kv_bounds() -> None:
    """Tests the smallest and largest pool, what fits into bytes, and B."""
    spec = tiny_spec(max_model_len=100, max_running=4)
    shard = replica_shards(spec.model, pipeline=2, tensor=1)[0]
    block = kv_block_bytes(spec.model, shard, block_tokens=16)
    assert (7, 29) == (least_kv_blocks(spec.limits), most_kv_blocks(spec.limits))
    assert least_kv_blocks(tiny_spec(min_kv_tokens=33).limits) == 3
    assert [0, 0, 1, 3] == [
        kv_blocks_within(spec.model, spec.limits, shard, size) for size in (-5, block - 1, block, 3 * block + 1)
    ]
    assert [1, 3, 4] == [running_bound(spec.limits, blocks) for blocks in (0, 3, 29)]


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (3, 1), (2, 2), (3, 3), (8, 1)])
def test_sizes_are_those_of_the_slice_map(pipeline: int, tensor: int) -> None:
    """Tests that sizes counted per layer are what the slice map adds up range by range."""
    model = tiny_spec().model
    sizes = ShardSizes(model, block_tokens=16)
    for shard in replica_shards(model, pipeline=pipeline, tensor=tensor):
        assert shard_bytes(model, shard) == sizes.weights(shard)
        assert kv_block_bytes(model, shard, block_tokens=16) == sizes.block(shard)


def test_uneven_micro_batches_bring_no_more_tokens() -> None:
    """Tests that of four sequences on three stages a round brings four tokens, not the six that three pairs would."""
    spec = tiny_spec(max_running=4)
    shape = balanced(spec.model, pipeline=3, tensor=1)
    long_answers = Workload(prompt_tokens=1, output_tokens=10_000, load_rps=0.0)
    round_s = 3 * slowest_stage_ms(spec, shape, tokens=2) / 1000.0
    tokens_per_s = 10_000 * pool_throughput_rps(spec, Pool(shape, 1, 4), long_answers)
    assert abs(tokens_per_s - 4 / round_s) < 0.001 * tokens_per_s
