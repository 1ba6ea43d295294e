"""What got slower since a baseline, and how well two runs agree: ratios to mm alone, since seconds are the machine's.

Ratios are a processor's as well: how fast its matrix product is against its memory, and how good torch's product is on
it. So the baseline has a part for every kind of machine that it was made on, and a run is held against its own kind's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from alterrec_fast.benchmarks.machine import Machine
from alterrec_fast.benchmarks.records import FLOOR, NOT_BEGUN, Record, Results, both

BASELINE = Path(__file__).with_name("baseline.json")
SEEN = math.log(1.3)  # how much slower an op may get before its baseline must tell, in logarithms


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


def baseline_of(*runs: Results) -> dict[str, dict[str, float]]:
    """Ours, as it is stored: no seconds in it. Of several runs the middle ratio, and the larger of what they state as
    noise and of how far any of them is from the middle.
    """
    found: dict[str, list[Known]] = {}
    for record in (record for results in runs for record in results.records):
        if record.ours and record.ratio is not None and record.noise is not None:
            found.setdefault(key(record), []).append(Known(record.ratio, record.noise))
    stored = {}
    for name, known in found.items():
        ratio = math.exp(statistics.median(math.log(one.ratio) for one in known))
        far = max(abs(math.log(one.ratio / ratio)) for one in known)
        noise = max(statistics.median(one.noise for one in known), far)
        stored[name] = {"ratio": round(ratio, 4), "noise": round(noise, 4)}
    return stored


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
        noise = both(record.noise, known.noise)
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
    lost = [record for record in results.records if key(record) in baseline and record.ratio is None]
    failed = [key(record) for record in lost if not (record.failed or "").startswith(NOT_BEGUN)]
    worse = compare(results, baseline)
    lines = [f"slower than the baseline: {len(worse)} of {known} ratios to mm", *(f"  {one}" for one in worse)]
    lines += [f"  {name}: no ratio any more" for name in failed]
    if len(lost) > len(failed):
        lines.append(f"  {len(lost) - len(failed)} not measured, since there was no time for their contests")
    return "\n".join(lines)


def agreement(one: Results, other: Results, within: float = 0.1) -> str:
    """For a person: how many ratios of two runs agree within 10%, and which do not lie in each other's printed
    interval, among them those of which a run has no interval or no ratio.
    """
    second = {key(record): record for record in other.records}
    pairs = [(key(a), a, second[key(a)]) for a in one.records if key(a) in second and a.contestant != FLOOR]
    timed = [row for row in pairs if row[1].ratio or row[2].ratio]
    close, lines = 0, []
    for name, a, b in timed:
        if a.ratio is None or b.ratio is None:
            lines.append(f"  {name}: no ratio in one of the runs")
            continue
        apart = abs(math.log(a.ratio / b.ratio))
        close += apart <= math.log(1.0 + within)
        if a.noise is None or b.noise is None:
            lines.append(f"  {name}: {a.ratio:.2f} and {b.ratio:.2f}, no interval")
        elif apart > min(a.noise, b.noise):
            lines.append(f"  {name}: {a.ratio:.2f} and {b.ratio:.2f}")
    first = (
        f"{close} of {len(timed)} ratios agree within {100 * within:.0f}%; "
        f"{len(timed) - len(lines)} of {len(timed)} lie in each other's interval"
    )
    return "\n".join([first, *lines])


def main() -> None:
    """Makes runs the baseline of their kind of machine, or with --with says how well two runs agree."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a run, or of several like it")
    parser.add_argument("--with", dest="other", type=Path, help="results.json of another run on the same machine")
    options = parser.parse_args()
    runs = [Results.read(path) for path in options.results]
    kinds = {kind_of(run.machine) for run in runs}
    if len(kinds) > 1 or (options.other and len(runs) > 1):
        parser.error(f"expected runs on one kind of machine, a single one with --with, got {len(runs)} on {kinds}")
    if options.other:
        print(agreement(runs[0], Results.read(options.other)))
        return
    found = baseline_of(*runs)
    told = {name: known for name, known in found.items() if known["noise"] < SEEN}
    for name in sorted(found.keys() - told.keys()):
        print(f"not stored, since its noise of {100 * math.expm1(found[name]['noise']):.0f}% hides a third: {name}")
    stored = json.loads(BASELINE.read_text()) | {kinds.pop(): told}
    BASELINE.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
