"""What is served: the model's parameter table, the measured profile, and the limits that follow from both."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from spotserve.app.deployment import Deployment, Inputs, profile_cache
from spotserve.core.options import RunOptions
from spotserve.core.sizing import size_limits
from spotserve.core.spec import DeviceProfile, Limits, ModelSpec, Profile, ServingSpec, weight_copies
from spotserve.errors import SpecError
from spotserve.runtime.forkserver_client import ForkServer, ForkServerError
from spotserve.runtime.instance import default_memory_bytes
from spotserve.runtime.profiles import answer_of, profile_of, write_whole

BUILTIN_GPU_MEMORY_BYTES = 6 * 1024 * 1024
DESCRIPTION_VERSION = 1
"""Counts changes to what is refused or described: an older description is made anew."""


async def forked_and_measured(deployment: Deployment) -> tuple[ForkServer, ServingSpec]:
    """The forkserver, and what is served: parameter table and profile, each made once by a short process and kept.

    What can be refused is refused before the forkserver starts, which takes seconds.
    """
    options, inputs, state_dir = deployment.options, deployment.inputs, deployment.state_dir
    cache, folder = profile_cache(state_dir), inputs.folder
    model = await asyncio.to_thread(_described, inputs, options.dtype, cache)
    limits = _limits(options, model)
    forking = asyncio.create_task(asyncio.to_thread(ForkServer.start, log=state_dir.logs_path / "forkserver.log"))
    try:
        profile = await asyncio.to_thread(
            profile_of, folder, device=options.device, dtype=options.dtype, linear=options.linear, cache=cache
        )
    except BaseException:
        with contextlib.suppress(ForkServerError):
            await asyncio.to_thread((await forking).close)
        raise
    spec = ServingSpec(
        model=model,
        profile=_as_capped(_with_types(profile, options.gpu_profiles)),
        limits=limits,
        policy=options.policy,
        solvers=options.solvers,
        deterministic=options.deterministic,
        linear=options.linear,
    )
    return await forking, spec


def link_cap() -> float | None:
    """Bytes per second that a worker's bulk transfers are held to, if a person wants a slower network."""
    cap = os.environ.get("SPOTSERVE_LINK_BYTES_PER_S")
    return None if cap is None else float(cap)


def _as_capped(profile: Profile) -> Profile:
    """The profile with links no faster than they are held to: plans must not count on what the workers will not do."""
    cap = link_cap()
    if cap is None or profile.link_bytes_per_s <= cap:
        return profile
    return profile.model_copy(update={"link_bytes_per_s": cap})


def _with_types(profile: Profile, others: Sequence[Profile]) -> Profile:
    """The profile with the times of other GPU types; what a link or the storage does stays this machine's."""
    if any(other.device == profile.device for other in others):
        raise SpecError(
            f"--gpu-profile of the device {profile.device!r} is this machine's own type",
            hint="the file's `device` names its type",
        )
    devices = tuple(
        DeviceProfile(type=other.device, latencies=other.latencies, price_per_hour=other.price_per_hour)
        for other in others
    )
    return profile.model_copy(update={"devices": devices})


def _limits(options: RunOptions, model: ModelSpec) -> Limits:
    max_model_len = options.max_model_len if options.max_model_len is not None else model.max_model_len
    if max_model_len > model.max_model_len:
        raise SpecError(
            f"--max-model-len {max_model_len} exceeds the model's {model.max_model_len}",
            hint=f"choose --max-model-len up to {model.max_model_len}",
        )
    limits = size_limits(
        model,
        gpu_memory_bytes=gpu_memory_bytes(options),
        num_gpus=options.instances * options.gpus_per_instance,
        max_model_len=max_model_len,
        max_running=options.max_num_seqs,
        degrees=(options.data, options.pipeline, options.tensor),
        weight_copies=weight_copies(options.linear),
    )
    return limits.model_copy(update={"spare_instances": options.spare_instances})


def _described(inputs: Inputs, dtype: str | None, cache: Path) -> ModelSpec:
    """The parameter table from a process that may import transformers; kept by the checkpoint's digest and versions."""
    key = inputs.layout.digest.removeprefix("sha256:")[:32]
    versions = f"v{DESCRIPTION_VERSION}-{version('transformers')}"
    kept = cache / f"model-{key}-{dtype or 'stored'}-{versions}.json"
    try:
        described = ModelSpec.model_validate_json(kept.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        answer = answer_of("spotserve.runtime.describe", inputs.folder, dtype=dtype)
        write_whole(kept, answer)
        described = ModelSpec.model_validate_json(answer)
    # Another folder with the same files may have been described first.
    return described.model_copy(update={"name": inputs.model_name})


def gpu_memory_bytes(options: RunOptions) -> int:
    num_gpus = max(1, options.instances * options.gpus_per_instance)
    if options.gpu_memory is not None and options.gpu_memory.total_bytes is not None:
        return options.gpu_memory.total_bytes
    if options.gpu_memory is not None and options.gpu_memory.free_share is not None:
        return default_memory_bytes(num_gpus, share=options.gpu_memory.free_share)
    return BUILTIN_GPU_MEMORY_BYTES if options.model is None else default_memory_bytes(num_gpus)
