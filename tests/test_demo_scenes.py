"""The demo's drawings, captions, held-out split and judge; the trained checkpoint has its own test."""

import random
from dataclasses import replace

import pytest
from PIL import Image

from tools.demo.captions import captioned_scene, complete_captions, everything, held_out_text, partial_caption
from tools.demo.judge import judge, score
from tools.demo.prompts import SEEDS, Prompt, held_out_prompts, partial_prompts
from tools.demo.scenes import (
    POSITIONS,
    RADII,
    RELATIONS,
    Pair,
    Solo,
    draw,
    held_out,
    mirrored,
    random_pair,
    random_solo,
    training_scene,
)
from tools.demo.shapes import COLORS, SHAPES, SIDE

SOLOS, PAIRS = held_out_prompts()
PARTIAL = partial_prompts()


def test_drawings_are_deterministic_and_sized() -> None:
    first = [draw(training_scene(random.Random(3))).tobytes() for _ in range(2)]
    assert first[0] == first[1]
    assert draw(training_scene(random.Random(4))).size == (SIDE, SIDE)
    assert draw(training_scene(random.Random(4))).tobytes() != first[0]


def test_edges_are_blended_and_insides_pure() -> None:
    colors = draw(Solo("red", "circle", "large", "in the center", "white")).getcolors(SIDE * SIDE)
    assert colors is not None
    pure = {rgb for count, rgb in colors if count > 500}
    assert pure == {COLORS["red"], COLORS["white"]}
    assert len(colors) > 20


def test_captions_name_every_attribute() -> None:
    for text in complete_captions(Solo("red", "circle", "small", "on the left", "blue")):
        assert all(word in text for word in ("red", "circle", "small", "on the left", "blue"))
    for text in complete_captions(Pair("red", "circle", "above", "blue", "square", "white")):
        assert text.index("red circle") < text.index("above") < text.index("blue square") < text.index("white")


def test_training_never_draws_what_is_held_out() -> None:
    rng = random.Random(0)
    drawn = {training_scene(rng) for _ in range(4000)}
    asked = {prompt.scene for prompt in SOLOS + PAIRS}
    assert len(drawn) > 3000
    assert not any(held_out(scene) for scene in drawn)
    assert not drawn & asked
    assert not {mirrored(scene) for scene in drawn if isinstance(scene, Pair)} & asked


def test_training_never_says_a_partial_caption_that_is_judged() -> None:
    rng = random.Random(0)
    said = {caption.text: caption for caption, _ in (captioned_scene(rng) for _ in range(4000))}
    assert len(said) > 2500
    asked = {prompt.text for prompt in PARTIAL}
    assert not asked & said.keys()
    assert all(held_out_text(text) for text in asked)
    whole = [caption for caption in said.values() if len(caption.said) > 4]
    assert any(held_out_text(caption.text) for caption in whole)


def test_what_a_partial_caption_says_is_in_its_words_and_nothing_else() -> None:
    rng = random.Random(2)
    left_open = dict.fromkeys((*everything(SOLOS[0].scene), *everything(PAIRS[0].scene)), 0)
    for _ in range(400):
        scene = random_pair(rng) if rng.random() < 0.5 else random_solo(rng)
        caption = partial_caption(rng, scene)
        assert caption.said < everything(scene)
        words = caption.text.replace(",", " ").replace(".", " ").split()
        for name in everything(scene):
            word = getattr(scene, name)
            if name in ("color", "shape", "other_color", "other_shape", "background"):
                assert name not in caption.said or word in words, (caption, scene)
            left_open[name] += name not in caption.said
        assert len(caption.named) == sum(word in (*COLORS, *SHAPES, "shape", "thing", "object", "something")
                                         for word in words), caption
    assert all(count > 20 for count in left_open.values())


def test_the_partial_prompts_are_fixed_and_distinct() -> None:
    assert len(PARTIAL) == 200 * SEEDS and len({prompt.text for prompt in PARTIAL}) == 200
    assert len({prompt.seed for prompt in PARTIAL}) == 200 * SEEDS
    assert partial_prompts() == PARTIAL
    assert all(prompt.said < everything(prompt.scene) for prompt in PARTIAL)


def test_what_is_left_open_may_be_anything_and_what_is_said_may_not() -> None:
    red = Solo("red", "circle", "small", "on the left", "white")
    left = frozenset({"color", "shape", "position"})
    assert judge(draw(replace(red, size="large", background="blue")), red, left).passed
    assert not judge(draw(replace(red, color="green")), red, frozenset({"color"})).passed
    pair = Pair("red", "circle", "above", "blue", "square", "white")
    things = frozenset({"color", "shape", "other_color", "other_shape"})
    aside = replace(pair, relation="to the right of", background="green")
    assert judge(draw(aside), pair, things).passed
    assert not judge(draw(aside), pair, things | {"relation"}).passed
    swapped = Pair("blue", "circle", "above", "red", "square", "white")
    assert not judge(draw(swapped), pair, things).passed
    assert judge(draw(swapped), pair, frozenset({"shape", "other_shape", "relation"})).passed
    assert not judge(draw(red), pair, frozenset({"color", "shape"})).passed
    assert judge(draw(red), red, frozenset()).passed and judge(draw(pair), red, frozenset()).passed
    assert not judge(Image.new("RGB", (SIDE, SIDE), COLORS["red"]), red, frozenset()).passed


