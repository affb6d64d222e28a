"""A token bucket that caps the bytes per second of one direction of a worker's bulk transfers.

Benchmarks use it to give a loopback machine the links of a cloud: every connection of the worker draws on the same
bucket, one bucket for what it sends and one for what it receives. No torch here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from spotserve.errors import SpecError

_CANCEL_POLL_S = 0.1


class RateLimiter:
    """Lets `bytes_per_s` through on average, `burst_bytes` at once after idleness; `None` lets everything through.

    The bucket is kept as the moment at which it is paid off: whoever draws moves that moment on and sleeps until
    only the burst is still owed. Waiting happens outside the lock, in the order of the draws.
    """

    def __init__(
        self,
        bytes_per_s: float | None,
        *,
        burst_bytes: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s is not None and not 0.0 < bytes_per_s < float("inf"):
            raise SpecError(
                f"rate {bytes_per_s} bytes/s is not positive and finite", hint="None leaves the link uncapped"
            )
        if burst_bytes < 0:
            raise SpecError(f"burst {burst_bytes} bytes is below 0")
        self._bytes_per_s = bytes_per_s
        self._burst_s = 0.0 if bytes_per_s is None else burst_bytes / bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._paid_at_s = float("-inf")

    def acquire(self, num_bytes: int, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Wait until `num_bytes` more may pass, or until `is_cancelled`; what was drawn stays drawn."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = self._clock()
            self._paid_at_s = max(self._paid_at_s, now_s) + num_bytes / self._bytes_per_s
            may_pass_at_s = self._paid_at_s - self._burst_s
        while (wait_s := may_pass_at_s - self._clock()) > 0.0 and not is_cancelled():
            self._sleep(min(wait_s, _CANCEL_POLL_S))
