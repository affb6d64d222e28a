"""Places where a fault test can have a process die, as the environment says: `SPOTSERVE_FAILPOINT=activate:before`.

Without the variables every `reach` is one comparison. The death is SIGKILL, as a preemption's is: nothing is flushed.
`NAME@2` dies when the place is reached for the second time. With `SPOTSERVE_FAILPOINTS=FOLDER` a running process is
armed by a file there: `i3.0` holds the place for worker i3/0, `coordinator` that for the coordinator. It fires once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

FAILPOINT_VARIABLE = "SPOTSERVE_FAILPOINT"
FAILPOINT_FOLDER_VARIABLE = "SPOTSERVE_FAILPOINTS"


class Failpoint:
    """The one place at which this process dies, if any."""

    def __init__(self, value: str | None, file: Path | None = None) -> None:
        self._name, _, count = (value or "").partition("@")
        self._left = int(count or 1)
        self._file = file
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, process: str) -> Failpoint:
        """The place that the environment names, or the file that may name one for `process` later."""
        folder = os.environ.get(FAILPOINT_FOLDER_VARIABLE)
        file = None if folder is None else Path(folder) / process.replace("/", ".")
        return cls(os.environ.get(FAILPOINT_VARIABLE), file)

    def reach(self, name: str) -> None:
        """Die here if this is the place."""
        if name != self._name and not self._is_armed(name):
            return
        with self._lock:
            self._left -= 1
            if self._left > 0:
                return
        sys.stderr.write(f"failpoint {name} reached\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def _is_armed(self, name: str) -> bool:
        if self._file is None or not self._file.exists() or self._file.read_text(encoding="utf-8") != name:
            return False
        self._file.unlink()
        return True


def failpoint_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What an instance forked from a process with another environment has to be given."""
    folder = environment.get(FAILPOINT_FOLDER_VARIABLE)
    return {} if folder is None else {FAILPOINT_FOLDER_VARIABLE: folder}
