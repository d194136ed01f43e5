"""The demo's training: whole-word tokenizers, phases that go on where they stopped, and an export that draws."""

import json
import random
from dataclasses import replace
from operator import eq
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from tools.demo.autoencoder import autoencoder_optimizer, build_autoencoder, train_autoencoder
from tools.demo.captions import Caption, captioned_scene, everything, known_words
from tools.demo.choices import STYLES, Choice, SceneChoices
from tools.demo.flow import FlowTraining, VelocityModel, build_transformer, flow_optimizers, frozen_copy, train_flow
from tools.demo.grounding import IGNORED, Grounding, grounding_optimizer, train_grounding
from tools.demo.latents import GRID, LatentCache, Latents, load_latents, save_latents
from tools.demo.muon import Muon, orthogonal
from tools.demo.phase import Phase
from tools.demo.scenes import POSITIONS, Pair, Solo, held_out, training_scene
from tools.demo.shapes import COLORS, SHAPES
from tools.demo.text import CLIP_TOKENS, TEXT_TOKENS, build_clip_encoder, build_clip_tokenizer, build_t5_encoder
from tools.demo.train import build_tokenizers, carried_rows, export_checkpoint, load_weights, thin_log

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FlowTraining]:
    folder = tmp_path_factory.mktemp("state")
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = build_tokenizers(folder)
    model = VelocityModel(build_clip_encoder(clip_tokenizer), build_t5_encoder(t5_tokenizer), build_transformer())
    rng = random.Random(0)
    scenes = [training_scene(rng) for _ in range(80)]
    latents = Latents(scenes, torch.randn(80, GRID * GRID, 64).half(), 0.1, 0.7)
    cache = LatentCache(latents, build_autoencoder())
    return folder, FlowTraining(model, frozen_copy(model), clip_tokenizer, t5_tokenizer, cache)


def test_a_sitting_that_goes_on_has_the_tokens_of_the_one_before(tmp_path: Path) -> None:
    """Tokens that swap their numbers are words that swap their meanings."""
    words = [f"{first}{last}" for first in ("ab", "cd", "ef", "gh") for last in ("on", "of", "at", "ar", "in", "it")]
    first = build_clip_tokenizer(tmp_path, words)
    assert all(build_clip_tokenizer(tmp_path, words).get_vocab() == first.get_vocab() for _ in range(5))
    assert build_clip_tokenizer(tmp_path, [*words, "other"]).tokenize("other") == ["other</w>"]


def test_every_word_of_the_captions_is_one_token(built: tuple[Path, FlowTraining]) -> None:
    _, training = built
    words = known_words()
    assert {"red", "star", "tiny", "beneath", "something", "picture"} <= set(words)
    assert all(len(training.t5_tokenizer(word).input_ids) == 2 for word in words)
    assert all(len(training.clip_tokenizer(word).input_ids) == 3 for word in words)
    rng = random.Random(1)
    texts = [captioned_scene(rng)[0].text for _ in range(2000)]
    assert max(len(training.t5_tokenizer(text).input_ids) for text in texts) <= TEXT_TOKENS
    assert max(len(training.clip_tokenizer(text).input_ids) for text in texts) <= CLIP_TOKENS
    unknown = training.t5_tokenizer.unk_token_id
    assert training.t5_tokenizer("a astronaut").input_ids.count(unknown) == 1
    assert training.t5_tokenizer("A Red circle").input_ids == training.t5_tokenizer("a red circle").input_ids


