"""What no way can be faster than: the arithmetic of a step, and the bytes that it copies, at rates measured here."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def operations(model: Path, side: int, tokens: int) -> int:
    """Floating-point operations of one step of FLUX's transformer for a picture of `side` times `side` pixels."""
    import torch
    from diffusers import FluxTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = FluxTransformer2DModel.load_config(str(model / "transformer"))
    patches = (side // 16) ** 2
    # Attention as two matrix products, whichever kernel a version of torch would take for it here.
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        network = FluxTransformer2DModel.from_config(config)
        network(
            hidden_states=torch.empty(1, patches, network.config.in_channels),
            encoder_hidden_states=torch.empty(1, tokens, network.config.joint_attention_dim),
            pooled_projections=torch.empty(1, network.config.pooled_projection_dim),
            timestep=torch.empty(1), guidance=torch.empty(1), img_ids=torch.empty(patches, 3),
            txt_ids=torch.empty(tokens, 3),
        )
    return int(count.get_total_flops())


def rates(device: str, dtype: "torch.dtype", width: int, size: int) -> dict[str, float]:
    """Operations a second in a product of `width` by `width` matrices; bytes a second copied from pinned memory."""
    import torch

    one, other = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = repeated(lambda: one @ other, 10)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.zeros(size, dtype=torch.uint8).pin_memory()
    copy = repeated(lambda: there.copy_(here, non_blocking=True), 4)
    return {"operations": 2 * width**3 / product, "bytes": size / copy}


def repeated(work: Callable[[], object], times: int) -> float:
    """Seconds of one `work`: the median of five rows of so many, after one that warms up."""
    import torch

    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        for _ in range(times):
            work()
        torch.accelerator.synchronize()
        seconds.append((time.perf_counter() - begin) / times)
    return statistics.median(seconds[1:])
