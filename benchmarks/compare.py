"""What got slower since a baseline: ratios to mm alone, since seconds are the machine's."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from alterrec_fast.benchmarks.records import Record, Results

BASELINE = Path(__file__).with_name("baseline.json")


@dataclass(frozen=True)
class Known:
    """A ratio as the baseline has it; `noise` as in Record."""

    ratio: float
    noise: float


@dataclass(frozen=True)
class Worse:
    """One of ours that takes longer than it did, by more than both runs' noise together."""

    name: str
    before: float
    now: float
    noise: float  # of the two runs together

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.now:.2f} times mm, was {self.before:.2f} (noise {100 * math.expm1(self.noise):.0f}%)"
        )


def key(record: Record) -> str:
    """What a record is known by in the baseline."""
    return f"{record.op} | {record.shape.label} | {record.contestant}"


def baseline_of(results: Results) -> dict[str, dict[str, float]]:
    """Ours, as it is stored: no seconds in it."""
    return {
        key(record): {"ratio": round(record.ratio, 4), "noise": round(record.noise, 4)}
        for record in results.records
        if record.ours and record.ratio is not None and record.noise is not None
    }


def read_baseline(path: Path = BASELINE) -> dict[str, Known]:
    return {name: Known(**values) for name, values in json.loads(path.read_text()).items()}


def compare(results: Results, baseline: dict[str, Known]) -> list[Worse]:
    """Ours that got slower. What only one of the two knows is left alone."""
    worse = []
    for record in results.records:
        known = baseline.get(key(record))
        if not record.ours or known is None or record.ratio is None or record.noise is None:
            continue
        noise = math.hypot(record.noise, known.noise)
        if math.log(record.ratio / known.ratio) > noise:
            worse.append(Worse(key(record), known.ratio, record.ratio, noise))
    return worse


def summary(results: Results, baseline: dict[str, Known]) -> str:
    """For a person: what got slower, or that nothing did, out of how many that could be compared."""
    known = sum(key(record) in baseline and record.ratio is not None for record in results.records)
    failed = [key(record) for record in results.records if key(record) in baseline and record.ratio is None]
    worse = compare(results, baseline)
    lines = [f"slower than the baseline: {len(worse)} of {known} ratios to mm", *(f"  {one}" for one in worse)]
    lines += [f"  {name}: no ratio any more" for name in failed]
    return "\n".join(lines)


def main() -> None:
    """Makes a run the baseline: python -m alterrec_fast.benchmarks.compare RESULTS.json"""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path)
    made = baseline_of(Results.read(parser.parse_args().results))
    BASELINE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
