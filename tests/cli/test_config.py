"""Options of a daemon: precedence, every kind of value, and what is refused with which words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import spotserve
from spotserve.cli.config import (
    BY_KEY,
    OTHER_VARIABLES,
    SETTINGS,
    Origin,
    parse_gpu_memory,
    parse_size_bytes,
    run_options,
)
from spotserve.core.options import POLICY_NAMES, SOLVER_NAMES, GpuMemory, RunOptions
from spotserve.errors import SpecError
from spotserve.solvers.registry import POLICIES, SOLVERS
from tests.specs import small_spec

HOME = {"XDG_STATE_HOME": "/state"}
SLOW = small_spec().profile.model_copy(update={"device": "slow"})


def options(
    flags: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    config_file: Path | None = None,
) -> RunOptions:
    return run_options(flags or {}, environment={**HOME, **(environment or {})}, config_file=config_file)


def refused(
    flags: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    config_file: Path | None = None,
) -> tuple[str, str | None]:
    with pytest.raises(SpecError) as caught:
        options(flags, environment, config_file)
    assert 2 == caught.value.exit_code
    return caught.value.message, caught.value.hint


def toml(folder: Path, text: str) -> Path:
    path = folder / "spotserve.toml"
    path.write_text(text, encoding="utf-8")
    return path


def profile_file(folder: Path, *, device: str = "slow") -> str:
    """What `spotserve profile --out` would have written on a machine of another type."""
    path = folder / f"{device}.json"
    path.write_text(SLOW.model_copy(update={"device": device}).model_dump_json(), encoding="utf-8")
    return str(path)


def test_defaults() -> None:
    """Tests that nothing said gives the documented defaults and a state dir by port."""
    assert RunOptions(state_dir="/state/spotserve/8000") == options()


def test_precedence(tmp_path: Path) -> None:
    """Tests that a flag beats a variable, a variable the file, and the file the default, each key by itself."""
    file = toml(tmp_path, "port = 1\ninstances = 1\nmax-num-seqs = 1\n")
    environment = {"SPOTSERVE_PORT": "2", "SPOTSERVE_INSTANCES": "2"}
    found = options({"port": "3"}, environment, file)
    assert (3, 2, 1, 1024) == (found.port, found.instances, found.max_num_seqs, found.max_queue)
    assert "/state/spotserve/3" == found.state_dir


def test_every_setting_reaches_its_field(tmp_path: Path) -> None:
    """Tests that the file can say everything, and that the variables say the same."""
    trace = tmp_path / "trace.txt"
    trace.touch()
    said = {
        "model": '"folder"',
        "instances": "2",
        "gpus_per_instance": "2",
        "gpu_memory": '"80%"',
        "gpu_profile": f'"{profile_file(tmp_path)}"',
        "gpu_types": '"own,slow"',
        "data_parallel_size": "1",
        "pipeline_parallel_size": "2",
        "tensor_parallel_size": "3",
        "dtype": '"bfloat16"',
        "device": '"cuda"',
        "policy": '"reroute"',
        "solver": '"place=rank-order"',
        "trace": f'"{trace}"',
        "host": '"::1"',
        "port": "80",
        "max_model_len": "64",
        "max_num_seqs": "4",
        "spare_instances": "2",
        "max_queue": "9",
        "served_model_name": '"me"',
        "api_key": '"secret"',
        "state_dir": '"/somewhere"',
        "seed": "7",
        "deterministic": "false",
        "linear": '"plain"',
        "drain": "1.5",
        "orphan_timeout": "2.5",
        "log_format": '"json"',
        "verify_weights": "true",
    }
    expected = RunOptions(
        model="folder",
        instances=2,
        gpus_per_instance=2,
        gpu_memory=GpuMemory(free_share=0.8),
        gpu_profiles=(SLOW,),
        gpu_types=("own", "slow"),
        data=1,
        pipeline=2,
        tensor=3,
        dtype="bfloat16",
        device="cuda",
        policy="reroute",
        solvers={"place": "rank-order"},
        trace=str(trace),
        host="::1",
        port=80,
        max_model_len=64,
        max_num_seqs=4,
        spare_instances=2,
        max_queue=9,
        served_model_name="me",
        api_key="secret",
        state_dir="/somewhere",
        seed=7,
        deterministic=False,
        drain_s=1.5,
        orphan_timeout_s=2.5,
        log_format="json",
        verify_weights=True,
    )
    assert {setting.key for setting in SETTINGS} == set(said)
    assert set(RunOptions.model_fields) == {setting.field for setting in SETTINGS} | {"fresh"}
    file = toml(tmp_path, "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in said.items()))
    assert expected == options(config_file=file)
    assert expected == options(environment={"SPOTSERVE_" + k.upper(): v.strip('"') for k, v in said.items()})


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("6MiB", 6 * 2**20), ("6 MiB", 6 * 2**20), ("1.5gib", 3 * 2**29), ("2GB", 2 * 10**9), ("80kb", 80_000), ("7", 7)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    """Tests that sizes are read with decimal and binary units, whatever the case."""
    assert size_bytes == parse_size_bytes(text, Origin("--gpu-memory"))


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1MiB", "6XiB", "0", "1e3", "nan", "0%", "101%", "%", "6 7", "9999999TiB"]
)
def test_refuses_sizes(text: str) -> None:
    """Tests that what is no size is refused by name and value."""
    with pytest.raises(SpecError) as caught:
        parse_gpu_memory(text, Origin("--gpu-memory"))
    assert caught.value.message.startswith(f"--gpu-memory {text} is not ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"instances": "many"}, "--instances many is not a whole number"),
        ({"instances": "2.0"}, "--instances 2.0 is not a whole number"),
        ({"instances": "-1"}, "--instances -1 is not between 0 and 1024"),
        ({"instances": "0"}, "--instances 0 is below 1 and no --trace adds any"),
        ({"port": "65536"}, "--port 65536 is not between 0 and 65535"),
        ({"port": "0"}, "--port 0 has no state dir of its own"),
        ({"tensor_parallel_size": "0"}, "--tensor-parallel-size 0 is not between 1 and 1024"),
        ({"drain": "nan"}, "--drain nan is not a number of seconds"),
        ({"drain": "inf"}, "--drain inf is not a number of seconds"),
        ({"drain": "-1"}, "--drain -1 is not between 0 and 86400 seconds"),
        ({"orphan_timeout": "0"}, "--orphan-timeout 0 is not between 0.1 and 86400 seconds"),
        ({"dtype": "int8"}, "--dtype int8 is not one of float32, bfloat16, float16"),
        ({"solver": ["place"]}, "--solver ['place'] is not kind=name"),
        ({"solver": ["plaec=x"]}, "--solver plaec is not one of configure, place, migrate, arrange, ladder, move"),
        ({"solver": ["place=rank-order", "place=reuse"]}, "--solver place=reuse contradicts place=rank-order"),
        ({"model": ""}, "MODEL  is empty"),
        ({"trace": "/nowhere/trace"}, "--trace /nowhere/trace is not a file"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 is not loopback and there is no API key"),
        ({"host": "gpu.example"}, "--host gpu.example is not loopback and there is no API key"),
    ],
)
def test_refuses_values(flags: dict[str, object], message: str) -> None:
    """Tests that each wrong value is told as what, value and bound."""
    assert message == refused(flags)[0]


def test_host_beyond_loopback_needs_a_key() -> None:
    """Tests that an API key opens what is refused without one, and that all of 127/8 is loopback."""
    assert "0.0.0.0" == options({"host": "0.0.0.0"}, {"SPOTSERVE_API_KEY": "k"}).host
    assert "127.0.0.2" == options({"host": "127.0.0.2"}).host


def test_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    """Tests that a misspelt key is refused wherever it stands, with the nearest name in that place's spelling."""
    file = toml(tmp_path, "gpu-memry = 1\n")
    assert (f"{file}: gpu-memry is not a setting", "did you mean gpu-memory?") == refused(config_file=file)
    assert ("SPOTSERVE_INSTANCE is not a setting", "did you mean SPOTSERVE_INSTANCES?") == refused(
        environment={"SPOTSERVE_INSTANCE": "1"}
    )


