"""Every family: the tokens of transformers in float32, our own bits for every cut, and features that count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spotserve.core.slices import max_tensor_degree, parameter_slices
from spotserve.errors import InvariantError, ModelError
from spotserve.runtime import stage_model
from spotserve.runtime.architecture import ARCHITECTURES
from spotserve.runtime.checkpoint import Checkpoint
from spotserve.runtime.family import FAMILIES as SERVED
from spotserve.runtime.family import KINDS, layer_windows, model_parts
from spotserve.runtime.model_table import describe_model
from tests.runtime.families import FAMILIES, WINDOW
from tests.runtime.models import LocalReplica, key_of
from tests.transformers_reference import greedy_tokens, reference_model

NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt2")
"""The dense families that are promised; the others come for free and are tested by the slow grids."""
DEGREES = [(1, 1), (2, 1), (1, 3), (1, 2), (2, 3)]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LENGTHS = (5, 16, 33, 47)
"""Prompts around the edges of KV blocks and windows."""


def prompts() -> list[list[int]]:
    """Random token ids, by length."""
    return [
        torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS
    ]


class Folders:
    """Model folders, written when first asked for."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def of(self, name: str, **changes: Any) -> Path:
        """The folder of a family's model, or of one with another config and the same weights."""
        folder = self._base / "-".join([name, *(f"{entry}={value}" for entry, value in changes.items())])
        return folder if folder.exists() else FAMILIES[name](folder, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Shared by the tests of this module."""
    return Folders(tmp_path_factory.mktemp("families"))


def reference_tokens(folder: Path, num_tokens: int) -> list[list[int]]:
    """Greedy tokens of `generate` after each prompt."""
    model = reference_model(folder)
    return [greedy_tokens(model, ids, num_tokens) for ids in prompts()]


def replica_tokens(replica: LocalReplica, num_tokens: int) -> list[list[int]]:
    """Greedy tokens after each prompt, prefilled in chunks and decoded together."""
    tokens = [[int(replica.prefill(key_of(index), ids, chunk=24).argmax())] for index, ids in enumerate(prompts())]
    while len(tokens[0]) < num_tokens:
        logits = replica.decode({key_of(index): each[-1] for index, each in enumerate(tokens)})
        for each, row in zip(tokens, logits, strict=True):
            each.append(int(row.argmax()))
    return tokens


def check_tokens(folder: Path, degrees: Sequence[tuple[int, int]], num_tokens: int) -> None:
    """Compare with transformers at each (P, M)."""
    expected = reference_tokens(folder, num_tokens)
    assert sum(len(set(each)) for each in expected) > num_tokens / 2
    model = describe_model(folder)
    for pipeline, tensor in degrees:
        tensor = min(tensor, max_tensor_degree(model))
        replica = LocalReplica(folder, model, pipeline=pipeline, tensor=tensor)
        assert expected == replica_tokens(replica, num_tokens), f"P={pipeline} M={tensor}"


@pytest.mark.parametrize("name", NAMED)
def test_float32_tokens_are_those_of_transformers(name: str, folders: Folders) -> None:
    """Tests greedy tokens of four prompts against `generate`, for cuts along and across the layers."""
    check_tokens(folders.of(name), DEGREES, 10)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"sliding_window": 512}),
        ("gpt_neox", {"num_key_value_heads": 2}),
        ("gemma3", {"attn_logit_softcapping": 0.5}),
    ],
)
def test_entries_that_transformers_ignores_change_nothing(name: str, config: dict[str, Any], folders: Folders) -> None:
    """Tests tokens of configs that have an entry of another family, and of one whose entry has no effect."""
    check_tokens(folders.of(name, **config), [(2, 2)], 10)


@pytest.mark.parametrize(("name", "stored"), [("qwen3", "lm_head.weight"), ("gpt_neox", "embed_out.weight")])
def test_a_stored_head_is_used_though_the_config_ties_it(name: str, stored: str, tmp_path: Path) -> None:
    """Tests tokens of a checkpoint whose head is another than its embedding, against its config."""
    folder = FAMILIES[name](tmp_path / "m", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    [embedding] = (tensor for key, tensor in tensors.items() if "embed_tokens" in key or "embed_in" in key)
    save_file(tensors | {stored: embedding.flip(0).contiguous()}, file, metadata={"format": "pt"})
    check_tokens(folder, [(2, 2)], 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_tokens_of_every_family(name: str, folders: Folders) -> None:
    """Tests longer texts of all families, up to as many ranks as there are heads, stage by stage and mixed."""
    check_tokens(folders.of(name), [*DEGREES, (4, 1), (3, 4), (1, 8)], 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_fast_mode_tokens_are_those_of_transformers(name: str, folders: Folders) -> None:
    """Tests that the mode without bit guarantees still computes every family, whole and cut."""
    expected = reference_tokens(folders.of(name), 10)
    for pipeline, tensor in ((1, 1), (2, 3)):
        replica = LocalReplica(folders.of(name), pipeline=pipeline, tensor=tensor, deterministic=False)
        assert expected == replica_tokens(replica, 10)


def logits_history(replica: LocalReplica, *, chunk: int, num_decoded: int = 3) -> list[Tensor]:
    """Logits after each prompt and of some forced decode steps together."""
    rows = [replica.prefill(key_of(index), ids, chunk=chunk) for index, ids in enumerate(prompts())]
    for step in range(num_decoded):
        rows += replica.decode({key_of(index): 7 * step + index for index in range(len(LENGTHS))}).unbind()
    return rows


def recomputed(replica: LocalReplica, *, chunk: int, num_decoded: int = 3) -> list[Tensor]:
    """Logits of the last of those decode steps from a prefill of all that came before."""
    return [
        replica.prefill(key_of(index + 10), ids + [7 * step + index for step in range(num_decoded)], chunk=chunk)
        for index, ids in enumerate(prompts())
    ]


def same_bits(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Bit equality of logits."""
    return all(torch.equal(*pair) for pair in zip(expected, actual, strict=True))


def check_bits(folder: Path, dtype: str, degrees: Sequence[tuple[int, int, int]], **options: Any) -> None:
    """Compare each (P, M, chunk) with (1, 1), then and after a recompute."""
    model = describe_model(folder, dtype)
    expected = logits_history(LocalReplica(folder, model, **options), chunk=64)
    for pipeline, tensor, chunk in degrees:
        tensor = min(tensor, max_tensor_degree(model))
        replica = LocalReplica(folder, model, pipeline=pipeline, tensor=tensor, **options)
        assert same_bits(expected, logits_history(replica, chunk=chunk)), f"P={pipeline} M={tensor} chunk={chunk}"
        assert same_bits(expected[-len(LENGTHS) :], recomputed(replica, chunk=11)), (
            f"recomputed P={pipeline} M={tensor}"
        )


@pytest.mark.parametrize("name", NAMED)
def test_bfloat16_bits_depend_on_nothing_else(name: str, folders: Folders) -> None:
    """Tests logits for cuts, chunks and recompute against one rank that prefilled at once."""
    check_bits(folders.of(name), "bfloat16", [(1, 1, 7), (2, 3, 16)])


def test_float16_bits_depend_on_nothing_else(folders: Folders) -> None:
    """Tests the third type that is served."""
    check_bits(folders.of("llama"), "float16", [(1, 1, 7), (2, 3, 16)])


@pytest.mark.slow
@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bits_of_every_family(name: str, dtype: str, prepacked: bool, folders: Folders) -> None:
    """Tests all families on more cuts, in both types, with plain and prepacked linears."""
    degrees = [(1, 1, 1), (2, 1, 64), (1, 2, 16), (1, 3, 7), (3, 4, 48), (1, 8, 64)]
    check_bits(folders.of(name), dtype, degrees, prepacked=prepacked)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere2"])
def test_logits_are_those_of_transformers(name: str, folders: Folders) -> None:
    """Tests what no greedy token shows: caps, factors and divisors of the logits themselves."""
    folder = folders.of(name)
    ids = prompts()[2]
    with torch.inference_mode():
        expected = reference_model(folder)(torch.tensor([ids])).logits[0, -1]
    actual = LocalReplica(folder, tensor=2).prefill(key_of(0), ids, chunk=24)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"max_window_layers": 4}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 512}),
        ("gemma3", {"sliding_window": 512}),
        ("phi3", {"sliding_window": None}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_the_hard_feature_counts(name: str, off: dict[str, Any], folders: Folders) -> None:
    """Tests that without it transformers generates other tokens, so that a test of tokens sees whether we have it."""
    assert reference_tokens(folders.of(name), 16) != reference_tokens(folders.of(name, **off), 16)


@pytest.mark.parametrize(("name", "leaf"), [("qwen3", "q_norm"), ("gemma3", "k_norm")])
def test_norms_of_heads_count(name: str, leaf: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that tokens change when norms of query or key are left out."""
    folder = folders.of(name)
    expected = replica_tokens(LocalReplica(folder), 16)
    replica = LocalReplica(folder)
    for layer in replica.stages[0][0]._layers:
        setattr(layer.self_attn, leaf, nn.Identity())
    assert expected != replica_tokens(replica, 16)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_both_rotary_bases_count(kind: str, folders: Folders) -> None:
    """Tests that gemma3's layers of either type need the table of their own base."""
    folder = folders.of("gemma3")
    replica = LocalReplica(folder)
    tables = replica.stages[0][0]._rotary
    tables["sliding_attention" if kind == "full_attention" else "full_attention"] = tables[kind]
    assert reference_tokens(folder, 16) != replica_tokens(replica, 16)


def test_a_window_longer_than_a_kernel_s_block_of_keys(folders: Folders) -> None:
    """Tests rows whose first hundreds of keys are all masked: no kernel may make them NaN or use them."""
    folder = folders.of("mistral", max_position_embeddings=2048)
    ids = torch.randint(3, 500, (1300,), generator=torch.Generator().manual_seed(9)).tolist()
    with torch.inference_mode():
        expected = reference_model(folder)(torch.tensor([ids])).logits[0, -1]
    for dtype, places in (("float32", 1e-3), ("bfloat16", 1.0)):
        actual = LocalReplica(folder, dtype=dtype).prefill(key_of(0), ids, chunk=500)
        torch.testing.assert_close(actual, expected, atol=places, rtol=0.1)
        assert same_bits([actual], [LocalReplica(folder, dtype=dtype, tensor=2).prefill(key_of(0), ids, chunk=999)])


def test_activations_beside_each_other_need_to_be_contiguous(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the bits of a packed gate and up depend on the cut when activations read a part of a wider tensor."""

    class Strided(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self._activation = activation

        def forward(self, columns: Tensor) -> Any:
            return self._activation(columns)

    folder = folders.of("glm")
    monkeypatch.setattr(stage_model, "WideActivation", Strided)
    expected = logits_history(LocalReplica(folder), chunk=64)
    assert not all(same_bits(expected, logits_history(LocalReplica(folder, tensor=m), chunk=64)) for m in (2, 3, 8))


def test_every_style_and_module_of_the_plans_is_known() -> None:
    """Tests the plans of the installed transformers: a style or module renamed by an update is noticed."""
    for architecture in ARCHITECTURES:
        model_class = getattr(transformers, architecture)
        styles = set((getattr(model_class.config_class, "base_model_tp_plan", None) or {}).values())
        styles |= set((model_class._tp_plan or {}).values())
        assert styles - set(KINDS) == set(), architecture
        parts = model_parts(architecture, model_class)
        assert any("mlp" in split.axes or "experts" in split.axes for split in parts.splits.values())


def test_every_served_architecture_has_a_writer(folders: Folders) -> None:
    """Tests that no architecture is served untested."""
    tested = {writer.keywords["architecture"] for writer in FAMILIES.values()}  # type: ignore[attr-defined]
    assert tested == set(SERVED)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_covers_the_model(name: str, folders: Folders) -> None:
    """Tests that every parameter is in the table once, with ranges of all ranks that cover it."""
    folder = folders.of(name)
    model = describe_model(folder)
    for parameter in model.parameters:
        for tensor in range(1, max_tensor_degree(model) + 1):
            owned = set()
            for rank in range(tensor):
                for start, stop in parameter_slices(model, parameter, tensor=tensor, rank=rank):
                    owned |= set(range(start, stop))
            assert owned == set(range(parameter.shape[parameter.dim])), parameter.name


def test_names_on_disk(folders: Folders) -> None:
    """Tests that names which differ on disk are found: another module's, one without prefix, a tied one."""
    sources = {
        name: {each.name: each.source for each in describe_model(folders.of(name)).parameters}
        for name in ("gpt_neox", "gpt2", "opt")
    }
    assert sources["gpt_neox"]["lm_head.weight"] == "embed_out.weight"
    assert sources["gpt2"]["transformer.h.{layer}.attn.c_attn.weight"] == "h.{layer}.attn.c_attn.weight"
    assert sources["gpt2"]["lm_head.weight"] == "wte.weight"
    assert sources["opt"]["lm_head.weight"] == "model.decoder.embed_tokens.weight"


def test_transposed_weights_are_read_by_rows_and_columns(folders: Folders) -> None:
    """Tests that a range of a transposed weight is the range of the turned tensor, and reads no more than it."""
    folder = folders.of("gpt2")
    model = describe_model(folder)
    checkpoint = Checkpoint(folder, model)
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder).transformer.h[1].attn
    for module, dim in (("c_attn", 0), ("c_proj", 1)):
        name = f"transformer.h.1.attn.{module}.weight"
        whole = getattr(stored, module).weight.t()
        before = checkpoint.bytes_read
        piece = checkpoint.read(stage_model.Slice(parameter=name, dim=dim, start=32, stop=96))
        assert torch.equal(piece, whole.narrow(dim, 32, 64))
        assert checkpoint.bytes_read - before == piece.numel() * 4


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gemma3", {"layer_types": ["chunked_attention"] + ["full_attention"] * 4}, "chunked_attention|not accepted"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"sliding_window": None}, "sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0 is not a whole number"),
        ("phi3", {"sliding_window": False}, "sliding_window"),
        ("llama", {"sliding_window": 511}, "has sliding_window 511, which a llama model does not know"),
        ("llama", {"attention_chunk_size": 8}, "has attention_chunk_size 8, which a llama model"),
        ("llama", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters by layer type, and a llama model"),
        ("llama", {"rope_parameters": {"full_attention": ROPE, "rope_theta": 1e4}}, "rope_parameters"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "model_type ministral is not that of"),
        ("phi3", {"layer_types": ["full_attention"] * 4}, "has layer_types, which"),
        ("opt", {"word_embed_proj_dim": 64}, "project_|shape"),
        ("llama", {"hidden_act": "wave"}, "LlamaForCausalLM"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
        ("gpt2", {"add_cross_attention": True}, "crossattention"),
    ],
)
def test_features_that_are_not_served_are_refused_by_name(
    name: str, config: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    """Tests that each unsupported entry of a config is one clear line."""
    folder = folders.of(name)
    content = json.loads((folder / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=message) as caught:
        describe_model(tmp_path)
    assert "\n" not in caught.value.message


def test_a_list_of_norms_is_refused(tmp_path: Path) -> None:
    """Tests that one norm per head, each as wide as a norm over one head, is not taken for that."""
    with pytest.raises(ModelError, match=r"q_layernorm\.norms\.0\.weight .* in no parallel plan"):
        describe_model(FAMILIES["stablelm"](tmp_path, qk_layernorm=True))


def test_an_attention_option_that_is_not_known_is_refused(folders: Folders) -> None:
    """Tests that a layer which hands its attention more than we know of, such as sinks, does not run without it."""
    replica = LocalReplica(folders.of("llama"))
    attention = replica.stages[0][0]._layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **given: forward(*args, s_aux=torch.zeros(8), **given)
    with pytest.raises(InvariantError, match="s_aux"):
        replica.prefill(key_of(0), [1, 2, 3], chunk=8)


def test_a_window_that_no_layer_has_is_no_exact_model(folders: Folders) -> None:
    """Tests why it is refused: transformers generates other tokens with its KV cache than without."""
    model = reference_model(folders.of("llama", sliding_window=4))
    ids = torch.tensor([prompts()[2]])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, recomputed = (model.generate(ids, use_cache=each, **options) for each in (True, False))
    assert not torch.equal(cached, recomputed)


def test_windows_by_layer(folders: Folders) -> None:
    """Tests which layers have windows."""
    by_name = {
        name: layer_windows(transformers.AutoConfig.from_pretrained(folders.of(name)))
        for name in ("llama", "mistral", "qwen2", "gemma3")
    }
    assert by_name["llama"] == (None,) * 4
    assert by_name["mistral"] == (WINDOW,) * 4
    assert by_name["qwen2"] == (None, WINDOW, WINDOW, WINDOW)
    assert by_name["gemma3"] == (WINDOW, None, WINDOW, WINDOW, WINDOW)
