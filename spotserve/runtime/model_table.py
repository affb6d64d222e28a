"""Derives a model's parameter table from what transformers declares about it.

The parallel plans of transformers say which module is split by columns and which by rows; the config says in what
units (heads, MLP columns). Style strings are normalised to our kinds in one table. What is not known is refused by
name, never guessed: a wrong cut gives wrong tokens, not an error. Runs in a short process (`describe.py`), so that
the coordinator never imports transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from spotserve.core.slices import column_chunks, head_chunks
from spotserve.core.spec import DTYPE_BYTES, Axis, DType, ModelSpec, Parameter, Segment
from spotserve.errors import ModelError
from spotserve.runtime.architecture import read_architecture
from spotserve.runtime.checkpoint_header import CheckpointLayout, validate_checkpoint
from spotserve.runtime.family import ModelParts, Split, layer_windows, model_parts, rope_layer_types

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on the length of the sequence."""

HEAD_AXES = ("q_heads", "kv_heads")

FLOAT_DTYPES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""How a weight may be stored. Integers are quantized weights, whose scales lie elsewhere."""


STRANGE_VALUE_ERRORS = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OSError,
    ImportError,
)
"""What transformers and torch raise on values in `config.json` that their authors did not think of, or that ask for
packages which are not installed."""
MAX_REASON_CHARS = 200


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
    parts = model_parts(architecture, model_class)
    _check_features(config)
    try:
        with torch.device("meta"):
            module = model_class(config)
    except STRANGE_VALUE_ERRORS as error:
        reason = _reason(error)
        raise ModelError(f"{folder / 'config.json'}: transformers builds no {architecture} of it: {reason}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(remove_duplicate=False)}
    q_heads, kv_heads, head_dim = head_counts(config)
    sizes = {"q_heads": q_heads, "kv_heads": kv_heads} | _mlp_sizes(parts, shapes)
    table = _Table(parts, sizes, head_dim, config)
    parameters = _as_stored(layout, table.parameters(shapes), parts)
    _check_stored(layout, parameters, config.num_hidden_layers)
    return ModelSpec(
        name=folder.resolve().name,
        digest=layout.digest,
        architecture=architecture,
        dtype=_serving_dtype(folder, layout, parameters, dtype),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        axes=_axes(sizes, config.vocab_size),
        parameters=parameters,
    )


def load_config(folder: Path) -> Any:
    """The transformers config of `folder`, read from disk alone and without any code of its own."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        # A file may name any attention, even a repository whose kernels would be loaded: the one that is built in.
        config._attn_implementation = "eager"
        config._experts_implementation = None
        return config
    except (StrictDataclassError, *STRANGE_VALUE_ERRORS) as error:
        raise ModelError(f"{folder / 'config.json'} is not accepted by transformers: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an exception of transformers says, in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_REASON_CHARS]


def _check_features(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope_layer_types(config)
    # One set of parameters, or one for each type of layer.
    for each in [rope[kind] for kind in kinds] if kinds else [rope]:
        rope_type = each.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ModelError(f"rope_type {rope_type} is not supported, known: {', '.join(ROPE_TYPES)}")
    layer_windows(config)
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError("config.json has use_bidirectional_attention, which is not supported")
    q_heads, kv_heads, _ = head_counts(config)
    if q_heads % kv_heads:
        raise ModelError(f"{q_heads} q heads are no multiple of {kv_heads} kv heads")


def head_counts(config: Any) -> tuple[int, int, int]:
    """(q heads, kv heads, head_dim) of a model."""
    q_heads = int(config.num_attention_heads)
    # An entry that its class does not know stays in a config, but no module of transformers reads it.
    grouped = config.num_key_value_heads if hasattr(type(config), "num_key_value_heads") else None
    kv_heads = int(grouped or q_heads)
    return q_heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // q_heads)


def _mlp_sizes(parts: ModelParts, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of the axes that are not heads, from the weights that are split along them."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        below = parts.below_layer(name)
        split = parts.splits.get(below.removesuffix(".weight")) if below is not None else None
        if split is not None and split.axes and split.axes[0] not in HEAD_AXES:
            width = shape[-1] if (split.kind == "row") != split.transposed else shape[-2]
            sizes.setdefault(split.axes[0], width // len(split.axes))
    return sizes


def _axes(sizes: Mapping[str, int], vocab_size: int) -> tuple[Axis, ...]:
    q_heads, kv_heads = sizes["q_heads"], sizes["kv_heads"]
    return (
        Axis(name="q_heads", size=q_heads, chunks=head_chunks(q_heads)),
        Axis(name="kv_heads", size=kv_heads, cover_of="q_heads", group=q_heads // kv_heads),
        *(
            Axis(name=name, size=size, chunks=column_chunks(size))
            for name, size in sizes.items()
            if name not in HEAD_AXES
        ),
        Axis(name="vocab", size=vocab_size, chunks=column_chunks(vocab_size)),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """Makes the rows of a model's parameter table; `sizes` are those of the axes."""

    parts: ModelParts
    sizes: Mapping[str, int]
    head_dim: int
    config: Any

    def parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Parameter, ...]:
        """One row per name, that of the layers with `{layer}` in it."""
        rows: dict[str, Parameter] = {}
        first: dict[str, tuple[int, ...]] = {}
        counts: Counter[str] = Counter()
        for name, shape in shapes.items():
            template = name
            below = self.parts.below_layer(name)
            if below is not None:
                template = f"{self.parts.layers}.{{layer}}.{below}"
            if template not in rows:
                rows[template] = self._row(template, shape, below)
                first[template] = shape
            elif first[template] != shape:
                raise ModelError(f"{name} has shape {shape}, other layers {first[template]}")
            counts[template] += 1
        num_layers = self.config.num_hidden_layers
        for name, row in rows.items():
            if row.stage == "layer" and counts[name] != num_layers:
                raise ModelError(
                    f"{name} is in {counts[name]} of {num_layers} layers",
                    hint="models with layers of two kinds are not served",
                )
        return tuple(rows.values())

    def _row(self, name: str, shape: tuple[int, ...], below: str | None) -> Parameter:
        module = name.rsplit(".", 1)[0]
        if below is not None:
            return self._layer_row(name, shape, below)
        if module in (self.parts.embedding, self.parts.positions):
            return Parameter(name=name, shape=shape, kind="replicated", stage="first")
        if module == self.parts.norm:
            return Parameter(name=name, shape=shape, kind="replicated", stage="last")
        if module == self.parts.head:
            segments = (Segment(offset=0, axis="vocab", unit=1),)
            tied = self.config.tie_word_embeddings and name.endswith(".weight")
            source = f"{self.parts.embedding}.weight" if tied else None
            return Parameter(name=name, shape=shape, kind="col", segments=segments, stage="last", source=source)
        raise ModelError(f"parameter {name} has no known place in the pipeline")

    def _layer_row(self, name: str, shape: tuple[int, ...], below: str) -> Parameter:
        module, leaf = below.rsplit(".", 1)
        # Experts are parameters of three dimensions, not modules: the plan names them whole.
        split = self.parts.splits.get(below) or self.parts.splits.get(module) or self._whole(below, shape)
        if split.kind == "replicated" or (split.kind == "row" and leaf == "bias"):
            return Parameter(name=name, shape=shape, kind="replicated", stage="layer")
        transposed = split.transposed and leaf == "weight"
        if transposed:
            shape = shape[::-1]
        dim = len(shape) - 1 if split.kind == "row" or len(shape) == 1 else len(shape) - 2
        segments = self._segments(below, split, shape[dim])
        return Parameter(
            name=name,
            shape=shape,
            kind=split.kind,
            dim=dim,
            segments=segments,
            stage="layer",
            transposed=transposed,
        )

    def _whole(self, below: str, shape: tuple[int, ...]) -> Split:
        """What no plan names is held whole if it is a norm: over one head in attention, else over the hidden size."""
        axis = self.parts.family.norms.get(below.rsplit(".", 1)[0])
        in_attention = below.startswith(f"{self.parts.attention}.")
        width = self.head_dim if in_attention else self.config.hidden_size
        # A list of modules may be one per head, of which a rank needs its own.
        is_listed = any(part.isdigit() for part in below.split("."))
        if is_listed or shape != (width if axis is None else self.sizes[axis] * self.head_dim,):
            raise ModelError(f"parameter {below} of shape {shape} is in no parallel plan")
        return Split("replicated")

    def _segments(self, below: str, split: Split, width: int) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        offset = 0
        for axis in split.axes:
            unit = self.head_dim * split.heads if axis in HEAD_AXES and not split.counts_heads else 1
            segments.append(Segment(offset=offset, axis=axis, unit=unit))
            offset += unit * self.sizes[axis]
        if width != offset:
            raise ModelError(f"{below} is {width} wide, expected {offset} for axes {', '.join(split.axes)}")
        return tuple(segments)


def _as_stored(layout: CheckpointLayout, parameters: tuple[Parameter, ...], parts: ModelParts) -> tuple[Parameter, ...]:
    """The rows with the names that this checkpoint has: their own, the family's other ones, or without the base.

    A head that should be the embedding is its own where it is stored: transformers ties what a checkpoint lacks.
    """
    result = []
    for parameter in parameters:
        own = parameter.source or parameter.name
        without_base = own.removeprefix(f"{parts.base}.") if isinstance(own, str) else own
        for source in (parameter.name, parts.family.stored.get(parameter.name), own, without_base):
            named = parameter.model_copy(update={"source": None if source == parameter.name else source})
            if source is not None and named.stored()[0][0] in layout.tensors:
                break
        else:
            named = parameter
        result.append(named)
    return tuple(result)


def _check_stored(layout: CheckpointLayout, parameters: tuple[Parameter, ...], num_layers: int) -> None:
    for parameter in parameters:
        for layer in range(num_layers) if parameter.stage == "layer" else [0]:
            for name, shape in parameter.stored(layer):
                stored = layout.tensor(name)
                if stored.dtype not in FLOAT_DTYPES:
                    raise ModelError(
                        f"{stored.file}: {stored.name} is stored as {stored.dtype}, known: {', '.join(FLOAT_DTYPES)}",
                        hint="give the model before it was quantized",
                    )
                if stored.shape != shape:
                    raise ModelError(f"{stored.file}: {stored.name} has shape {stored.shape}, config.json says {shape}")


def _serving_dtype(
    folder: Path, layout: CheckpointLayout, parameters: tuple[Parameter, ...], dtype: str | None
) -> DType:
    first = next(parameter for parameter in parameters if parameter.stage == "first")
    [(name, _)] = first.stored()
    stored = layout.tensor(name)
    known = ", ".join(DTYPE_BYTES)
    if dtype is None and FLOAT_DTYPES[stored.dtype] not in DTYPE_BYTES:
        raise ModelError(
            f"{stored.file}: {name} is stored as {stored.dtype}, which is not served in, known: {known}",
            hint="choose what it is converted to with --dtype",
        )
    chosen = dtype if dtype is not None else FLOAT_DTYPES[stored.dtype]
    if chosen not in DTYPE_BYTES:
        raise ModelError(f"{folder}: dtype {chosen} is not supported, known: {known}")
    return cast("DType", chosen)