def test_every_word_that_names_a_thing_is_asked_what_it_is_and_where(built: tuple[Path, FlowTraining]) -> None:
    _, training = built
    scene = Pair("red", "circle", "above", "blue", "circle", "white")
    text = "a red circle above a blue circle on a white background"
    ids = training.t5_tokenizer(text).input_ids
    colors, shapes, places = list(COLORS), list(SHAPES), list(POSITIONS)
    grounding = Grounding(training.t5_tokenizer)
    named = (("red", "0"), ("circle", "0"), ("blue", "1"), ("circle", "1"), ("white", "b"))
    labels = grounding.token_labels(ids, Caption(text, everything(scene), named), scene).tolist()
    words = dict(zip(text.split(), range(len(ids)), strict=False))
    first = [colors.index("red"), shapes.index("circle"), places.index("at the top")]
    other = [colors.index("blue"), shapes.index("circle"), places.index("at the bottom")]
    behind = [colors.index("white"), IGNORED, len(places)]
    asked = {spot: row for spot, row in enumerate(labels) if row != [IGNORED] * 3}
    assert asked == {1: first, 2: first, 5: other, 6: other, words["white"]: behind}
    star = Solo("red", "star", "large", "on the left", "black")
    open_place = Caption("a red thing", frozenset({"color"}), (("red", "0"), ("thing", "0")))
    labels = grounding.token_labels(training.t5_tokenizer(open_place.text).input_ids, open_place, star).tolist()
    assert labels[1:3] == [[colors.index("red"), IGNORED, IGNORED]] * 2


def test_the_text_encoder_learns_its_words_and_keeps_them(built: tuple[Path, FlowTraining], tmp_path: Path) -> None:
    _, training = built
    torch.manual_seed(0)
    t5, grounding = build_t5_encoder(training.t5_tokenizer), Grounding(training.t5_tokenizer)
    phase = Phase("g", 1e9, tmp_path, tmp_path / "log", {"t5": t5}, [grounding_optimizer(t5, grounding)])
    losses: list[float] = []

    def loss(rng: random.Random) -> torch.Tensor:
        error = grounding.loss(t5, rng, CPU)
        losses.append(float(error.detach()))
        phase.budget = 1e9 if len(losses) < 8 else phase.spent
        return error

    train_grounding(phase, loss)
    assert phase.steps == 8 and losses[-1] < 0.8 * losses[0]
    flow_optimizers(VelocityModel(build_clip_encoder(training.clip_tokenizer), t5, build_transformer()))
    assert not any(weights.requires_grad for weights in t5.parameters())


def test_a_phase_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def begin(budget: float) -> tuple[Phase, torch.nn.Linear]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        return Phase("toy", budget, tmp_path, tmp_path / "log", {"layer": layer}, [Muon([layer.weight], 0.1)]), layer

    phase, layer = begin(0.02)

    def step(_: float) -> float:
        loss = layer(torch.ones(2, 4)).square().mean()
        torch.autograd.backward(loss)
        phase.optimizers[0].step()
        return float(loss.detach())

    phase.run(step, warmup=1, decay=1.0)
    assert phase.steps > 0
    again, other = begin(0.02)
    assert not torch.equal(layer.weight, other.weight)
    again.load()
    assert (again.steps, again.spent) == (phase.steps, phase.spent)
    assert torch.equal(layer.weight, other.weight)
    again.run(step, warmup=1, decay=1.0)
    assert again.steps == phase.steps


def test_muon_makes_directions_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 64), (2, 64, 16)):
        spread = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert spread.min() > 0.5 and spread.max() < 1.5


def test_latents_come_back_from_disk(built: tuple[Path, FlowTraining], tmp_path: Path) -> None:
    latents = built[1].latents.cached
    save_latents(latents, tmp_path / "latents.pt")
    again = load_latents(tmp_path / "latents.pt")
    assert again.scenes == latents.scenes
    assert torch.equal(again.values, latents.values)
    assert (again.shift, again.scale) == (latents.shift, latents.scale)


def test_latents_that_are_not_cached_are_encoded_once(built: tuple[Path, FlowTraining]) -> None:
    cached = built[1].latents.cached
    autoencoder = build_autoencoder().eval()
    cache = LatentCache(cached, autoencoder)
    new = Solo("red", "circle", "small", "on the left", "white")
    assert new not in cached.scenes
    first = cache.of([cached.scenes[3], new, new])
    assert torch.equal(first[0], cached.values[3]) and torch.equal(first[1], first[2])
    for weights in autoencoder.parameters():
        weights.data.zero_()
    assert torch.equal(cache.of([new])[0], first[1])


