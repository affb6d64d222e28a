"""A small serving spec made by hand, for tests that need no weights."""

from __future__ import annotations

from spotserve.core.slices import column_chunks, head_chunks
from spotserve.core.spec import (
    Axis,
    LatencyPoint,
    Limits,
    ModelSpec,
    Parameter,
    Profile,
    Segment,
    ServingSpec,
)


def small_model(
    *, num_layers: int = 8, hidden: int = 128, q_heads: int = 8, kv_heads: int = 4, mlp: int = 384, vocab: int = 2048
) -> ModelSpec:
    """A llama-like parameter table."""
    head_dim = hidden // q_heads

    def col(name: str, width: int, axis: str, unit: int) -> Parameter:
        segment = Segment(offset=0, axis=axis, unit=unit)
        return Parameter(
            name=f"model.layers.{{layer}}.{name}.weight",
            shape=(width, hidden),
            kind="col",
            segments=(segment,),
            stage="layer",
        )

    def row(name: str, width: int, axis: str, unit: int) -> Parameter:
        segment = Segment(offset=0, axis=axis, unit=unit)
        return Parameter(
            name=f"model.layers.{{layer}}.{name}.weight",
            shape=(hidden, width),
            kind="row",
            dim=1,
            segments=(segment,),
            stage="layer",
        )

    def norm(name: str, stage: str) -> Parameter:
        return Parameter.model_validate({"name": name, "shape": (hidden,), "kind": "replicated", "stage": stage})

    return ModelSpec(
        name="small",
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
            Parameter(name="model.embed_tokens.weight", shape=(vocab, hidden), kind="replicated", stage="first"),
            col("self_attn.q_proj", q_heads * head_dim, "q_heads", head_dim),
            col("self_attn.k_proj", kv_heads * head_dim, "kv_heads", head_dim),
            col("self_attn.v_proj", kv_heads * head_dim, "kv_heads", head_dim),
            row("self_attn.o_proj", q_heads * head_dim, "q_heads", head_dim),
            col("mlp.gate_proj", mlp, "mlp", 1),
            col("mlp.up_proj", mlp, "mlp", 1),
            row("mlp.down_proj", mlp, "mlp", 1),
            norm("model.layers.{layer}.input_layernorm.weight", "layer"),
            norm("model.layers.{layer}.post_attention_layernorm.weight", "layer"),
            norm("model.norm.weight", "last"),
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


def small_spec(**limits: int) -> ServingSpec:
    """The small model with a made-up profile."""
    profile = Profile(
        name="test",
        source="made up for tests",
        device="cpu",
        latencies=(
            LatencyPoint(tokens=1, tensor=1, layer_ms=0.5),
            LatencyPoint(tokens=64, tensor=1, layer_ms=4.0),
            LatencyPoint(tokens=1, tensor=2, layer_ms=0.4),
            LatencyPoint(tokens=64, tensor=2, layer_ms=2.5),
            LatencyPoint(tokens=1, tensor=4, layer_ms=0.35),
            LatencyPoint(tokens=64, tensor=4, layer_ms=2.0),
        ),
        link_bytes_per_s=1e8,
        storage_bytes_per_s=2e8,
    )
    return ServingSpec(
        model=small_model(),
        profile=profile,
        limits=Limits.model_validate({"max_model_len": 256, "max_running": 8, **limits}),
    )


def with_experts(model: ModelSpec, *, num_experts: int = 4) -> ModelSpec:
    """The same model with a mixture of experts for its MLP: parameters of three dimensions, one of two segments."""
    width, hidden = model.axis("mlp").size, model.hidden_size
    segments = (Segment(offset=0, axis="mlp", unit=1), Segment(offset=width, axis="mlp", unit=1))
    gate_up = Parameter(
        name="model.layers.{layer}.mlp.experts.gate_up_proj",
        shape=(num_experts, 2 * width, hidden),
        kind="packed_col",
        dim=1,
        segments=segments,
        stage="layer",
    )
    down = Parameter(
        name="model.layers.{layer}.mlp.experts.down_proj",
        shape=(num_experts, hidden, width),
        kind="row",
        dim=2,
        segments=segments[:1],
        stage="layer",
    )
    others = tuple(each for each in model.parameters if ".mlp." not in each.name)
    return model.model_copy(update={"parameters": (*others, gate_up, down)})
