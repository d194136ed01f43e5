"""Artifacts: what goes in comes out, and names stay inside the store."""

import dataclasses
import json
import math
import os
import stat
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.artifacts import Artifact, FolderStore, ForwardingStore, MemoryStore, Store, header, key_of, open_store
from runner.artifacts.inspection import describe, open_artifact
from runner.artifacts.remote import RemoteStore
from runner.artifacts.state_format import is_finite, pack, unpack
from stages.errors import BadResult, StoreError
from stages.state import State
from tests.store_worker import KEY

OTHER = key_of({"prompt": "a blue square"})
STATE = State(
    {
        "prompt_embeds": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
        "latents": torch.linspace(-1, 1, 8).to(torch.bfloat16),
        "nested": {"Mask Of 1": torch.tensor([True, False]), "sizes": [(1, 2.5), None, "text", True]},
        "seed": 7,
    },
    {"denoiser_input_fields": ("prompt_embeds", "nested")},
)


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore | FolderStore:
    return MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "store")


def same(a: object, b: object) -> bool:
    """Whether two values are the same to the type and the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, float(str(b))))


def object_path(store: FolderStore, key: str = KEY) -> Path:
    """The file that holds the state of `key`."""
    artifact = store.find(key)
    assert artifact is not None
    return store.path / "objects" / artifact.object[:2] / artifact.object


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensors() -> st.SearchStrategy[torch.Tensor]:
    def build(dtype: torch.dtype, shape: list[int], cut: str, seed: int) -> torch.Tensor:
        source = torch.randn([side * 2 for side in shape], generator=torch.Generator().manual_seed(seed)) * 3
        tensor = source.abs().to(dtype) if dtype in (torch.uint16, torch.uint32, torch.uint64) else source.to(dtype)
        if cut == "slice":
            return tensor[tuple(slice(0, side) for side in shape)]
        return tensor.movedim(0, -1) if cut == "moved" and shape else tensor

    shapes = st.lists(st.integers(0, 4), max_size=4)
    cuts = st.sampled_from(["whole", "slice", "moved"])
    return st.builds(build, st.sampled_from(list(header.DTYPES.values())), shapes, cuts, st.integers(0, 2**16))


_PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
_VALUES = st.recursive(
    _PLAIN | _tensors(),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.dictionaries(st.text(), _VALUES, max_size=4),
    tags=st.dictionaries(st.text(), st.lists(st.text(), max_size=3).map(tuple), max_size=3),
)
def test_every_state_comes_back_as_it_was(
    values: dict[str, Any], tags: dict[str, tuple[str, ...]]
) -> None:
    packed = pack(State(values, tags), key=KEY, stage="encode")
    data = b"".join(packed.chunks)
    found = unpack(bytearray(data))
    assert same(dict(found.state.values), values) and found.state.tags == tags
    assert (found.key, found.stage, found.tensors) == (KEY, "encode", packed.tensors)
    assert len(data) == packed.bytes
    # The library that the format belongs to reads the same tensors.
    assert {n: _bits(t) for n, t in safetensors.torch.load(data).items()} == {
        n: _bits(t) for n, t in unpack(bytearray(data)).state.tensors().items()
    } or any(name not in found.tensors for name in found.state.tensors())


@pytest.mark.parametrize("code", header.DTYPES)
def test_every_dtype_is_spelled_as_the_library_spells_it(code: str) -> None:
    tensor = torch.ones(3).to(header.DTYPES[code])
    library = safetensors.torch.save({"x": tensor})
    length = int.from_bytes(library[:8], "little")
    assert json.loads(library[8 : 8 + length])["x"]["dtype"] == code
    ours = safetensors.torch.load(b"".join(pack(State({"x": tensor}), key=KEY, stage="encode").chunks))
    assert same(ours["x"], tensor)


def test_a_large_tensor_is_hashed_and_written_where_it_lies() -> None:
    tensor = torch.zeros(2**20)
    chunk = pack(State({"x": tensor}), key=KEY, stage="encode").chunks[1]
    tensor[0] = 1.0
    assert bytes(chunk[:4]) == struct.pack("<f", 1.0)


def test_both_stores_give_back_what_they_got(store: MemoryStore | FolderStore) -> None:
    assert store.get(KEY) is None and store.find(KEY) is None and store.keys() == []
    artifact = store.put(KEY, "encode", STATE, {"seconds": 0.25, "places": {"vae": "cpu"}})
    assert store.find(KEY) == artifact and store.keys() == [KEY]
    assert artifact.note == {"seconds": 0.25, "places": {"vae": "cpu"}}
    found = store.get(KEY)
    assert found is not None
    assert same(dict(found.values), dict(STATE.values)) and found.tags == STATE.tags


def test_what_is_dropped_is_gone_and_nothing_else(store: MemoryStore | FolderStore) -> None:
    # The same state under two keys: each has its own object.
    first, second = (store.put(key, "encode", STATE, {}) for key in (KEY, OTHER))
    assert first.object != second.object
    for _ in range(2):
        store.drop(KEY)
        assert store.get(KEY) is None and store.find(KEY) is None and store.keys() == [OTHER]
    assert store.get(OTHER) is not None
    if isinstance(store, FolderStore):
        assert [path.name for path in (store.path / "objects").rglob("*") if path.is_file()] == [second.object]
    store.put(KEY, "encode", STATE, {})
    assert store.get(KEY) is not None


def test_a_damaged_manifest_is_dropped(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store", strict=True)
    store.put(KEY, "encode", STATE, {})
    (store.path / f"stages/{KEY}.json").write_text("{")
    store.drop(KEY)
    assert store.keys() == [] and store.get(KEY) is None


def test_a_reader_whose_artifact_is_dropped_or_replaced_meanwhile_is_told_no_lie(tmp_path: Path) -> None:
    class Overtaken(FolderStore):
        def read(self, artifact: Artifact, *, finite: bool = True) -> State:
            if meanwhile:
                meanwhile.pop()()
            return super().read(artifact, finite=finite)

    store = Overtaken(tmp_path / "store", strict=True)
    store.put(KEY, "encode", STATE, {})
    meanwhile = [lambda: store.drop(KEY)]
    assert store.get(KEY) is None
    store.put(KEY, "encode", STATE, {})
    meanwhile = [lambda: (store.drop(KEY), store.put(KEY, "encode", State({"x": 1}), {}))]
    found = store.get(KEY)
    assert found is not None and found.values == {"x": 1}


def test_what_a_reader_does_to_a_state_stays_with_him(store: MemoryStore | FolderStore) -> None:
    store.put(KEY, "encode", STATE, {})
    first, second = store.get(KEY), store.get(KEY)
    assert first is not None and second is not None
    first.tensors()["prompt_embeds"].zero_()
    assert same(second.values["prompt_embeds"], STATE.values["prompt_embeds"])
    assert store.get(KEY) is not None


def test_a_folder_is_laid_out_as_promised_and_private(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    artifact = store.put(KEY, "encode", STATE, {})
    store.save_run("r1", {"status": "done"})
    files = {str(path.relative_to(store.path)): path for path in store.path.rglob("*") if path.is_file()}
    expected = {f"objects/{artifact.object[:2]}/{artifact.object}", f"stages/{KEY}.json", "runs/r1/run.json"}
    assert set(files) == expected | {"runs/.sequence"}
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in files.items()}
    assert modes.pop(min(expected)) == 0o444 and set(modes.values()) == {0o600}
    folders = [path for path in (store.path, *store.path.rglob("*")) if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    assert list((store.path / "tmp").iterdir()) == []


def test_the_same_bytes_are_stored_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    first, second = (store.put(KEY, "encode", STATE, {"seconds": seconds}) for seconds in (1, 2))
    assert first.object == second.object and second.note == {"seconds": 2}
    assert len([path for path in (store.path / "objects").rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2])
def test_what_is_not_finite_is_refused_by_name(
    store: MemoryStore | FolderStore, bad: float, dtype: torch.dtype
) -> None:
    tensor = torch.zeros(70, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    tensor[69] = bad
    tensor = tensor.to(dtype)
    assert not is_finite(tensor) and is_finite(tensor[:69])
    with pytest.raises(BadResult, match=r"stage denoise: deep\.1 holds NaN or infinity"):
        store.put(KEY, "denoise", State({"deep": [1, tensor]}), {})
    with pytest.raises(BadResult, match="stage denoise gave sigma = "):
        store.put(KEY, "denoise", State({"sigma": bad}), {})
    assert store.get(KEY) is None


def test_only_values_of_the_host_are_packed() -> None:
    with pytest.raises(AssertionError, match="x is on meta"):
        pack(State({"x": torch.ones(1, device="meta")}), key=KEY, stage="encode")
    with pytest.raises(AssertionError, match=r"x\.y is a .*complex"):
        pack(State({"x": {"y": 1j}}), key=KEY, stage="encode")  # type: ignore[dict-item]


def test_a_header_too_long_to_be_read_again_is_not_written(store: MemoryStore | FolderStore) -> None:
    with pytest.raises(StoreError, match=r"under a header of 2,000,\d+; an artifact holds at most"):
        store.put(KEY, "encode", State({"text": "a" * 2_000_000}), {})
    assert store.keys() == []


def test_keys_are_the_hash_of_every_part() -> None:
    parts = {"stage": "encode", "steps": 28, "guidance": 3.5, "size": [1024, 768], "inputs": {"b": 1, "a": None}}
    key = key_of(parts)
    assert len(key) == 64 and key == key_of(dict(reversed(parts.items())))
    changed: list[dict[str, Any]] = [
        {**parts, "steps": 29}, {**parts, "steps": 28.0}, {**parts, "size": [768, 1024]}, {**parts, "guidance": "3.5"},
        {**parts, "guidance": math.nextafter(3.5, 4)}, {**parts, "inputs": {"b": 1}}, {**parts, "steps": True},
    ]  # fmt: skip
    assert len({key, *map(key_of, changed)}) == len(changed) + 1
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            key_of({"guidance": bad})


def test_runs_are_kept_in_the_order_in_which_they_began(store: MemoryStore | FolderStore) -> None:
    for run in ("zebra", "apple", "20260101-000000"):
        store.save_run(run, {"status": "running"})
    store.save_run("zebra", {"status": "done", "keys": {"encode": [KEY]}})
    assert store.runs() == ["zebra", "apple", "20260101-000000"]
    assert store.load_run("zebra") == {"status": "done", "keys": {"encode": [KEY]}}
    with pytest.raises(StoreError, match="there is no run pear here; the last are: zebra, apple, 20260101-000000"):
        store.load_run("pear")


def test_the_order_of_runs_outlives_a_lost_counter_and_a_damaged_record(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for run in ("b", "a"):
        store.save_run(run, {})
    (store.path / "runs/.sequence").write_bytes(b"9" * 64)
    store.save_run("00", {})
    (store.path / "runs/.sequence").write_bytes(b"torn")
    store.save_run("0", {})
    assert store.runs() == ["b", "a", "00", "0"]
    path = store.path / "runs/a/run.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert set(store.runs()) == {"b", "a", "00", "0"}
    with pytest.raises(StoreError, match="the record of run a is damaged: it is torn"):
        store.load_run("a")


# Names: 200 hostile ones, none of which leaves the folder.

_STEMS = (
    "..", ".", "", "/", "//", "/etc/passwd", "../../x", "..\\..\\x", "a/b", "a\\b", "~", "~root", "$HOME", "`id`",
    "a\0b", "a\nb", "a b", "a\tb", "\u202etxt", "caf\u00e9", "\U0001f600", "%2e%2e%2f", "con:", "a:b", "a*b", "a?b",
    "a|b", "<a>", '"a"', "'a'", ".hidden", ".sequence", "-", "a;b", "a&b", "a\x1b[2J", "\ud800", "a\x7f", "x" * 65,
    "x" * 5000,
)  # fmt: skip
HOSTILE_NAMES = [
    name for stem in _STEMS for name in (stem, f"../{stem}", f"{stem}/../../x", f"runs/{stem}", f"{stem}\0.json")
]


def test_hostile_names_never_leave_the_folder(tmp_path: Path) -> None:
    assert len(HOSTILE_NAMES) == 200
    store = FolderStore(tmp_path / "inner" / "store") if (tmp_path / "inner").mkdir() is None else None
    assert store is not None
    before = sorted(tmp_path.rglob("*"))
    for name in HOSTILE_NAMES:
        # A lone dash is the one stem here that a run may have.
        if name != "-":
            for call in (lambda n: store.save_run(n, {}), store.load_run):
                with pytest.raises(ValueError, match="a run's name is"):
                    call(name)
        for call in (lambda n: store.put(n, "encode", STATE, {}), store.get, store.find, store.drop, store.working):
            with pytest.raises(ValueError, match="an artifact key is"):
                call(name)
        with pytest.raises((StoreError, ValueError)):
            open_artifact(f"{name}:encode", store)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_others_put_beside_our_files_is_not_taken_for_them(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    store.save_run("r", {})
    (store.path / "stages/notes.json").write_text("{}")
    (store.path / "stages/.DS_Store").touch()
    (store.path / "runs/a b").mkdir()
    (store.path / "runs/empty").mkdir()
    assert store.keys() == [KEY] and store.runs() == ["r"]


# Looking into artifacts.


def test_describe_tells_ranges_and_what_is_not_finite() -> None:
    values = torch.tensor([[1.0, -3.0], [math.nan, math.inf]], dtype=torch.bfloat16)
    rows = describe(State({"a": values, "b": [torch.zeros(0, 3, dtype=torch.int64)], "c": torch.tensor(True)}))
    first, second, third = rows
    assert (first.name, first.dtype, first.shape, first.bytes) == ("a", "bfloat16", (2, 2), 8)
    assert (first.min, first.max, first.mean, first.nonfinite) == (-3.0, 1.0, -1.0, 2)
    assert (second.name, second.shape, second.min, second.mean, second.nonfinite) == ("b.0", (0, 3), None, None, 0)
    assert (third.dtype, third.shape, third.max) == ("bool", (), 1.0)


def test_an_artifact_opens_by_path_key_prefix_or_run(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    artifact = store.put(KEY, "encode", STATE, {"seconds": 1})
    store.put(OTHER, "encode", STATE, {})
    store.save_run("r1", {"stages": {"encode": [OTHER, KEY]}})
    for what in (KEY, KEY[:6], "r1:encode:1", str(store.path / f"stages/{KEY}.json")):
        assert open_artifact(what, store)[0] == artifact
    assert open_artifact("r1:encode", store)[0].key == OTHER
    found, state = open_artifact(str(object_path(store)))
    assert dataclasses.replace(found, note={"seconds": 1}) == artifact and same(dict(state.values), dict(STATE.values))
    for what, message in {
        KEY[:5]: "a key needs 6 digits", "ffffff": "no file and no key starts with 'ffffff'; the last runs are: r1",
        "r1:decode": "run r1 has no stage 'decode'; it has encode", "r1:encode:2": "run r1 has 2 requests",
        "r2:encode": "there is no run r2",
    }.items():  # fmt: skip
        with pytest.raises(StoreError, match=message):
            open_artifact(what, store)
    with pytest.raises(StoreError, match="name a store to look"):
        open_artifact(KEY)


def test_an_ambiguous_prefix_names_the_candidates() -> None:
    store = MemoryStore()
    for last in "01":
        store.put("a" * 63 + last, "encode", STATE, {})
    with pytest.raises(StoreError, match=r"2 keys start with aaaaaa: a{16}, a{16}; give more digits"):
        open_artifact("aaaaaa", store)


def test_a_forwarding_store_hands_on_whatever_stores_do_in_their_own_way(tmp_path: Path) -> None:
    own = {name for kind in (MemoryStore, FolderStore, RemoteStore) for name in vars(kind)
           if not name.startswith("_") and callable(getattr(kind, name))}
    assert own <= vars(ForwardingStore).keys() and own > {"fetch", "publish", "working"}
    store = ForwardingStore(FolderStore(tmp_path / "store"))
    artifact = store.put(KEY, "encode", STATE, {})
    found = store.get(KEY)
    assert found is not None and same(dict(found.values), dict(STATE.values)) and store.find(KEY) == artifact
    store.save_run("r1", {"status": "done"})
    with store.running("r1"):
        assert store.is_running("r1") and store.load_run("r1") == {"status": "done"}
    store.drop_run("r1")
    assert list((tmp_path / "store/runs").iterdir()) == [tmp_path / "store/runs/.sequence"]


def test_open_store_knows_memory_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stores: list[Store] = [open_store("memory"), open_store(str(tmp_path / "s")), open_store("~/t")]
    assert [type(store) for store in stores] == [MemoryStore, FolderStore, FolderStore]
    assert (tmp_path / "s/objects").is_dir() and (tmp_path / "t/objects").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(store.get(KEY) is None for store in stores)
    assert isinstance(stores[0].put(KEY, "encode", STATE, {}), Artifact)
    assert os.listdir(tmp_path / "s/objects") == []
