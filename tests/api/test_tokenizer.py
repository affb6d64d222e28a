"""A model folder is read as transformers reads it, and its chat template cannot take the server down."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from spotserve.api.chat_template import ChatTemplate
from spotserve.api.tokenizer import GenerationDefaults, TextCodec
from spotserve.errors import ModelError, RequestError
from tests.api.folder import byte_level_tokenizer, metaspace_tokenizer, write_folder

MESSAGES = [{"role": "system", "content": "be  brief\n"}, {"role": "user", "content": "what is ß 🙂?"}]


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), metaspace_tokenizer()], ids=["byte_level", "metaspace"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_encodes_like_transformers(tmp_path: Path, tokenizer: Tokenizer, config: dict[str, object]) -> None:
    """Tests that prompts become the ids transformers gives, with and without special tokens."""
    folder = write_folder(tmp_path, tokenizer, **config)
    codec = TextCodec.load(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    generator = random.Random(3)
    texts = ["", " ", "the quick", "  two  spaces ", "<s>x</s>", "a\u00a0b\tc\n", "東京🙂"]
    texts += ["".join(generator.choice("abcdefgh <s>/ß") for _ in range(20)) for _ in range(20)]
    assert codec is not None
    for text in texts:
        assert tuple(theirs.encode(text)) == codec.encode(text)
        assert tuple(theirs.encode(text, add_special_tokens=False)) == codec.encode(text, add_special_tokens=False)
        token_ids = codec.encode(text)
        assert theirs.decode(token_ids, skip_special_tokens=True) == codec.decode(token_ids)


def test_renders_chats_like_transformers(tmp_path: Path) -> None:
    """Tests that a chat becomes the prompt that apply_chat_template makes."""
    folder = write_folder(tmp_path)
    codec = TextCodec.load(folder)
    assert codec is not None
    assert codec.template is not None
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    try:
        assert expected == codec.template.render(MESSAGES)
        assert expected == codec.template.render(MESSAGES)
    finally:
        codec.close()


def test_the_builtin_model_has_text() -> None:
    """Tests that the model that ships with the package encodes, decodes and chats."""
    folder = Path(__file__).parents[2] / "spotserve" / "builtin"
    codec = TextCodec.load(folder)
    assert codec is not None
    assert codec.template is not None
    try:
        assert "<|user|>\nWhat is a list?\n<|assistant|>\n" == codec.template.render(
            [{"role": "user", "content": "What is a list?"}]
        )
        assert "def f(x): ß" == codec.decode(codec.encode("def f(x): ß"))
        assert 1 in GenerationDefaults.load(folder).eos_token_ids
    finally:
        codec.close()


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    """Tests that chat_template.jinja is the template when both are there."""
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    codec = TextCodec.load(folder)
    assert codec is not None
    assert codec.template is not None
    try:
        assert "<s>hi" == codec.template.render([{"role": "user", "content": "hi"}])
    finally:
        codec.close()


def test_no_tokenizer_means_ids_only(tmp_path: Path) -> None:
    """Tests that a folder without tokenizer.json has no codec."""
    assert TextCodec.load(tmp_path) is None


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {"eos_token_id": 5}, GenerationDefaults(eos_token_ids=(5,))),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 5}, GenerationDefaults(eos_token_ids=(1, 2))),
        ({"do_sample": False, "temperature": 0.9}, {}, GenerationDefaults(temperature=0.0)),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 7}, {}, GenerationDefaults(temperature=0.6, top_p=0.9, top_k=7)),
        ({"temperature": None, "eos_token_id": None}, {}, GenerationDefaults()),
    ],
)
def test_defaults_come_from_the_folder(
    tmp_path: Path, generation: dict[str, object], config: dict[str, object], expected: GenerationDefaults
) -> None:
    """Tests which EOS ids and sampling defaults a folder gives."""
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expected == GenerationDefaults.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_corrupt_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """Tests that a broken file refuses the folder with its path and no traceback."""
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        TextCodec.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not finish within"),
        ("{{ 'x' * 100000000000 }}", "memory|process ended|cannot be used"),
        (
            "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "memory|finish",
        ),
        ("{% for a in range(9000) %}{{ 'x' * 10000 }}{% endfor %}", "wrote more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nests too deeply|process ended"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ strftime_now('%Y') }}", "undefined"),
        ("{{ messages.append(1) }}", "unsafe|sandbox"),
        ("{{ raise_exception('not this role') }}", "not this role"),
        ("{{ 1 / 0 }}", "zero|cannot be used"),
    ],
)
def test_a_hostile_template_hurts_nobody(source: str, message: str) -> None:
    """Tests that loops, memory bombs and escapes end as a refusal, and that the next chat is refused as well."""
    template = ChatTemplate(source, timeout_s=1.5)
    try:
        for _ in range(2):
            with pytest.raises(RequestError, match=message):
                template.render([{"role": "user", "content": "hi"}])
    finally:
        template.close()


def test_a_template_that_is_none_is_refused_at_load() -> None:
    """Tests that broken syntax is found when the folder is loaded."""
    with pytest.raises(ModelError, match="chat template cannot be read"):
        ChatTemplate("{% for %}")
