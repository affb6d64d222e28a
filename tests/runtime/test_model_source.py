"""MODEL is a folder or a hub id; a hub id is downloaded by a real process from a real HTTP server on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from spotserve.app import BUILTIN_MODEL
from spotserve.core.ports import StartStage
from spotserve.errors import HubError, ModelError, SpotServeError
from spotserve.runtime.checkpoint_header import validate_checkpoint
from spotserve.runtime.model_manifest import expectations, resolve_manifest
from spotserve.runtime.model_source import HUB_ID, TOKEN_VARIABLES, resolve_model, without_secrets
from tests.e2e.daemon import SPOTSERVE
from tests.runtime.hub import Hub, serving_hub

NOWHERE = "http://127.0.0.1:9"
TOKEN = "hf_secret_of_this_test"


@dataclass
class Told:
    """What a start's progress was told."""

    lines: list[tuple[StartStage, int, int]] = field(default_factory=list)

    def show(self, stage: StartStage, done: int, total: int) -> None:
        """Note it."""
        self.lines.append((stage, done, total))

    def end(self) -> None:
        """Nothing to close."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client asks, and an empty cache."""
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serving_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def refused(model: str, kind: type[SpotServeError]) -> SpotServeError:
    """The error of a model that cannot be had: one line, with a hint, and no token in it."""
    with pytest.raises(kind) as caught:
        resolve_model(model, Told())
    error = caught.value
    assert type(error) is kind
    assert "\n" not in error.message
    assert error.hint
    assert TOKEN not in error.message + error.hint
    return error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("Org-1/na.me_2@v1.0", ("Org-1/na.me_2", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        *((text, None) for text in ("/a/b", "./a", "a/b/c", "org/", "~/x", "a b", "org/name@", "-x/y", "a/.b", "")),
    ],
)
def test_what_looks_like_a_hub_id(text: str, expected: tuple[str, str | None] | None) -> None:
    """Tests which texts that are no folder are asked for on the hub."""
    matched = HUB_ID.fullmatch(text)
    assert expected == (None if matched is None else (matched["id"], matched["revision"]))


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that what is there is a folder even if it reads like a hub id, and that a file is told to be one."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    source = resolve_model("org/name", Told())
    assert (Path("org/name"), "name") == (source.folder, source.name)
    with pytest.raises(ModelError, match="MODEL file is not a folder"):
        resolve_model("file", Told())
    with pytest.raises(ModelError, match=r"MODEL \.\./org/x is not a folder"):
        resolve_model("../org/x", Told())


@pytest.mark.parametrize("model", ["a" * 300, "./" + "a" * 300, "\udcff", "x" * 5000])
def test_a_name_that_no_folder_can_have_is_refused(model: str) -> None:
    """Tests that a name that is too long for the file system, or is no text, is one clear line."""
    refused(model, ModelError)


