"""Where the options of `spotserve run` come from: flag > environment > TOML file > default.

Every source goes through the same parser of the same setting, so that a wrong value reads the same wherever it
stands: `origin value bound`, and a hint. An unknown key is an error with the nearest name, never ignored.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from spotserve.cli.plan_file import model_of, toml_table
from spotserve.core.gpu_types import OWN
from spotserve.core.options import (
    LOOPBACK_HOSTS,
    NOT_IN_PLANS,
    POLICY_NAMES,
    SOLVER_NAMES,
    Device,
    GpuMemory,
    LogFormat,
    RunOptions,
)
from spotserve.core.spec import DType, LinearKind, Profile
from spotserve.errors import SpecError

ENVIRONMENT_PREFIX = "SPOTSERVE_"
OTHER_VARIABLES = frozenset(
    {"URL", "CONFIG", "FORKSERVER", "PROFILE_CACHE", "LINK_BYTES_PER_S", "ITERATION_S"}
    | {"FAILPOINT", "FAILPOINTS", "SHARED", "REQUIRE_DATA"}
)
"""`SPOTSERVE_*` variables that are no settings of the daemon."""

MAX_DEGREE = 1024
MAX_SECONDS = 86_400.0
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|b)?", re.IGNORECASE)
SIZE_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value stands, for the message: a flag, a variable, a line of a file."""

    name: str
    secret: bool = False

    def refuse(self, value: object, bound: str, *, hint: str | None = None) -> SpecError:
        """The error for a value that this origin may not have."""
        shown = "<hidden>" if self.secret else str(value)
        return SpecError(f"{self.name} {shown} {bound}", hint=hint)


Parser = Callable[[Any, Origin], object]
"""Takes a flag's text, a variable's text or a TOML value (hence `Any`), and says what it means."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set: its key, the `RunOptions` field it fills, and how a value is read."""

    key: str
    field: str
    parse: Parser
    aliases: tuple[str, ...] = ()
    secret: bool = False


def parse_text(value: Any, origin: Origin) -> str:
    """Any text that is not empty."""
    if not isinstance(value, str):
        raise origin.refuse(value, "is not a text", hint="put it in quotes")
    if not value or "\0" in value:
        raise origin.refuse(value, "is empty", hint="leave it out to get the default")
    return value


def integer(low: int, high: int) -> Parser:
    """A parser of whole numbers in [low, high]."""

    def parse(value: Any, origin: Origin) -> int:
        number = value
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,19}", value.strip()):
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise origin.refuse(value, "is not a whole number", hint=f"give a number from {low} to {high}")
        if not low <= number <= high:
            raise origin.refuse(value, f"is not between {low} and {high}")
        return number

    return parse


def seconds(low: float, high: float = MAX_SECONDS) -> Parser:
    """A parser of seconds in [low, high]; NaN and infinity are no seconds."""

    def parse(value: Any, origin: Origin) -> float:
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise origin.refuse(value, "is not a number of seconds", hint=f"give seconds from {low:g} to {high:g}")
        if not low <= number <= high:
            raise origin.refuse(value, f"is not between {low:g} and {high:g} seconds")
        return number

    return parse


def choice(names: Iterable[str]) -> Parser:
    """A parser of one word of a closed list."""
    known = tuple(names)

    def parse(value: Any, origin: Origin) -> str:
        if value not in known:
            raise origin.refuse(value, f"is not one of {', '.join(known)}", hint=nearest(str(value), known))
        return str(value)

    return parse


