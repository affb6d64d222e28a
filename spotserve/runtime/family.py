"""Where each served architecture has its parts, and along which axes its linear modules are cut.

transformers declares most of it (parallel plans, the base model's prefix); that is read from there. `FAMILIES` holds
what it does not declare, or declares in a way that would not cut the computation. No torch here: the list of
architectures is also read by processes that never import it, and the classes of transformers come in as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spotserve.core.spec import ParameterKind
from spotserve.errors import ModelError

KINDS: Mapping[str, ParameterKind] = {
    "colwise": "col",
    "colwise_gather_output": "col",
    "colwise_rep": "col",
    "rowwise": "row",
    "rowwise_split_input": "row",
    "packed_colwise": "packed_col",
    "replicated_with_grad_allreduce": "replicated",
    "moe_tp_experts": "reduce_output",
}
"""The style strings of transformers' plans that we execute, and what each means to us."""

AXES: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("q_heads",),
    "self_attn.k_proj": ("kv_heads",),
    "self_attn.v_proj": ("kv_heads",),
    "self_attn.o_proj": ("q_heads",),
    "mlp.gate_proj": ("mlp",),
    "mlp.up_proj": ("mlp",),
    "mlp.down_proj": ("mlp",),
    "self_attn.dense": ("q_heads",),
    "mlp.fc1": ("mlp",),
    "mlp.fc2": ("mlp",),
    "mlp.c_fc": ("mlp",),
    "mlp.c_proj": ("mlp",),
    "mlp.experts.gate_up_proj": ("experts", "experts"),
    "mlp.experts.down_proj": ("experts",),
    "mlp.experts": (),
}
"""Module below a layer, as plans name it -> the axes its split dimension follows, one after another."""

ATTENTION_EXTRAS = frozenset(
    {"dropout", "position_ids", "position_embeddings", "sliding_window", "softcap", "use_cache", "output_attentions"}
)
"""What layers hand to the attention function that it knows of, or may ignore; anything else is a feature not served."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of attention layers that `config.layer_types` may name."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a module of a decoder layer is cut: `axes` one after another along the split dimension.

    `heads` is how many times head_dim one step along a head axis is wide (3 where query, key and value of a head are
    neighbours); with `counts_heads` it is one entry. `transposed` weights are [in, out] on disk.
    """

    kind: ParameterKind
    axes: tuple[str, ...] = ()
    heads: int = 1
    counts_heads: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What transformers does not declare of an architecture. Module names are below the base model.

    `splits` are modules below a layer; they replace those of transformers' plan. `embedding_factor`, `logit_factor`,
    `logit_divisor`, `logit_cap` and `score_cap` name config entries (None in the config means none) that the model
    applies outside its modules: embeddings and logits times, logits over, and logits and attention scores capped by
    tanh. `norms` are those below a layer that are taken over all heads of an axis at once. `private_config` is for
    attention modules that read head counts from their config in every forward. `stored` maps names of the parameter
    table to what checkpoints may have instead, as `Parameter.source` says it.
    """

    embedding: str | None = None
    layers: str = "layers"
    norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    splits: Mapping[str, Split] = field(default_factory=dict)
    embedding_factor: str | None = None
    logit_factor: str | None = None
    logit_divisor: str | None = None
    logit_cap: str | None = None
    score_cap: str | None = None
    norms: Mapping[str, str] = field(default_factory=dict)
    private_config: bool = False
    stored: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """An architecture's parts as dotted module names of the whole model; `attention` is below a layer."""

    base: str
    embedding: str
    positions: str | None
    layers: str
    attention: str
    norm: str
    rotary: str
    head: str
    splits: Mapping[str, Split]
    family: Family

    def below_layer(self, name: str) -> str | None:
        """What follows `<layers>.<number or {layer}>.` in a parameter's name; None if it is in no layer."""
        prefix = f"{self.layers}."
        return name.removeprefix(prefix).split(".", 1)[1] if name.startswith(prefix) else None


