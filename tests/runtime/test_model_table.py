"""The parameter table is what transformers declares, and what is not known is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spotserve.core.slices import max_tensor_degree, shard_bytes, stage_shard
from spotserve.core.spec import ModelSpec
from spotserve.errors import ModelError
from spotserve.runtime.model_table import describe_model
from tests.runtime.models import write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return write_llama(tmp_path_factory.mktemp("llama"))


def changed(folder: Path, into: Path, **config: Any) -> Path:
    """A copy of `folder` whose config.json has other entries; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | config
    content = {key: value for key, value in content.items() if value is not None}
    into.mkdir()
    (into / "config.json").write_text(json.dumps(content))
    (into / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return into


def test_the_table_has_every_parameter(folder: Path) -> None:
    """Tests that names, shapes and bytes of the table are those of the transformers model."""
    model = describe_model(folder)
    module = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    expected = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    actual = {
        parameter.name.replace("{layer}", str(layer)): parameter.shape
        for parameter in model.parameters
        for layer in (range(model.num_layers) if parameter.stage == "layer" else [0])
    }
    assert expected == actual
    whole = stage_shard(model, layers=(0, model.num_layers), tensor=1, rank=0)
    assert 4 * sum(tensor.numel() for tensor in module.parameters()) == shard_bytes(model, whole)
    assert max_tensor_degree(model) == 8


def test_kinds_and_axes_of_a_llama(folder: Path) -> None:
    """Tests each module's kind, dimension and axis."""
    model = describe_model(folder)
    rows = {
        parameter.name: (parameter.kind, parameter.dim, [segment.axis for segment in parameter.segments])
        for parameter in model.parameters
    }
    layer = "model.layers.{layer}."
    assert rows[layer + "self_attn.q_proj.weight"] == ("col", 0, ["q_heads"])
    assert rows[layer + "self_attn.k_proj.weight"] == ("col", 0, ["kv_heads"])
    assert rows[layer + "self_attn.o_proj.weight"] == ("row", 1, ["q_heads"])
    assert rows[layer + "mlp.down_proj.weight"] == ("row", 1, ["mlp"])
    assert rows[layer + "input_layernorm.weight"] == ("replicated", 0, [])
    assert rows["model.embed_tokens.weight"] == ("replicated", 0, [])
    assert rows["lm_head.weight"] == ("col", 0, ["vocab"])


def test_tied_embeddings_are_a_row_of_their_own(tmp_path: Path) -> None:
    """Tests that the head of a tied model is read from the embedding's tensor."""
    model = describe_model(write_llama(tmp_path, tie_word_embeddings=True))
    head = next(parameter for parameter in model.parameters if parameter.name == "lm_head.weight")
    assert head.source == "model.embed_tokens.weight"
    assert head.stage == "last"


def test_dtype_is_the_checkpoint_s_unless_told(tmp_path: Path) -> None:
    """Tests the default dtype and the override."""
    folder = write_llama(tmp_path, dtype=torch.bfloat16)
    assert describe_model(folder).dtype == "bfloat16"
    assert describe_model(folder, "float32").dtype == "float32"
    with pytest.raises(ModelError, match="int4"):
        describe_model(folder, "int4")


def test_the_digest_follows_config_and_headers(folder: Path, tmp_path: Path) -> None:
    """Tests that the digest is stable and changes with the config."""
    assert describe_model(folder).digest == describe_model(folder).digest
    assert describe_model(folder).digest != describe_model(changed(folder, tmp_path / "m", rms_norm_eps=1e-4)).digest


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token_id": 10**9}, "transformers builds no LlamaForCausalLM of it: Padding_idx must be within"),
        ({"dtype": "x"}, "is not accepted by transformers: module 'torch' has no attribute 'x'"),
        ({"dtype": [1]}, "is not accepted by transformers: "),
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supported"),
        ({"architectures": None}, "names no single architecture"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": 501}, "has shape \\(500, 64\\), config.json says \\(501, 64\\)"),
        ({"model_type": "gpt2"}, "model_type gpt2 is not that of LlamaForCausalLM"),
        ({"num_hidden_layers": 5}, "no tensor model.layers.4"),
        ({"num_key_value_heads": 3}, "kv heads|not accepted"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "rope_type dynamic is not supported",
        ),
        ({"hidden_size": "wide"}, "hidden_size .wide. is not"),
    ],
)
def test_what_is_not_served_is_refused(folder: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    """Tests that each unsupported config is one clear line."""
    with pytest.raises(ModelError, match=message) as caught:
        describe_model(changed(folder, tmp_path / "m", **config))
    assert "\n" not in caught.value.message


def test_a_folder_without_config_or_with_pickles_only(tmp_path: Path) -> None:
    """Tests the two folders people try by mistake."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        describe_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        describe_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="only pickled weights"):
        describe_model(tmp_path)


@pytest.mark.e2e
def test_the_short_process_prints_the_spec(folder: Path, tmp_path: Path) -> None:
    """Tests that the process prints what `describe_model` returns, and refuses with exit code 2 and one line."""
    command = [sys.executable, "-m", "spotserve.runtime.describe"]
    done = subprocess.run([*command, str(folder), "--dtype", "bfloat16"], capture_output=True, text=True, check=True)
    assert describe_model(folder, "bfloat16") == ModelSpec.model_validate_json(done.stdout)
    refused = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.splitlines()[0] == f"{tmp_path} has no config.json"
