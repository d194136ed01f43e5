"""A hub that means harm, or is broken, costs seconds and megabytes, and ends in a line about it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_hub import COMMIT, Answer, Hub, served, started

FIND = """
import json, resource, sys, time
from stages.models.checkpoint import find
from stages.errors import ModelError
for model in sys.argv[1:]:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = find(model, weights=False, components=["vae"])
        text = "found " + found.identity
    except ModelError as error:
        text = str(error)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([text, time.monotonic() - start, took * 1024]))
"""
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
CASES = {
    "silent": "has not answered for",
    "path": "answered with the commit '../../../../escaped'",
    "moving": f"answered with the commit '{'b' * 40}' where {COMMIT} was asked for",
    "tag": "names a file by '\"../../../escaped\"'",
    "flood": "answers with more than the 16777216 bytes that it should",
    "pages": "lists more than 100000 files",
    "listing": "answered with something else than asked for",
    "claim": "but its header tells of",
    "notes": "says that vae/merges.txt has 3000000000 bytes",
    "endless": "answers with more than the",
    "packed": "answers with packed bytes",
    "pause": "asks for a pause of 1000000 s",
    "index": "answers with more than the 16777216 bytes",
    "xet": f"found org/xet@{COMMIT}",
    "open": f"found org/open@{COMMIT}",
}


class Hostile(Answer):
    """The repository org/NAME does what NAME says, and is otherwise as every other."""

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].removeprefix("/api/models").split("/")
        self.case, what = parts[2], parts[3]
        self.path = self.path.replace(f"org/{self.case}", "org/open")
        is_tree, is_weights = what == "tree", self.path.split("?")[0].endswith(".safetensors")
        if self.case == "silent":
            time.sleep(10)
        elif self.case == "pause":
            self.send(429, b"{}", {"Retry-After": "1000000"})
        elif self.case in ("flood", "pages", "listing") and is_tree:
            self.list_much()
        elif (self.case, is_weights, body) in (("endless", True, True), ("packed", True, True)) or (
            self.case == "index" and body and "model_index" in self.path
        ):
            self.stream()
        else:
            super().answer(body)

    def entry(self, file: str) -> dict[str, object]:
        if file == "vae/merges.txt":
            return {"type": "file", "path": file, "size": 3_000_000_000, "oid": "0" * 40}
        claimed = {"size": 2**31} if (self.case, file) == ("claim", WEIGHTS) else {}
        return super().entry(file) | claimed

    def files(self) -> list[str]:
        return [*super().files(), *(["vae/merges.txt"] if self.case == "notes" and "/tree/" in self.path else [])]

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        changed = dict(headers or {})
        if "X-Repo-Commit" in changed:
            later = "model_index" not in self.path
            changed |= {"X-Repo-Commit": "../../../../escaped"} if self.case == "path" else {}
            changed |= {"X-Repo-Commit": "b" * 40} if self.case == "moving" and later else {}
            changed |= {"ETag": '"../../../escaped"'} if self.case == "tag" else {}
            # A way to a file on which nothing can be counted: it leads nowhere, and is not gone.
            changed |= {"X-Xet-Hash": "f" * 64, "X-Xet-Refresh-Route": "http://127.0.0.1:9/token"} if (
                self.case == "xet") else {}
        super().send(status, data, changed, body)

    def list_much(self) -> None:
        if self.case == "listing":
            return self.send(200, b'{"error": ["no", "list"]}')
        entry = json.dumps({"type": "file", "path": "x" * 40, "size": 1, "oid": "0" * 40}).encode()
        if self.case == "flood":
            data = b"[" + b",".join([entry] * 200_000) + b"]"
            return self.send(200, data)
        url = f"http://127.0.0.1:{self.server.server_port}/api/models/org/pages/tree/{COMMIT}?recursive=True"
        page = b"[" + b",".join(entry.replace(b"x" * 40, f"f{index}{time.monotonic()}".encode()) for index
                                in range(30_000)) + b"]"
        return self.send(200, page, {"Link": f'<{url}>; rel="next"'})

    def stream(self) -> None:
        """Bytes for as long as somebody reads."""
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"0123"')
        if self.case == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(2**16))
        except OSError:
            self.close_connection = True


@pytest.fixture(scope="module")
def hostile(flux: Path) -> Iterator[Hub]:
    for server in served(flux):
        server.RequestHandlerClass = Hostile
        yield server


@pytest.fixture(scope="module")
def ends(hostile: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int]]:
    """For each case the words, seconds and bytes that it ended with."""
    home = tmp_path_factory.mktemp("hostile") / "a" / "b" / "c" / "home"
    found = {}
    # A machine may be busy: only the hub that never answers is not waited for.
    for names, timeout in ((["silent"], 2), ([name for name in CASES if name != "silent"], 30)):
        done = started(["-c", FIND, *(f"org/{name}" for name in names)], hostile, home, timeout=timeout)
        assert done.returncode == 0, done.stderr
        found |= dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
    assert not list(home.parent.parent.parent.rglob("escaped*"))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_hub_costs_seconds_and_megabytes_whatever_it_answers(
    ends: dict[str, tuple[str, float, int]], name: str
) -> None:
    text, seconds, took = ends[name]
    assert CASES[name] in text and "\n" not in text
    assert seconds < 60 and took < 300 * 2**20
