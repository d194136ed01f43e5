"""Models of the hub, tried against a small hub of our own on the loopback."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.models import remote_headers
from stages.models.safetensors_header import TensorEntry, file_bytes, read_header
from tests import sparse, tiny

COMMIT = "a" * 40
TOKEN = "hf_SentinelSentinelSentinelSentinel"
CALL = """
import json, sys
from stages.models.checkpoint import find
from stages.errors import ModelError
try:
    found = find(sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps({"path": str(found.path), "identity": found.identity, "components": list(found.components)}))
except ModelError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """One folder as the repositories org/open, org/gated (it asks for a token) and org/broken (it never answers)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.fetched: list[str] = []
        self.sent = 0
        self.claimed: dict[str, int] = {}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        at = re.fullmatch(r"/(?:api/models/)?(org/\w+)/(tree|revision|resolve)/([^/]+)/?(.*)", path)
        repo, what, revision, file = at.groups() if at else ("", "", "", "")
        if refusal := self.refusal(repo, revision, what):
            self.send(refusal[0], b"{}", {"X-Error-Code": refusal[1], "X-Error-Message": refusal[2]})
        elif what == "tree":
            self.send(200, json.dumps([self.entry(path) for path in self.files()]).encode())
        elif what == "revision":
            self.send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
        elif file in self.files():
            self.send_file(file, body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def refusal(self, repo: str, revision: str, what: str) -> tuple[int, str, str] | None:
        token = self.headers.get("Authorization", "")
        if repo == "org/broken":
            return 418, "", "down"
        if repo not in ("org/open", "org/gated"):
            return (401, "RepoNotFound", "Repository not found") if not token else (404, "RepoNotFound", "")
        if repo == "org/gated" and what == "resolve" and token != "Bearer hf_good":
            if "wrong" in token:
                return 401, "", "Invalid credentials in Authorization header"
            return (403 if token else 401), "GatedRepo", "Access to model org/gated is restricted"
        return None if revision in ("main", COMMIT) else (404, "RevisionNotFound", "")

    def files(self) -> list[str]:
        folder = self.server.folder
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]

    def entry(self, file: str) -> dict[str, object]:
        size = self.server.claimed.get(file, (self.server.folder / file).stat().st_size)
        return {"type": "file", "path": file, "size": size, "oid": hashlib.sha1(file.encode()).hexdigest()}

    def send_file(self, file: str, body: bool) -> None:
        """A file, or the range of it that is asked for; a file of holes is never read as a whole."""
        path = self.server.folder / file
        size, asked = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
        tag = hashlib.sha256(f"{file} {size}".encode()).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(end - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        elif body:
            self.server.fetched.append(file)
        data = b""
        if body:
            with path.open("rb") as opened:
                opened.seek(start)
                data = opened.read(end - start)
            self.server.sent += len(data)
        self.send(206 if asked else 200, data, headers, body)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(flux: Path, tmp_path: Path) -> Iterator[Hub]:
    """The tiny checkpoint as a repository, with the clutter that real ones have."""
    folder = shutil.copytree(flux, tmp_path / "repo")
    (folder / "flux1-dev.safetensors").write_bytes(b"the whole model once more")
    (folder / "README.md").write_text("a model")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "model.onnx", "m.msgpack"):
        (folder / "transformer" / name).write_bytes(b"not for us")
    yield from served(folder)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Hub]:
    """FLUX.1-dev as a repository, with its headers and holes for data."""
    yield from served(sparse.flux_dev(tmp_path / "flux-dev"))


def served(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def call(hub: Hub | None, home: Path, model: str, token: str = "", offline: bool = False, **options: Any) -> Any:
    """What `find` gives or raises in a fresh process with its own cache."""
    done = started(["-c", CALL, model, json.dumps(options)], hub, home, token, offline)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def started(
    words: list[str], hub: Hub | None, home: Path, token: str = "", offline: bool = False, timeout: int | None = None
) -> "subprocess.CompletedProcess[str]":
    """A fresh Python process that knows this hub and this cache, when it has ended."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"} if hub else {}
    env |= {"HF_TOKEN": token} if token else {}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    env |= {"HF_HUB_ETAG_TIMEOUT": str(timeout), "HF_HUB_DOWNLOAD_TIMEOUT": str(timeout)} if timeout else {}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)
    for secret in (token, TOKEN):
        assert not secret or secret not in done.stdout + done.stderr
    return done


