"""Latency: how long a network takes for one image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["latency_ms", "timed_ms"]

_N_RUNS = 20
_N_WARM = 3


def latency_ms(network: nn.Module, image: Tensor) -> float:
    """Median time of a forward pass for one image (1, C, H, W), in milliseconds."""
    return timed_ms(lambda: network(image), image.device)


def timed_ms(
    run: Callable[[], object],
    device: torch.device,
    *,
    before: Callable[[], object] = lambda: None,
    n_runs: int = _N_RUNS,
) -> float:
    """Median time of something, in milliseconds, without gradients.

    Args:
        run: what is timed; a few first runs don't count.
        device: whose work is waited for.
        before: done before each run, and not timed.
        n_runs: that count.
    """
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    with torch.inference_mode():
        for _ in range(n_runs + _N_WARM):
            before()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[_N_WARM:])
