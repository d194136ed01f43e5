"""Damaged, swapped and forged artifacts: whatever happens to the bytes, no state comes out that was not put in."""

import dataclasses
import hashlib
import json
import math
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.artifacts import FolderStore, MemoryStore, manifest
from runner.artifacts.atomic_files import File
from runner.artifacts.inspection import describe, open_artifact
from runner.artifacts.signed_json import Damaged, canonical
from runner.artifacts.state_format import pack, unpack
from stages.errors import BadResult, StoreError
from stages.state import State
from tests.test_artifacts import KEY, OTHER, STATE, object_path


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def forge(store: FolderStore, data: bytes, **changes: Any) -> None:
    """Make the store hold `data` under KEY with everything around it right: only the strict reader is left."""
    store.put(KEY, "denoise", State({"x": torch.ones(4)}), {})
    artifact = store.find(KEY)
    assert artifact is not None
    digest = hashlib.sha256(data).hexdigest()
    told = dataclasses.replace(artifact, object=digest, bytes=len(data))
    path = store.path / "objects" / digest[:2] / digest
    path.parent.mkdir(exist_ok=True)
    replace(path, data)
    (store.path / f"stages/{KEY}.json").write_bytes(
        manifest.write_manifest(dataclasses.replace(told, **changes))
    )


def assert_refused(folder: Path, match: str = "") -> None:
    told: list[str] = []
    assert FolderStore(folder, warn=told.append).get(KEY) is None
    assert len(told) == 1 and "is damaged" in told[0] and match in told[0], told
    with pytest.raises(StoreError, match="is damaged"):
        FolderStore(folder, strict=True).get(KEY)


def test_a_flipped_bit_in_any_byte_of_an_object_is_found(tmp_path: Path) -> None:
    told: list[str] = []
    store = FolderStore(tmp_path / "store", warn=told.append)
    store.put(KEY, "encode", STATE, {})
    path, draw = object_path(store), random.Random(0)
    good = path.read_bytes()
    path.chmod(0o600)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        assert store.get(KEY) is None, place
    assert len(told) == len(good) > 500
    path.write_bytes(good)
    assert store.get(KEY) is not None


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    told: list[str] = []
    store = FolderStore(tmp_path / "store", warn=told.append)
    artifact, draw = store.put(KEY, "encode", STATE, {"versions": "1.0", "of": "a caf\u00e9"}), random.Random(0)
    path = store.path / f"stages/{KEY}.json"
    good, found = path.read_bytes(), 0
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        state = store.get(KEY)
        found += state is None
        # The case of an escape's digits is all that may change without changing what is said.
        assert state is None or store.find(KEY) == artifact, place
    assert found == len(told) >= len(good) - 4


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut to its length field": lambda data: data[:8],
    "cut in its header": lambda data: data[:100],
    "cut by a byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte longer": lambda data: data + b"\0",
    "twice as long": lambda data: data * 2,
    "zeroed": lambda data: bytes(len(data)),
    "zeroed in the middle": lambda data: data[:300] + bytes(40) + data[340:],
    "zeroed at its end": lambda data: data[:-16] + bytes(16),
    "shifted": lambda data: data[1:] + data[:1],
}


@pytest.mark.parametrize("how", CUTS)
def test_an_object_that_lost_or_gained_bytes_is_found_and_replaced(tmp_path: Path, how: str) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    path = object_path(store)
    good = path.read_bytes()
    replace(path, CUTS[how](good))
    assert_refused(store.path)
    store.put(KEY, "encode", STATE, {})
    assert path.read_bytes() == good and store.get(KEY) is not None


@pytest.mark.parametrize("how", CUTS)
def test_a_manifest_that_lost_or_gained_bytes_is_a_stage_not_done(tmp_path: Path, how: str) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    path = store.path / f"stages/{KEY}.json"
    path.write_bytes(CUTS[how](path.read_bytes()))
    assert_refused(store.path, "the manifest")


