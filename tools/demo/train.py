"""Trains the demo checkpoint from nothing, on a CPU or an accelerator; interrupted and started again, it goes on.

python -m tools.demo.train [--out FOLDER] [--state FOLDER] [--minutes-vae M] [--minutes-words M] [--minutes M]
    [--start CHECKPOINT]
"""

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from runner.demo import CHECKPOINT
from tools.demo.autoencoder import autoencoder_optimizer, build_autoencoder, train_autoencoder
from tools.demo.flow import Painter, Studio, build_transformer, painter_optimizers, trailing_copy, train_painter
from tools.demo.grounding import Grounding, grounding_optimizer, train_grounding
from tools.demo.latents import Latents, encode_scenes, load_latents, save_latents
from tools.demo.phase import Phase
from tools.demo.text import (
    build_clip_encoder,
    build_clip_tokenizer,
    build_t5_encoder,
    build_t5_tokenizer,
    sample_captions,
)

LOSSES = "losses.jsonl"


@dataclass(frozen=True)
class Budgets:
    """Minutes of training: of the autoencoder, of T5, and of the transformer with CLIP."""

    autoencoder: float
    words: float
    pictures: float


def trained_autoencoder(state: Path, minutes: float, device: torch.device) -> AutoencoderKL:
    """The autoencoder after its budget of training."""
    torch.manual_seed(0)
    model = build_autoencoder().to(device)
    optimizer = autoencoder_optimizer(model)
    phase = Phase("autoencoder", minutes * 60, state, state / LOSSES, {"autoencoder": model}, [optimizer])
    phase.load()
    train_autoencoder(phase, model, device)
    return model.eval().requires_grad_(False)


def grounded(state: Path, minutes: float, t5: T5EncoderModel, tokenizer: T5Tokenizer, device: torch.device) -> None:
    """Teach the text encoder its words, for its budget of training."""
    torch.manual_seed(2)
    grounding, t5 = Grounding(tokenizer).to(device), t5.to(device)
    modules: dict[str, torch.nn.Module] = {"t5": t5, "grounding": grounding}
    optimizers = [grounding_optimizer(t5, grounding)]
    phase = Phase("grounding", minutes * 60, state, state / LOSSES, modules, optimizers)
    phase.load()
    train_grounding(phase, lambda rng: grounding.loss(t5, rng, device))


def warmed(painter: Painter, start: Path) -> Painter:
    """The painter with the weights of a checkpoint."""
    for module, part in (("clip", "text_encoder"), ("t5", "text_encoder_2"), ("transformer", "transformer")):
        model: Any = painter.get_submodule(module)
        known = type(model).from_pretrained(start, subfolder=part, dtype=torch.float32)
        model.load_state_dict(known.state_dict())
    return painter


def cached_latents(state: Path, autoencoder: AutoencoderKL, device: torch.device) -> Latents:
    """The training scenes' latents, from the state folder or encoded now."""
    path = state / "latents.pt"
    if not path.exists():
        save_latents(encode_scenes(autoencoder, device), path)
    return load_latents(path)


def tokenizers(state: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Both tokenizers; learning them takes no time and always gives the same."""
    corpus = sample_captions(4000)
    return build_clip_tokenizer(state / "tokenizer", corpus), build_t5_tokenizer(state / "tokenizer_2", corpus)


def export(out: Path, state: Path, studio: Studio, autoencoder: AutoencoderKL) -> None:
    """Write the trailing average as a FluxPipeline folder in float16: half of float32's size, and no rounding seen."""
    best = copy.deepcopy(studio.average).cpu().half()
    vae = copy.deepcopy(autoencoder).cpu().half()
    vae.register_to_config(shift_factor=studio.latents.shift, scaling_factor=studio.latents.scale)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=best.clip,
        tokenizer=studio.clip_tokenizer,
        text_encoder_2=best.t5,
        tokenizer_2=studio.t5_tokenizer,
        transformer=best.transformer,
    )
    pipe.save_pretrained(out)
    # The sentencepiece model itself, which save_pretrained leaves out in favor of tokenizer.json.
    (out / "tokenizer_2" / "spiece.model").write_bytes((state / "tokenizer_2" / "spiece.model").read_bytes())


def thin(log: Path, kept: Path, lines: int = 120) -> None:
    """Keep about so many of the log's lines, spread evenly, and the last of each phase."""
    entries = log.read_text().splitlines()
    stride = max(1, len(entries) // lines)
    phases = [json.loads(entry)["phase"] for entry in entries]
    last = {len(phases) - 1 - phases[::-1].index(phase) for phase in phases}
    picked = [entry for index, entry in enumerate(entries) if index % stride == 0 or index in last]
    kept.write_text("\n".join(picked) + "\n")


def train(out: Path, state: Path, budgets: Budgets, start: Path | None = None) -> None:
    """Train what is still to train, and write the checkpoint to `out` every few minutes and at the end.

    With `start`, a checkpoint, its autoencoder and T5 are taken as they are, and the rest learns on from its weights.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    state.mkdir(parents=True, exist_ok=True)
    clip_tokenizer, t5_tokenizer = tokenizers(state)
    torch.manual_seed(1)
    painter = Painter(build_clip_encoder(clip_tokenizer), build_t5_encoder(t5_tokenizer), build_transformer())
    if start is None:
        autoencoder = trained_autoencoder(state, budgets.autoencoder, device)
        grounded(state, budgets.words, painter.t5, t5_tokenizer, device)
    else:
        autoencoder = AutoencoderKL.from_pretrained(start, subfolder="vae", dtype=torch.float32).to(device).eval()
        warmed(painter, start)
    painter.to(device)
    studio = Studio(
        painter, trailing_copy(painter), clip_tokenizer, t5_tokenizer, cached_latents(state, autoencoder, device)
    )
    modules: dict[str, torch.nn.Module] = {"painter": painter, "average": studio.average}
    phase = Phase("painter", budgets.pictures * 60, state, state / LOSSES, modules, painter_optimizers(painter))
    phase.load()
    train_painter(phase, studio, device, lambda: export(out, state, studio, autoencoder))
    export(out, state, studio, autoencoder)
    thin(state / LOSSES, (Path(__file__).parent if out == CHECKPOINT else out.parent) / LOSSES)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.train", description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("demo-training"), help="folder to go on from")
    parser.add_argument("--minutes-vae", type=float, default=17.0, help="budget of the autoencoder")
    parser.add_argument("--minutes-words", type=float, default=3.0, help="budget of T5")
    parser.add_argument("--minutes", type=float, default=90.0, help="budget of the transformer and CLIP")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights to begin with")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budgets = Budgets(options.minutes_vae, options.minutes_words, options.minutes)
    train(options.out, options.state, budgets, options.start)


if __name__ == "__main__":
    main()
