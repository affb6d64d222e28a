"""The SHA-256 of every file that a model is served from, resolved once by the coordinator and told to every worker.

A file is hashed when it is first met and never again while device, inode, size, mtime and ctime stay. So a second start
is instant, and still finds what was written between two starts, for nobody can put the last of them back. A
worker that opens the very same file believes the coordinator; one that sees another file under that name, as on another
machine, hashes it before it reads a weight. See docs/decisions/0009-model-manifest.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.frozen import Frozen
from spotserve.core.ports import Progress
from spotserve.core.wire import FileIdentity, ModelFile
from spotserve.errors import ModelError
from spotserve.runtime.checkpoint_header import (
    CONFIG_NAME,
    INDEX_NAME,
    TEXT_FILES,
    CheckpointLayout,
    entries_of,
    open_regular,
    read_bounded,
)
from spotserve.runtime.profiles import write_whole

CHUNK_BYTES = 1 << 20
SUMS_NAME = "SHA256SUMS"
MAX_SUMS_BYTES = 1_000_000
SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
BLOB_NAME = re.compile(r"[0-9a-f]{64}")
"""How the hub's cache names the content of a large file: its SHA-256."""

F = TypeVar("F", bound=Frozen)
D = TypeVar("D")


class ModelManifest(Frozen):
    """The files of one model."""

    format_version: Literal["0.1"] = "0.1"
    model_digest: str
    files: tuple[ModelFile, ...]


