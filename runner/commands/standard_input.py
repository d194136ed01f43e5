"""A prompt from standard input, which is read once: what comes after has it as if it had been written out."""

import os
import sys

from runner.inputs import PROMPT_BYTES
from stages.errors import InvalidInput


def may_read() -> bool:
    """Whether this process is the one that reads, where a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def read_prompt() -> str:
    """The prompt on standard input, without the line end behind it; InvalidInput for what is no prompt."""
    data = sys.stdin.buffer.read(PROMPT_BYTES + 3)
    if len(data.rstrip(b"\r\n")) > PROMPT_BYTES:
        raise InvalidInput(f"the prompt has more than {PROMPT_BYTES:,} bytes -> shorten it")
    try:
        return data.decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the prompt is not valid UTF-8 at byte {error.start} -> write it again in UTF-8"
                           ) from None

