"""Which folder a MODEL means: one that is there, or a repository of the hub, which a short process downloads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spotserve.core.ports import Progress
from spotserve.errors import HubError, ModelError, SpotServeError

HUB_ID = re.compile(r"(?P<id>\w[\w.-]{0,95}(?:/\w[\w.-]{0,95})?)(?:@(?P<revision>\w[\w./-]{0,254}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model folder, and what its model is called unless a person says else."""

    folder: Path
    name: str


def resolve_model(model: str, progress: Progress) -> ModelSource:
    """The folder that MODEL means: what exists is a folder, anything else of the form [ORG/]NAME[@REVISION] a hub id.

    Raises:
        ModelError: it is neither, or the hub has no such model.
        HubError: the hub cannot be reached and its cache does not have it.
    """
    path = Path(model)
    if path.is_dir():
        return ModelSource(path, path.resolve().name)
    if os.path.lexists(path):
        raise ModelError(f"MODEL {model} is not a folder", hint="give a folder with config.json and safetensors")
    matched = HUB_ID.fullmatch(model)
    if matched is None or ".." in model:
        raise ModelError(
            f"MODEL {model} is not a folder", hint="give one with config.json and safetensors, or a hub id ORG/NAME"
        )
    return ModelSource(downloaded(matched["id"], matched["revision"], progress), matched["id"])


def downloaded(repository: str, revision: str | None, progress: Progress) -> Path:
    """The folder of a repository's files in the hub's cache."""
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as words, downloading(repository, revision, words) as process:
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "done" in answer:
                progress.show("download", answer["done"], answer["total"])
        code = process.wait()
        progress.end()
        words.seek(0)
        said = words.read().strip().splitlines()
    if code == 0 and "folder" in answer:
        return Path(answer["folder"])
    if "error" in answer:
        kind = ModelError if answer["code"] == ModelError.code else HubError
        raise kind(answer["error"], hint=answer["hint"])
    raise SpotServeError(f"the download of {repository} ended with {code}: {said[-1] if said else 'no word'}")


@contextmanager
def downloading(repository: str, revision: str | None, stderr: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The process that downloads; it does not outlive this."""
    command = [sys.executable, "-m", "spotserve.runtime.hub_download", repository]
    process = subprocess.Popen(
        command if revision is None else [*command, revision],
        stdin=subprocess.PIPE,  # Its end tells the process that we are gone.
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