def test_a_pair_told_the_other_way_is_the_same_picture() -> None:
    pair = Pair("red", "circle", "below", "blue", "square", "white")
    assert mirrored(pair) == Pair("blue", "square", "above", "red", "circle", "white")
    assert draw(mirrored(pair)).tobytes() == draw(pair).tobytes()
    assert held_out(mirrored(pair)) == held_out(pair)


def test_the_prompts_are_fixed_held_out_and_distinct() -> None:
    assert (len(SOLOS), len(PAIRS)) == (100, 50)
    assert all(held_out(prompt.scene) for prompt in SOLOS + PAIRS)
    assert len({prompt.scene for prompt in SOLOS + PAIRS}) == 150
    assert len({prompt.seed for prompt in SOLOS + PAIRS}) == 150
    assert held_out_prompts() == (SOLOS, PAIRS)
    assert {prompt.scene.shape for prompt in SOLOS} == set(SHAPES)


@pytest.mark.parametrize("prompts", [SOLOS, PAIRS, PARTIAL], ids=["one shape", "two shapes", "something left open"])
def test_the_judge_passes_every_true_drawing(prompts: list[Prompt]) -> None:
    result = score(prompts, (draw(prompt.scene) for prompt in prompts))
    assert result.passed == result.total == len(prompts), result.wrong[:3]


def _other(rng: random.Random, names: object, *taken: str) -> str:
    return rng.choice([name for name in names if name not in taken])  # type: ignore[attr-defined]


def test_the_judge_sees_each_wrong_attribute_of_one_shape() -> None:
    rng = random.Random(1)
    for prompt in SOLOS[:30]:
        scene = prompt.scene
        assert isinstance(scene, Solo)
        changes = {
            "color": replace(scene, color=_other(rng, COLORS, scene.color, scene.background)),
            "background": replace(scene, background=_other(rng, COLORS, scene.color, scene.background)),
            "shape": replace(scene, shape=_other(rng, SHAPES, scene.shape)),
            "size": replace(scene, size=_other(rng, RADII, scene.size)),
            "position": replace(scene, position=_other(rng, POSITIONS, scene.position)),
        }
        for attribute, wrong in changes.items():
            verdict = judge(draw(wrong), scene)
            assert [name for name, right in verdict.right.items() if not right] == [attribute], (wrong, verdict)


def test_the_judge_sees_each_wrong_attribute_of_two_shapes() -> None:
    rng = random.Random(2)
    for prompt in PAIRS[:20]:
        scene = prompt.scene
        assert isinstance(scene, Pair)
        colors = (scene.color, scene.other_color, scene.background)
        changes = {
            "colors": replace(scene, color=_other(rng, COLORS, *colors)),
            "background": replace(scene, background=_other(rng, COLORS, *colors)),
            "shapes": replace(scene, other_shape=_other(rng, SHAPES, scene.other_shape)),
            "relation": replace(scene, relation=_other(rng, RELATIONS, scene.relation)),
        }
        for attribute, wrong in changes.items():
            verdict = judge(draw(wrong), scene)
            assert not verdict.right[attribute], (wrong, verdict)


def test_the_judge_binds_colors_to_shapes() -> None:
    scene = Pair("red", "circle", "above", "blue", "square", "white")
    swapped = Pair("red", "square", "above", "blue", "circle", "white")
    verdict = judge(draw(swapped), scene)
    assert [name for name, right in verdict.right.items() if not right] == ["things"]


def test_every_drawing_passes_as_itself_alone() -> None:
    rng = random.Random(5)
    scenes = [random_solo(rng) for _ in range(60)] + [random_pair(rng) for _ in range(30)]
    for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        assert judge(draw(scene), scene).passed
        assert type(scene) is not type(other) or scene == other or not judge(draw(other), scene).passed


def test_blank_noisy_and_crowded_pictures_fail() -> None:
    scene = Solo("red", "circle", "small", "in the center", "white")
    crowded = draw(scene)
    crowded.paste(COLORS["green"], (8, 8, 34, 34))
    noise = Image.frombytes("RGB", (SIDE, SIDE), random.Random(0).randbytes(SIDE * SIDE * 3))
    for picture in (Image.new("RGB", (SIDE, SIDE), COLORS["white"]), noise, crowded):
        assert not judge(picture, scene).passed
    assert not judge(draw(scene), Pair("red", "circle", "above", "blue", "square", "white")).passed


def test_the_judge_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="128x128, got 64x64"):
        judge(Image.new("RGB", (64, 64)), SOLOS[0].scene)
