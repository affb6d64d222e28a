"""How a daemon and its workers find each other: what an instance is started with, and who is welcome."""

from __future__ import annotations

import os
from collections.abc import Callable

from spotserve.app.deployment import Deployment
from spotserve.app.serving_spec import gpu_memory_bytes, link_cap
from spotserve.core import wire
from spotserve.core.controller import Controller
from spotserve.core.gpu_types import type_called
from spotserve.core.spec import ServingSpec
from spotserve.errors import SpecError


def worker_args(deployment: Deployment, *, port: int) -> tuple[str, ...]:
    """The arguments of `spotserve worker`, as a person would type them, but for the instance's name.

    Args:
        deployment: whose workers they are.
        port: where the coordinator listens for them.
    """
    options = deployment.options
    return (
        "--coordinator",
        f"127.0.0.1:{port}",
        "--secret-file",
        str(deployment.state_dir.secret_path),
        "--gpus",
        str(options.gpus_per_instance),
        "--gpu-memory",
        str(gpu_memory_bytes(options)),
        "--device",
        options.device,
        "--orphan-timeout",
        str(options.orphan_timeout_s),
    )


def welcome_of(deployment: Deployment, spec: ServingSpec, *, journal: str) -> wire.Welcome:
    """What a worker is told that may join."""
    options, files = deployment.options, deployment.manifest.files
    if options.verify_weights:
        # Without its identity a worker takes no file on trust.
        files = tuple(file.model_copy(update={"identity": None}) for file in files)
    return wire.Welcome(
        term=deployment.state_dir.term,
        spec=spec,
        model_path=str(deployment.inputs.folder.resolve()),
        model_files=tuple(files),
        journal=journal,
        link_bytes_per_s=link_cap(),
        least_iteration_s=_least_iteration_s(),
        orphan_timeout_s=options.orphan_timeout_s,
    )


def _least_iteration_s() -> float:
    """Seconds that a micro-batch takes at least, if a person wants the pace of a slower GPU."""
    return float(os.environ.get("SPOTSERVE_ITERATION_S", "0"))


def greeter(welcome: wire.Welcome, controller: Controller) -> Callable[[wire.Register], wire.Welcome | wire.Refused]:
    """Welcomes workers of instances that the controller asked for, refuses all others.

    A worker that another journal's coordinator welcomed is one of the others, whatever its name: it outlived its
    daemon, and what it holds is not what this journal says. So is one of a GPU type that no plan could reckon with.
    """

    def greet(register: wire.Register) -> wire.Welcome | wire.Refused:
        known = controller.state.instances.get(register.instance)
        if known is None or known.state == "gone":
            return _refused(f"instance {register.instance} is not wanted")
        if register.journal not in (None, welcome.journal):
            return _refused(f"worker {register.worker} belongs to another journal")
        try:
            type_called(welcome.spec.profile, register.gpu_type)
        except SpecError as error:
            return _refused(f"{error.message}; {error.hint}")
        return welcome

    def _refused(reason: str) -> wire.Refused:
        return wire.Refused(term=welcome.term, reason=reason)

    return greet