def test_a_missing_object_is_a_stage_not_done(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    object_path(store).unlink()
    assert_refused(store.path, "its object is missing")


def test_the_memory_store_checks_too() -> None:
    told: list[str] = []
    store = MemoryStore(warn=told.append)
    artifact = store.put(KEY, "encode", STATE, {})
    path = f"objects/{artifact.object[:2]}/{artifact.object}"
    store.publish([File.of(path, bytes(store.fetch(path, 2**20)[:-1]) + b"\xff")])
    assert store.get(KEY) is None and "sha256" in told[0]


def test_a_damaged_artifact_is_not_looked_into(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    replace(object_path(store), b"damaged")
    with pytest.raises(StoreError, match="instead of"):
        open_artifact(KEY, store)
    with pytest.raises(StoreError, match="does not have the sha256 that names it"):
        open_artifact(str(object_path(store)))


def test_damage_without_a_listener_is_a_warning(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    object_path(store).unlink()
    with pytest.warns(UserWarning, match="its object is missing; it is computed again"):
        store.get(KEY)


def test_swapped_objects_and_manifests_are_found(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    other = store.put(OTHER, "encode", State({**STATE.values, "seed": 8}, STATE.tags), {})
    one, two = object_path(store).read_bytes(), object_path(store, OTHER).read_bytes()
    replace(object_path(store), two)
    assert len(one) == len(two)
    assert_refused(store.path, "does not have the sha256 that names it")
    replace(object_path(store), one)
    first, second = (store.path / f"stages/{key}.json" for key in (KEY, OTHER))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert_refused(store.path, f"it is the manifest of artifact {OTHER[:12]}")
    first.write_bytes(kept)
    # Edited with care, so that only the key inside the object tells whose it is.
    first.write_bytes(manifest.write_manifest(dataclasses.replace(other, key=KEY)))
    assert_refused(store.path, f"its object belongs to artifact {OTHER[:12]} of stage encode")
    first.write_bytes(manifest.write_manifest(dataclasses.replace(other, key=KEY, stage="decode")))
    assert_refused(store.path)


def test_what_a_newer_version_wrote_is_refused_and_not_overwritten(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    path = store.path / f"stages/{KEY}.json"
    document = {**json.loads(path.read_bytes()), "schema": 2}
    del document["sha256"]
    signed = {**document, "sha256": hashlib.sha256(canonical(document)).hexdigest()}
    path.write_text(json.dumps(signed))
    with pytest.raises(StoreError, match=r"made by a newer version \(schema 2, this one reads 1\): upgrade"):
        store.get(KEY)


WRONG: dict[str, Any] = {
    "stage": 3, "object": "../../etc/passwd", "bytes": "12", "tensors": [], "note": None,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_of_wrong_types_is_a_stage_not_done(tmp_path: Path, name: str) -> None:
    store = FolderStore(tmp_path / "store")
    artifact = store.put(KEY, "encode", STATE, {})
    (store.path / f"stages/{KEY}.json").write_bytes(
        manifest.write_manifest(dataclasses.replace(artifact, **{name: WRONG[name]}))
    )
    assert_refused(store.path, "the manifest")


# Forged objects: the hash is right, so nothing but the strict reader stands between them and a run.


def file(entries: dict[str, Any] | str, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    """A safetensors file with this header, padded to eights."""
    text = entries if isinstance(entries, str) else json.dumps(entries)
    text += " " * (-len(text.encode()) % 8)
    return (len(text.encode()) if length is None else length).to_bytes(8, "little") + text.encode() + data


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def body(**changes: Any) -> dict[str, Any]:
    told = {"schema": 1, "key": KEY, "stage": "denoise", "values": {"x": {"tensor": "x"}}, "tags": {}, **changes}
    return {"__metadata__": {"stagerun": json.dumps(told)}}


X = {"x": entry([4], 0, 16)}
GOOD = {**body(), **X}
DEEP = "[" * 5000 + "]" * 5000
HOSTILE: dict[str, bytes] = {
    "a header of 2^63": file(GOOD, length=2**63),
    "a header of 2^64-1": file(GOOD, length=2**64 - 1),
    "a header past the end": file(GOOD, length=4096),
    "a header of 101 MB": file(json.dumps(GOOD) + " " * 101 * 2**20),
    "300,000 keys": file({**GOOD, **{f"k{n}": entry([0], 16, 16) for n in range(300_000)}}),
    "deep JSON": file(f'{{"x":{DEEP}}}'),
    "deep values": file({"__metadata__": {"stagerun": json.dumps(body())[:-1] + f',"v":{DEEP}}}'}, **X}),
    "an overlap": file({**GOOD, "y": entry([2], 8, 16)}),
    "a hole": file({**body(), "x": entry([2], 8, 16)}),
    "a tail": file(GOOD, bytes(24)),
    "a duplicate tensor": file(json.dumps(GOOD)[:-1] + ',"x":' + json.dumps(X["x"]) + "}"),
    "a duplicate field": file(json.dumps(GOOD).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"')),
    "a duplicate key inside": file({"__metadata__": {"stagerun": '{"schema": 1, "schema": 1}'}, **X}),
    "leading spaces": file(" " + json.dumps(GOOD)),
    "a list": file(f"[{json.dumps(GOOD)}]"),
    "UTF-16": b"\x10\x04\0\0\0\0\0\0" + json.dumps(GOOD).encode("utf-16-le").ljust(1040, b" ") + bytes(16),
    "a way out": file({**body(), "../../x": X["x"]}),
    "a NUL": file({**body(), "a\0b": X["x"]}),
    "no name": file({**body(), "": X["x"]}),
    "a huge empty shape": file({**GOOD, "y": entry([0, 2**62], 16, 16)}),
    "a shape past 2^64": file({**body(), "x": entry([2**33, 2**33], 0, 16)}),
    "a negative shape": file({**body(), "x": entry([-4], 0, 16)}),
    "a shape of floats": file({**body(), "x": entry([4.0], 0, 16)}),
    "a shape of truths": file({**GOOD, "y": entry([True, 0], 16, 16)}),
    "offsets reversed": file({**body(), "x": entry([4], 16, 0)}),
    "an unknown dtype": file({**body(), "x": entry([4], 0, 16, "F31")}),
    "an unexpected field": file({**body(), "x": {**X["x"], "more": 1}}),
    "an unaligned tensor": file({**body(), "a": entry([1], 0, 1, "U8"), "x": entry([3], 1, 13)}, bytes(13)),
    "NaN in the metadata": file({"__metadata__": {"stagerun": json.dumps(body(key=math.nan))}, **X}),
    "foreign metadata": file({"__metadata__": {"format": "pt"}, **X}),
    "no metadata": file(X),
    "a newer envelope": file({**body(schema=2), **X}),
    "values that name no tensor": file({**body(values={"x": {"tensor": "z"}}), **X}),
    "values that name it twice": file({**body(values={"x": [{"tensor": "x"}, {"tensor": "x"}]}), **X}),
    "a tensor that no value names": file({**body(values={}), **X}),
    "a node of two kinds": file({**body(values={"x": {"tensor": "x", "tuple": []}}), **X}),
    "a node of a list": file({**body(values={"x": {"tensor": ["x"]}}), **X}),
    "an unknown node": file({**body(values={"x": {"tensor": "x"}, "y": {"call": "os.system"}}), **X}),
    "tags of text": file({**body(tags={"t": "x"}), **X}),
    "a key of another type": file({**body(key=5), **X}),
    "a pickle": b"\x80\x04\x95cos\nsystem\n(S'true'\ntR." + bytes(64),
}  # fmt: skip


def test_a_well_formed_forgery_is_read(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    forge(store, file(GOOD))
    assert store.get(KEY) is not None


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, how: str) -> None:
    store = FolderStore(tmp_path / "store")
    forge(store, HOSTILE[how])
    data = bytearray(HOSTILE[how])
    # This thread's own work, whatever else the machine does.
    start = time.thread_time()
    with pytest.raises(Damaged, match="its bytes are no artifact"):
        unpack(data)
    assert time.thread_time() - start < 0.25
    assert_refused(store.path)


def test_tensors_that_the_manifest_does_not_declare_are_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    forge(store, file({**body(), "x": entry([2, 2], 0, 16)}))
    assert_refused(store.path, "its object holds other tensors than its manifest declares")


def test_a_stored_artifact_that_is_not_finite_is_refused_on_reading(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    data = bytearray(b"".join(pack(State({"x": torch.ones(4)}), key=KEY, stage="denoise").chunks))
    data[-4:] = struct.pack("<f", math.nan)
    forge(store, bytes(data))
    with pytest.raises(BadResult, match="stage denoise: x holds NaN"):
        store.get(KEY)
    artifact, state = open_artifact(KEY, store)
    assert [row.nonfinite for row in describe(state)] == [1] and artifact.stage == "denoise"


def test_an_object_larger_than_its_manifest_says_is_not_used(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    forge(store, file(GOOD), bytes=len(file(GOOD)) - 1)
    assert_refused(store.path, "bytes instead of")


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 400), junk=st.binary(max_size=64), keep=st.integers(0, 400))
def test_any_other_bytes_are_refused_as_damaged(cut: int, junk: bytes, keep: int) -> None:
    good = b"".join(pack(STATE, key=KEY, stage="encode").chunks)
    data = good[:cut] + junk + good[cut + keep :]
    if data != good:
        try:
            found = unpack(bytearray(data)).state
        except (Damaged, BadResult):
            return
        # Without the hash, bytes that only change values cannot be told: never more tensors or other shapes.
        assert {n: t.shape for n, t in found.tensors().items()} == {n: t.shape for n, t in STATE.tensors().items()}
