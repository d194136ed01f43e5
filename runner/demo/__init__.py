"""The demo checkpoint: a small FLUX trained on drawings of colored shapes."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
COLORS = Path(__file__).parent / "colors.json"
