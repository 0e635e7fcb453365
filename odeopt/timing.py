"""Times of calls, on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from odeopt.progress import tqdm


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds, once the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    n_repeats: int,
    n_calls: int = 1,
    description: str | None = None,
) -> dict[str, list[float]]:
    """Time calls in turns, so that what else the machine does strikes all alike.

    Args:
        calls: What to time, by name; each has been called before.
        device: Where they compute.
        n_repeats: Turns; three are enough of a call that took ten seconds in all.
        n_calls: Calls of each in a turn, timed as one, so that the clock does not count.
        description: Of a progress bar over the turns; None for no bar.

    Returns:
        Seconds per call of each turn, by name.
    """
    names, seconds = list(calls), {name: [] for name in calls}
    for repeat in tqdm(range(n_repeats), desc=description, unit=" turns", leave=False, disable=description is None):
        for i in range(len(names)):
            name = names[(repeat + i) % len(names)]  # nobody always runs after the same one
            if repeat >= 3 and n_calls * sum(seconds[name]) > 10:
                continue
            began = clock(device)
            for _ in range(n_calls):
                calls[name]()
            seconds[name].append((clock(device) - began) / n_calls)
    return seconds
