"""How steady this machine is: the same small product over and over, on all threads and on one.

Where products on all threads are slow for stretches in which those on one thread are not, threads share a core with
each other or with a neighbour, which no account of busy time tells. `python -m alterrec_fast.benchmarks.steadiness`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import groupby

import torch
from alterrec_fast.benchmarks.machine import cores

SLOW = 1.2  # times as long as the machine can do it
SHAPE = (512, 128, 1_000)  # sessions, width, items a thread
CALLS = 9  # of a look


def look(threads: int) -> float:
    """Seconds of a product, as many items on each thread; the median of a few calls, after one on so many threads."""
    sessions, width, items = SHAPE
    torch.set_num_threads(threads)
    query, catalog = torch.ones(sessions, width), torch.ones(items * threads, width)
    out = torch.empty(sessions, items * threads)
    taken = []
    for _ in range(CALLS + 1):
        begun = time.perf_counter()
        torch.mm(query, catalog.T, out=out)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def spells(looks: list[tuple[float, float]]) -> str:
    """How many of the looks (when, seconds) were slow, and how long it stayed so, in words."""
    best = min(seconds for _, seconds in looks)
    slow = [(when, seconds > SLOW * best) for when, seconds in looks]
    lasting = [[when for when, _ in group] for is_slow, group in groupby(slow, key=lambda one: one[1]) if is_slow]
    longest = max((times[-1] - times[0] for times in lasting), default=0.0)
    share = 100 * sum(is_slow for _, is_slow in slow) / len(slow)
    return (
        f"best {1e3 * best:.2f} ms, over {SLOW} times that in {share:.0f}% of {len(looks)} looks, "
        f"for up to {longest:.1f} s at a stretch"
    )


def main() -> None:
    """Looks for so long, and says what it saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    counts = sorted({1, cores()})
    looks: dict[int, list[tuple[float, float]]] = {threads: [] for threads in counts}
    begun = time.monotonic()
    while time.monotonic() - begun < options.seconds:
        for threads in counts:
            looks[threads].append((time.monotonic() - begun, look(threads)))
    for threads in counts:
        print(f"{threads} thread{'s' if threads > 1 else ''}: {spells(looks[threads])}")


if __name__ == "__main__":
    main()