def test_downloads_only_what_is_needed(hub: Hub, home: Path) -> None:
    first = call(hub, home, "org/open", components=["transformer", "scheduler"])
    assert first["identity"] == f"org/open@{COMMIT}"
    assert sorted(hub.fetched) == [
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    small = [file for file in hub.fetched if file.endswith(".json")]
    assert hub.fetched[:len(small)] == small, "configs come before weights"

    hub.fetched.clear()
    whole = call(hub, home, "org/open")
    assert whole["path"] == first["path"] and len(whole["components"]) == 7
    assert "text_encoder/model.safetensors" in hub.fetched
    assert not any(file.startswith(("transformer", "model_index")) for file in hub.fetched)
    assert not re.search(r"flux1-dev|README|\.bin|fp16|onnx|msgpack", " ".join(hub.fetched))

    hub.fetched.clear()
    assert call(None, home, "org/open", offline=True) == whole
    assert call(hub, home, "org/open", revision=COMMIT) == whole
    assert hub.fetched == []


def test_the_index_alone_is_enough_for_the_family(hub: Hub, home: Path) -> None:
    found = call(hub, home, "org/open", components=[])
    assert (found["components"], hub.fetched) == ([], ["model_index.json"])


def test_shards_come_by_their_index(hub: Hub, home: Path) -> None:
    folder, shard = hub.folder / "vae", "part-00001-of-00001.safetensors"
    weights = (folder / "diffusion_pytorch_model.safetensors").rename(folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"all": "absent.safetensors"}}))
    assert "has no vae/absent.safetensors" in call(hub, home, "org/open", components=["vae"])["error"]
    assert not any(file.endswith(".safetensors") for file in hub.fetched)
    shutil.rmtree(home)
    index.write_text(json.dumps({"weight_map": {"all": shard}}))
    assert call(hub, home, "org/open", components=["vae"])["components"] == ["vae"]
    assert hub.fetched[-1] == f"vae/{weights.name}"


def test_half_a_cache(hub: Hub, home: Path) -> None:
    call(hub, home, "org/open", components=["vae"])
    error = call(hub, home, "org/open", offline=True)["error"]
    assert "org/open is in the cache only in part" in error and "HF_HUB_OFFLINE" in error
    assert "hf download org/open --include model_index.json --include '*/*'" in error


def test_gated(hub: Hub, home: Path) -> None:
    closed = call(hub, home, "org/gated")["error"]
    for words in ("1. accept its license at https://huggingface.co/org/gated", "2. run `hf auth login`",
                  "no token was found (HF_TOKEN, the file", str(home / "token"), "Kaggle or Colab"):
        assert words in closed
    assert "a token was found" in call(hub, home, "org/gated", token=TOKEN)["error"]
    assert "refused the token for org/gated (401)" in call(hub, home, "org/gated", token="hf_wrong")["error"]
    assert hub.fetched == []
    assert call(hub, home, "org/gated", token="hf_good", components=["vae"])["identity"] == f"org/gated@{COMMIT}"


def test_what_the_hub_does_not_have(hub: Hub, home: Path) -> None:
    call(hub, home, "org/open", components=[])
    unknown = call(hub, home, "org/opem")["error"]
    assert "the hub knows no model org/opem" in unknown and "in the cache: org/open" in unknown
    assert "knows no model org/opem" in call(hub, home, "org/opem", token=TOKEN)["error"]
    assert "org/open has no revision v9" in call(hub, home, "org/open", revision="v9")["error"]
    assert "the hub answered 418 for org/broken" in call(hub, home, "org/broken")["error"]
    (hub.folder / "model_index.json").unlink()
    shutil.rmtree(home)
    assert "org/open has no model_index.json" in call(hub, home, "org/open")["error"]


