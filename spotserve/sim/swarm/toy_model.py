"""A llama-like parameter table of a few megabytes, with a made-up profile: swarms need many cheap plans."""

from __future__ import annotations

from spotserve.core.slices import column_chunks, head_chunks
from spotserve.core.spec import Axis, LatencyPoint, ModelSpec, Parameter, Profile, Segment

HEAD_DIM = 16


def toy_model(*, num_layers: int, q_heads: int = 8, kv_heads: int = 4, mlp: int = 384, vocab: int = 2048) -> ModelSpec:
    """A decoder with grouped-query attention, a gated MLP and tied embeddings."""
    hidden = q_heads * HEAD_DIM
    layer = "model.layers.{layer}."

    def col(name: str, width: int, axis: str, unit: int) -> Parameter:
        segments = (Segment(offset=0, axis=axis, unit=unit),)
        return Parameter(name=layer + name, shape=(width, hidden), kind="col", segments=segments, stage="layer")

    def row(name: str, width: int, axis: str, unit: int) -> Parameter:
        segments = (Segment(offset=0, axis=axis, unit=unit),)
        return Parameter(name=layer + name, shape=(hidden, width), kind="row", dim=1, segments=segments, stage="layer")

    return ModelSpec(
        name="toy",
        digest="sha256:0",
        architecture="LlamaForCausalLM",
        dtype="float32",
        num_layers=num_layers,
        hidden_size=hidden,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=vocab,
        max_model_len=512,
        axes=(
            Axis(name="q_heads", size=q_heads, chunks=head_chunks(q_heads)),
            Axis(name="kv_heads", size=kv_heads, cover_of="q_heads", group=q_heads // kv_heads),
            Axis(name="mlp", size=mlp, chunks=column_chunks(mlp)),
            Axis(name="vocab", size=vocab, chunks=column_chunks(vocab)),
        ),
        parameters=(
            Parameter(name="model.embed_tokens.weight", shape=(vocab, hidden), kind="replicated", stage="first"),
            col("self_attn.q_proj.weight", q_heads * HEAD_DIM, "q_heads", HEAD_DIM),
            col("self_attn.k_proj.weight", kv_heads * HEAD_DIM, "kv_heads", HEAD_DIM),
            col("self_attn.v_proj.weight", kv_heads * HEAD_DIM, "kv_heads", HEAD_DIM),
            row("self_attn.o_proj.weight", q_heads * HEAD_DIM, "q_heads", HEAD_DIM),
            col("mlp.gate_proj.weight", mlp, "mlp", 1),
            col("mlp.up_proj.weight", mlp, "mlp", 1),
            row("mlp.down_proj.weight", mlp, "mlp", 1),
            Parameter(name=f"{layer}norm.weight", shape=(hidden,), kind="replicated", stage="layer"),
            Parameter(
                name="lm_head.weight",
                shape=(vocab, hidden),
                kind="col",
                stage="last",
                segments=(Segment(offset=0, axis="vocab", unit=1),),
                source="model.embed_tokens.weight",
            ),
        ),
    )


def toy_profile(*, link_bytes_per_s: float) -> Profile:
    """Times of no real device."""
    points = ((1, 1, 0.5), (64, 1, 4.0), (1, 2, 0.4), (64, 2, 2.5), (1, 4, 0.35), (64, 4, 2.0))
    return Profile(
        name="toy",
        source="made up for the swarm",
        device="cpu",
        latencies=tuple(LatencyPoint(tokens=n, tensor=degree, layer_ms=ms) for n, degree, ms in points),
        link_bytes_per_s=link_bytes_per_s,
        storage_bytes_per_s=2 * link_bytes_per_s,
    )
