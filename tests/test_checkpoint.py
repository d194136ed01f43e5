"""A model is found and checked before anything heavy: every kind of damage has its own line and next step."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.errors import ModelError
from stages.families import FAMILIES
from stages.models.checkpoint import Checkpoint, check_family, find
from stages.models.files import Incomplete
from stages.models.safetensors_header import parse_header, read_header
from tests.sparse import hollow
from tests.tiny import flux as make_flux

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9983040304\n"


@pytest.fixture
def model(flux: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(flux, tmp_path / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("sharded") / "flux", shard="200KB")


def refused(model: Path | str, *words: str, kind: type[Exception] = ModelError) -> str:
    """The one-line message with which `find` refuses the model, which holds all the words."""
    with pytest.raises(kind) as caught:
        find(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_finds_a_folder(flux: Path) -> None:
    found = find(flux)
    assert (found.path, found.source, found.pipeline) == (flux, str(flux), "FluxPipeline")
    assert list(found.components) == [
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
    ]
    transformer = found.components["transformer"]
    assert (transformer.library, transformer.class_name) == ("diffusers", "FluxTransformer2DModel")
    assert transformer.files == (flux / WEIGHTS,)
    assert found.components["tokenizer"].files == found.components["scheduler"].files == ()
    assert find(str(flux)).identity == found.identity


def test_finds_shards_in_order(sharded: Path) -> None:
    files = find(sharded).components["transformer"].files
    assert len(files) > 2
    assert [file.name for file in files] == sorted(file.name for file in files)


def test_only_what_is_asked_for_has_to_be_there(model: Path) -> None:
    shutil.rmtree(model / "vae")
    assert list(find(model, components=["transformer", "scheduler"]).components) == ["scheduler", "transformer"]
    assert dict(find(model, components=()).components) == {}
    with pytest.raises(ModelError, match=r"no component unet; it has scheduler, text_encoder"):
        find(model, components=["unet"])


def test_finding_imports_nothing_heavy(flux: Path) -> None:
    """Neither torch nor diffusers nor the hub's client, and no network: HF_HUB_OFFLINE makes no difference."""
    script = (
        "import sys; from stages.models.checkpoint import find; find(sys.argv[1]);"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub.file_download')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(flux)], capture_output=True, text=True, check=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("change", [
    lambda model: (model / "scheduler" / "scheduler_config.json").open("a").write(" "),
    lambda model: rewrite(model / "model_index.json", _diffusers_version="0.1"),
    lambda model: (model / "tokenizer" / "added_tokens.json").write_text("{}"),
    lambda model: flip(model / WEIGHTS, -1),
], ids=["config", "index", "new file", "weights"])
def test_identity_changes_with_every_file(model: Path, change: Callable[[Path], object]) -> None:
    before = find(model).identity
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", before)
    change(model)
    assert find(model).identity != before
    assert find(model, components=["vae"]).identity == find(model).identity


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_identity_of_large_files_is_size_time_and_header(model: Path) -> None:
    path = model / WEIGHTS
    hollow(path, {"a": ("F32", (2**25,), 2**27)})
    os.utime(path, ns=(1, 1))
    before = find(model).identity
    os.utime(path, ns=(1, 2))
    assert find(model).identity != before
    hollow(path, {"b": ("F32", (2**25,), 2**27)})
    os.utime(path, ns=(1, 1))
    assert find(model).identity != before
    hollow(path, {"a": ("F32", (2**25,), 2**27)})
    os.utime(path, ns=(1, 1))
    assert find(model).identity == before


def test_what_is_no_model(model: Path, tmp_path: Path) -> None:
    refused(tmp_path / "modle", f"no model at {tmp_path / 'modle'}", f"nearest folder: {model}")
    refused(tmp_path, "but model in it has", f"model='{model}'")
    refused(model / "vae", "one component of a model", f"model='{model}'")
    refused(model / "model_index.json", "is a file")
    refused(str(model) + "/nothing/there", "no model at")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty", "hf download ID --local-dir")
    (tmp_path / "single").mkdir()
    shutil.copy(model / WEIGHTS, tmp_path / "single" / "flux1-dev.safetensors")
    refused(tmp_path / "single", "no model_index.json", "flux1-dev.safetensors")
    with pytest.raises(ValueError, match="revision='main' is for models of the hub"):
        find(model, revision="main")