def test_offline_and_not_cached(home: Path) -> None:
    error = call(None, home, "black-forest-labs/FLUX.1-dev", offline=True)["error"]
    assert "not in the cache and HF_HUB_OFFLINE is set" in error
    assert error.endswith("hf download black-forest-labs/FLUX.1-dev --include model_index.json --include '*/*'")
    assert "(33.7 GB)" in error


@pytest.mark.parametrize(("file", "text", "words"), [
    ("transformer/model.py", "raise SystemExit", "custom code"),
    ("transformer/config.json", '{"auto_map": {"a": "b"}}', "auto_map"),
    ("model_index.json", '{"_class_name": "FluxPipeline", "vae": ["os", "system"]}', "takes vae from 'os'"),
])
def test_foreign_code_is_refused_before_weights_come(hub: Hub, home: Path, file: str, text: str, words: str) -> None:
    (hub.folder / file).write_text(text)
    assert words in call(hub, home, "org/open")["error"]
    assert not any(file.endswith(".safetensors") for file in hub.fetched)


def test_pickles_and_missing_folders_are_refused_before_anything_comes(hub: Hub, home: Path) -> None:
    (hub.folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "pickle refused" in call(hub, home, "org/open")["error"]
    shutil.rmtree(hub.folder / "vae")
    assert "org/open has no folder vae" in call(hub, home, "org/open", components=["vae"])["error"]
    assert hub.fetched == ["model_index.json"]


def test_a_full_disk_is_seen_before_the_weights_come(hub: Hub, home: Path) -> None:
    hub.claimed["transformer/diffusion_pytorch_model.safetensors"] = 2**60
    error = call(hub, home, "org/open", components=["transformer"])["error"]
    assert f"still needs {2**60} bytes" in error and "free" in error and "HF_HOME" in error
    assert not any(file.endswith(".safetensors") for file in hub.fetched)


PLAN = ["-m", "runner", "plan", "flux", "--model", "org/open", "--machine", "2x16GB", "--json"]


def test_a_plan_reads_headers_and_no_weights(real: Hub, home: Path) -> None:
    """33.7 GB of FLUX.1-dev, planned from less than 2 MB; and once more without any network."""
    files = {path: path.stat().st_size for path in real.folder.rglob("*.safetensors")}
    done = started(PLAN, real, home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["disk"]["download"] == sum(files.values()) > 33 * 10**9
    assert found["components"]["transformer"]["placement"] == "cuda:0:10,cuda:1:29,cuda:0:18"
    assert real.sent < 2 * 10**6 and not any(file.endswith(".safetensors") for file in real.fetched)
    assert not list(home.rglob("*.safetensors"))

    sent = real.sent
    again = started(PLAN, None, home, offline=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["stages"] == found["stages"] and real.sent == sent


@pytest.mark.slow
def test_a_refused_plan_reads_no_weights_either(real: Hub, home: Path) -> None:
    sent = real.sent
    small = started([*PLAN[:-2], "1x8GB", "--max-memory", "9GB"], real, home)
    assert small.returncode == 4 and "next: python -m runner plan flux --model org/open" in small.stderr
    assert not list(home.rglob("*.safetensors")) and real.sent - sent < 2 * 10**6


def test_a_file_that_is_not_what_the_model_says_is_refused_from_its_header(hub: Hub, home: Path) -> None:
    weights = hub.folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for data, why in ((whole[:-100], "but its header tells of"), (b"<html>" * 100, "is no safetensors file")):
        weights.write_bytes(data)
        assert why in call(hub, home, "org/open", components=["vae"], weights=False)["error"]


def test_a_run_plans_first_and_downloads_then(hub: Hub, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    words = ["-m", "runner", "flux", "--model", "org/open", "--prompt", "a red circle", "--size", "64x48", "--steps",
             "1", "--device", "cpu", "--artifacts", "memory", "--out", str(out)]
    refused = started([*words, "--max-memory", "1MB"], hub, home)
    assert refused.returncode == 4 and not any(file.endswith(".safetensors") for file in hub.fetched)
    assert "next: python -m runner flux --model org/open" in refused.stderr
    done = started([*words, "-v"], hub, home)
    assert done.returncode == 0, done.stderr
    assert out.is_file() and "to download" in done.stderr
    assert sum(file.endswith(".safetensors") for file in hub.fetched) == 4


def test_a_kept_header_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(dtype="U8", shape=[2], data_offsets=(0, 2))
    monkeypatch.setattr("huggingface_hub.parse_safetensors_file_metadata",
                        lambda *asked, **more: SimpleNamespace(tensors={"a": info}, metadata={}))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path))

    def fails(descriptor: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as full, pytest.raises(OSError, match="no space left"):
        full.setattr(os, "fsync", fails)
        remote_headers.fetch("org/open", "abc", ["vae/model.safetensors"], {"vae/model.safetensors": 200})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    remote_headers.fetch("org/open", "abc", ["vae/model.safetensors"], {"vae/model.safetensors": 200})
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept == tmp_path / "stagerun" / "org--open" / "abc" / "vae" / "model.safetensors.header"
    assert (dict(read_header(kept)), file_bytes(kept)) == ({"a": TensorEntry("U8", (2,), 198, 2)}, 200)


LORA = """
import sys
from stages.errors import ModelError
from stages.models.lora import LoraRequest, find_lora
try:
    lora = find_lora(LoraRequest(sys.argv[1]), "FluxPipeline")
    print(" and ".join(path.name for path in (lora.path, lora.config) if path))
except ModelError as error:
    print(error)
"""


def test_a_lora_is_downloaded_alone_and_found_again_without_the_hub(hub: Hub, home: Path, flux: Path) -> None:
    def named(name: str, there: Hub | None, offline: bool = False) -> str:
        return started(["-c", LORA, name], there, home, offline=offline).stdout.strip()

    (hub.folder / "styles").mkdir()
    tiny.lora(hub.folder / "styles" / "one.safetensors", flux)
    assert named("org/open/styles/one.safetensors", hub) == "one.safetensors"
    assert hub.fetched == ["styles/one.safetensors"]
    assert named("org/open/styles/one.safetensors", None, offline=True) == "one.safetensors"
    # What is in the cache is all that can be known of it then.
    assert named("org/open", None, offline=True) == "one.safetensors"
    several = r"org/open has \d safetensors files: .* -> name the one to use, such as org/open/"
    assert re.search(several, named("org/open", hub))
    assert "org/open has no file two.safetensors; its files:" in named("org/open/two.safetensors", hub)
    assert "org/gated is gated" in named("org/gated/styles/one.safetensors", hub)
    # PEFT keeps its alpha beside the file.
    config = {"r": 4, "lora_alpha": 8}
    (hub.folder / "peft").mkdir()
    (hub.folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(hub.folder / "styles" / "one.safetensors", hub.folder / "peft" / "two.safetensors")
    hub.fetched.clear()
    assert named("org/open/peft/two.safetensors", hub) == "two.safetensors and adapter_config.json"
    assert named("org/open/peft/two.safetensors", None, offline=True) == "two.safetensors and adapter_config.json"
    assert hub.fetched == ["peft/two.safetensors", "peft/adapter_config.json"]
    lacking = named("org/other", None, offline=True)
    assert lacking.startswith("org/other/*.safetensors is not in the cache and HF_HUB_OFFLINE is set; ")
    assert lacking.endswith("hf download org/other --include '*.safetensors'")
