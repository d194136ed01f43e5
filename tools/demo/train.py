"""Trains the demo checkpoint from nothing, on a CPU or an accelerator; interrupted and started again, it goes on.

    python -m tools.demo.train [--out FOLDER] [--state FOLDER] [--minutes-vae M] [--minutes-words M] [--minutes M]
                               [--start CHECKPOINT] [--bfloat16]
"""

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from runner.demo import CHECKPOINT
from tools.demo.autoencoder import autoencoder_optimizer, build_autoencoder, train_autoencoder
from tools.demo.captions import SAME_WORDS, known_words
from tools.demo.flow import FlowTraining, VelocityModel, build_transformer, flow_optimizers, frozen_copy, train_flow
from tools.demo.grounding import PEAK, Grounding, grounding_optimizer, train_grounding
from tools.demo.latents import LatentCache, encode_training_scenes, load_latents, save_latents
from tools.demo.phase import Phase
from tools.demo.text import (
    build_clip_encoder,
    build_clip_tokenizer,
    build_t5_encoder,
    build_t5_tokenizer,
)

LOSSES = "losses.jsonl"
LEARNT_PEAK = 3e-4
"""The learning rate of a T5 that has learnt most of its words."""


@dataclass(frozen=True)
class Budgets:
    """How long each phase trains, in minutes."""

    autoencoder: float
    """Of the autoencoder."""
    grounding: float
    """Of T5."""
    flow: float
    """Of the transformer and CLIP."""


def trained_autoencoder(state: Path, minutes: float, device: torch.device) -> AutoencoderKL:
    """The autoencoder after its training."""
    torch.manual_seed(0)
    model = build_autoencoder().to(device)
    optimizer = autoencoder_optimizer(model)
    phase = Phase("autoencoder", minutes * 60, state, state / LOSSES, {"autoencoder": model}, [optimizer])
    phase.load()
    train_autoencoder(phase, model, device)
    return model.eval().requires_grad_(False)


def ground(
    state: Path, minutes: float, t5: T5EncoderModel, tokenizer: T5Tokenizer, device: torch.device, peak: float = PEAK
) -> None:
    """Train T5 to know its words."""
    torch.manual_seed(2)
    grounding, t5 = Grounding(tokenizer).to(device), t5.to(device)
    modules: dict[str, torch.nn.Module] = {"t5": t5, "grounding": grounding}
    optimizers = [grounding_optimizer(t5, grounding, peak)]
    phase = Phase("grounding", minutes * 60, state, state / LOSSES, modules, optimizers)
    phase.load()
    train_grounding(phase, lambda rng: grounding.loss(t5, rng, device))


def load_weights(model: VelocityModel, checkpoint: Path, tokenizers: tuple[CLIPTokenizer, T5Tokenizer]) -> None:
    """Give the model the weights of a checkpoint; a word that is new to it begins as the one it means the same as."""
    for module, folder, tokenizer in (
        (model.clip, "text_encoder", tokenizers[0]), (model.t5, "text_encoder_2", tokenizers[1]),
        (model.transformer, "transformer", None),
    ):
        saved = type(module).from_pretrained(checkpoint, subfolder=folder, dtype=torch.float32)
        weights = saved.state_dict()
        if tokenizer is not None:
            known = type(tokenizer).from_pretrained(checkpoint / folder.replace("text_encoder", "tokenizer"))
            words = carried_rows(tokenizer.get_vocab(), known.get_vocab())
            for name, built in module.state_dict().items():
                if name.endswith(("shared.weight", "embed_tokens.weight", "token_embedding.weight")):
                    rows = built.clone()
                    rows[list(words)] = weights[name][list(words.values())]
                    weights[name] = rows
                elif name.endswith("position_embedding.weight") and len(built) != len(weights[name]):
                    weights[name] = torch.cat([weights[name], built[len(weights[name]):]])
        module.load_state_dict(weights)


def carried_rows(new: dict[str, int], known: dict[str, int]) -> dict[int, int]:
    """For rows of a new vocabulary the rows of a known one that they begin as."""
    rows = {}
    for token, row in new.items():
        word = token.replace("\u2581", "").replace("</w>", "")
        meant = token if token in known else token.replace(word, SAME_WORDS.get(word, word))
        if meant in known:
            rows[row] = known[meant]
    return rows


