"""Derives a model's parameter table from what transformers declares about it.

The parallel plans of transformers say which module is split by columns and which by rows; the config says in what
units (heads, MLP columns). Style strings are normalised to our kinds in one table. What is not known is refused by
name, never guessed: a wrong cut gives wrong tokens, not an error. Runs in a short process (`describe.py`), so that
the coordinator never imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from spotserve.core.slices import column_chunks, head_chunks
from spotserve.core.spec import DTYPE_BYTES, Axis, DType, ModelSpec, Parameter, ParameterKind, Segment
from spotserve.errors import ModelError
from spotserve.runtime.architecture import read_architecture
from spotserve.runtime.checkpoint_header import CheckpointLayout, validate_checkpoint

KINDS: Mapping[str, ParameterKind] = {
    "colwise": "col",
    "colwise_gather_output": "col",
    "colwise_rep": "col",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "replicated",
}
"""The style strings of transformers' plans that we execute, and what each means to us."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on the length of the sequence."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# Module name below a layer -> the axis its split dimension follows.
_AXES: Mapping[str, str] = {
    "self_attn.q_proj": "q_heads",
    "self_attn.k_proj": "kv_heads",
    "self_attn.v_proj": "kv_heads",
    "self_attn.o_proj": "q_heads",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp",
}


def describe_model(folder: Path, dtype: str | None = None) -> ModelSpec:
    """The ModelSpec of a transformers folder, checked against its safetensors headers.

    Args:
        folder: config.json and safetensors files.
        dtype: what to serve in; None is the checkpoint's own.

    Raises:
        ModelError: missing, corrupt or unsupported, in one line.
    """
    layout = validate_checkpoint(folder)
    architecture = read_architecture(folder)
    config = load_config(folder)
    model_class = getattr(transformers, architecture)
    if not isinstance(config, model_class.config_class):
        raise ModelError(f"{folder / 'config.json'}: model_type {config.model_type} is not that of {architecture}")
    _check_features(config)
    with torch.device("meta"):
        module = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(remove_duplicate=False)}
    axes = _axes(config)
    parameters = _parameters(config, _plan(config, model_class), shapes)
    _check_stored(layout, parameters, config.num_hidden_layers)
    return ModelSpec(
        name=folder.resolve().name,
        digest=layout.digest,
        architecture=architecture,
        dtype=_serving_dtype(folder, layout, dtype),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        axes=axes,
        parameters=parameters,
    )


def load_config(folder: Path) -> Any:
    """The transformers config of `folder`, read from disk alone and without any code of its own."""
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (StrictDataclassError, ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{folder / 'config.json'} is not accepted by transformers: {reason}") from error


def _check_features(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ModelError(f"rope_type {rope} is not supported, known: {', '.join(ROPE_TYPES)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"{config.num_attention_heads} q heads are no multiple of {config.num_key_value_heads} kv heads"
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _axes(config: Any) -> tuple[Axis, ...]:
    q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return (
        Axis(name="q_heads", size=q_heads, chunks=head_chunks(q_heads)),
        Axis(name="kv_heads", size=kv_heads, cover_of="q_heads", group=q_heads // kv_heads),
        Axis(name="mlp", size=config.intermediate_size, chunks=column_chunks(config.intermediate_size)),
        Axis(name="vocab", size=config.vocab_size, chunks=column_chunks(config.vocab_size)),
    )


def _plan(config: Any, model_class: Any) -> dict[str, ParameterKind]:
    """Module name (with `{layer}`) to kind, from the plans of the config class and the model class."""
    styles = {
        f"model.{module}".replace(".*.", ".{layer}."): style
        for module, style in (type(config).base_model_tp_plan or {}).items()
    }
    # The instance attribute would be the merged plan; the class's own has just the head.
    styles |= model_class._tp_plan or {}
    unknown = sorted(set(styles.values()) - set(KINDS))
    if unknown:
        raise ModelError(f"parallel style {unknown[0]} is unknown, known: {', '.join(KINDS)}")
    return {module: KINDS[style] for module, style in styles.items()}


def _parameters(
    config: Any, plan: Mapping[str, ParameterKind], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Parameter, ...]:
    rows: dict[str, Parameter] = {}
    for name, shape in shapes.items():
        template = ".".join("{layer}" if part.isdigit() else part for part in name.split("."))
        if template not in rows:
            rows[template] = _parameter(config, plan, template, shape)
        elif rows[template].shape != shape:
            raise ModelError(f"{name} has shape {shape}, other layers {rows[template].shape}")
    return tuple(rows.values())


def _parameter(config: Any, plan: Mapping[str, ParameterKind], name: str, shape: tuple[int, ...]) -> Parameter:
    module, leaf = name.rsplit(".", 1)
    if name == EMBEDDING:
        return Parameter(name=name, shape=shape, kind="replicated", stage="first")
    if name == FINAL_NORM:
        return Parameter(name=name, shape=shape, kind="replicated", stage="last")
    if name == HEAD:
        if plan.get("lm_head") != "col":
            raise ModelError(f"the plan gives lm_head as {plan.get('lm_head')}, expected col")
        segments = (Segment(offset=0, axis="vocab", unit=1),)
        source = EMBEDDING if config.tie_word_embeddings else None
        return Parameter(name=name, shape=shape, kind="col", segments=segments, stage="last", source=source)
    if not name.startswith("model.layers.{layer}."):
        raise ModelError(f"parameter {name} has no known place in the pipeline")
    kind = plan.get(module, "replicated")
    if kind == "replicated" or (kind == "row" and leaf == "bias"):
        return Parameter(name=name, shape=shape, kind="replicated", stage="layer")
    dim = 1 if kind == "row" else 0
    segment = _segment(config, module.removeprefix("model.layers.{layer}."), shape[dim])
    return Parameter(name=name, shape=shape, kind=kind, dim=dim, segments=(segment,), stage="layer")


def _segment(config: Any, module: str, width: int) -> Segment:
    if module not in _AXES:
        raise ModelError(f"module {module} is split by no known axis, known: {', '.join(_AXES)}")
    axis = _AXES[module]
    unit = 1 if axis == "mlp" else _head_dim(config)
    size = {
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "mlp": config.intermediate_size,
    }[axis]
    if width != size * unit:
        raise ModelError(f"module {module} is {width} wide, expected {size} x {unit}")
    return Segment(offset=0, axis=axis, unit=unit)


def _check_stored(layout: CheckpointLayout, parameters: tuple[Parameter, ...], num_layers: int) -> None:
    for parameter in parameters:
        for layer in range(num_layers) if parameter.stage == "layer" else [0]:
            stored = layout.tensor((parameter.source or parameter.name).replace("{layer}", str(layer)))
            if stored.shape != parameter.shape:
                raise ModelError(
                    f"{stored.file}: {stored.name} has shape {stored.shape}, config.json says {parameter.shape}"
                )


def _serving_dtype(folder: Path, layout: CheckpointLayout, dtype: str | None) -> DType:
    stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(layout.tensor(EMBEDDING).dtype)
    chosen = dtype if dtype is not None else stored
    if chosen not in DTYPE_BYTES:
        raise ModelError(f"{folder}: dtype {chosen} is not supported, known: {', '.join(DTYPE_BYTES)}")
    return cast("DType", chosen)
