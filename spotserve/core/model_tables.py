"""Models by name, their parameter tables written by hand: what a scenario may name without a checkpoint.

The three of the SpotServe paper (Miao et al., ASPLOS'24, Table 1) are fp32 there. Its "GPT-20B" and "LLaMA-30B" are
OPT-like GPTs with random weights and learned positions for 640 tokens. `llama-70b` has the published shape of
Llama 3 70B: grouped-query attention, a gated MLP, no biases.
"""

from __future__ import annotations

from typing import Literal

from spotserve.core.slices import column_chunks, head_chunks
from spotserve.core.spec import Axis, DType, ModelSpec, Parameter, Segment
from spotserve.errors import SpecError

NO_DIGEST = "sha256:" + 64 * "0"
"""A table by hand has no checkpoint."""

OPT_POSITION_OFFSET = 2
"""OPT's position table begins with two rows that no token uses."""

MODEL_NAMES = ("opt-6.7b", "gpt-20b", "llama-30b", "llama-70b")


def model_table(name: str, *, dtype: DType | None = None, max_model_len: int | None = None) -> ModelSpec:
    """The model of this name.

    Args:
        name: one of `MODEL_NAMES`, upper or lower case.
        dtype: of weights and KV; fp32 for the paper's models and bfloat16 for the others if not given.
        max_model_len: most tokens of a sequence, if fewer than the model's own are served.

    Raises:
        SpecError: an unknown name, or more tokens than the model takes.
    """
    model = _model(name.lower())
    if max_model_len is not None and not 1 <= max_model_len <= model.max_model_len:
        raise SpecError(f"max_model_len {max_model_len} is not between 1 and {model.max_model_len} of {model.name}")
    changes = {"dtype": dtype, "max_model_len": max_model_len}
    return model.model_copy(update={key: value for key, value in changes.items() if value is not None})


def _model(name: str) -> ModelSpec:
    if name == "opt-6.7b":
        return _opt("OPT-6.7B", hidden=4096, heads=32, layers=32, vocab=50272, positions=2048)
    if name == "gpt-20b":
        return _opt("GPT-20B", hidden=6144, heads=48, layers=44, vocab=51200, positions=640)
    if name == "llama-30b":
        return _opt("LLaMA-30B", hidden=7168, heads=56, layers=48, vocab=50304, positions=640)
    if name == "llama-70b":
        return _llama(
            "Llama-3-70B", hidden=8192, heads=64, kv_heads=8, layers=80, mlp=28672, vocab=128256, positions=8192
        )
    raise SpecError(f"model {name!r} has no table", hint=f"known: {', '.join(MODEL_NAMES)}")


