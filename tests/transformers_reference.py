"""What `transformers` itself says of a model folder, in float32 and greedily: the reference of every test of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


def reference_model(folder: Path) -> Any:
    """The model in float32; with plain attention where SDPA is not what the family computes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not model._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    # What a generation configuration leaves open is taken from the model's, and that one stops at its EOS.
    model.generation_config.eos_token_id = None
    return model


def greedy_tokens(model: Any, ids: Sequence[int], num_tokens: int) -> list[int]:
    """Tokens by `generate` after a prompt."""
    return greedy_tokens_with_lead(model, ids, num_tokens)[0]


def greedy_tokens_with_lead(model: Any, ids: Sequence[int], num_tokens: int) -> tuple[list[int], float]:
    """Tokens by `generate`, and the least lead that one's logit had over the second."""
    greedy = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0)
    given = torch.tensor([list(ids)])
    with torch.no_grad():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=greedy,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens: list[int] = out.sequences[0, len(ids) :].tolist()
    assert num_tokens == len(tokens)
    best = torch.cat(out.logits).topk(2).values
    return tokens, float((best[:, 0] - best[:, 1]).min())