def parse_flag(value: Any, origin: Origin) -> bool:
    """Yes or no."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise origin.refuse(value, "is neither true nor false", hint="write true or false")
    return word in TRUE_WORDS


def parse_size_bytes(value: Any, origin: Origin) -> int:
    """`6MiB`, `2 GB`, `6291456`: bytes."""
    matched = SIZE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if matched is None:
        raise origin.refuse(value, "is not a size", hint="write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    size_bytes = int(float(matched[1]) * SIZE_UNITS[(matched[2] or "b").lower()])
    if not 1 <= size_bytes <= 2**60:
        raise origin.refuse(value, "is not between 1 byte and 1 EiB")
    return size_bytes


def parse_gpu_memory(value: Any, origin: Origin) -> GpuMemory:
    """A size, or `80%` of the free memory."""
    text = str(value).strip()
    if not text.endswith("%"):
        return GpuMemory(total_bytes=parse_size_bytes(value, origin))
    matched = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", text)
    if matched is None or not 0 < float(matched[1]) <= 100:
        raise origin.refuse(value, "is not a share above 0% and up to 100%", hint="write 80% or a size such as 6MiB")
    return GpuMemory(free_share=float(matched[1]) / 100)


def parse_solvers(value: Any, origin: Origin) -> dict[str, str]:
    """`place=assignment`, several of them as a list, with commas between, or as a TOML table."""
    if isinstance(value, dict):
        pairs = [(kind, name) for kind, name in value.items()]
    else:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and "=" in item for item in items):
            raise origin.refuse(value, "is not kind=name", hint="write place=assignment")
        pairs = [(item.split("=", 1)[0].strip(), item.split("=", 1)[1].strip()) for item in items]
    chosen: dict[str, str] = {}
    for kind, name in pairs:
        if kind in NOT_IN_PLANS:
            raise origin.refuse(kind, NOT_IN_PLANS[kind], hint=f"call spotserve.solvers.{kind} from Python")
        if kind not in SOLVER_NAMES:
            raise origin.refuse(kind, f"is not one of {', '.join(SOLVER_NAMES)}", hint=nearest(kind, SOLVER_NAMES))
        if name not in SOLVER_NAMES[kind]:
            known = ", ".join(SOLVER_NAMES[kind])
            raise origin.refuse(f"{kind}={name}", f"is not one of {known}", hint=nearest(str(name), SOLVER_NAMES[kind]))
        if chosen.setdefault(kind, name) != name:
            raise origin.refuse(f"{kind}={name}", f"contradicts {kind}={chosen[kind]}")
    return chosen


def parse_gpu_profiles(value: Any, origin: Origin) -> tuple[Profile, ...]:
    """Files of `spotserve profile --out`, several of them as a list or with commas between."""
    return tuple(model_of(Profile, Path(name), what=origin.name) for name in listed(value, origin))


def listed(value: Any, origin: Origin) -> tuple[str, ...]:
    """Words with commas between, or a list of them."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise origin.refuse(value, "is not a list", hint="write the names with commas between")
    return tuple(parse_text(item.strip() if isinstance(item, str) else item, origin) for item in items)


SETTINGS = (
    Setting("model", "model", parse_text),
    Setting("verify_weights", "verify_weights", parse_flag),
    Setting("instances", "instances", integer(0, 1024)),
    Setting("gpus_per_instance", "gpus_per_instance", integer(1, 64)),
    Setting("gpu_memory", "gpu_memory", parse_gpu_memory),
    Setting("gpu_profile", "gpu_profiles", parse_gpu_profiles),
    Setting("gpu_types", "gpu_types", listed),
    Setting("data_parallel_size", "data", integer(1, MAX_DEGREE), aliases=("dp",)),
    Setting("pipeline_parallel_size", "pipeline", integer(1, MAX_DEGREE), aliases=("pp",)),
    Setting("tensor_parallel_size", "tensor", integer(1, MAX_DEGREE), aliases=("tp",)),
    Setting("dtype", "dtype", choice(get_args(DType))),
    Setting("device", "device", choice(get_args(Device))),
    Setting("policy", "policy", choice(POLICY_NAMES)),
    Setting("solver", "solvers", parse_solvers),
    Setting("trace", "trace", parse_text),
    Setting("host", "host", parse_text),
    Setting("port", "port", integer(0, 65535)),
    Setting("max_model_len", "max_model_len", integer(1, 2**24)),
    Setting("max_num_seqs", "max_num_seqs", integer(1, 4096)),
    Setting("spare_instances", "spare_instances", integer(0, 1024)),
    Setting("max_queue", "max_queue", integer(1, 1_000_000)),
    Setting("served_model_name", "served_model_name", parse_text),
    Setting("api_key", "api_key", parse_text, secret=True),
    Setting("state_dir", "state_dir", parse_text),
    Setting("seed", "seed", integer(0, 2**63 - 1)),
    Setting("deterministic", "deterministic", parse_flag),
    Setting("linear", "linear", choice(get_args(LinearKind))),
    Setting("drain", "drain_s", seconds(0)),
    Setting("orphan_timeout", "orphan_timeout_s", seconds(0.1)),
    Setting("log_format", "log_format", choice(get_args(LogFormat))),
)
BY_KEY = {key: setting for setting in SETTINGS for key in (setting.key, *setting.aliases)}


def run_options(
    flags: Mapping[str, object], *, environment: Mapping[str, str], config_file: Path | None, fresh: bool = False
) -> RunOptions:
    """The options of a daemon out of every source.

    Args:
        flags: setting key -> what the command line said; None means that it said nothing.
        environment: the variables of the process.
        config_file: a TOML file, or None for none.
        fresh: begin a new journal; deliberately neither a variable nor a key of the file.
    """
    if config_file is None and environment.get("SPOTSERVE_CONFIG"):
        config_file = Path(environment["SPOTSERVE_CONFIG"])
    values: dict[str, object] = {}
    if config_file is not None:
        values |= from_file(config_file)
    values |= from_environment(environment)
    values |= from_flags(flags)
    port = values.get("port", RunOptions.model_fields["port"].default)
    values.setdefault("state_dir", str(state_dir_of(cast("int", port), environment)))
    options = RunOptions(**values, fresh=fresh)  # type: ignore[arg-type]  # each parser gives its field's type
    check_together(options)
    return options