def cached_latents(state: Path, autoencoder: AutoencoderKL) -> LatentCache:
    """The training scenes' latents, from the state folder or encoded and kept there, and others when asked."""
    path = state / "latents.pt"
    if not path.exists():
        save_latents(encode_training_scenes(autoencoder), path)
    return LatentCache(load_latents(path), autoencoder)


def build_tokenizers(state: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """CLIP's tokenizer and T5's; building them takes no time, and in the same folder always gives the same."""
    words = known_words()
    return build_clip_tokenizer(state / "tokenizer", words), build_t5_tokenizer(state / "tokenizer_2", words)


def export_checkpoint(out: Path, state: Path, training: FlowTraining, autoencoder: AutoencoderKL) -> None:
    """Write the average of the weights as a FluxPipeline folder in float16: half the size, and no difference seen."""
    average = copy.deepcopy(training.average).cpu().half()
    vae = copy.deepcopy(autoencoder).cpu().half()
    vae.register_to_config(shift_factor=training.latents.cached.shift, scaling_factor=training.latents.cached.scale)
    pipe = FluxPipeline(
        # Most steps near the noise, where what a caption leaves open is settled.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=average.clip,
        tokenizer=training.clip_tokenizer,
        text_encoder_2=average.t5,
        tokenizer_2=training.t5_tokenizer,
        transformer=average.transformer,
    )
    pipe.save_pretrained(out)
    # Where the autoencoder was read from is nobody's business.
    config = out / "vae" / "config.json"
    told = json.loads(config.read_text())
    told.pop("_name_or_path", None)
    config.write_text(json.dumps(told, indent=2) + "\n")
    # The sentencepiece model itself, which save_pretrained leaves out in favor of tokenizer.json.
    (out / "tokenizer_2" / "spiece.model").write_bytes((state / "tokenizer_2" / "spiece.model").read_bytes())


def thin_log(log: Path, kept: Path, lines: int = 120) -> None:
    """Write about so many of the log's lines, spread evenly, and the last of each phase, to the file `kept`."""
    entries = log.read_text().splitlines()
    stride = max(1, len(entries) // lines)
    phases = [json.loads(entry)["phase"] for entry in entries]
    last = {len(phases) - 1 - phases[::-1].index(phase) for phase in phases}
    picked = [entry for index, entry in enumerate(entries) if index % stride == 0 or index in last]
    kept.write_text("\n".join(picked) + "\n")


def train(
    out: Path, state: Path, budgets: Budgets, start: Path | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Train what is still to train, and write the checkpoint to `out` about once a minute and at the end.

    With the checkpoint `start` its autoencoder is taken as it is, and the rest is trained on from there. The
    transformer and CLIP multiply in `dtype`.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    state.mkdir(parents=True, exist_ok=True)
    clip_tokenizer, t5_tokenizer = build_tokenizers(state)
    torch.manual_seed(1)
    model = VelocityModel(build_clip_encoder(clip_tokenizer), build_t5_encoder(t5_tokenizer), build_transformer())
    if start is None:
        autoencoder = trained_autoencoder(state, budgets.autoencoder, device)
        ground(state, budgets.grounding, model.t5, t5_tokenizer, device)
    else:
        autoencoder = AutoencoderKL.from_pretrained(start, subfolder="vae", dtype=torch.float32).to(device).eval()
        load_weights(model, start, (clip_tokenizer, t5_tokenizer))
        ground(state, budgets.grounding, model.t5, t5_tokenizer, device, peak=LEARNT_PEAK)
    model.to(device)
    latents = cached_latents(state, autoencoder)
    training = FlowTraining(model, frozen_copy(model), clip_tokenizer, t5_tokenizer, latents, dtype)
    # Called "painter", here and in its seed, as in the log of the training that made the checkpoint.
    modules: dict[str, torch.nn.Module] = {"painter": model, "average": training.average}
    phase = Phase("painter", budgets.flow * 60, state, state / LOSSES, modules, flow_optimizers(model))
    phase.load()
    train_flow(phase, training, device, lambda: export_checkpoint(out, state, training, autoencoder))
    export_checkpoint(out, state, training, autoencoder)
    thin_log(state / LOSSES, (Path(__file__).parent if out.samefile(CHECKPOINT) else out.parent) / LOSSES)


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
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16: faster on many processors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budgets = Budgets(options.minutes_vae, options.minutes_words, options.minutes)
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    train(options.out, options.state, budgets, options.start, dtype)


if __name__ == "__main__":
    main()
