"""The model that the benchmarks serve: a Llama of about 100 million parameters, drawn from a seed.

What a migration costs depends on shapes and not on what the weights say, so no training and no download is needed.
It is kept as safetensors without a tokenizer (requests carry token ids) and named by its seed, so that a second run
finds it. `initializer_range` is far above the usual: with small random weights greedy decoding soon repeats one
token, and a stream that repeats itself could not show a lost or a doubled token.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a Llama, and the seed its weights are drawn from."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: int = 10
    num_q_heads: int = 12
    num_kv_heads: int = 4
    vocab_size: int = 32_000
    max_model_len: int = 512
    seed: int = 0

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"random-llama-{self.num_layers}x{self.hidden_size}-seed{self.seed}"


def random_llama(shape: ModelShape, folder: Path) -> Path:
    """The checkpoint folder of a shape inside `folder`, made now unless it is there."""
    checkpoint = folder / shape.name
    stamp = checkpoint / "shape.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == asdict(shape):
        return checkpoint
    draft = folder / f"{shape.name}.{os.getpid()}"
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_model_len,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=torch.float32,
    )
    torch.manual_seed(shape.seed)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(draft)
    (draft / "shape.json").write_text(json.dumps(asdict(shape)), encoding="utf-8")
    shutil.rmtree(checkpoint, ignore_errors=True)
    draft.rename(checkpoint)
    return checkpoint
