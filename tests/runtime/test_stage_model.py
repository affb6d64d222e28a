"""The engine is exact: transformers' tokens in float32, and bits that depend on tokens and positions alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from spotserve.core.slices import shard_slices, stage_shard
from spotserve.errors import InvariantError, ModelError
from spotserve.runtime import linear, stage_model
from spotserve.runtime.attention import FREE_TILES, PagedBatch
from spotserve.runtime.checkpoint import Checkpoint
from spotserve.runtime.kv_store import OutOfBlocks
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.stage_model import BatchSequence, StageBatch, StageModel
from spotserve.runtime.weights import WeightStore
from tests.runtime.models import LocalReplica, empty_kv, key_of, write_llama
from tests.transformers_reference import greedy_tokens, reference_model

VARIANTS = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
"""(dtype, prepacked linears)"""
DEGREES = [(pipeline, tensor) for pipeline in (1, 2, 3) for tensor in (1, 2, 3, 4)] + [(1, 8), (4, 5)]
AWKWARD: dict[str, Any] = {"head_dim": 8, "intermediate_size": 179, "vocab_size": 301, "num_hidden_layers": 3}
"""Heads narrower than a column slice may be, an MLP and a vocabulary that are no multiple of 16."""


def prompt(length: int, seed: int = 1, vocab_size: int = 300) -> list[int]:
    """Random token ids."""
    return [
        int(token) for token in torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 q heads on 4 kv heads, 4 layers."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of inconvenient sizes."""
    return write_llama(tmp_path_factory.mktemp("awkward"), **AWKWARD)


def transformers_tokens(folder: Path, num_tokens: int) -> list[int]:
    """Greedy tokens of `generate` after `prompt(37)`."""
    return greedy_tokens(reference_model(folder), prompt(37), num_tokens)


@pytest.fixture(scope="module")
def reference(llama: Path) -> list[int]:
    """What transformers generates, and a check that the text is neither periodic nor monotonous."""
    tokens = transformers_tokens(llama, 200)
    assert len(set(tokens)) >= 50
    assert all(tokens[100 : 200 - period] != tokens[100 + period :] for period in range(1, 60))
    return tokens


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 1), (1, 2), (3, 3)])
def test_float32_tokens_are_those_of_transformers(
    llama: Path, reference: list[int], pipeline: int, tensor: int, prepacked: bool
) -> None:
    """Tests 200 greedy tokens against `generate`."""
    replica = LocalReplica(llama, pipeline=pipeline, tensor=tensor, prepacked=prepacked)
    assert reference == replica.generate(key_of(0), prompt(37), 200)


def test_fast_mode_tokens_are_those_of_transformers(llama: Path, reference: list[int]) -> None:
    """Tests that the mode without bit guarantees still computes the same model, split too."""
    for pipeline, tensor in ((1, 1), (2, 3)):
        replica = LocalReplica(llama, pipeline=pipeline, tensor=tensor, deterministic=False)
        assert reference[:60] == replica.generate(key_of(0), prompt(37), 60)


def history(replica: LocalReplica, *, chunk: int, num_decoded: int = 4) -> list[Tensor]:
    """Logits after a prefill and after each of some forced decode steps, in company of other sequences."""
    ids, forced = prompt(61), prompt(num_decoded, seed=2)
    rows = [replica.prefill(key_of(0), ids, chunk=chunk)]
    replica.prefill(key_of(1), prompt(20, seed=3), chunk=64)
    for token in forced:
        rows.append(replica.decode({key_of(1): 5, key_of(0): token})[1])
    return rows


