"""The small JSON documents of a store: strict, and signed with their own sha256. No torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Union, cast

from stages.errors import StoreError
from stages.strict_json import strict_json

JSON = Union[str, int, float, bool, None, "list[JSON]", "dict[str, JSON]"]
SCHEMA = 1
MAX_DOCUMENT_BYTES = 64 * 2**20


class Damaged(StoreError):
    """Stored bytes that are not what was written: torn, flipped, cut, swapped or forged."""


def write_document(body: Mapping[str, object]) -> bytes:
    """`body` as JSON with our schema and its own sha256: safe to read by eye, not to edit by hand."""
    document = {"schema": SCHEMA, **body}
    signed = {**document, "sha256": hashlib.sha256(canonical(document)).hexdigest()}
    return json.dumps(signed, indent=1, allow_nan=False).encode()


def read_document(data: bytes | bytearray) -> dict[str, JSON]:
    """The document in `data`; Damaged where it is torn or edited, StoreError where a newer version wrote it."""
    try:
        document = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is torn ({error})") from error
    if not isinstance(document, dict):
        raise Damaged("it is no mapping")
    declared = document.pop("sha256", None)
    # Every schema signs the same way, so that a flipped bit in `schema` is not taken for a newer version.
    if declared != hashlib.sha256(canonical(document)).hexdigest():
        raise Damaged("it does not have the sha256 that it names")
    schema = document.get("schema")
    if schema != SCHEMA:
        raise StoreError(
            f"this store was made by a newer version (schema {schema}, this one reads {SCHEMA}): "
            "upgrade stagerun, or choose another `store`"
        )
    return cast("dict[str, JSON]", document)


def canonical(value: object) -> bytes:
    """`value` as the one JSON text that its hash is taken of; ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
