"""Finds or measures the profile of a model on this machine. No torch here: the measuring is a process of its own.

A measured profile is kept by model digest, dtype and device, so that the second start of a daemon measures nothing.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import ValidationError

from spotserve.core.canonical import canonical_json
from spotserve.core.spec import Profile
from spotserve.errors import ModelError, SpotServeError
from spotserve.runtime.checkpoint_header import validate_checkpoint

MEASURE_TIMEOUT_S = 600.0
CACHE_VERSION = 2
"""Raised when what is measured, or how, changes: older entries are then measured again."""


def profile_of(
    folder: Path, *, device: str = "cpu", dtype: str | None = None, cache: Path, again: bool = False
) -> Profile:
    """The profile of a model folder: the kept one, else a new measurement.

    Args:
        folder: the model's checkpoint.
        device: `cpu` or `cuda`.
        dtype: None is the checkpoint's own.
        cache: the folder that keeps profiles.
        again: measure even if one is kept.
    """
    path = cache / cache_name(folder, device=device, dtype=dtype)
    if not again and (kept := read_profile(path)) is not None:
        return kept
    profile = measured_profile(folder, device=device, dtype=dtype)
    write_whole(path, canonical_json(profile))
    return profile


def cache_name(folder: Path, *, device: str, dtype: str | None) -> str:
    """The file name that a profile is kept under."""
    digest = validate_checkpoint(folder).digest
    key = f"{CACHE_VERSION}:{digest}:{dtype or 'stored'}:{device}"
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"


def read_profile(path: Path) -> Profile | None:
    """The profile in a file; None when there is none, or it is of another version."""
    try:
        return Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def measured_profile(folder: Path, *, device: str, dtype: str | None) -> Profile:
    """A new measurement in a process with torch."""
    command = [sys.executable, "-m", "spotserve.runtime.measure", str(folder), "--device", device]
    command += ["--dtype", dtype] if dtype is not None else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MEASURE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SpotServeError(f"measuring {folder} did not end within {MEASURE_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise measuring_error(folder, done.returncode, done.stderr)
    return Profile.model_validate_json(done.stdout)


def measuring_error(folder: Path, code: int, stderr: str) -> SpotServeError:
    """What the measuring process said on stderr, as an error of ours."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    hint = next((line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")), None)
    if code == ModelError.exit_code and lines:
        told = [line for line in lines if not line.startswith("hint: ")]
        return ModelError(told[-1] if told else lines[-1], hint=hint)
    return SpotServeError(f"measuring {folder} ended with {code}: {lines[-1] if lines else 'no word'}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
