"""Finds or measures the profile of a model on this machine. No torch here: the measuring is a process of its own.

A measured profile is kept by model digest, dtype and device, so that the second start of a daemon measures nothing.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.spec import LinearKind, Profile
from spotserve.errors import ModelError, SpotServeError
from spotserve.runtime.checkpoint_header import validate_checkpoint

PROCESS_TIMEOUT_S = 600.0
CACHE_VERSION = 2
"""Raised when what is measured, or how, changes: older entries are then measured again."""


def profile_of(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    linear: LinearKind = "plain",
    cache: Path,
    again: bool = False,
) -> Profile:
    """The profile of a model folder: the kept one, else a new measurement.

    Args:
        folder: the model's checkpoint.
        device: `cpu` or `cuda`.
        dtype: None is the checkpoint's own.
        linear: what the weights are multiplied with.
        cache: the folder that keeps profiles.
        again: measure even if one is kept.
    """
    path = cache / cache_name(folder, device=device, dtype=dtype, linear=linear)
    if not again and (kept := read_profile(path)) is not None:
        return kept
    profile = measured_profile(folder, device=device, dtype=dtype, linear=linear)
    write_whole(path, canonical_json(profile))
    return profile


def cache_name(folder: Path, *, device: str, dtype: str | None, linear: LinearKind = "plain") -> str:
    """The file name that a profile is kept under."""
    digest = validate_checkpoint(folder).digest
    key = f"{CACHE_VERSION}:{digest}:{dtype or 'stored'}:{device}" + ("" if linear == "plain" else f":{linear}")
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"


def read_profile(path: Path) -> Profile | None:
    """The profile in a file; None when there is none, or it is of another version."""
    try:
        return Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def measured_profile(folder: Path, *, device: str, dtype: str | None, linear: LinearKind) -> Profile:
    """A new measurement in a process with torch."""
    answer = answer_of(
        "spotserve.runtime.measure", folder, dtype=dtype, options=("--device", device, "--linear", linear)
    )
    return Profile.model_validate_json(answer)


def answer_of(module: str, folder: Path, *, dtype: str | None, options: Sequence[str] = ()) -> str:
    """What a short process prints about a model folder; it may import torch and transformers, its caller may not.

    Raises:
        ModelError: the process refused the folder.
        SpotServeError: it failed otherwise, or did not end in time.
    """
    command = [sys.executable, "-m", module, str(folder), *options]
    command += ["--dtype", dtype] if dtype is not None else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROCESS_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SpotServeError(f"{module} did not end within {PROCESS_TIMEOUT_S:g} s on {folder}") from error
    if done.returncode != 0:
        raise process_error(module, folder, done.returncode, done.stderr)
    return done.stdout


def process_error(module: str, folder: Path, code: int, stderr: str) -> SpotServeError:
    """What a short process said on stderr, as an error of ours."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    hint = next((line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")), None)
    if code == ModelError.exit_code and lines:
        told = [line for line in lines if not line.startswith("hint: ")]
        return ModelError(told[-1] if told else lines[-1], hint=hint)
    return SpotServeError(f"{module} ended with {code} on {folder}: {lines[-1] if lines else 'no word'}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