def test_the_noise_chooses_what_a_caption_leaves_open(built: tuple[Path, FlowTraining]) -> None:
    cached = built[1].latents.cached
    # As drawings do, these differ in a few directions far more than in others.
    few = torch.cat([torch.randn(80, 1, 20), torch.zeros(80, 1, 44)], -1).expand(80, GRID * GRID, 64)
    choices = SceneChoices(replace(cached, values=few.half()))
    noise = torch.randn(400, GRID * GRID, 64, generator=torch.Generator().manual_seed(1))
    styles = choices.styles(noise)
    assert set(styles) == set(range(STYLES))
    # So the style is read off noisy latents as off the noise.
    mixed = choices.styles(torch.lerp(few[torch.arange(400) % 80], noise, 0.3))
    assert sum(map(eq, mixed, styles)) >= 398
    rng = random.Random(3)
    for _ in range(60):
        choice = choices.caption(rng)
        scenes = [choice.styled(style) for style in range(STYLES)]
        assert not any(map(held_out, scenes))
        if choice.caption.said:
            assert all(getattr(scene, part) == getattr(choice.scene, part)
                       for scene in scenes for part in choice.caption.said)
        assert choice.complete == (set(scenes) == {choice.scene})
    nothing = Choice(Caption("a fox", frozenset(), ()), cached.scenes[0])
    assert len({nothing.styled(style) for style in range(STYLES)}) == STYLES


def test_one_step_of_each_kind_and_an_export_that_draws(built: tuple[Path, FlowTraining], tmp_path: Path) -> None:
    folder, training = built
    autoencoder = build_autoencoder()
    before = [weights.clone() for weights in autoencoder.parameters()]
    phase = Phase("a", 1e-6, folder, folder / "log", {"a": autoencoder}, [autoencoder_optimizer(autoencoder)])
    train_autoencoder(phase, autoencoder, CPU)
    assert phase.steps == 1
    assert any(not torch.equal(old, new) for old, new in zip(before, autoencoder.parameters(), strict=True))

    assert not training.average.transformer.proj_out.weight.any()
    phase = Phase("p", 1e-6, folder, folder / "log", {"p": training.model}, flow_optimizers(training.model))
    train_flow(phase, training, CPU, lambda: None)
    assert training.average.transformer.proj_out.weight.any()

    export_checkpoint(tmp_path, folder, training, autoencoder)
    assert (tmp_path / "tokenizer_2" / "spiece.model").exists()
    assert not list(tmp_path.rglob("*.bin"))
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.shift_factor == 0.1
    made = pipe("a red circle", height=128, width=128, num_inference_steps=1, max_sequence_length=TEXT_TOKENS)
    assert made.images[0].size == (128, 128)


def test_a_thinned_log_keeps_each_phase_s_last_line(tmp_path: Path) -> None:
    lines = [json.dumps({"phase": phase, "step": step}) for phase in ("a", "b") for step in range(301)]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    thin_log(tmp_path / "log", tmp_path / "kept", lines=20)
    kept = [json.loads(line) for line in (tmp_path / "kept").read_text().splitlines()]
    assert len(kept) < 30
    assert {"phase": "a", "step": 300} in kept
    assert kept[-1] == {"phase": "b", "step": 300}


def test_learning_goes_on_from_a_checkpoint(built: tuple[Path, FlowTraining], tmp_path: Path) -> None:
    folder, training = built
    export_checkpoint(tmp_path, folder, training, build_autoencoder())
    torch.manual_seed(5)
    encoders = build_clip_encoder(training.clip_tokenizer), build_t5_encoder(training.t5_tokenizer)
    model = VelocityModel(*encoders, build_transformer())
    load_weights(model, tmp_path, (training.clip_tokenizer, training.t5_tokenizer))
    loaded, exported = model.state_dict(), training.average.state_dict()
    assert all(torch.equal(weights.half().float(), loaded[name]) for name, weights in exported.items())


def test_a_word_that_is_new_to_a_checkpoint_begins_as_the_one_it_means_the_same_as() -> None:
    known = {"\u2581small": 4, "\u2581red": 5, "</s>": 1}
    new = {"\u2581tiny": 9, "\u2581small": 8, "\u2581red": 7, "</s>": 1, "\u2581photo": 6}
    assert carried_rows(new, known) == {9: 4, 8: 4, 7: 5, 1: 1}
