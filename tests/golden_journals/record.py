"""Records the golden journals from a real daemon: `python -m tests.golden_journals.record FOLDER [NAME]…`.

Journals that are here already are never recorded again: they are kept as they are, for ever. New ones are recorded when
the policy version changes, under new names (README.md).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw

from spotserve.core.canonical import canonical_json
from spotserve.core.replay import moments
from spotserve.core.spec import POLICY_VERSION
from spotserve.store.recording import read_recording
from tests.e2e.daemon import RunningDaemon, Stream

PROMPTS = (
    "The for statement",
    "A dictionary is",
    "class Example:",
    "To import a module",
    "A tuple is written",
    "Lists may be nested",
)
ARGS = ("--orphan-timeout", "30")
PACED = {"SPOTSERVE_LINK_BYTES_PER_S": "4000000", "SPOTSERVE_ITERATION_S": "0.006"}
"""Slow links and iterations of one length, so that streams outlast the migrations on every machine."""


def main(folder: Path, names: Sequence[str]) -> None:
    """Record the named scenes, or all of them."""
    for name in names or SCENES:
        with tempfile.TemporaryDirectory() as place:
            state_dir = Path(place) / "state"
            daemon = RunningDaemon(state_dir, *ARGS, env={**PACED, "SPOTSERVE_PROFILE_CACHE": f"{place}/profiles"})
            try:
                daemon.start()
                SCENES[name](daemon)
                settle(daemon)
            finally:
                assert daemon.stop() == 0, daemon.log_tail()
            pack(state_dir / "journal.db", folder / f"v{POLICY_VERSION}-{name}.db")


def notice(daemon: RunningDaemon) -> None:
    """A notice that suffices: KV and weights move while six streams decode."""
    streams = decoding(daemon)
    daemon.admin("notice", instance=serving(daemon)[0], grace_s=20.0)
    finish(streams)
    until(lambda: any(one["state"] == "gone" for one in daemon.status()["instances"]))


def kill(daemon: RunningDaemon) -> None:
    """A kill without notice, an instance that joins for it, a cancelled and a timed out request."""
    streams = decoding(daemon)
    daemon.admin("kill", instance=serving(daemon)[0])
    daemon.admin("add-instance")
    late = daemon.stream(PROMPTS[0], max_tokens=400, timeout_s=1.0)
    finish(streams)
    assert late.done.wait(60.0)
    settle(daemon)


def restart(daemon: RunningDaemon) -> None:
    """The coordinator dies while six streams decode and comes back; after that a notice is overtaken by a second."""
    decoding(daemon)
    daemon.kill9()
    daemon.start()
    streams = decoding(daemon)
    first, second = serving(daemon)[0], serving(daemon)[-1]
    daemon.admin("notice", instance=first, grace_s=25.0)
    until(lambda: bool(daemon.status()["migrations"]))
    daemon.admin("notice", instance=second, grace_s=20.0)
    daemon.admin("add-instance")
    daemon.admin("add-instance")
    finish(streams)


SCENES: dict[str, Callable[[RunningDaemon], None]] = {"notice": notice, "kill": kill, "restart": restart}


def decoding(daemon: RunningDaemon) -> list[Stream]:
    """Six streams, each past its first tokens."""
    streams = [daemon.stream(prompt, max_tokens=250) for prompt in PROMPTS]
    for stream in streams:
        stream.wait_tokens(10)
    return streams


def finish(streams: Sequence[Stream]) -> None:
    """Until every stream has ended well."""
    for stream in streams:
        stream.wait()


def serving(daemon: RunningDaemon) -> list[str]:
    """Instances of the first replica."""
    return [gpu.split("/")[0] for stage in daemon.status()["replicas"][0]["stages"] for gpu in stage["gpus"]]


def is_calm(daemon: RunningDaemon) -> bool:
    """Whether it serves, nothing runs and nothing is open."""
    status = daemon.status()
    is_open = status["requests"]["running"] + status["requests"]["queued"]
    return status["state"] == "serving" and not is_open and all(line["outcome"] for line in status["migrations"])


def settle(daemon: RunningDaemon) -> None:
    """Until it is calm."""
    until(lambda: is_calm(daemon))


def until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Poll until `holds()`."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def pack(journal: Path, target: Path) -> None:
    """A copy of a closed journal in one file without free pages, and beside it the state it folds to."""
    source = read_recording(journal)
    state = source.base
    for moment in moments(state, source.entries):
        state = moment.after
    target.with_suffix(".state.json").write_text(canonical_json(state))
    shutil.copy(journal, target)
    connection = apsw.Connection(str(target))
    connection.execute("VACUUM")
    connection.pragma("wal_checkpoint", "truncate")
    connection.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
