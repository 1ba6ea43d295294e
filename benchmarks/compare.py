"""What got slower since a baseline, and how well two runs agree: ratios to mm alone, since seconds are the machine's.

Ratios are a processor's as well: how fast its matrix product is against its memory, and how good torch's product is on
it. So the baseline has a part for every kind of machine that it was made on, and a run is held against its own kind's.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from alterrec_fast.benchmarks.machine import Machine
from alterrec_fast.benchmarks.records import FLOOR, Record, Results

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


def kind_of(machine: Machine) -> str:
    """What a machine's part of the baseline is called."""
    return f"{machine.processor}, {machine.instruction_set}, {machine.threads} threads"


def baseline_of(results: Results) -> dict[str, dict[str, float]]:
    """Ours, as it is stored: no seconds in it."""
    return {
        key(record): {"ratio": round(record.ratio, 4), "noise": round(record.noise, 4)}
        for record in results.records
        if record.ours and record.ratio is not None and record.noise is not None
    }


def read_baselines(path: Path = BASELINE) -> dict[str, dict[str, Known]]:
    """Each kind of machine's part."""
    stored = json.loads(path.read_text())
    return {kind: {name: Known(**known) for name, known in part.items()} for kind, part in stored.items()}


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


def summary(results: Results, baselines: dict[str, dict[str, Known]]) -> str:
    """For a person: what got slower, or that nothing did, out of how many that could be compared."""
    kind = kind_of(results.machine)
    if kind not in baselines:
        others = "; ".join(baselines) or "none"
        return f"no baseline of this kind of machine ({kind}), so nothing to compare with; there are: {others}"
    baseline = baselines[kind]
    known = sum(key(record) in baseline and record.ratio is not None for record in results.records)
    failed = [key(record) for record in results.records if key(record) in baseline and record.ratio is None]
    worse = compare(results, baseline)
    lines = [f"slower than the baseline: {len(worse)} of {known} ratios to mm", *(f"  {one}" for one in worse)]
    lines += [f"  {name}: no ratio any more" for name in failed]
    return "\n".join(lines)


def agreement(one: Results, other: Results, within: float = 0.1) -> str:
    """For a person: how many ratios of two runs agree within 10%, and which differ by more than both noises."""
    second = {key(record): record for record in other.records}
    pairs = [(key(a), a, second[key(a)]) for a in one.records if key(a) in second and a.contestant != FLOOR]
    found = [(name, a, b, abs(math.log(a.ratio / b.ratio))) for name, a, b in pairs if a.ratio and b.ratio]
    close = sum(apart <= math.log(1.0 + within) for *_, apart in found)
    told = [(name, a, b, apart) for name, a, b, apart in found if a.noise is not None and b.noise is not None]
    beyond = [row for row in told if row[3] > max(row[1].noise or 0.0, row[2].noise or 0.0)]
    lines = [
        f"{close} of {len(found)} ratios agree within {100 * within:.0f}%; "
        f"{len(told) - len(beyond)} of {len(told)} that have an interval agree within it",
        *(f"  {name}: {a.ratio:.2f} and {b.ratio:.2f}" for name, a, b, _ in beyond),
    ]
    return "\n".join(lines)


def main() -> None:
    """Makes a run its kind of machine's baseline, or with --with says how well two runs agree."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--with", dest="other", type=Path, help="results.json of another run on the same machine")
    options = parser.parse_args()
    results = Results.read(options.results)
    if options.other:
        print(agreement(results, Results.read(options.other)))
        return
    stored = json.loads(BASELINE.read_text()) | {kind_of(results.machine): baseline_of(results)}
    BASELINE.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
