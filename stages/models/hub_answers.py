"""What a hub may answer: so many bytes, in so many seconds, and no name that leads out of the cache."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import huggingface_hub.constants as settings

from stages.errors import ModelError

# Seconds for an answer that is no file.
SLOWEST = 60.0
# Seconds for the hub to take a connection.
LONGEST_CONNECT = 4.0
LARGEST_ANSWER = 16 * 2**20
# Of all hubs the one whose files its client may fetch in its own way.
PUBLIC = "https://huggingface.co"
# Seconds that it may ask to be left alone; its own limits are counted in five minutes.
LONGEST_PAUSE = 600.0
_SECONDS = re.compile(r"(?:^|t=)([0-9]{1,300})")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TAG = re.compile(r"[\w.:+=-]{1,200}", re.ASCII)
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def answers() -> bool:
    """Whether the hub can be reached: asked once, where its client would ask for half a minute, and tell of each time.

    One that takes a connection and then says nothing is left to the client's own limits.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError

    if settings.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(settings.ENDPOINT, timeout=min(LONGEST_CONNECT, settings.HF_HUB_ETAG_TIMEOUT))
    except HTTPError as error:
        # The HTTP library differs between versions of the hub's; these have the same names in each.
        return type(error).__name__ not in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
    return True


@contextmanager
def bounded(model: str, commit: str | None, largest: int | None = None) -> Iterator[None]:
    """While entered, ModelError for what the hub's client must not be told.

    `commit` is the one that the model is asked for, where it is known; `largest` are the bytes of the largest file
    that is downloaded.
    """
    from huggingface_hub import get_session

    answers = _Answers(model, commit, largest)
    hooks, is_plain = get_session().event_hooks, settings.HF_HUB_DISABLE_XET
    hooks["request"].append(answers.asked)
    hooks["response"].append(answers.answered)
    # Xet fetches files from wherever a hub says, past this session: how much comes, and when it ends, is out of reach.
    settings.HF_HUB_DISABLE_XET = is_plain or settings.ENDPOINT != PUBLIC
    try:
        yield
    finally:
        settings.HF_HUB_DISABLE_XET = is_plain
        hooks["request"].remove(answers.asked)
        hooks["response"].remove(answers.answered)


class _Answers:
    """The answers about one model."""

    def __init__(self, model: str, commit: str | None, largest: int | None) -> None:
        self._model, self._commit, self._largest = model, commit, largest
        self._silent_since: float | None = None

    def asked(self, request: Any) -> None:
        """A request is about to be sent, for the first time or once more: but not often where none is answered."""
        # So many bytes of what is packed can be any number of them.
        request.headers["accept-encoding"] = "identity"
        # Where a file's facts do not come at once, the client waits for them for a minute, and that several times.
        longest = max(settings.HF_HUB_ETAG_TIMEOUT, settings.HF_HUB_DOWNLOAD_TIMEOUT)
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {part: min(waits.get(part) or longest, longest)
                                         for part in ("connect", "read", "write", "pool")}
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        if (silent := now - self._silent_since) > 1.5 * longest:
            raise ModelError(f"{settings.ENDPOINT} has not answered for {silent:.0f} s ({self._model}); look at the "
                             f"network, and run the same again: what has arrived is kept")

    def answered(self, response: Any) -> None:
        """An answer begins; its body is still to come."""
        self._silent_since = None
        self._check_names(response)
        self._check_pause(response)
        limit, seconds = self._limits(response.request)
        claimed = response.headers.get("content-length", "0")
        if response.request.method == "HEAD" or limit is None:
            return
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ModelError(f"{settings.ENDPOINT} answers with packed bytes, which it was asked not to, and which "
                             f"may be any number of them ({self._model}): refused; use another hub or proxy")
        if not claimed.isdigit() or int(claimed) > limit:
            raise self._too_long(limit)
        response.stream = _limited(response, limit, seconds, self._too_long(limit))

    def _check_names(self, response: Any) -> None:
        """What the client names files and folders by: both are in one answer, which is not that of a file server."""
        headers, is_ours = response.headers, f"/{self._model}/" in response.request.url.path
        commit = headers.get(settings.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        if commit is None:
            return
        if not _COMMIT.fullmatch(commit) or (is_ours and self._commit not in (None, commit)):
            asked = f" where {self._commit} was asked for" if self._commit else ""
            raise ModelError(f"{settings.ENDPOINT} answered with the commit {commit!r:.60}{asked} ({self._model}): "
                             f"refused; run the same again, or give a `revision` that stays")
        for name in ("etag", settings.HUGGINGFACE_HEADER_X_LINKED_ETAG):
            tag = headers.get(name)
            if tag is not None and not _TAG.fullmatch(tag.removeprefix("W/").strip('"')):
                raise ModelError(f"{settings.ENDPOINT} names a file by {tag!r:.60} ({self._model}): refused; use "
                                 f"another hub")

    def _check_pause(self, response: Any) -> None:
        """The client sleeps for as long as it is told to before it asks once more."""
        if response.status_code < 400:
            return
        said = response.headers.get("retry-after", "") + ";" + response.headers.get("ratelimit", "")
        if (pause := max(map(float, _SECONDS.findall(said)), default=0.0)) > LONGEST_PAUSE:
            raise ModelError(f"{settings.ENDPOINT} asks for a pause of {pause:.0f} s ({self._model}), and more than "
                             f"{LONGEST_PAUSE:.0f} are not waited for; run the same again later")

    def _limits(self, request: Any) -> tuple[int | None, float]:
        """The most bytes of the answer and its seconds; None where any number is right."""
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if asked:
            return max(LARGEST_ANSWER, int(asked[2]) - int(asked[1]) + 1), SLOWEST
        if "/resolve" in request.url.path or not request.url.path.startswith("/api/"):
            return self._largest, float("inf")
        return LARGEST_ANSWER, SLOWEST

    def _too_long(self, limit: int) -> ModelError:
        return ModelError(f"{settings.ENDPOINT} answers with more than the {limit} bytes that it should, or forever "
                          f"({self._model}): refused; use a model that is whole, or another hub")


def _limited(response: Any, limit: int, seconds: float, error: ModelError) -> Any:
    """The answer's stream of bytes, which raises the error once there are too many or they take too long."""
    # The HTTP library differs between versions of the hub's; each takes a stream of its own class alone.
    base: Any = import_module(type(response).__module__.partition(".")[0]).SyncByteStream
    stream, end = response.stream, time.monotonic() + seconds

    class Limited(base):
        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for part in stream:
                count += len(part)
                if count > limit or time.monotonic() > end:
                    raise error
                yield part

        def close(self) -> None:
            stream.close()

    return Limited()
