"""What `spotserve run` cannot do is one clear line and the right exit code, and nothing is started or written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from spotserve.app import BUILTIN_MODEL
from spotserve.cli.main import run_verb
from spotserve.runtime.forkserver_client import ForkServer
from spotserve.store.state_dir import StateDir
from tests.e2e.daemon import SPOTSERVE, free_port

LINES = re.compile(r"error: (?P<message>[^\n]+)\n(hint: (?P<hint>[^\n]+)\n)?")
LINE_CHARS = 400


def damaged(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """A copy of the built-in model with something wrong about it, as the MODEL of a command line."""

    def arguments(folder: Path) -> list[str]:
        model = folder / "model"
        shutil.copytree(BUILTIN_MODEL, model)
        change(model)
        return [str(model)]

    return arguments


def config(**changes: Any) -> Callable[[Path], None]:
    """Other values in `config.json`."""

    def change(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other bytes in the safetensors file."""

    def write(model: Path) -> None:
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return write


def only_pickled(model: Path) -> None:
    """`.bin` instead of safetensors."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def wrong_index(model: Path) -> None:
    """An index that names a tensor the file does not hold."""
    index = {"metadata": {}, "weight_map": {"model.no.such.weight": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another header in front of the same data."""

    def write(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        change(content)
        raw = json.dumps(content).encode()
        return len(raw).to_bytes(8, "little") + raw + data[8 + length :]

    return weights(write)


def overlapping(content: dict[str, Any]) -> None:
    """Two tensors of one size at the same place."""
    content["model.layers.1.input_layernorm.weight"] = content["model.layers.0.input_layernorm.weight"]


def missing_shard(model: Path) -> None:
    """An index that names a file that is not there."""
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def pipe(model: Path) -> None:
    """A FIFO that nobody writes to."""
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


def bad_trace(text: str) -> Callable[[Path], list[str]]:
    """A trace file with this text."""

    def arguments(folder: Path) -> list[str]:
        (folder / "trace.json").write_text(text)
        return ["--trace", str(folder / "trace.json")]

    return arguments


def toml(text: str) -> Callable[[Path], list[str]]:
    """A configuration file with this text."""

    def arguments(folder: Path) -> list[str]:
        (folder / "spotserve.toml").write_text(text)
        return ["--config", str(folder / "spotserve.toml")]

    return arguments


def flags(*words: str) -> Callable[[Path], list[str]]:
    """These words as they are."""
    return lambda folder: list(words)


AT_ONCE: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing folder": (flags("/no/such/folder"), r"/no/such/folder is not a folder"),
    "no hub id": (flags("org/name/more"), r"MODEL org/name/more is not a folder"),
    "no folder": (flags(__file__), r"test_bad_input\.py is not a folder"),
    "no config": (damaged(lambda model: (model / "config.json").unlink()), r"has no config\.json"),
    "config no JSON": (
        damaged(lambda model: (model / "config.json").write_text("{")),
        r"config\.json is not valid JSON",
    ),
    "unknown architecture": (
        damaged(config(architectures=["NoSuchForCausalLM"])),
        r"architecture NoSuchForCausalLM is not supported",
    ),
    "own code": (
        damaged(config(architectures=["EvilModel"], auto_map={"AutoModel": "evil.EvilModel"})),
        r"architecture EvilModel is not supported",
    ),
    "quantised": (damaged(config(quantization_config={"bits": 4})), r"has a quantization_config"),
    "only pickled": (damaged(only_pickled), r"has only pickled weights \(pytorch_model\.bin\)"),
    "no weights": (damaged(lambda model: (model / "model.safetensors").unlink()), r"has no model\.safetensors"),
    "truncated": (damaged(weights(lambda data: data[:-100])), r"has \d+ bytes, its header describes \d+"),
    "cut in its header": (damaged(weights(lambda data: data[:20])), r"header length \d+ exceeds 12 bytes"),
    "corrupt header": (damaged(weights(lambda data: data[:9] + b"\xff" + data[10:])), r"header is not valid JSON"),
    "overlapping": (damaged(header(overlapping)), r"model\.safetensors: \S+ starts at byte \d+, expected \d+"),
    "oversized header": (
        damaged(weights(lambda data: b"\xff" * 7 + b"\x00" + data[8:])),
        r"model\.safetensors: header length \d+ exceeds \d+ bytes",
    ),
    "unknown type": (
        damaged(header(lambda content: content["model.norm.weight"].update(dtype="F4"))),
        r"model\.safetensors: model\.norm\.weight has unknown dtype 'F4'",
    ),
    "missing shard": (damaged(missing_shard), r"model-00002-of-00002\.safetensors is missing"),
    "pipe": (damaged(pipe), r"model\.safetensors is not a regular file"),
    "layers without end": (
        damaged(config(num_hidden_layers=10**9)),
        r"config\.json: num_hidden_layers 1000000000 is not a whole number from 1 to",
    ),
    "negative width": (damaged(config(hidden_size=-4)), r"config\.json: hidden_size -4 is not a whole number"),
    "wrong index": (damaged(wrong_index), r"holds model\.no\.such\.weight, but it does not"),
    "corrupt tokenizer": (
        damaged(lambda model: (model / "tokenizer.json").write_text("{}")),
        r"tokenizer\.json cannot be read",
    ),
    "bad generation config": (
        damaged(lambda model: (model / "generation_config.json").write_text('{"temperature": -1}')),
        r"generation_config\.json: temperature -1",
    ),
    "dtype": (flags("--dtype", "int8"), r"--dtype int8 is not one of float32"),
    "device": (flags("--device", "tpu"), r"--device tpu is not one of cpu, cuda"),
    "policy": (flags("--policy", "liv"), r"--policy liv is not one of live"),
    "solver kind": (flags("--solver", "plaice=assignment"), r"--solver plaice is not one of"),
    "solver name": (flags("--solver", "place=magic"), r"--solver place=magic is not one of"),
    "no instances": (flags("--instances", "0"), r"--instances 0 is below 1"),
    "too many instances": (flags("--instances", "2000"), r"--instances 2000 is not between 0 and 1024"),
    "too many workers": (
        flags("--instances", "1024", "--gpus-per-instance", "64"),
        r"65536 workers exceed \d+, which is what \d+ cores and [\d.]+ GiB of free memory can run",
    ),
    "memory": (flags("--gpu-memory", "lots"), r"--gpu-memory lots is not a size"),
    "port": (flags("--port", "70000"), r"--port 70000 is not between 0 and 65535"),
    "open host": (flags("--host", "0.0.0.0"), r"--host 0\.0\.0\.0 is not loopback and there is no API key"),
    "no host": (flags("--host", "no.such.host.invalid", "--api-key", "k"), r"no\.such\.host\.invalid .* is no address"),
    "no trace": (flags("--trace", "/no/such/trace"), r"--trace /no/such/trace is not a file"),
    "trace no JSON": (bad_trace("{"), r"trace\.json"),
    "trace backwards": (
        bad_trace(
            '{"format_version": "0.1", "events": [{"at_s": 5, "kind": "add", "count": 1},'
            ' {"at_s": 1, "kind": "add", "count": 1}]}'
        ),
        r"at 1 s is before the event above it at 5 s",
    ),
    "unknown key": (toml("gpu-memroy = 5"), r"gpu-memroy is not a setting"),
    "no TOML": (toml("instances ="), r"spotserve\.toml is not TOML"),
    "unknown flag": (flags("--gpu-memroy", "5"), r"no such option"),
}
"""Refused before any process starts and any file is written."""

