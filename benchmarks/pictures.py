"""The README's picture grid, made by the command line itself with the demo checkpoint.

python -m benchmarks.pictures [FOLDER]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

PROMPTS = (
    "a large red circle on the left on a blue background",
    "a small green square at the top on a white background",
    "a large yellow ring in the center on a black background",
    "a red circle above a blue square on a white background",
    "a green heart to the left of a pink star on a black background",
    "a white cross below a yellow triangle on a red background",
    "a blue diamond to the right of a cyan ring on a yellow background",
    "a small cyan star on the left on a black background",
    "a large black circle at the top on a yellow background",
)
COLUMNS, SIDE, CAPTION = 3, 192, 36


def picture(prompt: str, seed: int, folder: Path) -> Image.Image:
    """The picture that `python -m runner flux --model demo` makes of a prompt."""
    path = folder / f"{seed}.png"
    command = [sys.executable, "-m", "runner", "flux", "--model", "demo", "--prompt", prompt, "--seed", str(seed),
               "--out", str(path), "--artifacts", "memory", "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    """Write the grid to FOLDER/demo.png, docs/ unless said otherwise."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    rows = -(-len(PROMPTS) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (SIDE + 12) + 12, rows * (SIDE + CAPTION + 12) + 12), "white")
    pen = ImageDraw.Draw(grid)
    with tempfile.TemporaryDirectory() as folder:
        for index, prompt in enumerate(PROMPTS):
            left = 12 + index % COLUMNS * (SIDE + 12)
            top = 12 + index // COLUMNS * (SIDE + CAPTION + 12)
            grid.paste(picture(prompt, index, Path(folder)), (left, top))
            words = prompt.split(" ")
            half = (len(words) + 1) // 2
            pen.text((left, top + SIDE + 4), " ".join(words[:half]) + "\n" + " ".join(words[half:]), fill="black")
    grid.save(out / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
