"""The slice map: every cut covers each parameter, and only kv heads and whole parameters are held twice."""

from __future__ import annotations

import pytest

from spotserve.core.slices import (
    axis_range,
    column_chunks,
    head_chunks,
    intersect,
    kv_head_range,
    layer_split,
    max_tensor_degree,
    owned_chunks,
    parameter_of,
    q_head_range,
    shard_bytes,
    shard_slices,
    slices_bytes,
    split_evenly,
    stage_shard,
    subtract,
)
from spotserve.core.spec import Axis, ModelSpec, Parameter, Segment


def tiny_model(
    *, num_layers: int = 5, q_heads: int = 8, kv_heads: int = 4, mlp: int = 179, vocab: int = 500
) -> ModelSpec:
    """A hand-written table of a Llama-like model whose MLP width is no multiple of 16."""
    layer = "model.layers.{layer}."
    head_dim, hidden = 16, 64
    q_segment, kv_segment = Segment(offset=0, axis="q_heads", unit=16), Segment(offset=0, axis="kv_heads", unit=16)
    mlp_segment = Segment(offset=0, axis="mlp", unit=1)
    return ModelSpec(
        name="tiny",
        digest="sha256:0",
        architecture="LlamaForCausalLM",
        dtype="float32",
        num_layers=num_layers,
        hidden_size=hidden,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_model_len=512,
        axes=(
            Axis(name="q_heads", size=q_heads, chunks=head_chunks(q_heads)),
            Axis(name="kv_heads", size=kv_heads, cover_of="q_heads", group=q_heads // kv_heads),
            Axis(name="mlp", size=mlp, chunks=column_chunks(mlp)),
            Axis(name="vocab", size=vocab, chunks=column_chunks(vocab)),
        ),
        parameters=(
            Parameter(name="embed", shape=(vocab, hidden), kind="replicated", stage="first"),
            Parameter(
                name=layer + "q", shape=(q_heads * head_dim, hidden), kind="col", segments=(q_segment,), stage="layer"
            ),
            Parameter(
                name=layer + "k", shape=(kv_heads * head_dim, hidden), kind="col", segments=(kv_segment,), stage="layer"
            ),
            Parameter(
                name=layer + "o",
                shape=(hidden, q_heads * head_dim),
                kind="row",
                dim=1,
                segments=(q_segment,),
                stage="layer",
            ),
            Parameter(
                name=layer + "gate_up",
                shape=(2 * mlp, hidden),
                kind="packed_col",
                segments=(mlp_segment, Segment(offset=mlp, axis="mlp", unit=1)),
                stage="layer",
            ),
            Parameter(name=layer + "norm", shape=(hidden,), kind="replicated", stage="layer"),
            Parameter(
                name="head",
                shape=(vocab, hidden),
                kind="col",
                segments=(Segment(offset=0, axis="vocab", unit=1),),
                stage="last",
                source="embed",
            ),
        ),
    )


@pytest.mark.parametrize("pipeline", [1, 2, 3, 5])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 5, 8])
def test_a_cut_covers_every_parameter(pipeline: int, tensor: int) -> None:
    """Tests that the ranks of all stages together hold each index of each parameter, and split ones just once."""
    model = tiny_model()
    held: dict[str, list[tuple[int, int]]] = {}
    for layers in layer_split(model.num_layers, pipeline):
        for rank in range(tensor):
            for piece in shard_slices(model, stage_shard(model, layers=layers, tensor=tensor, rank=rank)):
                held.setdefault(piece.parameter, []).append((piece.start, piece.stop))
    assert model.num_layers * 5 + 2 == len(held)
    for name, ranges in held.items():
        parameter = parameter_of(model, name)
        size = parameter.shape[parameter.dim]
        assert subtract([(0, size)], ranges) == []
        if parameter.kind != "replicated" and not name.endswith(".k"):
            assert size == sum(stop - start for start, stop in ranges), name


@pytest.mark.parametrize("tensor", range(1, 9))
def test_kv_heads_cover_the_q_heads(tensor: int) -> None:
    """Tests that a rank stores exactly the kv heads that its q heads read."""
    model = tiny_model()
    for rank in range(tensor):
        start, stop = q_head_range(model, tensor=tensor, rank=rank)
        read = sorted({head // 2 for head in range(start, stop)})
        assert read == list(range(*kv_head_range(model, tensor=tensor, rank=rank)))


def test_chunks_are_the_contract_s_grid() -> None:
    """Tests the reduction grid: balanced heads, runs of 16 columns, a remainder joined to the last run."""
    assert head_chunks(12) == ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 10), (10, 11), (11, 12))
    assert head_chunks(3) == ((0, 1), (1, 2), (2, 3))
    chunks = column_chunks(179)
    assert len(chunks) == 8
    assert chunks[-1] == (160, 179)
    assert all(start % 16 == 0 for start, _ in chunks)
    assert column_chunks(15) == ((0, 15),)


def test_eight_chunks_over_three_ranks() -> None:
    """Tests that chunks are dealt whole, 3/3/2, and that an axis range is the union of a rank's chunks."""
    model = tiny_model()
    axis = model.axis("mlp")
    dealt = [owned_chunks(axis, tensor=3, rank=rank) for rank in range(3)]
    assert [3, 3, 2] == [len(chunks) for chunks in dealt]
    assert list(axis.chunks) == [chunk for chunks in dealt for chunk in chunks]
    for rank, chunks in enumerate(dealt):
        assert (chunks[0][0], chunks[-1][1]) == axis_range(model, axis, tensor=3, rank=rank)


def test_max_tensor_degree_is_the_smallest_grid() -> None:
    """Tests that a narrow MLP bounds the tensor degree."""
    assert max_tensor_degree(tiny_model()) == 8
    assert max_tensor_degree(tiny_model(mlp=48)) == 3


def test_bytes_agree() -> None:
    """Tests that a shard's bytes are those of its slices, and one rank's are the whole model's."""
    model = tiny_model()
    shard = stage_shard(model, layers=(1, 4), tensor=3, rank=1)
    assert shard_bytes(model, shard) == slices_bytes(model, shard_slices(model, shard))
    whole = stage_shard(model, layers=(0, 5), tensor=1, rank=0)
    per_layer = 128 * 64 + 64 * 64 + 64 * 128 + 2 * 179 * 64 + 64
    assert shard_bytes(model, whole) == 4 * (2 * 500 * 64 + 5 * per_layer)


def test_interval_arithmetic() -> None:
    """Tests intersection and subtraction on ranges that touch, nest and miss."""
    assert intersect([(0, 10)], [(2, 4), (8, 12), (20, 21)]) == [(2, 4), (8, 10)]
    assert subtract([(0, 10)], [(2, 4), (8, 12)]) == [(0, 2), (4, 8)]
    assert subtract([(0, 4)], [(4, 6)]) == [(0, 4)]


def test_split_evenly_spreads_the_remainder() -> None:
    """Tests that runs differ by at most one and the front ones are longer."""
    assert split_evenly(8, 3) == ((0, 3), (3, 6), (6, 8))


def test_an_unknown_parameter_has_no_row() -> None:
    """Tests that a name outside the table is an error, not a guess."""
    with pytest.raises(KeyError):
        parameter_of(tiny_model(), "model.layers.0.unknown")
