"""Tiny random models, one writer per family, each with what is hard about its family switched on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.runtime.models import TINY

SHAPE: Mapping[str, Any] = {
    **TINY,
    "vocab_size": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
BIAS_STD = 0.2
WINDOW = 20
"""Tokens of a sliding window: shorter than the prompts of the tests, and no multiple of an attention tile."""


def write_family(
    folder: Path,
    *,
    architecture: str,
    config: Mapping[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    embedding_scale: float = 1.0,
    stored_without: str = "",
    **changes: Any,
) -> Path:
    """A random model of `architecture` in `folder`; `changes` are to its config.

    `embedding_scale` makes embeddings smaller: where they are also the head, or scaled up, a model with large ones
    would say its last token again and again. `stored_without` is a prefix that the names on disk lack.
    """
    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    known = {
        name: value
        for name, value in SHAPE.items()
        if hasattr(config_class, config_class.attribute_map.get(name, name))
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**known, **config, **changes}))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):  # transformers makes them zero, and norms one: that would test nothing
            nn.init.normal_(tensor, std=BIAS_STD)
        elif tensor.dim() == 1:
            tensor.data += 0.3 * torch.randn_like(tensor)
    model.get_input_embeddings().weight.data *= embedding_scale
    model.to(dtype).save_pretrained(folder)
    if stored_without:
        file = folder / "model.safetensors"
        tensors = {name.removeprefix(stored_without): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _writer(
    architecture: str, *, embedding_scale: float = 1.0, stored_without: str = "", **config: Any
) -> Callable[..., Path]:
    return partial(
        write_family,
        architecture=architecture,
        config=config,
        embedding_scale=embedding_scale,
        stored_without=stored_without,
    )


FAMILIES: dict[str, Callable[..., Path]] = {
    # Many query heads on few kv heads.
    "llama": _writer("LlamaForCausalLM", num_key_value_heads=2),
    "mistral": _writer("MistralForCausalLM", sliding_window=WINDOW),
    # Biases of query, key and value; windows from the second layer on.
    "qwen2": _writer(
        "Qwen2ForCausalLM", head_dim=8, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    # Norms of query and key; tied embeddings.
    "qwen3": _writer("Qwen3ForCausalLM", num_key_value_heads=2, tie_word_embeddings=True),
    # Caps of scores and logits; windows in every other layer.
    "gemma2": _writer(
        "Gemma2ForCausalLM",
        embedding_scale=0.08,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
        tie_word_embeddings=True,
    ),
    # Two rotary bases, norms of query and key, windows in all layers but each third.
    "gemma3": _writer(
        "Gemma3ForCausalLM",
        embedding_scale=0.05,
        num_hidden_layers=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"] + ["sliding_attention"] * 2,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        tie_word_embeddings=True,
    ),
    # Query, key and value in one matrix, gate and up in one, part of a head rotated, windows.
    "phi3": _writer(
        "Phi3ForCausalLM",
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    # Learned positions, biases, tied embeddings, no gate.
    "opt": _writer(
        "OPTForCausalLM",
        embedding_scale=0.5,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=304,
        init_std=0.25,
        tie_word_embeddings=True,
    ),
    # Query, key and value of each head side by side, a quarter of a head rotated, parallel residual.
    "gpt_neox": _writer("GPTNeoXForCausalLM", hidden_size=128),
    # Transposed weights in one matrix, learned positions, tied embeddings, names as the first checkpoints have them.
    "gpt2": _writer(
        "GPT2LMHeadModel",
        stored_without="transformer.",
        hidden_size=128,
        n_inner=304,
        num_hidden_layers=6,
        initializer_range=0.5,
        tie_word_embeddings=True,
    ),
    "gemma": _writer("GemmaForCausalLM", tie_word_embeddings=True),
    "granite": _writer(
        "GraniteForCausalLM",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=4.0,
    ),
    # Norms of query and key with weights per head.
    "cohere": _writer(
        "CohereForCausalLM",
        embedding_scale=0.35,
        head_dim=8,
        initializer_range=0.7,
        use_qk_norm=True,
        logit_scale=0.25,
        tie_word_embeddings=True,
    ),
    "cohere2": _writer("Cohere2ForCausalLM", sliding_window=WINDOW, logit_scale=0.25, tie_word_embeddings=True),
    "olmo": _writer("OlmoForCausalLM", head_dim=8, clip_qkv=1.5),
    # Norms over all heads at once; olmo3 with windows as well.
    "olmo2": _writer("Olmo2ForCausalLM", head_dim=8, num_key_value_heads=2),
    "olmo3": _writer("Olmo3ForCausalLM", head_dim=8, sliding_window=WINDOW),
    "starcoder2": _writer("Starcoder2ForCausalLM", initializer_range=0.4, head_dim=8, sliding_window=WINDOW),
    "phi": _writer("PhiForCausalLM", embedding_scale=40.0, num_hidden_layers=3, head_dim=8, qk_layernorm=True),
    "glm": _writer("GlmForCausalLM"),
    "glm4": _writer("Glm4ForCausalLM"),
    "helium": _writer("HeliumForCausalLM", head_dim=8),
    "seed_oss": _writer("SeedOssForCausalLM"),
    "smollm3": _writer("SmolLM3ForCausalLM", head_dim=8),
    "ministral": _writer("MinistralForCausalLM", sliding_window=WINDOW),
    "ministral3": _writer("Ministral3ForCausalLM"),
    "arcee": _writer("ArceeForCausalLM"),
    "ernie4_5": _writer("Ernie4_5ForCausalLM"),
    "exaone4": _writer("Exaone4ForCausalLM", sliding_window=WINDOW, sliding_window_pattern=3),
    "jais2": _writer("Jais2ForCausalLM"),
    "vaultgemma": _writer("VaultGemmaForCausalLM", sliding_window=WINDOW),
    "nemotron": _writer("NemotronForCausalLM"),
    "hunyuan_v1_dense": _writer("HunYuanDenseV1ForCausalLM"),
    "stablelm": _writer("StableLmForCausalLM", head_dim=8),
    # Three of six experts per token; experts that are no multiple of 16 wide; a window.
    "mixtral": _writer(
        "MixtralForCausalLM",
        num_key_value_heads=2,
        intermediate_size=152,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=WINDOW,
    ),
    # A gated expert that all tokens share beside three of seven; weights that do not add up to one.
    "qwen2_moe": _writer(
        "Qwen2MoeForCausalLM",
        head_dim=8,
        moe_intermediate_size=88,
        shared_expert_intermediate_size=104,
        num_experts=7,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    ),
    # Two of five experts per token, stored whole under other names; factors and divisors.
    "granitemoe": _writer(
        "GraniteMoeForCausalLM",
        head_dim=8,
        intermediate_size=104,
        num_local_experts=5,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=4.0,
    ),
    # Four of sixteen experts per token, five reduction chunks to an expert, the last of them 20 wide.
    "qwen3_moe": _writer(
        "Qwen3MoeForCausalLM",
        num_key_value_heads=2,
        moe_intermediate_size=84,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
}
"""Name -> writer of a model folder, called with the folder and, where wanted, `seed`, `dtype` and config changes."""
