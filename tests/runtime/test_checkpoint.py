"""Checkpoints are validated before anything is allocated, and read by range."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spotserve.core.slices import Slice
from spotserve.errors import ModelError
from spotserve.runtime.checkpoint import Checkpoint
from spotserve.runtime.checkpoint_header import validate_checkpoint
from spotserve.runtime.model_table import describe_model
from tests.runtime.families import FAMILIES
from tests.runtime.models import write_llama

NAME = "model.layers.1.mlp.down_proj.weight"


def write_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(start: int, stop: int, **changes: Any) -> dict[str, Any]:
    """A header entry of float32 elements."""
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]} | changes


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"\0" * 4, "has .* bytes, its header describes"),
        ({"a": entry(0, 8)}, b"\0" * 12, "has .* bytes, its header describes"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "b starts at byte"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12, "b starts at byte"),
        ({"a": entry(0, 8, shape=[3])}, b"\0" * 8, "spans 8 bytes, its shape needs 12"),
        ({"a": entry(0, 8, dtype="F8")}, b"\0" * 8, "unknown dtype 'F8'"),
        ({"a": entry(0, 8, shape=[-2])}, b"\0" * 8, "invalid shape"),
        ({"a": entry(0, 8, shape=[True, 2])}, b"\0" * 8, "invalid shape"),
        ({"a": entry(0, 8, data_offsets=[8, 0])}, b"\0" * 8, "invalid data_offsets"),
        ({"a": entry(0, 8, shape=[2**62, 4])}, b"\0" * 8, "its shape needs"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets"),
        ([], b"", "header is list"),
        (b"{nope", b"", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "duplicate key"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
    ],
)
def test_a_corrupt_file_is_refused_by_name(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    """Tests that each kind of damage is found in the header alone and the line names the file."""
    (tmp_path / "config.json").write_text("{}")
    write_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message) as caught:
        validate_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in caught.value.message


@pytest.mark.parametrize("length", [9, 2**40, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, length: int) -> None:
    """Tests that the header length is bounded before anything of that size is allocated."""
    (tmp_path / "config.json").write_text("{}")
    write_file(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(ModelError, match=f"header length {length} exceeds 2 bytes"):
        validate_checkpoint(tmp_path)


def shards(folder: Path) -> Path:
    """A checkpoint of two files and an index."""
    folder.joinpath("config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """The index file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_is_followed(tmp_path: Path) -> None:
    """Tests that tensors of several files are found, each in its own."""
    layout = validate_checkpoint(shards(tmp_path))
    assert {"a": "one.safetensors", "b": "two.safetensors"} == {
        name: tensor.file.name for name, tensor in layout.tensors.items()
    }
    with pytest.raises(ModelError, match="no tensor c"):
        layout.tensor("c")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "two.safetensors").unlink(), "two.safetensors is missing"),
        (
            lambda folder: write_index(folder, {"a": "one.safetensors", "b": "one.safetensors"}),
            "one.safetensors holds b",
        ),
        (lambda folder: write_index(folder, {"a": "one.safetensors"}), None),
        (
            lambda folder: write_index(folder, {"a": "one.safetensors", "c": "two.safetensors"}),
            "two.safetensors holds c",
        ),
        (lambda folder: write_index(folder, {"a": "../one.safetensors"}), "no safetensors file of this folder"),
        (lambda folder: write_index(folder, {}), "has no weight_map"),
        (
            lambda folder: save_file({"a": torch.ones(1), "b": torch.ones(3)}, folder / "two.safetensors"),
            "holds a, which",
        ),
    ],
)
def test_an_index_that_disagrees_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str | None
) -> None:
    """Tests missing shards, names that are not where the index says, doubles, and paths out of the folder."""
    damage(shards(tmp_path))
    if message is None:
        assert set(validate_checkpoint(tmp_path).tensors) == {"a"}
        return
    with pytest.raises(ModelError, match=message):
        validate_checkpoint(tmp_path)


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 0, 64), (0, 5, 9), (1, 16, 48), (1, 100, 176)])
def test_a_range_is_read_exactly(tmp_path: Path, dim: int, start: int, stop: int) -> None:
    """Tests values, contiguity, conversion, and that only the range's bytes are counted as read."""
    folder = write_llama(tmp_path, num_hidden_layers=2, dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")[NAME].narrow(dim, start, stop - start)
    for dtype in ("bfloat16", "float32", "float16"):
        checkpoint = Checkpoint(folder, describe_model(folder, dtype))
        got = checkpoint.read(Slice(parameter=NAME, dim=dim, start=start, stop=stop))
        assert torch.equal(expected.to(got.dtype), got)
        assert got.is_contiguous()
        assert checkpoint.bytes_read == expected.numel() * 2


GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A mixtral's tensors as transformers has them in memory: a layer's experts in two tensors."""
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        first, second, third = (
            torch.stack([tensors[f"{name}.experts.{expert}.w{number}.weight"] for expert in range(6)])
            for number in (1, 2, 3)
        )
        result[f"{name}.experts.gate_up_proj"] = torch.cat([first, third], dim=1)
        result[f"{name}.experts.down_proj"] = second
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in result.items()}


@pytest.mark.parametrize("is_fused", [False, True])
def test_experts_are_read_by_range(tmp_path: Path, is_fused: bool) -> None:
    """Tests columns of all experts, of gate, up, both and down, from either form on disk, and the bytes that cost."""
    folder = FAMILIES["mixtral"](tmp_path, num_hidden_layers=2, dtype=torch.bfloat16)
    expected = fused(load_file(folder / "model.safetensors"))
    if is_fused:
        save_file(expected, folder / "model.safetensors")
    model = describe_model(folder, "float32")
    runs = [(0, 152), (16, 48), (152, 304), (200, 304), (100, 200), (0, 304)]
    for name, dim, runs_ in ((GATE_UP, 1, runs), (DOWN, 2, runs[:2]), (DOWN, 0, [(2, 5)])):
        for start, stop in runs_:
            checkpoint = Checkpoint(folder, model)
            got = checkpoint.read(Slice(parameter=name, dim=dim, start=start, stop=stop))
            wanted = expected[name].narrow(dim, start, stop - start)
            assert torch.equal(wanted.float(), got)
            assert got.is_contiguous()
            assert checkpoint.bytes_read == wanted.numel() * 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [(None, "no tensor .*experts.3.w3"), ((152, 32), r"experts.3.w3.weight has shape \(152, 32\)")],
)
def test_experts_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...] | None, message: str) -> None:
    """Tests one matrix of one expert that is missing, or has another shape than config.json says."""
    folder = FAMILIES["mixtral"](tmp_path, num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    del tensors[name]
    save_file(tensors if shape is None else tensors | {name: torch.zeros(shape)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        describe_model(folder)


def test_a_misaligned_tensor_is_read(tmp_path: Path) -> None:
    """Tests that a header whose length is odd, which the format allows, is no obstacle."""
    folder = write_llama(tmp_path, num_hidden_layers=1)
    model = describe_model(folder)
    expected = load_file(folder / "model.safetensors")["model.norm.weight"].clone()
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    write_file(folder / "model.safetensors", header, raw[8 + length :])
    assert torch.equal(expected, Checkpoint(folder, model).read_slice("model.norm.weight", 0, 0, 64))


def test_validation_needs_no_torch() -> None:
    """Tests that the coordinator can validate a folder without importing torch."""
    code = "import sys, spotserve.runtime.checkpoint_header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
