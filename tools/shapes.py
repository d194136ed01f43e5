"""Makes the shapes that ship with the package: `python -m tools.shapes [--source hub|configs] [FAMILY ...]`.

From the `hub` come the small files of a model and the headers of its weights, read by ranges; of a gated model after
its license was accepted. `configs` needs no network: it makes the libraries' own classes from the models' configs, as
`tests/sparse.py` has them, without weights, and lists the tensors that they would save, in files of the hub's sizes.
"""

import argparse
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import transformers

from stages.families import FAMILIES
from stages.models.checkpoint import Checkpoint, find
from stages.models.files import read_json
from stages.models.index import INDEX
from stages.models.safetensors_header import read_header
from stages.models.shapes import Shapes, file_name
from tests import sparse

SHIPPED = Path(__file__).parents[1] / "stages" / "models" / "shipped"
CONFIGS: dict[str, Callable[[Path], Path]] = {
    "flux": sparse.flux_dev,
    "flux-schnell": lambda folder: sparse.flux_dev(folder, guidance=False),
    "flux2": sparse.flux2_dev,
    "flux2-klein": sparse.flux2_klein,
    "flux2-klein-base": lambda folder: sparse.flux2_klein(folder, distilled=False),
    "qwen-image": sparse.qwen_image,
    "sd3": sparse.sd35_large,
    "z-image": sparse.z_image,
}
# Stands for all files of a tokenizer, which say nothing of shapes.
STAND_IN = "tokenizer.json"


def made(family: str, source: str) -> Shapes:
    """The shapes of a family's model from the hub, or from its configs."""
    repo = FAMILIES[family].repo
    if source == "hub":
        checkpoint = find(repo, weights=False)
        return shapes_of(checkpoint, repo, "the headers of its files", checkpoint.path.name)
    with TemporaryDirectory() as folder:
        return shapes_of(find(CONFIGS[family](Path(folder) / "model")), repo, "its configs", None)


def shapes_of(checkpoint: Checkpoint, model: str, source: str, commit: str | None) -> Shapes:
    """The shapes of a model folder that is here, or of which the headers are."""
    small = {INDEX: read_json(checkpoint.path / INDEX)}
    weights = {}
    for component in checkpoint.components.values():
        names = [path.name for path in component.files]
        if not component.files and not component.class_name.endswith("Scheduler"):
            small[f"{component.name}/{STAND_IN}"] = {}
            continue
        for path in sorted(component.folder.glob("*config.json")):
            small[f"{component.name}/{path.name}"] = read_json(path)
        for name, path in zip(names, component.files, strict=True):
            weights[f"{component.name}/{name.removesuffix('.header')}"] = {
                tensor: (entry.dtype, entry.shape) for tensor, entry in read_header(path).items()}
        if len(names) > 1:
            # Which files there are is all that is read of it.
            index = next(component.folder.glob("*.safetensors.index.json")).name
            small[f"{component.name}/{index}"] = {"weight_map": {
                next(iter(read_header(path))): path.name.removesuffix(".header") for path in component.files}}
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    return Shapes(model, source, commit, f"{datetime.now(UTC):%Y-%m-%d} with {versions}", small, weights)


def main(words: Sequence[str] | None = None) -> None:
    """Write the files of the families that are named, or of all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=[*CONFIGS])
    parser.add_argument("--source", choices=["hub", "configs"], default="hub")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(words)
    options.out.mkdir(exist_ok=True)
    for family in options.families:
        shapes = made(family, options.source)
        path = options.out / file_name(shapes.model)
        path.write_bytes(shapes.packed())
        count = sum(map(len, shapes.weights.values()))
        print(f"{family}: {count} tensors, {path.stat().st_size} bytes, {shapes}")


if __name__ == "__main__":
    main()
