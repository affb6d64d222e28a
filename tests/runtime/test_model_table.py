"""The parameter table is what transformers declares, and what is not known is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from spotserve.core.slices import max_tensor_degree, shard_bytes, stage_shard
from spotserve.core.spec import ModelSpec
from spotserve.errors import ModelError
from spotserve.runtime.model_table import describe_model, load_config
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


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.int64, "I64")])
def test_weights_that_are_no_floats_are_refused(folder: Path, tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    """Tests that a quantized weight is named and not served as if its integers were the weights."""
    name = "model.layers.1.self_attn.q_proj.weight"
    damaged = with_stored(folder, tmp_path / "m", {name: dtype})
    message = f"{damaged / 'model.safetensors'}: {name} is stored as {stored}, known: F64, F32, F16, BF16"
    for chosen in (None, "float32"):
        with pytest.raises(ModelError) as caught:
            describe_model(damaged, chosen)
        assert message == caught.value.message


def test_double_precision_is_served_as_something_else_only(folder: Path, tmp_path: Path) -> None:
    """Tests that the refusal names the stored dtype and the option, and that the option is taken."""
    double = with_stored(folder, tmp_path / "m", dict.fromkeys(load_file(folder / "model.safetensors"), torch.float64))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is stored as F64, which is not") as caught:
        describe_model(double)
    assert caught.value.hint is not None
    assert "--dtype" in caught.value.hint
    assert "float32" == describe_model(double, "float32").dtype


def with_stored(folder: Path, into: Path, dtypes: dict[str, torch.dtype]) -> Path:
    """A copy of `folder` that stores some tensors in other dtypes."""
    weights = load_file(changed(folder, into) / "model.safetensors")
    save_file(weights | {name: weights[name].to(dtype) for name, dtype in dtypes.items()}, into / "model.safetensors")
    return into


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
        (
            {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoConfig": "code.Config"}},
            "architecture OwnForCausalLM is not supported",
        ),
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, "not accepted by transformers"),
        ({"model_type": "gpt2", "auto_map": {"AutoConfig": "code.Config"}}, "model_type gpt2 is not that of"),
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


def test_code_beside_the_config_is_never_run(folder: Path, tmp_path: Path) -> None:
    """Tests that an auto_map is no reason to refuse a known architecture, and its file is not imported."""
    classes = {"AutoConfig": "own.LlamaConfig", "AutoModelForCausalLM": "own.LlamaForCausalLM"}
    other = changed(folder, tmp_path / "m", auto_map=classes)
    (other / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nfrom transformers import *\n")
    assert describe_model(other).parameters == describe_model(folder).parameters
    assert type(load_config(other)) is LlamaConfig
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "kernels-community/flash-attn", {"": "flash_attention_3"}])
def test_the_attention_that_a_config_names_is_not_loaded(folder: Path, tmp_path: Path, entry: str, value: Any) -> None:
    """Tests that such a config gives the same table: attention is ours."""
    other = changed(folder, tmp_path / "m", **{entry: value})
    assert describe_model(other).parameters == describe_model(folder).parameters


def test_a_missing_package_is_a_model_that_is_not_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that transformers asking for a package that is not installed is one clear line."""

    def build(*_: Any) -> None:
        raise ImportError("needs the package\nnone")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", build)
    with pytest.raises(ModelError, match="builds no LlamaForCausalLM of it: needs the package none"):
        describe_model(folder)


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
