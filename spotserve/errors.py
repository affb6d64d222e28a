"""The one tree of errors. A message says what, the value and the bound; `hint` says what to do about it.

Their input is a `SpecError` (or a subclass), the world is an event and never an exception, our own bug is an
`InvariantError`. Each class carries the code that the README's troubleshooting table lists and the exit code
of `contracts.md` section 5.
"""

from __future__ import annotations


class SpotServeError(Exception):
    """Base of every error a person can meet. `str(error)` is one line; `hint` may add a second."""

    code = "SPS-000"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvariantError(SpotServeError):
    """Our own bug: something that the code promises does not hold."""

    code = "SPS-001"


class SpecError(SpotServeError):
    """A value somebody gave us is wrong: usage, configuration, a flag."""

    code = "SPS-100"
    exit_code = 2


class ModelError(SpecError):
    """A model folder cannot be served: missing, corrupt, unknown, too large."""

    code = "SPS-110"


class HubError(SpotServeError):
    """The model hub cannot be reached, or what it sent cannot be kept."""

    code = "SPS-111"


class RequestError(SpecError):
    """A generation request is malformed or out of bounds (HTTP 400)."""

    code = "SPS-120"

    def __init__(self, message: str, *, parameter: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.parameter = parameter


class QueueFullError(SpotServeError):
    """The queue bound is reached (HTTP 429); nothing was accepted."""

    code = "SPS-130"


class NotServingError(SpotServeError):
    """The daemon is starting or stopping and accepts nothing (HTTP 503)."""

    code = "SPS-131"


class UnknownInstanceError(SpotServeError):
    """An instance id is unknown or gone."""

    code = "SPS-140"


class DaemonUnreachableError(SpotServeError):
    """No daemon answers at the URL."""

    code = "SPS-150"


class PortError(SpotServeError):
    """The address to listen on is taken, or is not for us."""

    code = "SPS-151"


class StateDirError(SpotServeError):
    """The state dir is locked, unwritable, corrupt or belongs to another model."""

    code = "SPS-160"


class PlanRefusedError(SpotServeError):
    """A plan file is corrupt, wrong or stale."""

    code = "SPS-170"
    exit_code = 5


class InfeasibleError(SpotServeError):
    """No configuration fits what is left."""

    code = "SPS-180"
    exit_code = 4


class TransferError(SpotServeError):
    """A bulk transfer between two workers failed; the step fails, the plan decides."""

    code = "SPS-190"


class MeshError(SpotServeError):
    """A peer of a replica's mesh is gone or the mesh was closed."""

    code = "SPS-191"