def from_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """Field -> value of what the command line said."""
    return {
        BY_KEY[key].field: BY_KEY[key].parse(value, Origin(flag_of(key), secret=BY_KEY[key].secret))
        for key, value in flags.items()
        if value is not None and value != []
    }


def from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """Field -> value of every `SPOTSERVE_*` variable; an empty one counts as not set."""
    found: dict[str, object] = {}
    for variable in sorted(environment):
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or name in OTHER_VARIABLES or not environment[variable]:
            continue
        setting = setting_called(name.lower(), variable, known=[ENVIRONMENT_PREFIX + key.upper() for key in BY_KEY])
        if setting.field in found:
            raise SpecError(f"{variable} sets {setting.key} twice", hint="unset one of the two names of it")
        found[setting.field] = setting.parse(environment[variable], Origin(variable, secret=setting.secret))
    return found


def from_file(path: Path) -> dict[str, object]:
    """Field -> value of a TOML file's keys; `gpu-memory` and `gpu_memory` are one key."""
    found: dict[str, object] = {}
    for key, value in toml_table(path, what="--config").items():
        setting = setting_called(
            key.replace("-", "_"), f"{path}: {key}", known=[known.replace("_", "-") for known in BY_KEY]
        )
        if setting.field in found:
            raise SpecError(f"{path}: {key} sets {setting.key} twice", hint="keep one of the two spellings")
        found[setting.field] = setting.parse(value, Origin(f"{path}: {key}", secret=setting.secret))
    return found


def setting_called(key: str, place: str, *, known: Iterable[str]) -> Setting:
    """The setting with this key."""
    if key not in BY_KEY:
        spelt = place.rsplit(" ", 1)[-1]
        raise SpecError(f"{place} is not a setting", hint=nearest(spelt, known))
    return BY_KEY[key]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """`did you mean …?` with the closest known word."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else None


def flag_of(key: str) -> str:
    """How the command line spells a key."""
    return "MODEL" if key == "model" else "--" + key.replace("_", "-")


def state_dir_of(port: int, environment: Mapping[str, str]) -> Path:
    """Where the daemon at `port` keeps its state unless told otherwise."""
    # Here and not above: the store brings the journal and with it the controller, which no other verb shall wait for.
    from spotserve.store.state_dir import default_state_dir

    return default_state_dir(port, environment)


def check_together(options: RunOptions) -> None:
    """What no value says by itself."""
    if not is_loopback(options.host) and options.api_key is None:
        raise SpecError(
            f"--host {options.host} is not loopback and there is no API key",
            hint="set SPOTSERVE_API_KEY, or leave --host at 127.0.0.1",
        )
    if options.linear == "prepacked" and options.device != "cpu":
        raise SpecError(
            f"--linear prepacked is not supported by --device {options.device}", hint="leave out --linear prepacked"
        )
    check_gpu_types(options)
    if options.port == 0 and Path(options.state_dir).parts[-2:] == ("spotserve", "0"):
        raise SpecError("--port 0 has no state dir of its own", hint="name one with --state-dir")
    if options.trace is not None and not os.path.isfile(options.trace):
        raise SpecError(f"--trace {options.trace} is not a file")
    if options.instances == 0 and options.trace is None:
        raise SpecError(
            "--instances 0 is below 1 and no --trace adds any", hint="give --instances 1 or more, or a --trace"
        )


def check_gpu_types(options: RunOptions) -> None:
    """Every GPU type that is named has times, and the solver that is asked for knows several."""
    known = [profile.device for profile in options.gpu_profiles]
    for name in known:
        if name == OWN or known.count(name) > 1:
            told = "stands for the type of this machine" if name == OWN else "is there twice"
            raise SpecError(f"--gpu-profile of the device {name!r} {told}", hint="the file's `device` names its type")
    for name in options.gpu_types:
        if name not in (OWN, *known):
            raise SpecError(
                f"--gpu-types {name} has no times: it is not one of {', '.join([OWN, *known])}",
                hint="give them by --gpu-profile, a file of spotserve profile --out",
            )
    solver = options.solvers.get("configure", "paper" if options.policy == "paper" else "cpsat")
    if known and solver != "cpsat":
        raise SpecError(
            f"the solver configure={solver} knows fleets of one GPU type only, and --gpu-profile gives another",
            hint="--solver configure=cpsat",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host in LOOPBACK_HOSTS:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
