"""`spotserve run`: gathers the options of a daemon and starts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from spotserve.cli.config import run_options
from spotserve.cli.start_progress import default_progress


def register(app: typer.Typer) -> None:
    """Add `run` to the command line."""
    app.command()(run)


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Checkpoint folder or hub id, ORG/NAME[@REVISION]; without it the built-in one."
        ),
    ] = None,
    verify_weights: Annotated[
        bool | None,
        typer.Option("--verify-weights/--no-verify-weights", help="Hash every weight file again [default: new ones]."),
    ] = None,
    instances: Annotated[str | None, typer.Option(metavar="N", help="Instances at start [default: 4].")] = None,
    gpus_per_instance: Annotated[
        str | None, typer.Option(metavar="K", help="GPUs of one instance [default: 1].")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of one GPU, as 6MiB or 80% [default: 6MiB for the built-in model]."),
    ] = None,
    gpu_profile: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Times of another GPU type, by spotserve profile --out; repeatable."),
    ] = None,
    gpu_types: Annotated[
        str | None,
        typer.Option(metavar="T,T,…", help="Types that instances take in turn [default: own, this machine's]."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data-parallel-size", "-dp", metavar="D", help="Pin the number of replicas.")
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline-parallel-size", "-pp", metavar="P", help="Pin the stages of a replica.")
    ] = None,
    tensor: Annotated[
        str | None, typer.Option("--tensor-parallel-size", "-tp", metavar="M", help="Pin the GPUs of a stage.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="Weights and KV [default: the checkpoint's].")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="What a GPU is [default: cpu, one process each].")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="live|reroute|reparallelize", help="What to do about a preemption [default: live]."),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option(metavar="KIND=NAME", help="Another solver than the policy's; repeatable.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Capacity comes and goes as this trace says.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Listen here; beyond loopback only with an API key.")
    ] = None,
    port: Annotated[str | None, typer.Option(metavar="P", help="Listen here [default: 8000].")] = None,
    max_model_len: Annotated[
        str | None, typer.Option(metavar="N", help="Longest prompt plus output [default: the model's].")
    ] = None,
    max_num_seqs: Annotated[
        str | None, typer.Option(metavar="B", help="Most running sequences of a replica [default: 8].")
    ] = None,
    spare_instances: Annotated[
        str | None, typer.Option(metavar="N", help="Give idle instances back but for so many [default: keep all].")
    ] = None,
    max_queue: Annotated[
        str | None, typer.Option(metavar="N", help="Most waiting requests; beyond it 429 [default: 1024].")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="S", help="The model's name for clients [default: the folder's].")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="K", help="Clients must send it; better given by SPOTSERVE_API_KEY.")
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(metavar="D", help="Journal, ledger and logs [default: $XDG_STATE_HOME/spotserve/PORT]."),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings as TOML.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Seed of what the daemon draws [default: 0].")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic/--no-deterministic", help="Bit-equal output [default: yes].")
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option(metavar="plain|prepacked", help="Prepacked weights: faster on a CPU, twice the memory."),
    ] = None,
    drain: Annotated[
        str | None, typer.Option(metavar="S", help="Seconds to finish requests at a stop [default: 30].")
    ] = None,
    orphan_timeout: Annotated[
        str | None, typer.Option(metavar="S", help="Seconds a worker outlives the daemon [default: 60].")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(metavar="console|json", help="How logs read on stderr [default: console].")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin a new journal whatever the state dir holds.")] = False,
) -> None:
    """Serve MODEL on preemptible instances until Ctrl-C.

    Every option can also be a variable (SPOTSERVE_GPU_MEMORY) or a key of the --config file (gpu-memory).
    """
    flags: dict[str, object] = {
        "model": model,
        "verify_weights": verify_weights,
        "instances": instances,
        "gpus_per_instance": gpus_per_instance,
        "gpu_memory": gpu_memory,
        "gpu_profile": gpu_profile,
        "gpu_types": gpu_types,
        "data_parallel_size": data,
        "pipeline_parallel_size": pipeline,
        "tensor_parallel_size": tensor,
        "dtype": dtype,
        "device": device,
        "policy": policy,
        "solver": solver,
        "trace": trace,
        "host": host,
        "port": port,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "spare_instances": spare_instances,
        "max_queue": max_queue,
        "served_model_name": served_model_name,
        "api_key": api_key,
        "state_dir": state_dir,
        "seed": seed,
        "deterministic": deterministic,
        "linear": linear,
        "drain": drain,
        "orphan_timeout": orphan_timeout,
        "log_format": log_format,
    }
    options = run_options(flags, environment=os.environ, config_file=config, fresh=fresh)
    # Here and not above: the daemon brings a web server and gRPC, which no other verb shall wait for.
    from spotserve.app import serve

    progress = default_progress()
    try:
        code = serve(options, progress, log_stream=progress.stream)
    finally:
        # Of a start that was refused or interrupted too: a bar hides the cursor.
        progress.end()
    raise typer.Exit(code)
