"""Which folder a MODEL means: one that is there, or a repository of the hub, which a short process downloads."""

from __future__ import annotations

import errno
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
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
USER_INFO = re.compile(r"://[^/\s]*@")


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
    if _is_folder(path):
        resolved = path.resolve()
        if not _is_text(str(resolved)):
            raise ModelError(f"MODEL {str(resolved)!a} is no UTF-8 text", hint="rename the folder")
        return ModelSource(path, resolved.name)
    if not _is_text(model):
        raise ModelError(f"MODEL {model!a} is no UTF-8 text", hint="rename it")
    if os.path.lexists(path):
        raise ModelError(f"MODEL {model} is not a folder", hint="give a folder with config.json and safetensors")
    matched = HUB_ID.fullmatch(model)
    if matched is None or ".." in model:
        raise ModelError(
            f"MODEL {model} is not a folder", hint="give one with config.json and safetensors, or a hub id ORG/NAME"
        )
    return ModelSource(downloaded(matched["id"], matched["revision"], progress), matched["id"])


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise ModelError(f"MODEL {path} cannot be read: {error.strerror}", hint="check the permissions") from error


def _is_text(name: str) -> bool:
    """Whether a path can be sent and logged: a name on disk may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def downloaded(repository: str, revision: str | None, progress: Progress) -> Path:
    """The folder of a repository's files in the hub's cache."""
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as words, downloading(repository, revision, words) as (process, answers):
        for line in answers:
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
    raise SpotServeError(
        f"the download of {repository} ended with {code}: {without_secrets(said[-1]) if said else 'no word'}"
    )


@contextmanager
def downloading(
    repository: str, revision: str | None, words: IO[str]
) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """The process that downloads, which does not outlive this, and its answers; all else it writes goes to `words`."""
    # Not its stdout: the hub's client prints there when it pleases.
    read_end, write_end = os.pipe()
    with open(read_end, encoding="utf-8") as answers:
        command = [sys.executable, "-m", "spotserve.runtime.hub_download", str(write_end), repository]
        try:
            process = subprocess.Popen(
                command if revision is None else [*command, revision],
                stdin=subprocess.PIPE,  # Its end tells the process that we are gone.
                stdout=words,
                stderr=words,
                pass_fds=(write_end,),
            )
        finally:
            os.close(write_end)
        with process:
            try:
                yield process, answers
            finally:
                process.kill()


def without_secrets(text: str) -> str:
    """A text without the token and without the name and password of an address, should anything have repeated them."""
    for variable in TOKEN_VARIABLES:
        if token := os.environ.get(variable, "").strip():
            text = text.replace(token, "<hidden>")
    return USER_INFO.sub("://", text)
