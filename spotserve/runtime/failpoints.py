"""Places where a fault test can have a worker die, named in the environment: `SPOTSERVE_FAILPOINT=copy_weights:before`.

Without the variable every `reach` is one comparison. The death is SIGKILL, as a preemption's is: nothing is flushed.
`NAME@2` dies when the place is reached for the second time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

FAILPOINT_VARIABLE = "SPOTSERVE_FAILPOINT"


class Failpoint:
    """The one place at which this process dies, if any."""

    def __init__(self, value: str | None) -> None:
        self._name, _, count = (value or "").partition("@")
        self._left = int(count or 1)
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls) -> Failpoint:
        """The place that the environment names."""
        return cls(os.environ.get(FAILPOINT_VARIABLE))

    def reach(self, name: str) -> None:
        """Die here if this is the place."""
        if name != self._name:
            return
        with self._lock:
            self._left -= 1
            if self._left > 0:
                return
        sys.stderr.write(f"failpoint {name} reached\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
