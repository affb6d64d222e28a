"""The manifest: every byte of a served file is hashed once, and a changed one is found and named."""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from spotserve.app import BUILTIN_MODEL
from spotserve.core.slices import Slice
from spotserve.core.wire import ModelFile
from spotserve.errors import ModelError
from spotserve.runtime import model_manifest
from spotserve.runtime.checkpoint import Checkpoint
from spotserve.runtime.checkpoint_header import validate_checkpoint
from spotserve.runtime.model_manifest import ModelManifest, check_unchanged, hashed, resolve_manifest
from spotserve.runtime.model_table import describe_model
from tests.runtime.models import write_llama
from tests.runtime.test_model_source import Told

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of one's own."""
    return Path(shutil.copytree(BUILTIN_MODEL, tmp_path / "model"))


def flip(path: Path, *, keep_mtime: bool = False) -> None:
    """Change one bit of the last weight."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    if keep_mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def resolve(folder: Path, *, hash_again: bool = False) -> tuple[ModelManifest, int]:
    """The manifest of a folder and how many bytes were hashed for it."""
    told = Told()
    cache = folder.parent / "cache"
    found = resolve_manifest(validate_checkpoint(folder), cache=cache, progress=told, hash_again=hash_again)
    return found, told.lines[-1][1] if told.lines else 0


def test_every_file_is_hashed_once(folder: Path) -> None:
    """Tests the hashes, that the bytes are told, that a second start reads nothing, and that it can be made to."""
    found, num_bytes = resolve(folder)
    files = {path.name: path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
    assert {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == {
        file.name: file.sha256 for file in found.files
    }
    assert num_bytes == sum(path.stat().st_size for path in files.values())
    assert (found, 0) == resolve(folder)
    assert (found, num_bytes) == resolve(folder, hash_again=True)


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_flipped_bit_between_two_starts_is_found(folder: Path, keep_mtime: bool) -> None:
    """Tests that only the changed file is read again, even if its mtime was put back, and is named with both hashes."""
    before, _ = resolve(folder)
    flip(folder / WEIGHTS, keep_mtime=keep_mtime)
    after, num_bytes = resolve(folder)
    assert num_bytes == (folder / WEIGHTS).stat().st_size
    expected, found = (next(file.sha256 for file in each.files if file.name == WEIGHTS) for each in (before, after))
    assert before.model_digest == after.model_digest  # Of the headers, which a weight's bit is not in.
    with pytest.raises(ModelError) as caught:
        check_unchanged(before, after, folder)
    assert f"{folder / WEIGHTS} has sha256 {found}, but {expected} was served before" == caught.value.message
    check_unchanged(None, after, folder)
    check_unchanged(before.model_copy(update={"model_digest": "another model's"}), after, folder)


def test_a_checksum_file_is_held_to(folder: Path) -> None:
    """Tests that SHA256SUMS finds a flip at the first start, and that a line that is none is refused."""
    sums = folder / "SHA256SUMS"
    files = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"]
    sums.write_text("".join(f"{sha256(path.read_bytes()).hexdigest()} *{path.name}\n" for path in files))
    resolve(folder)
    flip(folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"model\.safetensors has sha256 \w{64}, but SHA256SUMS says \w{64}"):
        resolve(folder)
    sums.write_text("model.safetensors is fine\n")
    with pytest.raises(ModelError, match="SHA256SUMS: line 1 is no checksum"):
        resolve(folder)


def test_a_link_to_itself_beside_the_model_is_nothing(folder: Path) -> None:
    """Tests that a broken link that nothing is served from does not stop a start."""
    (folder / "notes").symlink_to("notes")
    assert resolve(folder)[0].files


def test_a_file_that_changes_while_it_is_read_is_refused(folder: Path) -> None:
    """Tests that a download that is still under way is not taken for a model."""
    path = folder / WEIGHTS
    with pytest.raises(ModelError, match="changed while it was read"):
        hashed(path, lambda num_bytes: flip(path))


def test_a_worker_believes_only_the_very_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a worker reads the coordinator's own file unhashed, hashes a copy, and refuses a bent one."""
    folder = write_llama(tmp_path / "model", num_hidden_layers=1)
    model = describe_model(folder)
    known = hashed(folder / WEIGHTS)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    hashes: list[object] = []
    real = model_manifest.sha256_of

    def counted(file: object, *more: object) -> str:
        hashes.append(file)
        return real(file, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(model_manifest, "sha256_of", counted)

    def read(place: Path, file: ModelFile) -> None:
        Checkpoint(place, model, files=(file,)).read(Slice(parameter=NORM, dim=0, start=0, stop=64))

    read(folder, known)
    assert [] == hashes
    read(folder, known.model_copy(update={"identity": None}))
    read(copy, known)
    assert 2 == len(hashes)
    flip(copy / WEIGHTS, keep_mtime=True)
    with pytest.raises(ModelError, match=r"copy/model\.safetensors has sha256 \w{64}, expected \w{64}"):
        read(copy, known)
    with pytest.raises(ModelError, match=r"has \d+ bytes, expected \d+"):
        read(folder, known.model_copy(update={"size_bytes": known.size_bytes + 1}))
