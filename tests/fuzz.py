"""The engines against the reference on random calls, for as long as it may take: make fuzz SECONDS=600 [SEED=1].

A case is a seed: op, shapes, dtypes, strides, storage and options are drawn from it, and the command printed for
a case that fails draws the same again. Embeddings are small integers, whose products are exact, so that sets must be
identical; losses and gradients may differ by rounding. Tensors lie among values that would be seen: NaN, and ids that
no catalog has. Every instruction set of this machine is run on one thread and on two, in processes of their own; with
TRITON_INTERPRET=1 it is Triton instead of the native engine.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import alterrec_fast as af
from alterrec_fast.ops import library
from alterrec_fast.ops.dispatch import FORMATS
from alterrec_fast.ops.slices import pack_bits
from tests.ops.loss_helpers import INSTRUCTION_SETS

ROWS = (0, 1, 2, 3, 5, 17, 40)
ITEMS = (1, 2, 3, 31, 63, 64, 65, 130, 511, 513, 600, 1_100, 3_000, 9_000)
WIDTHS = (0, 1, 2, 3, 8, 16, 17, 33, 64)
NO_ITEM = 10**9  # an id that no catalog has


@dataclass
class Draw:
    """What a seed draws; the same calls in the same order draw the same."""

    rng: random.Random
    small: bool  # for the interpreter, which is slow

    def of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def size(self, sizes: tuple[int, ...], small: int) -> int:
        return self.rng.choice([n for n in sizes if n <= small] if self.small else sizes)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(2**60))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def mask(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < probability

    def dtype(self) -> torch.dtype:
        kind: torch.dtype = self.of(torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16)
        return kind

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Small integers; now and then rows that overlap in memory."""
        values = self.integers(-2, 3, rows, columns).to(self.dtype())
        form = self.rng.randrange(12)
        if form == 0 and rows:
            return values[:1].expand(rows, columns)
        if form == 1 and columns:
            return values[:, :1].expand(rows, columns)
        if form == 2:
            long = self.integers(-2, 3, rows + columns).to(values.dtype)
            return long.unfold(0, columns, 1)[:rows] if columns else values
        return self.laid_out(values)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values somewhere else: with other strides, behind an offset, or at the end of their storage."""
        around = math.nan if x.dtype.is_floating_point else NO_ITEM if x.dtype != torch.uint8 else 255
        form = self.rng.randrange(5)
        if form == 0:
            return x.clone()
        if x.ndim == 2 and form == 1:
            return self.laid_out(x.T).T
        before, step = self.rng.randrange(6), self.of(1, 1, 2, 3)
        width = (x.shape[-1] - 1) * step + 1 if x.shape[-1] else 0
        after = 0 if form == 2 else self.rng.randrange(4)
        shape = (x.shape[0], before + width + after) if x.ndim == 2 else (before + width + after,)
        wide = torch.full(shape, around, dtype=x.dtype)
        view = wide[..., before : before + width : step]
        view.copy_(x)
        return view

    def ids(self, x: Tensor) -> Tensor:
        return self.laid_out(x.int() if self.chance(0.5) else x)


@dataclass
class Case:
    """A call: inputs with gradients, further options, and what must agree."""

    op: Callable[..., Any]
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    exact: bool  # the results are sets and scores, which must be identical


def draw_case(seed: int, small: bool) -> Case:
    d = Draw(random.Random(seed), small)
    op = d.of(af.rank_slice, af.top_k, af.slice_cross_entropy, af.sampled_softmax, af.slice_cross_entropy)
    b, v, width = d.size(ROWS, 5), d.size(ITEMS, 130), d.size(WIDTHS, 17)
    first = d.of(0, 0, 1, v // 3, v)
    inputs = {"query": d.matrix(b, width), "catalog": d.matrix(v, width)}
    formats = {FORMATS[x.dtype] for x in inputs.values() if x.dtype in FORMATS}
    precisions = [None, "fp32", *(name for name in FORMATS.values() if not formats - {name})]
    options: dict[str, Any] = {"precision": d.of(*precisions), "check": d.of(None, True, False)}
    if d.chance(0.5):
        bias = d.integers(-2, 3, v).float().masked_fill(d.mask(d.of(0.0, 0.0, 0.3, 0.9, 1.0), v), -math.inf)
        inputs["bias"] = d.laid_out(bias.to(d.dtype()))
    if op in (af.rank_slice, af.top_k):
        options["first_item"] = first
        options["exclude"] = draw_exclude(d, b, v)
        ranks = sorted(d.rng.randint(0, v - first) for _ in range(2))
        if op is af.rank_slice:
            options |= {"start": ranks[0], "stop": ranks[1], "top": d.of(0, min(5, v - first), v - first)}
        else:
            options["k"] = ranks[0]
        return Case(op, inputs, options, exact=True)
    if op is af.sampled_softmax:
        first = 0
        shape = (d.of(0, 1, 7, 90),) if d.chance(0.4) else (b, d.of(0, 1, 7, 90))
        options |= {"neg": d.ids(d.integers(-1, v, *shape)), "sparse_grad": d.chance(0.3)}
        if d.chance(0.5):
            options["log_q"] = d.laid_out(d.integers(-3, 1, v).to(d.dtype()))
    else:
        first = min(first, v - 1)
        options |= {"first_item": first, "neg": draw_slice(d, b, v, first), "max_saved_bytes": d.of(0, 9_000, 1 << 28)}
    candidates = torch.ones(v, dtype=torch.bool) if "bias" not in inputs else inputs["bias"].isfinite()
    candidates[:first] = False
    allowed = candidates.nonzero()[:, 0]
    none = allowed.numel() == 0
    target = torch.full((b,), -100) if none else allowed[d.integers(0, allowed.numel(), b)]
    target = target.masked_fill(d.mask(d.of(0.0, 0.3, 1.0), b), -100)
    if d.chance(0.7):
        count = d.of(0, 1, 3)
        positives = torch.full((b, count), -1) if none else allowed[d.integers(0, allowed.numel(), b, count)]
        options["positives"] = d.ids(positives.masked_fill(d.mask(0.3, b, count), -1))
    options |= {"target": d.ids(target), "positive_weight": d.of(0.0, 0.5, 1.0)}
    temperature = d.of(1.0, 0.5, 4.0)
    if d.chance(0.3):
        inputs["temperature"] = torch.tensor(temperature, dtype=d.dtype())
    else:
        options["temperature"] = temperature
    if d.chance(0.3):
        options["weight"] = d.laid_out(d.integers(0, 3, v).to(d.dtype()))
    if op is af.slice_cross_entropy and options["neg"] is None and "positives" not in options:
        options["label_smoothing"] = d.of(0.0, 0.25, 1.0)
    ignored = target == -100
    if ignored.any() and width and d.chance(0.5):  # they may hold anything
        query = inputs["query"].clone()
        query[ignored] = d.of(math.nan, math.inf)
        inputs["query"] = query
    options["reduction"] = d.of("none", "none", "sum", "mean")
    if d.chance(0.2):
        as_sequences(d, inputs, options)
    return Case(op, inputs, options, exact=False)


def as_sequences(d: Draw, inputs: dict[str, Tensor], options: dict[str, Any]) -> None:
    """The same rows as (B, L, ...)."""
    b = inputs["query"].shape[0]
    length = d.of(*(n for n in range(1, b + 1) if b % n == 0)) if b else d.of(0, 1, 3)
    shape = (b // length, length) if length else (d.of(0, 2), 0)
    inputs["query"] = inputs["query"].unflatten(0, shape)
    for name in ("target", "positives", "neg"):
        if isinstance(options.get(name), Tensor) and (name != "neg" or options[name].ndim == 2):
            options[name] = options[name].unflatten(0, shape)


def draw_exclude(d: Draw, b: int, v: int) -> Any:
    form = d.of("none", "one", "many", "lists")
    if form == "none":
        return None
    if form == "lists":
        counts = d.integers(0, d.of(1, 4, 80), b)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return d.ids(d.integers(-2, v, int(offsets[-1]))), d.ids(offsets)
    return d.ids(d.integers(-2, v, b) if form == "one" else d.integers(-2, v, b, d.of(0, 1, 5, 70)))


def draw_slice(d: Draw, b: int, v: int, first: int) -> af.RankSlice | None:
    form = d.of("all", "bits", "ids", "few")
    if form == "all":
        return None
    mask = d.mask(d.of(0.0, 0.02, 0.5, 1.0), b, v)
    mask[:, :first] = False
    if form == "few":
        mask &= d.mask(0.05, b, v)
    made = af.RankSlice.from_mask(mask, first)
    if form == "bits":
        return replace(made, bits=d.laid_out(pack_bits(mask)), ids=None)
    return replace(made, bits=None, ids=d.laid_out(made.indices().int()))


def results(case: Case, engine: str, seed: int, copied: bool) -> dict[str, Tensor]:
    """What the call returns, and its gradients, by name."""
    d = Draw(random.Random(seed + 1), False)

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.clone(memory_format=torch.contiguous_format)
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        if isinstance(x, af.RankSlice):
            return replace(
                x, bits=x.bits if x.bits is None else plain(x.bits), ids=x.ids if x.ids is None else plain(x.ids)
            )
        return x

    inputs = {name: (plain(x) if copied else x).detach() for name, x in case.inputs.items()}
    options = {name: plain(x) if copied else x for name, x in case.options.items()}
    if case.exact:
        found = case.op(**inputs, **options, backend=engine)
        if isinstance(found, af.TopK):
            return found._asdict()
        members = {"bits": found.bits} if found.bits is not None else {"ids": found.ids}
        return {**members, "top": found.top, "thresholds": found.thresholds}
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if d.chance(0.8)}
    losses = case.op(**(inputs | leaves), **options, backend=engine)
    weights = d.integers(1, 4, *losses.shape).to(losses.dtype)
    if losses.ndim and not copied:
        weights = d.laid_out(weights)
    grads = torch.autograd.grad(losses, list(leaves.values()), weights) if leaves else ()
    return {"losses": losses.detach()} | {
        f"gradient of {name}": g.to_dense() if g.is_sparse else g for name, g in zip(leaves, grads, strict=True)
    }


def run_case(seed: int, engine: str) -> str:
    """What is wrong with this case; empty for nothing."""
    case = draw_case(seed, engine == "triton")
    ours, theirs = results(case, engine, seed, False), results(case, "reference", seed, True)
    if ours.keys() != theirs.keys():
        return f"got {sorted(ours)}, expected {sorted(theirs)}"
    half = any(x.dtype in FORMATS for x in case.inputs.values()) or case.options["precision"] in FORMATS.values()
    for name, got in ours.items():
        want = theirs[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{name}: got {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
        if case.exact and not torch.equal(got, want):
            return f"{name}: {int((got != want).sum())} of {got.numel()} differ"
        if not case.exact and not torch.allclose(
            got.float(), want.float(), rtol=2e-3 if half else 1e-4, atol=bound(case, half, name)
        ):
            return f"{name}: differs by up to {float((got.float() - want.float()).abs().max())}"
    return ""


def bound(case: Case, half: bool, name: str) -> float:
    """How far sums of a case may differ by rounding: of each row, weights of at most 3 times entries of at most 2, and
    class weights of at most 2. The temperature's gradient is a sum of such over the rows' width."""
    positives = case.options.get("positives")
    terms = 1 + (0 if positives is None else positives.shape[-1])
    temperature = float(case.options.get("temperature", case.inputs.get("temperature", 1.0)))
    largest = 3 * 2 * 2 * terms * (1 + case.options["target"].numel()) / temperature
    if "weight" in case.options:
        largest *= 2
    if name == "gradient of temperature":
        largest *= (2 * case.inputs["query"].shape[-1] + 2) / temperature
    return float(largest * (2.0**-8 if half else 1e-5))


def described(seed: int, engine: str) -> str:
    """The op, and shape, strides and dtype of its inputs."""
    case = draw_case(seed, engine == "triton")
    inputs = [f"{name} {tuple(x.shape)} {x.stride()} {x.dtype}" for name, x in case.inputs.items()]
    return f"{case.op.__name__}({', '.join(inputs)})"


def fuzz(seed: int, seconds: float, engine: str) -> int:
    """Runs cases from `seed` on until the time is over; returns how many failed, 3 at most."""
    end, failed, first = time.monotonic() + seconds, 0, seed
    setting = f"{engine}, {os.environ.get('ALTERREC_FAST_ISA', 'best')}, {torch.get_num_threads()} threads"
    while time.monotonic() < end and failed < 3:
        try:
            wrong = run_case(seed, engine)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            failed += 1
            names = ("TRITON_INTERPRET", "ALTERREC_FAST_ISA", "OMP_NUM_THREADS")
            environment = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
            print(f"{setting}: {described(seed, engine)}: {wrong}")
            print(f"    {environment} {sys.executable} -m tests.fuzz --case {seed}")
        seed += 1
    print(f"{setting}: cases {first} to {seed - 1}, {failed} failed", flush=True)
    return failed


def settings(engine: str) -> list[dict[str, str]]:
    """The environments to run in: every instruction set of this machine, one thread and two."""
    if engine == "triton":
        return [{"OMP_NUM_THREADS": "1"}]
    from alterrec_fast import _C

    available = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_C.isa()) + 1]
    return [{"ALTERREC_FAST_ISA": isa, "OMP_NUM_THREADS": threads} for isa in available for threads in ("1", "2")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all settings together")
    parser.add_argument("--seed", type=int, default=None, help="the first case; without it one by the clock")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--one-setting", action="store_true", help="in this process, as the environment says")
    options = parser.parse_args()
    engine = "triton" if library.INTERPRETED else "native"
    if engine == "native" and library.NO_EXTENSION:
        print(f"the extension is not built: {library.NO_EXTENSION}")
        return 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.case is not None:
        wrong = run_case(options.case, engine)
        print(wrong or "nothing is wrong")
        return bool(wrong)
    seed = int(time.time()) % 10**6 * 1000 if options.seed is None else options.seed
    if options.one_setting:
        return bool(fuzz(seed, options.seconds, engine))
    every, failed = settings(engine), False
    for number, environment in enumerate(every):
        command = [sys.executable, "-m", "tests.fuzz", "--one-setting", "--seed", str(seed + number * 10**7)]
        command += ["--seconds", str(options.seconds / len(every))]
        failed |= subprocess.run(command, env=os.environ | environment).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