_LAYER = "model.layers.{layer}"
_EXPERTS = f"{_LAYER}.mlp.experts"
_ROUTER = {"mlp.gate": Split("replicated")}
_QWEN_EXPERTS: Mapping[str, tuple[str, ...]] = {
    f"{_EXPERTS}.gate_up_proj": (
        f"{_EXPERTS}.{{expert}}.gate_proj.weight",
        f"{_EXPERTS}.{{expert}}.up_proj.weight",
    ),
    f"{_EXPERTS}.down_proj": (f"{_EXPERTS}.{{expert}}.down_proj.weight",),
}

_LLAMA_SPLITS: Mapping[str, Split] = {
    **{f"self_attn.{name}": Split("col", AXES[f"self_attn.{name}"]) for name in ("q_proj", "k_proj", "v_proj")},
    "self_attn.o_proj": Split("row", ("q_heads",)),
    "mlp.gate_proj": Split("col", ("mlp",)),
    "mlp.up_proj": Split("col", ("mlp",)),
    "mlp.down_proj": Split("row", ("mlp",)),
}
"""For architectures built like Llama for which transformers declares no plan."""

_GATE_UP = {"mlp.gate_up_proj": Split("packed_col", ("mlp", "mlp"))}
_GEMMA2 = Family(score_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping")
_GEMMA3 = Family(logit_cap="final_logit_softcapping")
"""Its attention modules read a cap of the scores from the config, and do not hand it to their attention function."""
_COHERE = Family(
    splits={
        "self_attn.q_norm": Split("col", ("q_heads",), counts_heads=True),
        "self_attn.k_norm": Split("col", ("kv_heads",), counts_heads=True),
    },
    logit_factor="logit_scale",
)
_OLMO2 = Family(norms={"self_attn.q_norm": "q_heads", "self_attn.k_norm": "kv_heads"})

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MinistralForCausalLM": Family(),
    "Ministral3ForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "GemmaForCausalLM": Family(),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Phi3ForCausalLM": Family(
        splits={"self_attn.qkv_proj": Split("packed_col", ("q_heads", "kv_heads", "kv_heads")), **_GATE_UP},
        private_config=True,
    ),
    "PhiForCausalLM": Family(),
    "GPTNeoXForCausalLM": Family(
        splits={
            "attention.query_key_value": Split("col", ("q_heads",), heads=3),
            "attention.dense": Split("row", ("q_heads",)),
            "mlp.dense_h_to_4h": Split("col", ("mlp",)),
            "mlp.dense_4h_to_h": Split("row", ("mlp",)),
        },
        stored={"lm_head.weight": "embed_out.weight"},
    ),
    "OPTForCausalLM": Family(
        embedding="decoder.embed_tokens",
        positions="decoder.embed_positions",
        position_offset=2,
        layers="decoder.layers",
        norm="decoder.final_layer_norm",
        splits={
            "self_attn.q_proj": Split("col", ("q_heads",)),
            "self_attn.k_proj": Split("col", ("kv_heads",)),
            "self_attn.v_proj": Split("col", ("kv_heads",)),
            "self_attn.out_proj": Split("row", ("q_heads",)),
            "fc1": Split("col", ("mlp",)),
            "fc2": Split("row", ("mlp",)),
        },
    ),
    "GPT2LMHeadModel": Family(
        embedding="wte",
        positions="wpe",
        layers="h",
        norm="ln_f",
        splits={
            "attn.c_attn": Split("packed_col", ("q_heads", "kv_heads", "kv_heads"), transposed=True),
            "attn.c_proj": Split("row", ("q_heads",), transposed=True),
            "mlp.c_fc": Split("col", ("mlp",), transposed=True),
            "mlp.c_proj": Split("row", ("mlp",), transposed=True),
        },
    ),
    "GraniteForCausalLM": Family(embedding_factor="embedding_multiplier", logit_divisor="logits_scaling"),
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": Family(logit_factor="logit_scale"),
    "OlmoForCausalLM": Family(),
    "Olmo2ForCausalLM": _OLMO2,
    "Olmo3ForCausalLM": _OLMO2,
    "Starcoder2ForCausalLM": Family(),
    "GlmForCausalLM": Family(splits=_GATE_UP),
    "Glm4ForCausalLM": Family(splits=_GATE_UP),
    "HeliumForCausalLM": Family(),
    "SeedOssForCausalLM": Family(),
    "SmolLM3ForCausalLM": Family(),
    "ArceeForCausalLM": Family(),
    "Ernie4_5ForCausalLM": Family(),
    "Exaone4ForCausalLM": Family(),
    "Jais2ForCausalLM": Family(),
    "VaultGemmaForCausalLM": _GEMMA2,
    # transformers before 5.23 need not declare a plan for it.
    "NemotronForCausalLM": Family(
        embedding="embed_tokens",
        norm="norm",
        splits={module: split for module, split in _LLAMA_SPLITS.items() if module != "mlp.gate_proj"},
    ),
    "HunYuanDenseV1ForCausalLM": Family(embedding="embed_tokens", norm="norm", splits=_LLAMA_SPLITS),
    "StableLmForCausalLM": Family(embedding="embed_tokens", norm="norm", splits=_LLAMA_SPLITS),
    "MixtralForCausalLM": Family(
        splits=_ROUTER,
        stored={
            f"{_LAYER}.mlp.gate.weight": f"{_LAYER}.block_sparse_moe.gate.weight",
            f"{_EXPERTS}.gate_up_proj": (
                f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w1.weight",
                f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w3.weight",
            ),
            f"{_EXPERTS}.down_proj": (f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w2.weight",),
        },
    ),
    "Qwen3MoeForCausalLM": Family(splits=_ROUTER, stored=_QWEN_EXPERTS),
    "Qwen2MoeForCausalLM": Family(
        splits={
            **_ROUTER,
            "mlp.shared_expert.gate_proj": Split("col", ("shared_expert",)),
            "mlp.shared_expert.up_proj": Split("col", ("shared_expert",)),
            "mlp.shared_expert.down_proj": Split("row", ("shared_expert",)),
            "mlp.shared_expert_gate": Split("replicated"),
            # transformers before 5.23 need not declare these.
            "mlp.experts.gate_up_proj": Split("packed_col", AXES["mlp.experts.gate_up_proj"]),
            "mlp.experts.down_proj": Split("row", AXES["mlp.experts.down_proj"]),
            "mlp.experts": Split("reduce_output"),
        },
        stored=_QWEN_EXPERTS,
    ),
    "GraniteMoeForCausalLM": Family(
        embedding="embed_tokens",
        norm="norm",
        splits={
            **{name: split for name, split in _LLAMA_SPLITS.items() if not name.startswith("mlp.")},
            "block_sparse_moe.router": Split("replicated"),
            "block_sparse_moe.experts": Split("reduce_output"),
            "block_sparse_moe.experts.gate_up_proj": Split("packed_col", ("experts", "experts")),
            "block_sparse_moe.experts.down_proj": Split("row", ("experts",)),
        },
        embedding_factor="embedding_multiplier",
        logit_divisor="logits_scaling",
        stored={
            f"{_LAYER}.block_sparse_moe.router.weight": f"{_LAYER}.block_sparse_moe.router.layer.weight",
            f"{_LAYER}.block_sparse_moe.experts.gate_up_proj": f"{_LAYER}.block_sparse_moe.input_linear.weight",
            f"{_LAYER}.block_sparse_moe.experts.down_proj": f"{_LAYER}.block_sparse_moe.output_linear.weight",
        },
    ),
}
"""Architectures whose tokens are tested equal to transformers' own, for every cut."""


def model_parts(architecture: str, model_class: Any) -> ModelParts:
    """The parts of `architecture`, whose transformers class is `model_class`.

    Raises:
        ModelError: its plan has a style, or cuts a module, that is not known here.
    """
    family = FAMILIES[architecture]
    base = model_class.base_model_prefix
    # The pipeline plan lists the base model's modules in the order of its forward.
    order = list(getattr(model_class.config_class, "base_model_pp_plan", None) or {}) or [""]
    embedding, norm = family.embedding or order[0], family.norm or order[-1]
    head_style = (model_class._tp_plan or {}).get("lm_head", "colwise")
    if KINDS.get(head_style) != "col":
        raise ModelError(f"parallel style {head_style} of lm_head is unknown, expected one that cuts columns")
    splits = _declared_splits(model_class, family) | dict(family.splits)
    attention = next(module.rsplit(".", 1)[0] for module, split in splits.items() if "q_heads" in split.axes)
    return ModelParts(
        base=base,
        embedding=f"{base}.{embedding}",
        positions=f"{base}.{family.positions}" if family.positions else None,
        layers=f"{base}.{family.layers}",
        attention=attention,
        norm=f"{base}.{norm}",
        rotary=f"{base}.rotary_emb",
        head="lm_head",
        splits=splits,
        family=family,
    )


def _declared_splits(model_class: Any, family: Family) -> dict[str, Split]:
    """The splits of transformers' tensor plan, but for the modules that the family gives by hand."""
    plan = getattr(model_class.config_class, "base_model_tp_plan", None) or {}
    splits = {}
    for module, style in plan.items():
        below = module.removeprefix(f"{family.layers}.*.")
        if style not in KINDS:
            raise ModelError(f"parallel style {style} is unknown, known: {', '.join(KINDS)}")
        if below in family.splits:
            continue
        kind = KINDS[style]
        if kind != "replicated" and below not in AXES:
            raise ModelError(f"module {module} is split by no known axis, known: {', '.join(AXES)}")
        splits[below] = Split(kind, () if kind == "replicated" else AXES[below])
    return splits


def rope_layer_types(config: Any) -> tuple[str, ...]:
    """The types of layers that have rotary parameters of their own; none where all layers share them.

    Raises:
        ModelError: the config has such parameters, and no layer types or something beside them.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in rope.values()):
        return ()
    types = getattr(config, "layer_types", None)
    if types is None:
        raise ModelError(
            f"config.json has rope_parameters by layer type, and a {config.model_type} model no layer types"
        )
    missing = sorted(kind for kind in set(types) if not isinstance(rope.get(kind), dict))
    if missing:
        raise ModelError(f"config.json has rope_parameters by layer type, but none for {missing[0]}")
    return tuple(sorted(set(types)))


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """For each layer, how many tokens a row attends to, itself included; None is all of them.

    Raises:
        ModelError: a layer attends in a way that is not served.
    """
    _check_unknown_windows(config)
    window: int | None = config.sliding_window if hasattr(type(config), "sliding_window") else None
    types = getattr(config, "layer_types", None)
    # Some classes write 0 where no layer has a window.
    is_used = window is not None and (types is None or "sliding_attention" in types)
    if is_used and (type(window) is not int or window < 1):
        raise ModelError(f"config.json: sliding_window {window!r} is not a whole number from 1 on")
    if types is not None and not hasattr(type(config), "layer_types"):
        raise ModelError(f"config.json has layer_types, which a {config.model_type} model does not know")
    if types is None:
        return (window,) * int(config.num_hidden_layers)
    unknown = sorted(set(types) - set(LAYER_TYPES))
    if unknown:
        raise ModelError(f"layer type {unknown[0]} is not supported, known: {', '.join(LAYER_TYPES)}")
    if "sliding_attention" in types and window is None:
        raise ModelError("config.json has layers of type sliding_attention and no sliding_window")
    return tuple(window if each == "sliding_attention" else None for each in types)


def _check_unknown_windows(config: Any) -> None:
    """Refuse windows of an architecture that has none, unless they are as long as its sequences.

    No layer of such a model has the window, but the KV cache of transformers' `generate` drops what is outside of it:
    what it generates depends on where the prompt ends.
    """
    for name in ("sliding_window", "attention_chunk_size"):
        value = None if hasattr(type(config), name) else getattr(config, name, None)
        if value is not None and (type(value) is not int or value < config.max_position_embeddings):
            raise ModelError(
                f"config.json has {name} {value!r}, which a {config.model_type} model does not know",
                hint=f"remove {name} from config.json",
            )
