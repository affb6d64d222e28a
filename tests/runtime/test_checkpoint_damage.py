"""Damaged checkpoints: whatever is wrong with a folder, it is refused with one clear line, or it is a valid model."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotserve.errors import ModelError
from spotserve.runtime.checkpoint_header import (
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    CheckpointLayout,
    validate_checkpoint,
)

NUM_MUTATIONS = 2000
CONFIG = {"num_hidden_layers": 2, "hidden_size": 4, "vocab_size": 10, "num_key_value_heads": None}


def safetensors(tensors: dict[str, list[int]], **metadata: str) -> bytes:
    """A small valid file of float32 tensors of zeros."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, shape in tensors.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(position)


VALID = safetensors({"a.weight": [3, 2], "b.weight": [], "empty": [0, 5], "c.weight": [4]}, format="pt")


def write(folder: Path, content: bytes = VALID, config: Any = CONFIG) -> Path:
    """A folder of one file."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(content)
    return folder


def assert_covers(layout: CheckpointLayout) -> None:
    """Every byte after the header belongs to exactly one tensor, and every tensor has the bytes of its shape."""
    path = layout.folder / "model.safetensors"
    raw = path.read_bytes()
    position = 8 + int.from_bytes(raw[:8], "little")
    for tensor in sorted(layout.tensors.values(), key=lambda each: (each.start, each.stop)):
        assert (position, path) == (tensor.start, tensor.file)
        assert tensor.name.isprintable()
        position = tensor.stop
    assert len(raw) == position


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A file with bytes changed, cut off, doubled, dropped or moved, mostly in its header."""
    data = bytearray(content)
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(min(header_end, len(data)) if rng.random() < 0.8 else len(data)) if data else 0
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice(b'0123456789-eE.[]{}",:\\\x00\xff')
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 9)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case _:
                data[:8] = struct.pack("<Q", rng.choice((0, 1, header_end, len(data), 2**31, 2**63, 2**64 - 1)))
    return bytes(data)


def test_no_mutation_gives_anything_but_a_refusal_or_a_model(tmp_path: Path, rng: random.Random) -> None:
    """Tests thousands of damaged files: each is refused by name, or its tensors cover it without gap and overlap."""
    write(tmp_path)
    assert_covers(validate_checkpoint(tmp_path))
    accepted = 0
    told: set[bool] = set()
    for _ in range(NUM_MUTATIONS):
        content = mutated(rng, VALID)
        (tmp_path / "model.safetensors").write_bytes(content)
        try:
            layout = validate_checkpoint(tmp_path)
        except ModelError as error:
            told.add(error.message.startswith(str(tmp_path / "model.safetensors")))
        else:
            accepted += 1
            assert_covers(layout)
    assert {True} == told
    assert 0 < accepted < NUM_MUTATIONS / 2  # A flipped weight is not the header's to find; the manifest finds it.


@pytest.mark.parametrize(
    "name",
    ["a\nb", "a\x1b[31mb", "../a", "a/b", "a\\b", "", "a" * 513, "\udc80", "a\u202eb"],
    ids=["newline", "escape", "parent", "slash", "backslash", "empty", "long", "surrogate", "bidi"],
)
def test_a_name_that_could_lie_is_refused(tmp_path: Path, name: str) -> None:
    """Tests names that would break a line, move a cursor, or be taken for a path."""
    with pytest.raises(ModelError, match="is no name of a tensor") as caught:
        validate_checkpoint(write(tmp_path, safetensors({name: [2]})))
    assert caught.value.message.isprintable()


def index_of(folder: Path, content: str, *, num_bytes: int | None = None) -> None:
    """An index with this text; with `num_bytes` a sparse file that long, without a byte on the disk."""
    path = folder / "model.safetensors.index.json"
    path.write_text(content)
    if num_bytes is not None:
        os.truncate(path, num_bytes)