def test_missing_component(model: Path) -> None:
    shutil.rmtree(model / "vae")
    refused(model, "vae is missing", f"--include 'vae/*' --local-dir {model}", kind=Incomplete)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda path: path.unlink(), ("has no weights",)),
    (lambda path: path.write_bytes(b""), ("0 bytes",)),
    (lambda path: path.write_text(POINTER), ("Git LFS pointer to 9983040304 bytes", "git lfs pull")),
    (lambda path: os.truncate(path, path.stat().st_size - 5), ("cut off", "bytes expected")),
    (lambda path: os.truncate(path, 100), ("no safetensors file or is cut off", "the file has 100")),
    (lambda path: os.truncate(path, 5), ("no safetensors file or is cut off", "the file has 5")),
    (lambda path: path.open("ab").write(b"more"), ("followed by foreign bytes",)),
    (lambda path: path.write_bytes(b"\xff" * 200), ("no safetensors file",)),
    (lambda path: path.write_bytes((10).to_bytes(8, "little") + b"not JSON!!"), ("not valid JSON",)),
    (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), ("JSON list, not an object",)),
    (lambda path: (path.unlink(), path.symlink_to(path)), ("leads nowhere",)),
    (lambda path: (path.unlink(), path.symlink_to("gone")), ("leads nowhere",)),
    (lambda path: (path.unlink(), path.mkdir()), ("not a regular file",)),
    (lambda path: (path.unlink(), os.mkfifo(path)), ("not a regular file",)),
], ids=["gone", "empty", "pointer", "cut", "header cut", "length cut", "longer", "noise", "no json", "list", "loop",
        "dangling", "folder", "fifo"])
def test_damaged_weights(model: Path, damage: Callable[[Path], object], words: tuple[str, ...]) -> None:
    damage(model / WEIGHTS)
    refused(model, str(model / "transformer"), f"hf download ID {WEIGHTS} --local-dir {model}", *words)


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]},
    {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2]},
    [],
])
def test_header_that_lies(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "transformer" / "a.safetensors"
    path.parent.mkdir()
    text = json.dumps({"weight": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match="describes tensor 'weight' wrongly"):
        read_header(path)


@pytest.mark.parametrize("offsets", [((0, 8), (4, 12)), ((0, 8), (9, 17)), ((4, 12), (12, 20))])
def test_header_with_gaps_or_overlaps(tmp_path: Path, offsets: tuple[tuple[int, int], ...]) -> None:
    path = tmp_path / "transformer" / "a.safetensors"
    path.parent.mkdir()
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": list(at)}
              for name, at in zip("ab", offsets, strict=True)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offsets[-1][1]))
    with pytest.raises(ModelError, match="overlap or leave a gap"):
        read_header(path)


@pytest.mark.parametrize(("text", "wrong"), [
    (b' {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', "does not start with a brace"),
    (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "more": 1}}', "describes tensor 'a' wrongly"),
    (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
     b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}', "describes tensor 'b' wrongly"),
])
def test_an_exact_header_has_nothing_that_the_format_merely_allows(text: bytes, wrong: str) -> None:
    assert parse_header(text).tensors["a"].start == 8 + len(text)
    with pytest.raises(ValueError, match=wrong):
        parse_header(text, exact=True)


def test_header_with_a_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "transformer" / "a.safetensors"
    path.parent.mkdir()
    one = '"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    text = f"{{{one}, {one}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(1))
    with pytest.raises(ModelError, match="a key appears twice"):
        read_header(path)


def test_header_longer_than_its_cap(tmp_path: Path) -> None:
    path = tmp_path / "transformer" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes((10**8 + 1).to_bytes(8, "little"))
    os.truncate(path, 2 * 10**8)
    with pytest.raises(ModelError, match="its header claims 100000001 bytes"):
        read_header(path)


def test_damaged_shards(sharded: Path, tmp_path: Path) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    shard = find(model).components["transformer"].files[1]
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-3])
    refused(model, f"{shard} is cut off: {len(kept)} bytes expected, {len(kept) - 3} found")
    shard.unlink()
    refused(model, f"{shard} is missing", f"hf download ID transformer/{shard.name}", kind=Incomplete)


@pytest.mark.parametrize(("name", "words"), [
    ("diffusion_pytorch_model-00001-of-00002.bin", "pickle refused"),
    ("../vae/diffusion_pytorch_model.safetensors", "not a file beside it"),
    ("/etc/passwd", "not a file beside it"),
    ("C:\\model.safetensors", "not a file beside it"),
    ("..", "pickle refused"),
])
def test_index_that_points_elsewhere(sharded: Path, tmp_path: Path, name: str, words: str) -> None:
    model = shutil.copytree(sharded, tmp_path / "model")
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    rewrite(index, weight_map={**json.loads(index.read_text())["weight_map"], "x_embedder.weight": name})
    refused(model, str(index), repr(name), words)
    rewrite(index, weight_map={})
    refused(model, "no weight_map")


def test_pickles_are_refused_and_never_opened(model: Path) -> None:
    (model / WEIGHTS).unlink()
    pickle = model / "transformer" / "diffusion_pytorch_model.bin"
    os.mkfifo(pickle)  # opening it would wait for ever
    refused(model, "pickle refused", "diffusion_pytorch_model.bin", "ships safetensors")