def assert_same_bits(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    """Bit equality of logits, row by row."""
    assert [True] * len(expected) == [torch.equal(*pair) for pair in zip(expected, actual, strict=True)]


@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
@pytest.mark.parametrize("name", ["llama", "awkward"])
def test_bits_do_not_depend_on_the_cut(name: str, dtype: str, prepacked: bool, request: pytest.FixtureRequest) -> None:
    """Tests logits of prefill and decode for every (P, M), with fewer kv heads than ranks and uneven layers."""
    folder = request.getfixturevalue(name)
    model = describe_model(folder, dtype)
    expected = history(LocalReplica(folder, model, prepacked=prepacked), chunk=64)
    for pipeline, tensor in DEGREES:
        if pipeline <= model.num_layers:
            replica = LocalReplica(folder, model, pipeline=pipeline, tensor=tensor, prepacked=prepacked)
            assert_same_bits(expected, history(replica, chunk=64))


def run_history(folder: Path, *, chunk: int, **options: Any) -> list[Tensor]:
    """`history` on a fresh replica."""
    return history(LocalReplica(folder, **options), chunk=chunk)


@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
@pytest.mark.parametrize("name", ["llama", "awkward"])
def test_bits_do_not_depend_on_the_chunk(
    name: str, dtype: str, prepacked: bool, request: pytest.FixtureRequest
) -> None:
    """Tests that prefill chunks of 1, 7, 16 and 64 tokens give the same bits, then and later."""
    folder = request.getfixturevalue(name)
    expected = run_history(folder, chunk=64, dtype=dtype, prepacked=prepacked)
    for chunk in (1, 7, 16):
        assert_same_bits(expected, run_history(folder, chunk=chunk, dtype=dtype, prepacked=prepacked))


def recomputed(folder: Path, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of decode steps, and of the same positions prefilled afresh."""
    replica = LocalReplica(folder, **options)
    ids, forced = prompt(40), prompt(30, seed=2)
    replica.prefill(key_of(0), ids, chunk=64)
    decoded = [replica.decode({key_of(0): token})[0] for token in forced]
    again = [
        replica.prefill(key_of(index + 1), ids + forced[: index + 1], chunk=64) for index in range(0, len(forced), 5)
    ]
    return decoded[::5], again


@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
@pytest.mark.parametrize("name", ["llama", "awkward"])
def test_recompute_gives_the_bits_of_decoding(
    name: str, dtype: str, prepacked: bool, request: pytest.FixtureRequest
) -> None:
    """Tests that KV rebuilt by a prefill of prompt and tokens continues exactly like the KV that was lost."""
    assert_same_bits(*recomputed(request.getfixturevalue(name), dtype=dtype, prepacked=prepacked))


@pytest.mark.parametrize(("dtype", "prepacked"), VARIANTS)
def test_bits_do_not_depend_on_the_batch(llama: Path, dtype: str, prepacked: bool) -> None:
    """Tests rows alone against a mixed batch: decodes of equal and other lengths beside prefill chunks."""
    lengths = [1, 15, 16, 17, 33, 33, 64, 70]
    alone, mixed = (LocalReplica(llama, dtype=dtype, prepacked=prepacked) for _ in range(2))
    for replica in (alone, mixed):
        for index, length in enumerate(lengths):
            replica.prefill(key_of(index), prompt(length, seed=index), chunk=64)
    sequences = [BatchSequence(key_of(index), length, 1, True, (index,)) for index, length in enumerate(lengths)] + [
        BatchSequence(key_of(20), 0, 45, True, tuple(prompt(45, seed=20))),
        BatchSequence(key_of(21), 0, 9, False, tuple(prompt(9, seed=21))),
        BatchSequence(key_of(22), 0, 16, True, tuple(prompt(16, seed=22))),
    ]
    expected = [row for each in sequences for row in alone.forward(StageBatch((each,)))]
    assert_same_bits(expected, list(mixed.forward(StageBatch(tuple(sequences)))))
    assert alone.stages[0][0].kv.directory() == mixed.stages[0][0].kv.directory()


def test_fast_mode_computes_a_mixed_batch(llama: Path) -> None:
    """Tests fast mode's logits, where unequal lengths share a call and a chunk is cut anywhere, to float32's noise."""
    lengths = [1, 16, 33, 50, 64, 70]
    fast, exact = LocalReplica(llama, deterministic=False), LocalReplica(llama)
    sequences = [BatchSequence(key_of(index), length, 1, True, (index,)) for index, length in enumerate(lengths)]
    sequences.append(BatchSequence(key_of(20), 0, 100, True, tuple(prompt(100, seed=20))))
    for replica in (fast, exact):
        for index, length in enumerate(lengths):
            replica.prefill(key_of(index), prompt(length, seed=index), chunk=64)
    expected, actual = (replica.forward(StageBatch(tuple(sequences))) for replica in (exact, fast))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    groups = fast.stages[0][0]._paged.current.groups
    assert any(len({tile.num_blocks for tile in group.tiles}) > 1 for group in groups)


def test_bits_do_not_depend_on_the_rank_s_heads_being_even(tmp_path: Path) -> None:
    """Tests 6 q heads on 2 kv heads over 4 and 5 ranks, where a rank's q heads share kv heads unevenly, with biases."""
    folder = write_llama(
        tmp_path,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        num_hidden_layers=2,
    )
    expected = run_history(folder, chunk=64)
    for tensor in (2, 4, 5, 6):
        assert_same_bits(expected, run_history(folder, chunk=64, tensor=tensor))
    assert transformers_tokens(folder, 40) == LocalReplica(folder, tensor=4).generate(key_of(0), prompt(37), 40)


def test_tied_embeddings_and_scaled_rotary(tmp_path: Path) -> None:
    """Tests a tied model with llama3 rotary scaling, split both ways, against transformers."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = write_llama(tmp_path, tie_word_embeddings=True, rope_parameters=rope)
    replica = LocalReplica(folder, pipeline=2, tensor=2)
    assert transformers_tokens(folder, 60) == replica.generate(key_of(0), prompt(37), 60)


def test_moved_kv_continues_with_the_same_bits(llama: Path) -> None:
    """Tests a switch from (1, 3) to (2, 2): KV rectangles and weights of the old ranks make up the new ones."""
    old, new = LocalReplica(llama, tensor=3), LocalReplica(llama, pipeline=2, tensor=2)
    ids, forced = prompt(53), prompt(20, seed=2)
    old.prefill(key_of(0), ids, chunk=64)
    new.prefill(key_of(9), prompt(5), chunk=64)
    for target in (rank.kv for ranks in new.stages for rank in ranks):
        target.extend(key_of(0), len(ids))
        for head in range(*target.kv_heads):
            source = next(rank.kv for rank in old.stages[0] if rank.kv.kv_heads[0] <= head < rank.kv.kv_heads[1])
            for block in range(-(-len(ids) // 16)):
                area: dict[str, Any] = {"layers": target.layers, "kv_heads": (head, head + 1)}
                target.import_block(key_of(0), block, source.export_block(key_of(0), block, **area), **area)
        target.fill(key_of(0), len(ids))
    expected = [old.decode({key_of(0): token})[0] for token in forced]
    assert_same_bits(expected, [new.decode({key_of(0): token})[0] for token in forced])


def naive_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged_batch: PagedBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention without tiles for one sequence on one rank: all rows at once, keys exactly as many as there are."""
    keys, values = paged_batch.kv.keys(module.layer_idx), paged_batch.kv.values(module.layer_idx)  # type: ignore[arg-type]
    rows, slots = paged_batch.rows, paged_batch.slots
    heads = keys.shape[0]
    keys.view(heads, -1, keys.shape[3]).index_copy_(1, slots, key[0, :, :rows])
    values.view(heads, -1, keys.shape[3]).index_copy_(1, slots, value[0, :, :rows])
    length = (len(paged_batch.blocks) - 1) * 16 + int(slots[-1]) % 16 + 1
    all_keys, all_values = (
        pool[:, paged_batch.blocks].flatten(1, 2)[:, :length].repeat_interleave(query.shape[1] // heads, 0)[None]
        for pool in (keys, values)
    )
    mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    attended = F.scaled_dot_product_attention(query[:, :, :rows], all_keys, all_values, attn_mask=mask, scale=scaling)
    output = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
    output[0, :rows] = attended[0].transpose(0, 1)
    return output, None


def split_bits_differ(folder: Path) -> bool:
    """Whether some (1, M) gives other bits than (1, 1)."""
    expected = run_history(folder, chunk=64)
    return any(
        not torch.equal(*pair)
        for tensor in (2, 3, 8)
        for pair in zip(expected, run_history(folder, chunk=64, tensor=tensor), strict=True)
    )


def chunked_bits_differ(folder: Path) -> bool:
    """Whether prefill chunks of 8 give other bits than one of 61."""
    pairs = zip(run_history(folder, chunk=64), run_history(folder, chunk=8), strict=True)
    return any(not torch.equal(*pair) for pair in pairs)


def recomputed_bits_differ(folder: Path, dtype: str) -> bool:
    """Whether a re-prefill gives other bits than decoding."""
    return any(not torch.equal(*pair) for pair in zip(*recomputed(folder, dtype=dtype), strict=True))


def one_sum(self: StageModel, parameter: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Row-parallel products without reduction chunks."""
    if parameter.kind == "row":
        return linear.RowLinear(weight, bias, self._gather)
    return linear.ColumnLinear(weight, bias, min_columns=16)


@pytest.mark.parametrize(
    ("name", "value", "breaks"),
    [
        ("ROW_MULTIPLE", 1, lambda folder: recomputed_bits_differ(folder, "float32")),
        ("MIN_COLUMNS", 1, split_bits_differ),
        ("StageModel._linear", one_sum, split_bits_differ),
        ("paged_attention", naive_attention, lambda folder: recomputed_bits_differ(folder, "bfloat16")),
        ("ALIGNED_TILES", FREE_TILES, lambda folder: recomputed_bits_differ(folder, "float32")),
        ("WideActivation", lambda activation: activation, chunked_bits_differ),
    ],
)
def test_each_measure_is_needed(
    awkward: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, breaks: Callable[[Path], bool]
) -> None:
    """Tests that these tests can fail: without any one measure of deterministic mode some bits differ."""
    assert not breaks(awkward)
    monkeypatch.setattr(f"{stage_model.__name__}.{name}", value)
    assert breaks(awkward)


def test_another_sequence_s_infinities_do_not_spread(llama: Path) -> None:
    """Tests that a block which held infinities serves its next sequence as a fresh one does."""
    fresh, used = LocalReplica(llama), LocalReplica(llama, num_blocks=2)
    used.prefill(key_of(1), prompt(32), chunk=64)
    for layer in range(4):
        used.stages[0][0].kv.values(layer).fill_(float("inf"))
    used.stages[0][0].kv.free(key_of(1))
    expected = fresh.prefill(key_of(0), prompt(20), chunk=64)
    assert_same_bits([expected], [used.prefill(key_of(0), prompt(20), chunk=64)])


def test_a_full_pool_is_a_typed_error(llama: Path) -> None:
    """Tests that a forward which needs more blocks than are free raises before it writes any KV."""
    replica = LocalReplica(llama, num_blocks=2)
    with pytest.raises(OutOfBlocks):
        replica.prefill(key_of(0), prompt(40), chunk=64)
    assert replica.stages[0][0].kv.kv_tokens(key_of(0)) == 0


def test_a_gap_in_the_kv_is_refused(llama: Path) -> None:
    """Tests that tokens cannot start beyond what is written."""
    replica = LocalReplica(llama)
    with pytest.raises(InvariantError, match="starts at 3, KV has 0 tokens"):
        replica.forward(StageBatch((BatchSequence(key_of(0), 3, 1, True, (1,)),)))


def test_weights_that_are_not_complete_are_refused(llama: Path) -> None:
    """Tests that a stage model cannot be built over a range that was reserved but never written."""
    model = describe_model(llama)
    shard = stage_shard(model, layers=(0, 4), tensor=1, rank=0)
    weights, slices = WeightStore(model), shard_slices(model, shard)
    weights.reserve(slices)
    for piece in slices[:-1]:
        content = Checkpoint(llama, model).read(piece)
        weights.write_range(piece.parameter, piece.dim, piece.start, piece.stop, content)
    with pytest.raises(InvariantError, match="not fully held"):
        StageModel(llama, model, shard, weights, empty_kv(model, shard, num_blocks=1))


def test_prepacked_linears_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the refusals of another device, of a torch without oneDNN, and of a type that the processor lacks."""
    linear.check_linear("plain", torch.bfloat16, "meta")
    linear.check_linear("prepacked", torch.float32, "cpu")
    with pytest.raises(ModelError, match="prepacked weights are not supported on meta"):
        linear.check_linear("prepacked", torch.float32, "meta")
    with pytest.raises(ModelError, match=r"prepacked torch.int64 weights are not supported by this processor"):
        linear.check_linear("prepacked", torch.int64, "cpu")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with pytest.raises(ModelError, match="prepacked weights need a torch with oneDNN"):
        linear.check_linear("prepacked", torch.float32, "cpu")
