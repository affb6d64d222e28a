"""Tests of the built-in model: its size, its shapes, its tokenizer and template, and that it speaks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "spotserve" / "builtin"
EMULATED_GPU_BYTES = 6 * 1024 * 1024
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is a for statement?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Renders the chat template as the coordinator does, without transformers."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(read_json("tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def tensor_bytes() -> dict[str, int]:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (not a mapping)
    assert {torch.float32} == {tensor.dtype for tensor in tensors.values()}
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def greedy_answer(question: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    prompt = tokenizer(render([{"role": "user", "content": question}], add_generation_prompt=True), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=False, temperature=None, top_p=None)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_folder_holds_only_safetensors_and_text() -> None:
    """Tests that the folder has just the files a model needs, none of them a pickle."""
    expected = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert expected == {path.name for path in FOLDER.iterdir()}


def test_weights_need_two_emulated_gpus() -> None:
    """Tests that the weights exceed one emulated GPU, while a half and 1,024 tokens of KV cache fit on one."""
    config = read_json("config.json")
    sizes = tensor_bytes()
    num_layers = config["num_hidden_layers"]
    kv_bytes_per_token = 2 * (num_layers // 2) * config["num_key_value_heads"] * config["head_dim"] * 4
    # The embedding is tied, so the stage with the last layers needs it as well as the one with the first.
    layer_bytes = sum(size for name, size in sizes.items() if ".layers." in name)
    stage_bytes = sum(sizes.values()) - layer_bytes // 2

    assert sum(sizes.values()) > EMULATED_GPU_BYTES
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert stage_bytes + 1024 * kv_bytes_per_token <= EMULATED_GPU_BYTES


def test_config_is_a_small_llama() -> None:
    """Tests that the shapes allow tensor degrees up to 8, fewer KV heads than ranks, and uneven stages."""
    config = read_json("config.json")
    widths = ("hidden_size", "intermediate_size", "head_dim")

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert [config[width] % 16 for width in widths] == [0, 0, 0]
    assert config["intermediate_size"] % 128 == 0
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    assert config["num_hidden_layers"] >= 6
    assert config["num_hidden_layers"] % 4 != 0
    assert config["max_position_embeddings"] >= 1024


def test_special_tokens_agree(tokenizer: Tokenizer) -> None:
    """Tests that config, generation defaults and tokenizer name one end token, and that nobody adds a BOS."""
    end = tokenizer.token_to_id(read_json("tokenizer_config.json")["eos_token"])

    assert end == read_json("config.json")["eos_token_id"]
    assert end == read_json("generation_config.json")["eos_token_id"]
    assert read_json("config.json")["bos_token_id"] is None
    assert read_json("config.json")["vocab_size"] == tokenizer.get_vocab_size()
    assert tokenizer.encode("for", add_special_tokens=False).ids == tokenizer.encode("for").ids


def test_loads_in_transformers_without_loose_ends() -> None:
    """Tests that transformers finds every weight it wants and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)

    assert torch.float32 == model.dtype
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_every_text_round_trips(text: str) -> None:
    """Tests that any Unicode text comes back from its tokens unchanged."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert text == tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", ["  two  spaces\r\n\ttab ", "naïve 你好 🎉👩‍👩‍👧", "<|end|> and <|user|>\n", ""])
def test_tokenizers_and_transformers_agree(tokenizer: Tokenizer, text: str) -> None:
    """Tests that the coordinator's tokenizer and that of transformers give the same ids and text."""
    wrapped = AutoTokenizer.from_pretrained(FOLDER)
    token_ids = tokenizer.encode(text).ids

    assert wrapped(text).input_ids == token_ids
    assert text == wrapped.decode(token_ids) == tokenizer.decode(token_ids, skip_special_tokens=False)


def test_chat_template_renders_in_the_sandbox() -> None:
    """Tests the prompt of a conversation, and that transformers renders the same one."""
    expected = (
        "<|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nWhat is a for statement?\n<|assistant|>\n"
    )
    wrapped = AutoTokenizer.from_pretrained(FOLDER)

    assert expected == render(CONVERSATION, add_generation_prompt=True)
    assert expected.removesuffix("<|assistant|>\n") == render(CONVERSATION, add_generation_prompt=False)
    assert expected == wrapped.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)


def test_chat_template_refuses_an_unknown_role() -> None:
    """Tests that a role the model never saw is refused rather than put into the prompt."""
    with pytest.raises(ValueError, match="role robot is not one of"):
        render([{"role": "robot", "content": "Hello"}], add_generation_prompt=True)


@pytest.mark.parametrize(
    "question", ["What is a for statement?", "Explain lambda in Python.", "Tell me about modules."]
)
def test_answers_are_words_of_the_corpus(question: str) -> None:
    """Tests that nine in ten words of a greedy answer occur in the text the model was trained on."""
    corpus = {word.lower() for page in topics.topics.values() for word in re.findall(r"[^\W\d_]+", page)}
    words = re.findall(r"[^\W\d_]+", greedy_answer(question, 64).lower())

    assert len(words) >= 10
    assert sum(word in corpus for word in words) / len(words) >= 0.9


@pytest.mark.slow
def test_training_script_writes_such_a_folder(tmp_path: Path) -> None:
    """Tests that two steps of the script make a folder with the same files, config and tokenizer settings."""
    command = [sys.executable, str(ROOT / "examples" / "train_builtin.py"), str(tmp_path / "model"), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    assert done.returncode == 0, done.stderr
    assert "step 1 loss" in done.stdout
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in (tmp_path / "model").iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        written = json.loads((tmp_path / "model" / name).read_text(encoding="utf-8"))
        kept = read_json(name)
        written.pop("transformers_version", None)
        kept.pop("transformers_version", None)
        assert kept == written