def test_variants_are_refused_by_name(model: Path) -> None:
    (model / WEIGHTS).rename(model / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    refused(model, "diffusion_pytorch_model.fp16.safetensors", "only the plain variant is read")


@pytest.mark.parametrize(("path", "text", "words"), [
    ("vae/config.json", "{", "not valid JSON"),
    ("vae/config.json", '{"a": NaN}', "NaN is not JSON"),
    ("vae/config.json", "[" * 100_000, "not valid JSON"),
    ("vae/config.json", "", "0 bytes"),
    ("vae/config.json", POINTER, "Git LFS pointer"),
    ("scheduler/scheduler_config.json", "[]", "JSON list"),
    ("tokenizer_2/tokenizer.json", POINTER, "Git LFS pointer"),
    ("model_index.json", "null", "JSON NoneType"),
    ("transformer/config.json", '{"auto_map": {"AutoModel": "evil.Model"}}', "auto_map: custom code"),
    ("text_encoder/config.json", '{"transformers_weights": "../../x.safetensors"}', "transformers_weights"),
    ("transformer/config.json", '{"quantization_config": {"load_in_4bit": true}}', "quantized weights"),
    ("transformer/model.py", "raise SystemExit", "custom code and adapters are not run"),
    ("text_encoder/adapter_config.json", "{}", "custom code and adapters are not run"),
])
def test_damaged_or_foreign_files(model: Path, path: str, text: str, words: str) -> None:
    (model / path).write_text(text)
    refused(model, str((model / path).parent), words)


@pytest.mark.parametrize("name", ["config.json", "../scheduler/scheduler_config.json"])
def test_missing_config(model: Path, name: str) -> None:
    (model / "vae" / name).unlink()
    refused(model, Path(name).name, "is missing", "fetch it: hf download ID", kind=Incomplete)


def test_tokenizer_without_vocabulary(model: Path) -> None:
    """transformers makes an empty tokenizer of it without a word, and so a wrong picture."""
    for name in ("tokenizer.json", "spiece.model"):
        (model / "tokenizer_2" / name).unlink()
    refused(model, "tokenizer_2 has no vocabulary", kind=Incomplete)


@pytest.mark.parametrize(("changes", "words"), [
    ({"transformer": ["os", "system"]}, "takes transformer from 'os'"),
    ({"transformer": ["my_transformer", "MyModel"]}, "custom code is refused"),
    ({"transformer": ["diffusers", "a.b"]}, "'a.b'"),
    ({"_class_name": ["pipeline", "MyPipeline"]}, "custom code is refused"),
    ({"_class_name": None}, "custom code is refused"),
    ({"../vae": ["diffusers", "AutoencoderKL"]}, "no plain name"),
    ({"auto_map": {"x": "y"}}, "auto_map"),
])
def test_index_that_names_code(model: Path, changes: dict[str, object], words: str) -> None:
    rewrite(model / "model_index.json", **changes)
    refused(model, str(model / "model_index.json"), words)


def test_family(model: Path) -> None:
    for name in ("flux", "flux-schnell", "demo"):
        check_family(find(model), family=FAMILIES[name])
    rewrite(model / "model_index.json", _class_name="StableDiffusionPipeline",
            safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.raises(ModelError, match=r"is a StableDiffusionPipeline, but family flux runs a FluxPipeline.*"
                                        r"model='black-forest-labs/FLUX.1-dev'"):
        check_family(find(model, components=()), family=FAMILIES["flux"])


def modular(model: Path, **spec: object) -> None:
    index = json.loads((model / "model_index.json").read_text())
    parts = {
        name: [*value, {"pretrained_model_name_or_path": "org/name", "subfolder": name, "variant": None, **spec}]
        for name, value in index.items() if isinstance(value, list) and value[0]
    }
    (model / "modular_model_index.json").write_text(json.dumps({"_class_name": "FluxModularPipeline", **parts}))


def test_modular_index(model: Path) -> None:
    plain = find(model)
    modular(model)
    assert find(model).components == plain.components
    (model / "model_index.json").rename(model / "kept.json")
    found = find(model)
    assert (found.pipeline, found.components) == ("FluxModularPipeline", plain.components)
    check_family(found, family=FAMILIES["flux"])
    (model / "kept.json").rename(model / "model_index.json")
    modular(model, subfolder="elsewhere")
    refused(model, "only models whose components lie in their own folders", "'elsewhere'")


def test_two_indexes_that_disagree(model: Path) -> None:
    modular(model)
    rewrite(model / "modular_model_index.json", vae=["diffusers", "AutoencoderTiny", {"subfolder": "vae"}])
    refused(model, "disagree about vae")


def test_folder_of_links(flux: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where every file is a link to a blob."""
    model = tmp_path / "models--org--name" / "snapshots" / "abc"
    for path in flux.rglob("*"):
        if path.is_file():
            link = model / path.relative_to(flux)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    found: Checkpoint = find(model)
    assert found.identity == find(flux).identity
    (model / WEIGHTS).unlink()
    refused(model, f"hf download org/name {WEIGHTS} --revision abc --force-download")