def _opt(name: str, *, hidden: int, heads: int, layers: int, vocab: int, positions: int) -> ModelSpec:
    """A decoder as OPT has it: biases, an MLP of four times the width, tied embeddings."""
    mlp, head_dim = 4 * hidden, hidden // heads
    layer = "model.decoder.layers.{layer}."
    attention = [
        each
        for part, axis in (("q", "q_heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        for each in _with_bias(f"{layer}self_attn.{part}_proj", hidden, hidden, axis, head_dim)
    ]
    return ModelSpec(
        name=name,
        digest=NO_DIGEST,
        architecture="OPTForCausalLM",
        dtype="float32",
        num_layers=layers,
        hidden_size=hidden,
        num_q_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_model_len=positions,
        axes=_axes(heads, heads, mlp),
        parameters=(
            _whole("model.decoder.embed_tokens.weight", (vocab, hidden), "first"),
            _whole("model.decoder.embed_positions.weight", (positions + OPT_POSITION_OFFSET, hidden), "first"),
            *attention,
            _row(f"{layer}self_attn.out_proj.weight", hidden, hidden, "q_heads", head_dim),
            Parameter(name=f"{layer}self_attn.out_proj.bias", shape=(hidden,), kind="reduce_output", stage="layer"),
            *_norm(f"{layer}self_attn_layer_norm", hidden, "layer"),
            *_with_bias(f"{layer}fc1", mlp, hidden, "mlp", 1),
            _row(f"{layer}fc2.weight", hidden, mlp, "mlp", 1),
            Parameter(name=f"{layer}fc2.bias", shape=(hidden,), kind="reduce_output", stage="layer"),
            *_norm(f"{layer}final_layer_norm", hidden, "layer"),
            *_norm("model.decoder.final_layer_norm", hidden, "last"),
            Parameter(
                name="lm_head.weight",
                shape=(vocab, hidden),
                kind="replicated",
                stage="last",
                source="model.decoder.embed_tokens.weight",
            ),
        ),
    )


def _llama(
    name: str, *, hidden: int, heads: int, kv_heads: int, layers: int, mlp: int, vocab: int, positions: int
) -> ModelSpec:
    """A decoder as Llama has it: grouped kv heads, a gated MLP, RMS norms, a head of its own."""
    head_dim = hidden // heads
    layer = "model.layers.{layer}."
    return ModelSpec(
        name=name,
        digest=NO_DIGEST,
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        num_layers=layers,
        hidden_size=hidden,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_model_len=positions,
        axes=(*_axes(heads, kv_heads, mlp), Axis(name="vocab", size=vocab, chunks=column_chunks(vocab))),
        parameters=(
            _whole("model.embed_tokens.weight", (vocab, hidden), "first"),
            _col(f"{layer}self_attn.q_proj.weight", (hidden, hidden), "q_heads", head_dim),
            _col(f"{layer}self_attn.k_proj.weight", (kv_heads * head_dim, hidden), "kv_heads", head_dim),
            _col(f"{layer}self_attn.v_proj.weight", (kv_heads * head_dim, hidden), "kv_heads", head_dim),
            _row(f"{layer}self_attn.o_proj.weight", hidden, hidden, "q_heads", head_dim),
            _col(f"{layer}mlp.gate_proj.weight", (mlp, hidden), "mlp", 1),
            _col(f"{layer}mlp.up_proj.weight", (mlp, hidden), "mlp", 1),
            _row(f"{layer}mlp.down_proj.weight", hidden, mlp, "mlp", 1),
            _whole(f"{layer}input_layernorm.weight", (hidden,), "layer"),
            _whole(f"{layer}post_attention_layernorm.weight", (hidden,), "layer"),
            _whole("model.norm.weight", (hidden,), "last"),
            _col("lm_head.weight", (vocab, hidden), "vocab", 1, stage="last"),
        ),
    )


def _axes(heads: int, kv_heads: int, mlp: int) -> tuple[Axis, ...]:
    return (
        Axis(name="q_heads", size=heads, chunks=head_chunks(heads)),
        Axis(name="kv_heads", size=kv_heads, cover_of="q_heads", group=heads // kv_heads),
        Axis(name="mlp", size=mlp, chunks=column_chunks(mlp)),
    )


Stage = Literal["first", "layer", "last"]


def _col(name: str, shape: tuple[int, ...], axis: str, unit: int, *, stage: Stage = "layer") -> Parameter:
    return Parameter(
        name=name, shape=shape, kind="col", segments=(Segment(offset=0, axis=axis, unit=unit),), stage=stage
    )


def _with_bias(name: str, width: int, hidden: int, axis: str, unit: int) -> tuple[Parameter, Parameter]:
    """A column-parallel matrix and its bias."""
    return _col(f"{name}.weight", (width, hidden), axis, unit), _col(f"{name}.bias", (width,), axis, unit)


def _row(name: str, hidden: int, width: int, axis: str, unit: int) -> Parameter:
    segments = (Segment(offset=0, axis=axis, unit=unit),)
    return Parameter(name=name, shape=(hidden, width), kind="row", dim=1, segments=segments, stage="layer")


def _whole(name: str, shape: tuple[int, ...], stage: Stage) -> Parameter:
    return Parameter(name=name, shape=shape, kind="replicated", stage=stage)


def _norm(name: str, hidden: int, stage: Stage) -> tuple[Parameter, Parameter]:
    """A layer norm with its bias."""
    return _whole(f"{name}.weight", (hidden,), stage), _whole(f"{name}.bias", (hidden,), stage)