def test_a_folder_whose_path_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that it is refused, however it is named, before anything of it has to be sent or logged."""
    folder = tmp_path / os.fsdecode(b"m\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    for model in (str(folder), "."):
        assert r"m\udcff' is no UTF-8 text" in refused(model, ModelError).message


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """Tests that a folder below one that may not be entered, and one that may not be listed, are named."""
    (tmp_path / "parent" / "model").mkdir(parents=True)
    (tmp_path / "parent").chmod(0)
    with unprivileged():
        error = refused(str(tmp_path / "parent" / "model"), ModelError)
        assert f"MODEL {tmp_path / 'parent' / 'model'} cannot be read: Permission denied" == error.message
        with pytest.raises(ModelError, match="parent cannot be listed: Permission denied"):
            expectations(tmp_path / "parent")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions count for the superuser too."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_is_printed_there_is_no_answer(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a download goes on when anything in its process, here before our first line, prints to stdout."""
    hub.add("org/tiny", BUILTIN_MODEL)
    (tmp_path / "sitecustomize.py").write_text("print('a word of the client')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert resolve_model("org/tiny", Told()).folder.is_dir()


@pytest.mark.parametrize(("variable", "value"), [("HF_HUB_ETAG_TIMEOUT", "abc"), ("PYTHONPATH", "")])
def test_a_client_that_does_not_start_is_one_line(
    hub: Hub, variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that the last word of a process that ended without an answer is told, and no secret in it."""
    hub.add("org/tiny", BUILTIN_MODEL)
    code = f"import os, sys; print('asked http://u:{TOKEN}@hub', file=sys.stderr); sys.stderr.flush(); os._exit(3)"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv(variable, value or str(tmp_path))
    with pytest.raises(SpotServeError, match=r"the download of org/tiny ended with [13]: (ValueError|asked)") as caught:
        resolve_model("org/tiny", Told())
    assert "\n" not in caught.value.message
    assert TOKEN not in caught.value.message


def test_a_hub_id_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    """Tests that the served files come and no other, bytes are told, a second time asks for none, offline neither."""
    repository = hub.add("org/tiny", BUILTIN_MODEL)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "README.md"):
        repository.files[name] = b"not for us"
    told = Told()
    source = resolve_model("org/tiny", told)
    assert "org/tiny" == source.name
    assert repository.commit == source.folder.name
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected == {path.name for path in source.folder.iterdir()} == set(hub.downloaded())
    size = len(repository.files["model.safetensors"])
    assert ("download", size, size) == told.lines[-1]
    hub.asked.clear()
    assert source == resolve_model("org/tiny@main", Told())
    assert [] == hub.downloaded()
    assert validate_checkpoint(source.folder).digest == validate_checkpoint(BUILTIN_MODEL).digest
    manifest = resolve_manifest(validate_checkpoint(source.folder), cache=tmp_path / "cache", progress=Told())
    assert expected == {file.name for file in manifest.files}


def test_shards_come_by_the_index(hub: Hub) -> None:
    """Tests that of a sharded repository exactly the files that its index names come."""
    repository = hub.add("org/sharded", BUILTIN_MODEL)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*shards, "model-00003-of-00003.safetensors"):
        repository.files[name] = b"bytes of " + name.encode()
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    repository.files["model.safetensors.index.json"] = json.dumps(index).encode()
    folder = resolve_model("org/sharded", Told()).folder
    assert shards == sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_the_cache_serves_without_a_hub(hub: Hub, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that what is in the cache is served with HF_HUB_OFFLINE=1 and with no network; what is not is refused."""
    hub.add("org/tiny", BUILTIN_MODEL)
    source = resolve_model("org/tiny", Told())
    hub.asked.clear()
    monkeypatch.setenv(variable, "1" if variable == "HF_HUB_OFFLINE" else NOWHERE)
    assert source == resolve_model("org/tiny", Told())
    (source.folder / "model.safetensors").unlink()
    error = refused("org/tiny", HubError)
    assert ("HF_HUB_OFFLINE is set" if variable == "HF_HUB_OFFLINE" else f"{NOWHERE} cannot") in error.message
    assert [] == hub.asked


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/none", "org/none is no folder here, and http://.* has no such public model"),
        ("org/tiny@v9", "org/tiny has no revision v9"),
        ("org/gated", "org/gated is gated"),
        ("org/pickled", r"org/pickled has only pickled weights \(pytorch_model.bin\)"),
        ("org/foreign", "architecture NoSuchForCausalLM is not supported"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(hub: Hub, model: str, message: str) -> None:
    """Tests one clear line for each, and that no weights are downloaded of a model that cannot be served."""
    hub.add("org/tiny", BUILTIN_MODEL)
    hub.add("org/gated", BUILTIN_MODEL, is_gated=True)
    pickled = hub.add("org/pickled", BUILTIN_MODEL).files
    pickled["pytorch_model.bin"] = pickled.pop("model.safetensors")
    foreign = hub.add("org/foreign", BUILTIN_MODEL).files
    foreign["config.json"] = json.dumps({"architectures": ["NoSuchForCausalLM"]}).encode()
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(model, Told())
    assert "\n" not in caught.value.message
    assert not [name for name in hub.downloaded() if not name.endswith(".json")]


def test_a_token_opens_and_is_not_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that HF_TOKEN opens a private repository, and that a wrong one is not repeated in the refusal."""
    hub.add("org/private", BUILTIN_MODEL, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    refused("org/private", ModelError)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve_model("org/private", Told()).folder.is_dir()


def test_the_password_of_a_hub_is_not_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that what cannot be had names the hub that was asked without the password in its address."""
    hub.add("org/gated", BUILTIN_MODEL, is_gated=True)
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", "://user:pass@word@"))
    for model in ("org/none", "org/gated"):
        error = refused(model, ModelError)
        assert hub.url in error.message + str(error.hint)
        assert "user" not in error.message + str(error.hint)
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refused("org/none", HubError).message


def test_secrets_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests each place that a token or a password may stand in, and that nothing else is touched."""
    for variable in TOKEN_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    plain = "org/name@main of https://hub/org@x and mail@here"
    assert plain == without_secrets(plain)
    assert "a http://hub/x, https://h" == without_secrets("a http://user:pass@word@hub/x, https://token@h")
    monkeypatch.setenv(TOKEN_VARIABLES[0], TOKEN)
    monkeypatch.setenv(TOKEN_VARIABLES[1], "other")
    assert "<hidden> and <hidden>" == without_secrets(f"{TOKEN} and other")


def test_a_corrupt_download_is_found(hub: Hub, tmp_path: Path) -> None:
    """Tests that a weight byte that changed on its way is found by the SHA-256 that the hub told, the file named."""
    hub.add("org/bent", BUILTIN_MODEL, corrupt={"model.safetensors"})
    layout = validate_checkpoint(resolve_model("org/bent", Told()).folder)
    with pytest.raises(ModelError, match=r"model\.safetensors has sha256 \w{64}, but the hub says \w{64}") as caught:
        resolve_manifest(layout, cache=tmp_path / "cache", progress=Told())
    blob = (layout.folder / "model.safetensors").resolve()
    assert f"delete {blob} and start again, which downloads it" == caught.value.hint
    blob.unlink()
    hub.repositories["org/bent"].corrupt.clear()
    mended = validate_checkpoint(resolve_model("org/bent", Told()).folder)
    assert resolve_manifest(mended, cache=tmp_path / "cache", progress=Told()).files


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_ends_with_its_caller(hub: Hub, tmp_path: Path, number: signal.Signals) -> None:
    """Tests that Ctrl-C in the middle of a download is exit 130 at once, and that nothing downloads on without us."""
    hub.add("org/stuck", BUILTIN_MODEL, stuck={"model.safetensors"})
    command = [SPOTSERVE, "run", "org/stuck", "--port", "0", "--state-dir", str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: "model.safetensors" in hub.downloaded())
        children = psutil.Process(process.pid).children()
        assert 1 == len(children)
        process.send_signal(number)
        said = process.communicate(timeout=20)
    assert (130 if number == signal.SIGINT else -number, (b"", b"")) == (process.returncode, said)
    assert [] == psutil.wait_procs(children, timeout=20)[1]
    assert not (tmp_path / "state").exists()


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