def test_other_variables_are_no_settings() -> None:
    """Tests that variables of the client and the tests, empty ones and other people's change nothing."""
    environment = dict.fromkeys([f"SPOTSERVE_{name}" for name in OTHER_VARIABLES - {"CONFIG"}], "x")
    assert options() == options(environment={**environment, "SPOTSERVE_PORT": "", "OTHER_PORT": "1"})


def test_every_variable_of_the_source_is_known() -> None:
    """Tests that no part of the package reads a SPOTSERVE_* variable that `run` would refuse as unknown."""
    sources = [path.read_text(encoding="utf-8") for path in Path(spotserve.__file__).parent.rglob("*.py")]
    named = {name for source in sources for name in re.findall(r'"SPOTSERVE_([A-Z_]*[A-Z])"', source)}
    assert set() == named - OTHER_VARIABLES - {key.upper() for key in BY_KEY}


def test_linear(tmp_path: Path) -> None:
    """Tests that the kind of linear is taken from each source, and that it is refused where there is none such."""
    file = toml(tmp_path, 'linear = "prepacked"\n')
    for said in (options({"linear": "prepacked"}), options(environment={"SPOTSERVE_LINEAR": "prepacked"})):
        assert "prepacked" == said.linear == options(config_file=file).linear
    assert "plain" == options().linear
    assert "--linear packed is not one of plain, prepacked" in refused({"linear": "packed"})[0]
    assert "--linear prepacked is not supported by --device cuda" in refused({"device": "cuda"}, config_file=file)[0]


