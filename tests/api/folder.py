"""A tiny model folder: a byte-level BPE tokenizer trained here, a chat template, EOS ids, sampling defaults."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 320
MAX_MODEL_LEN = 128
BOS, EOS = 0, 1
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '\n' -}}{%- endfor -%}"
    "{%- if messages[0]['content'] == 'refuse' -%}{{- raise_exception('no refusing') -}}{%- endif -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "stop here and there", "grüße aus köln, 東京 🙂🙃 naïve"] * 4


def byte_level_tokenizer() -> Tokenizer:
    """A llama-3 style tokenizer: byte-level BPE, BOS added by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in ("<s>", "</s>", "<|user|>", "<|assistant|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """A llama-2 style tokenizer: BPE with byte fallback, a leading space that decoding strips."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefgh", "▁a", "▁b", "ab", "cd"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *letters])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("c", "d")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer | None = None, **config: object) -> Path:
    """Write the folder; `config` goes into `tokenizer_config.json`."""
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
            "chat_template": TEMPLATE,
            **config,
        },
    )
    _write(folder / "config.json", {"model_type": "llama", "eos_token_id": EOS})
    _write(folder / "generation_config.json", {"temperature": 0.7, "top_k": 20, "do_sample": True})
    return folder


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
