"""What a daemon is started with: options, the model and everything else found good, and where its state lies."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from spotserve.api.server import bind
from spotserve.api.tokenizer import GenerationDefaults, TextCodec
from spotserve.cloud.local import check_capacity
from spotserve.cloud.traces import Trace, read_trace
from spotserve.core.options import RunOptions
from spotserve.core.ports import Progress
from spotserve.runtime.architecture import read_architecture
from spotserve.runtime.checkpoint_header import CheckpointLayout, validate_checkpoint
from spotserve.runtime.model_manifest import ModelManifest, check_unchanged, read_manifest, resolve_manifest
from spotserve.runtime.model_source import ModelSource, resolve_model
from spotserve.store.state_dir import StateDir

BUILTIN_MODEL = Path(__file__).parent.parent / "builtin"
BUILTIN_NAME = "spotserve-builtin"
MANIFEST_NAME = "model-manifest.json"
"""In the state dir: what was served from it last."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a person gave, read and found good while nothing was started and nothing written yet."""

    layout: CheckpointLayout
    model_name: str
    served_name: str
    """What clients call the model."""
    codec: TextCodec | None
    defaults: GenerationDefaults
    trace: Trace | None
    listener: socket.socket
    """Owns the HTTP address; listened on when the front door opens."""

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.layout.folder


@dataclass(frozen=True, slots=True)
class Deployment:
    """One start of a daemon in one state dir, before anything of it runs."""

    options: RunOptions
    inputs: Inputs
    manifest: ModelManifest
    state_dir: StateDir
    progress: Progress
    """Is told how the start goes."""

    @property
    def manifest_path(self) -> Path:
        """Where the next start reads what this one serves from."""
        return self.state_dir.path / MANIFEST_NAME


def read_inputs(options: RunOptions, progress: Progress) -> Inputs:
    """Read what was given, the cheapest first. Raises SpecError, ModelError, HubError or PortError."""
    check_capacity(
        options.instances * options.gpus_per_instance,
        num_cores=os.cpu_count() or 1,
        free_bytes=psutil.virtual_memory().available,
    )
    trace = None if options.trace is None else read_trace(Path(options.trace), living=options.instances)
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(bind(options.host, options.port))
        source = ModelSource(BUILTIN_MODEL, BUILTIN_MODEL.name)
        if options.model is not None:
            source = resolve_model(options.model, progress)
        layout = validate_checkpoint(source.folder)
        read_architecture(source.folder)
        inputs = Inputs(
            layout=layout,
            model_name=source.name,
            served_name=options.served_model_name or (BUILTIN_NAME if options.model is None else source.name),
            codec=TextCodec.load(source.folder),
            defaults=GenerationDefaults.load(source.folder),
            trace=trace,
            listener=listener,
        )
        undo.pop_all()
    return inputs


def deploy(options: RunOptions, inputs: Inputs, state_dir: StateDir, progress: Progress) -> Deployment:
    """Hash every file that is served from, and compare with what this state dir served before."""
    layout = inputs.layout
    manifest = resolve_manifest(
        layout, cache=profile_cache(state_dir), progress=progress, hash_again=options.verify_weights
    )
    if not options.fresh:
        check_unchanged(read_manifest(state_dir.path / MANIFEST_NAME), manifest, layout.folder)
    return Deployment(options, inputs, manifest, state_dir, progress)


def profile_cache(state_dir: StateDir) -> Path:
    """The folder of what is found out about models once and kept."""
    return Path(os.environ.get("SPOTSERVE_PROFILE_CACHE", state_dir.path / "profiles"))