def test_config_file_by_variable(tmp_path: Path) -> None:
    """Tests that SPOTSERVE_CONFIG names the file when --config does not."""
    assert 9 == options(environment={"SPOTSERVE_CONFIG": str(toml(tmp_path, "port = 9\n"))}).port


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = ", "is not TOML"),
        ("port = true\n", "port True is not a whole number"),
        ("gpu-memory = 1\ngpu_memory = 2\n", "sets gpu_memory twice"),
        ("dp = 1\ndata-parallel-size = 2\n", "sets data_parallel_size twice"),
        ("deterministic = 3\n", "deterministic 3 is neither true nor false"),
        ("host = 3\n", "host 3 is not a text"),
        ("fresh = true\n", "fresh is not a setting"),
        ("[solver]\nplace = 3\n", "solver place=3 is not one of makespan, reuse, paper, paper-artifact, rank-order"),
        ("x = " + "[" * 100_000, "is not TOML: nesting exceeds"),
        ("# " + "x" * (4 * 1024 * 1024), "is malformed at file: it is larger than"),
        ("port = 1" + "0" * 400, "is malformed at port: an integer is beyond"),
    ],
)
def test_refuses_files(tmp_path: Path, text: str, words: str) -> None:
    """Tests that broken, doubled and wrongly typed keys are refused with the file's name."""
    file = toml(tmp_path, text)
    message = refused(config_file=file)[0]
    assert str(file) in message
    assert words in message


def test_missing_file(tmp_path: Path) -> None:
    """Tests that a config file that is not there, or a pipe that nobody writes, is refused, not ignored or awaited."""
    assert refused(config_file=tmp_path / "none.toml")[0].endswith("cannot be read: No such file or directory")
    os.mkfifo(tmp_path / "pipe")
    assert refused(config_file=tmp_path / "pipe")[0].endswith("cannot be read: it is not a regular file")


def test_solver_table(tmp_path: Path) -> None:
    """Tests that the file may list solvers as a table and a flag as several kind=name."""
    file = toml(tmp_path, '[solver]\nplace = "rank-order"\nmigrate = "layered"\n')
    expected = {"place": "rank-order", "migrate": "layered"}
    assert expected == options(config_file=file).solvers
    assert expected == options({"solver": ["place=rank-order", "migrate=layered"]}).solvers


def test_names_are_those_of_the_registry() -> None:
    """Tests that the command line knows exactly the policies and solvers that there are."""
    assert (POLICIES, SOLVERS) == (POLICY_NAMES, SOLVER_NAMES)


@pytest.mark.parametrize("value", ["own, slow", ["own", "slow"]])
def test_types_of_instances(tmp_path: Path, value: object) -> None:
    """Tests that types are read as a list or with commas between."""
    assert ("own", "slow") == options({"gpu_profile": [profile_file(tmp_path)], "gpu_types": value}).gpu_types


def test_types_need_times(tmp_path: Path) -> None:
    """Tests that a type without times, times given twice, and a solver that knows one type only are refused."""
    file = profile_file(tmp_path)
    given = {"gpu_profile": [file]}
    assert "--gpu-types fast has no times: it is not one of own, slow" == refused({**given, "gpu_types": "fast"})[0]
    assert "--gpu-types slow has no times: it is not one of own" == refused({"gpu_types": "slow"})[0]
    assert "--gpu-types  is empty" == refused({**given, "gpu_types": "own,,slow"})[0]
    assert "--gpu-profile of the device 'slow' is there twice" == refused({"gpu_profile": [file, file]})[0]
    for other, name in (({"solver": ["configure=enumerate"]}, "enumerate"), ({"policy": "paper"}, "paper")):
        message, hint = refused({**given, **other})
        assert f"the solver configure={name} knows fleets of one GPU type only, and --gpu-profile" in message
        assert "--solver configure=cpsat" == hint
    assert options({**given, "policy": "paper", "solver": ["configure=cpsat"]}).gpu_profiles == (SLOW,)
    own = profile_file(tmp_path, device="own")
    assert "--gpu-profile of the device 'own' stands for" in refused({"gpu_profile": own})[0]


@pytest.mark.parametrize("text", ["", "{}", '{"device": NaN}', "[" * 100_000])
def test_refuses_profiles(tmp_path: Path, text: str) -> None:
    """Tests that a file that is no profile is refused by name, with where it is wrong."""
    (tmp_path / "bad.json").write_text(text)
    message, hint = refused({"gpu_profile": [str(tmp_path / "bad.json")]})
    assert message.startswith(f"--gpu-profile {tmp_path / 'bad.json'} is malformed at ")
    assert hint is not None


def test_secrets_are_not_told(tmp_path: Path) -> None:
    """Tests that neither an error message nor the options' repr shows the API key."""
    assert "sesame" not in repr(options({"api_key": "sesame"}))
    assert "12345" not in refused(config_file=toml(tmp_path, "api-key = 12345\n"))[0]
