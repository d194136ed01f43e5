"""The demo's transformer and the training of it, with CLIP, by flow matching on cached latents."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer

from tools.demo.choices import SceneChoices
from tools.demo.latents import CHANNELS, GRID, LatentCache
from tools.demo.muon import Muon
from tools.demo.phase import Phase
from tools.demo.text import CLIP_TOKENS, CLIP_WIDTH, T5_WIDTH, TEXT_TOKENS

BATCH = 48
HEADS, HEAD = 3, 64
ADAM_PEAK = 1.5e-3
MUON_PEAK = 3e-3
AVERAGE_DECAY = 0.997
# Where in the picture things go is settled near the noise.
TIME_SHIFT = 0.7
# What a caption leaves open is settled nearer still: so many of its times are among these, evenly.
OPEN_SHARE, OPEN_TIMES = 0.65, (0.82, 1.0)


def build_transformer() -> FluxTransformer2DModel:
    """FLUX's layout, small: 2 double and 4 single blocks, 3 heads of 64; every block starts as the identity."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        axes_dims_rope=(8, 28, 28),
        guidance_embeds=False,
    )
    for name, weights in model.named_parameters():
        if "norm" in name and ".linear." in name:
            torch.nn.init.zeros_(weights)
    # Gates at one, and the last layer of each block at zero: gradients reach both from the first step.
    width = HEADS * HEAD
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            norm.linear.bias.data[2 * width : 3 * width] = 1
            norm.linear.bias.data[5 * width :] = 1
        for out in (block.attn.to_out[0], block.attn.to_add_out, block.ff.net[2], block.ff_context.net[2]):
            torch.nn.init.zeros_(out.weight)
    for block in model.single_transformer_blocks:
        block.norm.linear.bias.data[2 * width :] = 1
        torch.nn.init.zeros_(block.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


class VelocityModel(torch.nn.Module):
    """Both text encoders and the transformer: from token ids and noisy latents to the flow's velocity."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.clip, self.t5, self.transformer = clip, t5, transformer
        line = torch.arange(GRID, dtype=torch.float32)
        rows, columns = torch.meshgrid(line, line, indexing="ij")
        positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        self.register_buffer("image_positions", positions, persistent=False)
        self.register_buffer("text_positions", torch.zeros(TEXT_TOKENS, 3), persistent=False)

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity of the latents x at the times t [batch], 0 the picture and 1 the noise.

        Latents and velocity are [batch, tokens, 64], ids [batch, text tokens].
        """
        velocity: torch.Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            timestep=t,
            img_ids=self.image_positions,
            txt_ids=self.text_positions,
            return_dict=False,
        )[0]
        return velocity


def flow_optimizers(model: VelocityModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; T5, which is trained before, is frozen."""
    model.t5.requires_grad_(False)
    hidden: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, weights in model.named_parameters():
        if weights.requires_grad:
            matrix = "blocks." in name and weights.ndim == 2 and "norm" not in name
            (hidden if matrix else rest).append(weights)
    adam = torch.optim.AdamW([{"params": rest, "peak": ADAM_PEAK}], lr=ADAM_PEAK, betas=(0.9, 0.98), weight_decay=0.0)
    return [adam, Muon(hidden, MUON_PEAK)]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> torch.Tensor:
    """Ids [texts, length], padded as the pipeline pads them."""
    ids: torch.Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def times(leave_open: list[bool]) -> torch.Tensor:
    """Times to train at, 0 the picture and 1 the noise, for captions that do or do not leave something open.

    They are logit-normal, nearer the noise, or for many of those that leave something open evenly spread near it.
    """
    count = len(leave_open)
    usual = torch.sigmoid(torch.randn(count) + TIME_SHIFT)
    near = torch.tensor(leave_open) & (torch.rand(count) < OPEN_SHARE)
    return torch.where(near, torch.empty(count).uniform_(*OPEN_TIMES), usual)


@dataclass(frozen=True)
class FlowTraining:
    """What flow matching works on."""

    model: VelocityModel
    """What is trained."""
    average: VelocityModel
    """The moving average of its weights, which is what becomes the checkpoint."""
    clip_tokenizer: CLIPTokenizer
    """For the ids that CLIP reads."""
    t5_tokenizer: T5Tokenizer
    """For the ids that T5 reads."""
    latents: LatentCache
    """What the model learns to make."""
    dtype: torch.dtype = torch.float32
    """What matrices are multiplied in; the weights are float32 in any case."""

    @cached_property
    def _choices(self) -> SceneChoices:
        return SceneChoices(self.latents.cached)

    def loss(self, rng: random.Random, device: torch.device) -> torch.Tensor:
        """The flow-matching error on one batch.

        What a caption leaves open is chosen by the noise, so that the model can tell which of many pictures is meant.
        """
        captions = [self._choices.caption(rng) for _ in range(BATCH)]
        noise = torch.randn(BATCH, *self.latents.cached.values.shape[1:])
        scenes = [each.scene if each.complete else each.styled(style)
                  for each, style in zip(captions, self._choices.styles(noise), strict=True)]
        clean, noise = self.latents.of(scenes).float().to(device), noise.to(device)
        t = times([not each.complete for each in captions]).to(device)
        mixed = torch.lerp(clean, noise, t[:, None, None])
        texts = [each.text for each in captions]
        clip_ids = token_ids(self.clip_tokenizer, texts, CLIP_TOKENS).to(device)
        t5_ids = token_ids(self.t5_tokenizer, texts, TEXT_TOKENS).to(device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            velocity: torch.Tensor = self.model(clip_ids, t5_ids, mixed, t)
        return (velocity.float() - (noise - clean)).square().mean()

    @torch.no_grad()
    def update_average(self, steps: int) -> None:
        """Move the average toward the weights after so many steps, fast at first."""
        decay = min(AVERAGE_DECAY, (steps + 1) / (steps + 20))
        for average, weights in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weights, 1 - decay)


def train_flow(phase: Phase, training: FlowTraining, device: torch.device, on_save: Callable[[], None]) -> None:
    """Train until the budget is spent; `on_save` is called about once a minute."""
    rng = random.Random(f"painter/{phase.steps}")

    def step(_: float) -> float:
        loss = training.loss(rng, device)
        phase.update(loss, training.model.parameters())
        training.update_average(phase.steps)
        return float(loss.detach())

    phase.run(step, warmup=150, decay=1.3, on_save=on_save)


def frozen_copy(model: VelocityModel) -> VelocityModel:
    """A second model of the same weights, for their average."""
    return copy.deepcopy(model).requires_grad_(False)