class KnownFiles(Frozen):
    """What was hashed in one folder before."""

    format_version: Literal["0.1"] = "0.1"
    files: tuple[ModelFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Expectation:
    """A SHA-256 that somebody else says a file has."""

    sha256: str
    says: str


def resolve_manifest(
    layout: CheckpointLayout, *, cache: Path, progress: Progress, hash_again: bool = False
) -> ModelManifest:
    """The manifest of a checked model folder; what is not known from before is hashed.

    Args:
        layout: the folder's files.
        cache: the folder that keeps what was hashed before.
        progress: told the bytes.
        hash_again: believe nothing from before.

    Raises:
        ModelError: a file is not what the hub or the folder's own SHA256SUMS says, or it changes meanwhile.
    """
    folder = layout.folder
    kept_path = cache / f"files-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
    kept = {} if hash_again else {file.name: file for file in _read(KnownFiles, kept_path, KnownFiles()).files}
    expected = expectations(folder)
    names = served_files(layout)
    known = {name: kept[name] for name in names if name in kept and _is_still(folder / name, kept[name])}
    total = sum((folder / name).stat().st_size for name in names if name not in known)
    files: list[ModelFile] = []
    done = 0
    for name in names:
        file = known.get(name)
        if file is None:
            file = hashed(folder / name, _counting(progress, done, total))
            done += file.size_bytes
        _check_expected(folder / name, file, expected.get(name))
        files.append(file)
    progress.end()
    if done:
        with contextlib.suppress(OSError):  # Unwritable: the next start hashes again.
            write_whole(kept_path, canonical_json(KnownFiles(files=tuple(files))))
    return ModelManifest(model_digest=layout.digest, files=tuple(files))


def served_files(layout: CheckpointLayout) -> list[str]:
    """The names of the files that are read to serve a folder."""
    names = {header.file.name for header in layout.tensors.values()} | {CONFIG_NAME}
    return sorted(names | {name for name in (INDEX_NAME, *TEXT_FILES) if (layout.folder / name).is_file()})


def hashed(path: Path, count: Callable[[int], None] = lambda num_bytes: None) -> ModelFile:
    """A file with its SHA-256 and what tells it from any other. Raises ModelError when it changes meanwhile."""
    with open_regular(path) as file:
        before = identity_of(file)
        sha256 = sha256_of(file, count)
        if identity_of(file) != before:
            raise ModelError(f"{path} changed while it was read", hint="start when its download is complete")
        return ModelFile(name=path.name, size_bytes=os.fstat(file.fileno()).st_size, sha256=sha256, identity=before)


def sha256_of(file: BinaryIO, count: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The SHA-256 of an open file from its start, in hexadecimal; `count` is told the bytes so far."""
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES)), 0
    file.seek(0)
    while num_bytes := file.readinto(buffer):  # type: ignore[attr-defined]  # every file opened for reading bytes has it
        digest.update(buffer[:num_bytes])
        done += num_bytes
        count(done)
    return digest.hexdigest()


def identity_of(file: BinaryIO) -> FileIdentity:
    """What changes when a file on this machine is written to, replaced or another one."""
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def verify_open_file(file: BinaryIO, path: Path, known: ModelFile) -> None:
    """Check that an open file is the one the coordinator hashed, by hashing it unless it is that very file.

    Raises:
        ModelError: it is another.
    """
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != known.size_bytes:
        raise ModelError(f"{path} has {size_bytes} bytes, expected {known.size_bytes}")
    if known.identity != identity_of(file) and (found := sha256_of(file)) != known.sha256:
        raise ModelError(f"{path} has sha256 {found}, expected {known.sha256}")


def check_unchanged(before: ModelManifest | None, now: ModelManifest, folder: Path) -> None:
    """Refuse weights that differ from those the same state dir served before: only their bytes can tell them apart.

    Raises:
        ModelError: a file of the same name and layout has other bytes.
    """
    if before is None or before.model_digest != now.model_digest:
        return
    hashes = {file.name: file.sha256 for file in before.files}
    for file in now.files:
        expected = hashes.get(file.name, file.sha256)
        if file.name.endswith(".safetensors") and file.sha256 != expected:
            raise ModelError(
                f"{folder / file.name} has sha256 {file.sha256}, but {expected} was served before",
                hint="download it again; start with --fresh if it was replaced on purpose",
            )


def read_manifest(path: Path) -> ModelManifest | None:
    """The manifest that a daemon left; None when there is none, or it is of another version."""
    return _read(ModelManifest, path, None)


def expectations(folder: Path) -> dict[str, Expectation]:
    """File name to the SHA-256 that the hub's cache or the folder's SHA256SUMS says it has."""
    found: dict[str, Expectation] = {}
    for path in entries_of(folder):
        # Not `Path.resolve`, which raises where a link leads to itself, be it one that nothing is served from.
        blob = Path(os.path.realpath(path))
        if path.is_symlink() and blob.parent.name == "blobs" and BLOB_NAME.fullmatch(blob.name):
            found[path.name] = Expectation(blob.name, "the hub")
    sums = folder / SUMS_NAME
    if not os.path.lexists(sums):
        return found
    for number, line in enumerate(read_bounded(sums, MAX_SUMS_BYTES).decode(errors="replace").splitlines(), start=1):
        matched = SUM_LINE.fullmatch(line)
        if matched is None and line.strip() and not line.startswith("#"):
            raise ModelError(f"{sums}: line {number} is no checksum", hint="write it with sha256sum")
        if matched is not None:
            found[matched[2]] = Expectation(matched[1].lower(), SUMS_NAME)
    return found


def _check_expected(path: Path, file: ModelFile, expected: Expectation | None) -> None:
    if expected is None or expected.sha256 == file.sha256:
        return
    hint = "download it again"
    if expected.says == "the hub":
        hint = f"delete {path.resolve()} and start again, which downloads it"
    raise ModelError(f"{path} has sha256 {file.sha256}, but {expected.says} says {expected.sha256}", hint=hint)


def _counting(progress: Progress, done: int, total: int) -> Callable[[int], None]:
    """Tells the bytes of one file on top of those of the files before it."""
    return lambda num_bytes: progress.show("verify", done + num_bytes, total)


def _is_still(path: Path, known: ModelFile) -> bool:
    """Whether a file is the one that was hashed before."""
    with open_regular(path) as file:
        return known.identity == identity_of(file) and known.size_bytes == os.fstat(file.fileno()).st_size


def _read(kind: type[F], path: Path, default: D) -> F | D:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return default
