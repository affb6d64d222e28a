"""What a plain TCP socket brings from one process to another on this machine: the ceiling of a bulk copy.

`python -m benchmarks.ceiling PORT BYTES` is the sending process. Nothing is checked, parsed or paced, and both ends
use blocking calls of 1 MiB; the receiver writes into memory of the full size, as a copy of weights must, or into one
buffer again and again, which no copy can do.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass

CALL_BYTES = 1 << 20
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Bytes per second of one transfer into fresh memory, and into one reused buffer."""

    fresh_bytes_per_s: float
    reused_bytes_per_s: float


def measure_ceiling(num_bytes: int) -> Ceiling:
    """Both rates, one transfer each."""
    return Ceiling(_receive(num_bytes, fresh=True), _receive(num_bytes, fresh=False))


def _receive(num_bytes: int, *, fresh: bool) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        port = listener.getsockname()[1]
        sender = subprocess.Popen([sys.executable, "-m", "benchmarks.ceiling", str(port), str(num_bytes)])
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(None)
            connection.recv(1)  # The sender has its bytes in memory and is about to send them.
            began_s = time.perf_counter()
            # Anonymous memory that nobody has touched, as a freshly reserved weight is.
            target = memoryview(bytearray(num_bytes if fresh else CALL_BYTES))
            received = 0
            while received < num_bytes:
                at = received if fresh else 0
                count = connection.recv_into(target[at : at + CALL_BYTES], 0, socket.MSG_WAITALL)
                if count == 0:
                    raise ConnectionError(f"sender ended after {received} of {num_bytes} bytes")
                received += count
            elapsed_s = time.perf_counter() - began_s
        if sender.wait(TIMEOUT_S) != 0:
            raise ConnectionError(f"sender ended with {sender.returncode}")
    return num_bytes / elapsed_s


def send(port: int, num_bytes: int) -> None:
    """The other end."""
    source = memoryview(bytearray(b"\x5a") * num_bytes)
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.settimeout(None)
        connection.sendall(b"x")
        for at in range(0, num_bytes, CALL_BYTES):
            connection.sendall(source[at : at + CALL_BYTES])


if __name__ == "__main__":
    send(int(sys.argv[1]), int(sys.argv[2]))
