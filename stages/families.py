"""The model families that have a name on the command line: pure data, no torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of models, and what it is run with unless the user says otherwise."""

    name: str
    """Its name on the command line."""
    repo: str
    """The hub id of its model."""
    pipeline: str
    """The pipeline class that its models name."""
    steps: int
    """Denoise steps."""
    guidance: float | None
    """The guidance scale; None where the model takes none."""
    text_tokens: int
    """The longest prompt, in tokens."""
    size: tuple[int, int]
    """Width and height of the picture, in pixels."""
    requires: tuple[str, ...] = ()
    """Modules that upstream imports only when they are installed but calls all the same.

    They are checked before anything is downloaded.
    """
    patch: int = 2
    """How many latents along an edge the transformer packs into one token."""
    multiple: int = 16
    """What width and height of its model's pictures are multiples of, in pixels."""
    most_tokens: int = 512
    """The most tokens that may be asked for."""
    negative: bool = False
    """Whether the model reads a negative prompt."""
    true_guidance: bool = False
    """Whether diffusers' own pipeline calls the guidance scale `true_cfg_scale`."""
    license: str = "see its page"
    """What its maker calls the license of the model."""
    gated: bool = False
    """Whether the hub gives the model only to those who accepted its license there."""
    parameters: int = 0
    """Numbers in its transformer, to three digits; 0 where that is not known."""


MEGAPIXEL = (1024, 1024)
APACHE = "Apache-2.0"

FAMILIES = {
    family.name: family
    for family in (
        Family("flux", "black-forest-labs/FLUX.1-dev", "FluxPipeline", 28, 3.5, 512, MEGAPIXEL,
               license="FLUX.1 [dev] Non-Commercial License", gated=True, parameters=11_900_000_000),
        Family("flux-schnell", "black-forest-labs/FLUX.1-schnell", "FluxPipeline", 4, None, 256, MEGAPIXEL,
               license=APACHE, gated=True, parameters=11_900_000_000),
        # The defaults of Flux2Pipeline; its PixtralProcessor asks for torchvision even to read text.
        Family("flux2", "black-forest-labs/FLUX.2-dev", "Flux2Pipeline", 50, 4.0, 512, MEGAPIXEL, ("torchvision",),
               license="FLUX.2 [dev] Non-Commercial License", gated=True, parameters=32_200_000_000),
        # Distilled to 4 steps without guidance; the base model has the defaults of Flux2KleinPipeline.
        Family("flux2-klein", "black-forest-labs/FLUX.2-klein-4B", "Flux2KleinPipeline", 4, None, 512, MEGAPIXEL,
               license=APACHE, parameters=3_880_000_000),
        Family(
            "flux2-klein-base", "black-forest-labs/FLUX.2-klein-base-4B", "Flux2KleinPipeline", 50, 4.0, 512,
            MEGAPIXEL,
            license=APACHE, parameters=3_880_000_000,
        ),
        # Steps, guidance and tokens are the defaults of QwenImagePipeline; 1328 is the square that it was trained on.
        Family(
            "qwen-image", "Qwen/Qwen-Image", "QwenImagePipeline", 50, 4.0, 512, (1328, 1328), most_tokens=1024,
            negative=True, true_guidance=True, license=APACHE, parameters=20_400_000_000,
        ),
        # Steps and tokens are the defaults of StableDiffusion3Pipeline; 3.5 is the guidance of this model's card.
        Family(
            "sd3", "stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", 28, 3.5, 256, MEGAPIXEL,
            negative=True, license="Stability AI Community License", gated=True, parameters=8_060_000_000,
        ),
        # Distilled to 8 steps without guidance, as in the example of ZImagePipeline.
        Family("z-image", "Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", 8, None, 512, MEGAPIXEL,
               license=APACHE, parameters=6_150_000_000),
        Family("demo", "demo", "FluxPipeline", 16, None, 32, (128, 128), license=APACHE, parameters=5_160_000),
    )
}

# Models that others run, by how their names begin, as `plain` has them.
_OTHERS = (
    "sdxl", "sd1", "sd2", "sd-1", "sd-2", "sd-xl", "sd-turbo", "sdxl-turbo", "sd-v1", "stable-diffusion",
    "stable-cascade", "stable-video", "stable-audio", "stable-unclip", "svd", "ssd-1b", "pixart", "hunyuan", "wan",
    "kandinsky", "lumina", "sana", "auraflow", "cogview", "hidream", "chroma", "kolors", "playground", "ltx",
    "kontext", "flux-kontext", "flux1-kontext", "flux-fill", "flux1-fill", "flux1-redux", "flux1-canny", "flux1-depth",
    "qwen-image-edit", "qwen-image-layered", "omnigen", "deepfloyd", "if-i", "dalle", "midjourney", "imagen",
    "ideogram", "mochi", "cogvideo", "bria", "ovis", "dreamshaper", "realistic-vision", "openjourney", "animatediff",
    "animagine", "juggernaut", "realvis", "pony-diffusion", "illustrious", "noobai", "waifu-diffusion", "wuerstchen",
    "amused", "instruct-pix2pix", "controlnet", "ip-adapter", "cosmos", "skyreels", "allegro", "easyanimate", "latte",
    "longcat", "glm-image", "unidiffuser", "marigold", "musicldm", "audioldm", "shap-e", "lcm-", "vq-diffusion",
    "ldm-", "gpt", "llama", "meta-llama", "mistral", "bert-", "whisper", "clip-vit", "t5-",
)


def is_unsupported(model: str) -> bool:
    """Whether it is the name or the hub id of a model that is known not to be of a family here."""
    name = plain(model.rpartition("/")[2])
    return name.startswith(_OTHERS) and not name.startswith("stable-diffusion-3")


def plain(name: str) -> str:
    """A name in small letters without dots, its parts apart by dashes."""
    return re.sub("[ _]", "-", name.lower()).replace(".", "")