def as_pipe(name: str) -> Callable[[Path], None]:
    """A FIFO in place of a file: to open it to read would wait for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def as_folder(folder: Path) -> None:
    """A folder in place of the weights."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def as_link(target: str) -> Callable[[Path], None]:
    """A link in place of the weights."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    """Other values in config.json."""
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes})) and None


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (as_pipe("model.safetensors"), r"model\.safetensors is not a regular file"),
    "pipe as config": (as_pipe("config.json"), r"config\.json is not a regular file"),
    "pipe as index": (as_pipe("model.safetensors.index.json"), r"index\.json is not a regular file"),
    "folder": (as_folder, r"model\.safetensors is not a regular file"),
    "device": (as_link("/dev/zero"), r"model\.safetensors is not a regular file"),
    "link to nowhere": (as_link("../blobs/gone"), r"model\.safetensors is missing"),
    "link to itself": (as_link("model.safetensors"), r"model\.safetensors cannot be read: Too many levels"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated: 0 bytes"),
    "metadata": (lambda folder: write(folder, b"\x16" + bytes(7) + b'{"__metadata__":{"":1}}'[:22]), "not valid JSON"),
    "metadata of numbers": (
        lambda folder: write(folder, b"\x17" + bytes(7) + b'{"__metadata__":{"":1}}'),
        "__metadata__ is not an object of texts",
    ),
    "huge number": (
        lambda folder: write(folder, struct.pack("<Q", 5007) + b'{"a":1' + b"0" * 5000 + b"}"),
        "header is not valid JSON",
    ),
    "huge config": (
        lambda folder: (folder / "config.json").write_text(" " * MAX_CONFIG_BYTES + "{}"),
        f"config.json has more than {MAX_CONFIG_BYTES} bytes",
    ),
    "deep config": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 100_000),
        r"config\.json is not valid JSON",
    ),
    "config of a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is list"),
    "huge index": (
        lambda folder: index_of(folder, "", num_bytes=MAX_INDEX_BYTES + 1),
        f"index.json has more than {MAX_INDEX_BYTES} bytes",
    ),
    "layers without end": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers 1000000000 is not a whole number from 1",
    ),
    "more layers than tensors": (config(num_hidden_layers=5), "num_hidden_layers 5 exceeds the 4 tensors"),
    "negative layers": (config(num_hidden_layers=-1), "num_hidden_layers -1 is not a whole number from 1"),
    "no layers": (config(n_layer=0), "n_layer 0 is not a whole number from 1"),
    "layers as text": (config(num_hidden_layers="2"), "num_hidden_layers '2' is not a whole number"),
    "layers as a truth": (config(num_hidden_layers=True), "num_hidden_layers True is not a whole number"),
    "half a head": (config(num_attention_heads=1.5), "num_attention_heads 1.5 is not a whole number"),
    "width in an inner config": (config(text_config={"hidden_size": 10**12}), "hidden_size 1000000000000 is not"),
    "index to a folder above": (
        lambda folder: index_of(folder, '{"weight_map": {"a": "../x.safetensors"}}'),
        "is no safetensors file of this folder",
    ),
    "index with an escape": (
        lambda folder: index_of(folder, '{"weight_map": {"a": "\\u001b[2J.safetensors"}}'),
        "is no safetensors file of this folder",
    ),
    "index with a zero": (
        lambda folder: index_of(folder, '{"weight_map": {"a": "x\\u0000.safetensors"}}'),
        "is no safetensors file of this folder",
    ),
    "index with a strange name": (
        lambda folder: index_of(folder, '{"weight_map": {"a\\n": "model.safetensors"}}'),
        "is no name of a tensor",
    ),
    "index of numbers": (lambda folder: index_of(folder, '{"weight_map": {"a": 1}}'), "which is no safetensors file"),
    "index of another shard": (
        lambda folder: index_of(folder, '{"weight_map": {"a": "y.safetensors"}}'),
        r"y\.safetensors is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """Tests that each kind of damage is one printable line that names the file, at once."""
    write(tmp_path)
    damage, message = DAMAGES[case]
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        validate_checkpoint(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.message.isprintable()


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """Tests that a folder of links, as the hub's cache makes them, is a model."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs")
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_covers(validate_checkpoint(tmp_path / "snapshot"))