AFTER_A_LOOK: dict[str, tuple[tuple[str, ...], str]] = {
    "tensor degree": (("-tp", "9"), r"tensor degree 9 exceeds 8 reduction chunks"),
    "pipeline degree": (("-pp", "7"), r"stage count 7 exceeds 6 layers"),
    "model too large": (("--gpu-memory", "1MiB"), r"model .* exceed 4 GPUs of 1048576 bytes"),
    "too long": (("--max-model-len", "5000"), r"--max-model-len 5000 exceeds the model's 1024"),
}
"""Refused with the model's parameter table at hand, which a short process writes once: no forkserver, no journal."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting from outside, and no forkserver however a start goes."""
    for variable in [name for name in os.environ if name.startswith("SPOTSERVE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(ForkServer, "start", refuse_process)
    yield
    structlog.reset_defaults()  # It was told to write to what captured this test's stderr.


def refuse_process(*args: object, **more: object) -> None:
    """Stands in for what starts a process."""
    raise AssertionError(f"a process is started: {args} {more}")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], state_dir: Path, *, code: int) -> str:
    """The message of a run that is refused; it may leave neither a listening port nor a journal."""
    port = free_port()
    given = [] if "--port" in arguments else ["--port", str(port)]
    assert code == run_verb(["run", *given, "--state-dir", str(state_dir), *arguments])
    said = capsys.readouterr()
    told = LINES.fullmatch(said.err)
    assert told is not None, said.err
    assert len(told["message"]) <= LINE_CHARS
    assert "" == said.out
    assert not state_dir.is_dir() or [] == list(state_dir.glob("journal*"))
    with socket.socket() as probe:
        assert 0 != probe.connect_ex(("127.0.0.1", port))
    return told["message"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", AT_ONCE)
def test_refused_at_once(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that bad input is one line and exit 2 before a process is started or the state dir is made."""
    monkeypatch.setattr(subprocess, "Popen", refuse_process)
    arguments, expected = AT_ONCE[case]
    message = refused(capsys, arguments(tmp_path), tmp_path / "state", code=2)
    assert re.search(expected, message), message
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("alone")
def test_a_wrong_checksum(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a weight that SHA256SUMS contradicts is found at the very first start, before a process is started."""
    monkeypatch.setattr(subprocess, "Popen", refuse_process)
    [model] = damaged(weights(lambda data: data[:-1] + bytes([data[-1] ^ 1])))(tmp_path)
    right = hashlib.sha256((BUILTIN_MODEL / "model.safetensors").read_bytes()).hexdigest()
    (Path(model) / "SHA256SUMS").write_text(f"{right}  model.safetensors\n")
    message = refused(capsys, [model], tmp_path / "state", code=2)
    assert re.fullmatch(rf"{model}/model\.safetensors has sha256 \w{{64}}, but SHA256SUMS says {right}", message)


@pytest.mark.e2e
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", AFTER_A_LOOK)
def test_refused_after_a_look_at_the_model(
    case: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    daemon_environment: dict[str, str],
) -> None:
    """Tests that what only the model's table can tell is refused before the forkserver and the journal."""
    monkeypatch.setenv("SPOTSERVE_PROFILE_CACHE", daemon_environment["SPOTSERVE_PROFILE_CACHE"])
    arguments, expected = AFTER_A_LOOK[case]
    message = refused(capsys, list(arguments), tmp_path / "state", code=2)
    assert re.search(expected, message), message


@pytest.mark.usefixtures("alone")
def test_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a taken HTTP port is told with exit 1 before the state dir is touched."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(capsys, ["--port", str(port)], tmp_path / "state", code=1)
    assert f"port {port} on 127.0.0.1 cannot be used: Address already in use" == message
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("alone")
def test_unwritable_state_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that a state dir that cannot be made is told with exit 1."""
    (tmp_path / "file").write_text("")
    message = refused(capsys, [], tmp_path / "file" / "state", code=1)
    assert message.endswith("state cannot be written: Not a directory")


@pytest.mark.usefixtures("alone")
def test_state_dir_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests that the state dir of another daemon is left alone, with exit 1 and the holder's pid."""
    with StateDir(tmp_path / "state"):
        term = (tmp_path / "state" / "term").read_text()
        message = refused(capsys, [], tmp_path / "state", code=1)
        assert term == (tmp_path / "state" / "term").read_text()
    assert f"state dir {tmp_path / 'state'} is held by process {os.getpid()}" == message


@pytest.mark.e2e
def test_nothing_lives_on(tmp_path: Path) -> None:
    """Tests with a real process that a start that fails in the forkserver leaves no process and no listening port."""
    port = free_port()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "SPOTSERVE_FORKSERVER": "", "OMP_NUM_THREADS": "1"}
    command = [SPOTSERVE, "run", "--device", "cuda", "--port", str(port), "--state-dir", str(tmp_path / "state")]
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU, so that cuda is no bad input")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert LINES.fullmatch(done.stderr) is not None, done.stderr
    assert 2 == done.returncode
    assert [] == list(tmp_path.glob("spotserve-*"))
    assert [] == list((tmp_path / "state").glob("journal*"))
    deadline_s = time.monotonic() + 10
    while left := subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)
