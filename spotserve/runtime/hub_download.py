"""`python -m spotserve.runtime.hub_download FD ID [REVISION]`: brings a repository's model files into the hub's cache.

A process of its own, so that the hub's client with its threads, bars and warnings stays out of the coordinator; it
imports no torch. Small files come first: what they say can refuse a model before its weights are downloaded. Of the
weights only the safetensors files that are served from come; never a pickle, never code. Each line to the descriptor FD
is a JSON object: bytes done and in all, and at last the folder, or the error with its hint and its kind. Stdout is the
client's.

The client's own variables count: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from spotserve.errors import HubError, ModelError, SpotServeError
from spotserve.runtime.architecture import read_architecture
from spotserve.runtime.checkpoint_header import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLED_SUFFIXES,
    SINGLE_NAME,
    TEXT_FILES,
    read_weight_map,
)
from spotserve.runtime.model_source import without_secrets

REPORT_PERIOD_S = 0.1


class Answers:
    """Where our caller reads."""

    descriptor = 1


class Bar(tqdm):  # type: ignore[misc]  # the client's own class is untyped
    """The client's progress bar, told to our caller instead of drawn."""

    total_bytes = 0
    """Of all files of a download, known before it begins."""
    told_s = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A bar that is disabled, as it is where there is no terminal, does not count.
        super().__init__(*args, **{**kwargs, "disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115

    def update(self, n: float | None = 1) -> bool | None:
        """Count, and tell bytes now and then."""
        result: bool | None = super().update(n)
        if self.unit == "B" and Bar.total_bytes and time.monotonic() - Bar.told_s > REPORT_PERIOD_S:
            Bar.told_s = time.monotonic()
            tell(done=int(min(self.n, Bar.total_bytes)), total=Bar.total_bytes)
        return result


def main(arguments: list[str]) -> int:
    """Download and say where to; returns the exit code."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    repository, revision = arguments[1], arguments[2] if len(arguments) > 2 else None
    Answers.descriptor = int(arguments[0])
    try:
        tell(folder=str(download(repository, revision)))
    except SpotServeError as error:
        hint = None if error.hint is None else without_secrets(error.hint)
        tell(error=without_secrets(error.message), hint=hint, code=error.code)
        return error.exit_code
    return 0


def end_with_parent() -> None:
    """Nobody is left to tell when the other end of stdin goes."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def tell(**values: object) -> None:
    """One line to the caller."""
    os.write(Answers.descriptor, (json.dumps(values) + "\n").encode())


def download(repository: str, revision: str | None) -> Path:
    """The snapshot folder with all that is served from.

    Raises:
        ModelError: there is no such repository, or it has no model that can be served.
        HubError: the hub cannot be asked, or its answer not be kept.
    """
    folder = fetched(repository, revision, [CONFIG_NAME, INDEX_NAME, *TEXT_FILES])
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"{repository} has no {CONFIG_NAME}", hint="give the repository of a transformers model")
    read_architecture(folder)
    weight_map = read_weight_map(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
    wanted = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not missing:
        return folder
    # A snapshot's folder is named by its commit: whatever the branch does meanwhile, this is one model.
    commit = folder.name
    sizes = listed(repository, commit)
    if absent := [name for name in missing if name not in sizes]:
        pickled = sorted(name for name in sizes if name.endswith(PICKLED_SUFFIXES))
        if pickled and weight_map is None:
            raise ModelError(
                f"{repository} has only pickled weights ({pickled[0]})", hint="convert them to safetensors first"
            )
        raise ModelError(f"{repository} has no {absent[0]}", hint="choose another revision: ORG/NAME@REVISION")
    Bar.total_bytes = sum(sizes[name] for name in missing)
    fetched(repository, commit, missing)
    tell(done=Bar.total_bytes, total=Bar.total_bytes)
    return folder


def listed(repository: str, commit: str) -> dict[str, int]:
    """Name to size of a snapshot's files, asked of the hub itself: what is not in the cache can come from nowhere else.

    Raises:
        HubError: it cannot be asked.
    """
    try:
        info = HfApi(library_name="spotserve").repo_info(
            repository, revision=commit, files_metadata=True, timeout=constants.DEFAULT_REQUEST_TIMEOUT
        )
    except (HTTPError, OSError) as error:
        raise unreachable(repository, error) from error
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def fetched(repository: str, revision: str | None, names: list[str]) -> Path:
    """The snapshot folder, with those of the files that the repository has."""
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=Bar,
                library_name="spotserve",
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated and its terms were not accepted, or HF_TOKEN is not set",
            hint=f"accept them on {constants.ENDPOINT}/{repository}, then set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repository} is no folder here, and {constants.ENDPOINT} has no such public model",
            hint="check the spelling; set HF_TOKEN for a private one",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision}", hint="name a branch, a tag or a commit") from error
    except HFValidationError as error:
        raise ModelError(f"{repository} is no folder here, and no hub id either: {one_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise unreachable(repository, error.__cause__) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise HubError(f"{constants.ENDPOINT} answered {status} for {repository}", hint=hint) from error
    except (HTTPError, OSError) as error:
        raise HubError(f"{repository} cannot be downloaded: {one_line(error)}") from error


def unreachable(repository: str, cause: BaseException | None) -> HubError:
    """Nothing, or not all of it, is in the cache, and nobody could be asked."""
    if constants.HF_HUB_OFFLINE:
        return HubError(
            f"{repository} is no folder here and not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE"
            " is set",
            hint="unset HF_HUB_OFFLINE to download it, or set HF_HUB_CACHE to the cache that has it",
        )
    reason = "" if cause is None else f" ({type(cause).__name__})"
    return HubError(
        f"{constants.ENDPOINT} cannot be reached{reason}, and {repository} is no folder here and not whole in the cache"
        f" {constants.HF_HUB_CACHE}",
        hint="check the network and HF_ENDPOINT, or give a folder",
    )


def one_line(error: Exception) -> str:
    """What an exception says, short."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
