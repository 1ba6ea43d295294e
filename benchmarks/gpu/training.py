"""AlterRec's training step on a GPU: `python -m alterrec_fast.benchmarks.gpu.training --out DIR [--seconds 200]`.

First, side by side: losses and gradients against the CPU; to the last bit, the graph's steps against the same steps one
kernel at a time, two runs of one seed, and a resumed one; errors of gradients by precision; with --shop, quality by
precision. Then alone on the device: milliseconds a step, eager and as a graph, beside the published step in plain
torch; kernels of a graph; ways of attention. Every result is a line of DIR/training.jsonl as soon as it is known. Ends
with 1 where a check failed. Random sessions: mean length 4.5, items by Zipf's law; features of 384 numbers an item.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from alterrec_fast.benchmarks.bench_step import PublishedStep, prefixes
from torch import Tensor

from alterrec_fast.data.batches import Batch, pack, plan
from alterrec_fast.data.sessions import Dataset, Sessions
from alterrec_fast.model import packing as packings
from alterrec_fast.model.encoders import TransformerSession, initialise
from alterrec_fast.model.packing import MaskedPacking, Packing, pad_heads
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import LAST, Trainer
from alterrec_fast.training.config import VARIANTS, Config, demo_settings
from alterrec_fast.training.steps import Inputs, StaticBatch, side_stream
from alterrec_fast.training.variants import Epoch, epochs

PAPER, LARGE = (40_258, 300), (1_000_000, 128)
EPOCHS = {"id": Epoch(5, "id", "text", 2), "text": Epoch(7, "text", "id", 2), "random": Epoch(1, "id", None, 0)}
PRECISIONS = {  # of ops and of encoders
    "fp32": ("fp32", "fp32"),
    "tf32": ("tf32", "tf32"),
    "bf16, encoders fp32": ("bf16", "fp32"),
    "bf16, encoders tf32": ("bf16", "tf32"),
    "bf16": ("bf16", "bf16"),
}
CUDA = torch.device("cuda")


class Journal:
    """Lines of JSON, written as they come."""

    def __init__(self, folder: Path):
        self.path = folder / "training.jsonl"
        self.failed = False

    def write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **values})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")

    def check(self, name: str, passed: bool, **values: Any) -> None:
        self.failed |= not passed
        self.write("check", name=name, passed=passed, **values)


def random_sessions(num_items: int, count: int = 20_000) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = 1 + rng.geometric(1 / 3.5, count)
    weights = 1 / np.arange(1, num_items + 1)
    items = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(lengths.sum())).clip(0, num_items - 1)
    sessions = Sessions(items.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    few = Sessions(sessions.items[: sessions.offsets[20]], sessions.offsets[:21])
    return Dataset(Path(), sessions, few, few, {"num_items": num_items, "text_columns": []})


def trainer(shape: tuple[int, int], precision: str = "fp32", data: Dataset | None = None, **changes: Any) -> Trainer:
    items, width = shape
    ops, encoders = PRECISIONS[precision]
    device = changes.pop("device", "cuda")
    settings: dict[str, Any] = {"precision": ops, "encoder_precision": encoders, **changes}
    config = Config(data="random", width=width, device=device, **settings)
    made_on = "cpu" if items < 100_000 else device
    generator = torch.Generator(made_on).manual_seed(0)
    features = torch.randn(items, 384, generator=generator, device=made_on)
    return Trainer(config, data or random_sessions(items), features, Path(tempfile.mkdtemp()))


def batches(made: Trainer, count: int) -> list[Batch]:
    order = plan(made.dataset.train, made.config.max_length, made.config.batch_targets, np.random.default_rng(1))
    whole = [pack(made.dataset.train, which, made.config.max_length) for which in itertools.islice(order, count)]
    return [whole[i % len(whole)] for i in range(count)]


def steps(made: Trainer, epoch: Epoch, count: int, begin: int = 0) -> list[Tensor]:
    """Losses of steps [begin, begin + count) as `Trainer` takes them, seeds included."""
    made.recommender.network(epoch.student).train()
    run, losses = made.stepper(epoch, made.teacher_catalog(epoch)), []
    for i, batch in enumerate(batches(made, begin + count)[begin:]):
        torch.manual_seed(begin + i)
        losses.append(run(batch)[0]["loss"].clone())
    return losses


def student_of(made: Trainer, epoch: Epoch) -> list[Tensor]:
    return [p.detach().clone() for p in made.recommender.network(epoch.student).parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- checks ---


def check_graph(journal: Journal, shape: tuple[int, int], precision: str, phases: list[str], **changes: Any) -> None:
    """Twelve steps as a graph and one kernel at a time: the same bits, twice; and none of them waits for the device."""
    for phase in phases:
        epoch, ends = EPOCHS[phase], []
        name = f"{changes.get('variant', 'alterrec')}, {phase}, {precision}, {shape}"
        for graph in (False, True, True):
            made = trainer(shape, precision, graph=graph, **changes)
            with side_stream(CUDA):
                losses = torch.stack(steps(made, epoch, 12))
            ends.append([losses, *student_of(made, epoch)])
            if not graph:
                check_waits(journal, name, made, epoch)
            said = list(made._said)
            del made
        made = trainer(shape, precision, **changes)
        teacher, one_by_one = made.teacher_catalog(epoch), []
        made.recommender.network(epoch.student).train()
        for i, batch in enumerate(batches(made, 12)):
            torch.manual_seed(i)
            one_by_one.append(made.step(epoch, batch, teacher)[0]["loss"])
        far = float((torch.stack(one_by_one) / ends[1][0] - 1.0).abs().max())
        journal.check(f"with the optimiser's own step: {name}", far < 1e-3, far=far)
        del made, teacher
        values = [float(x) for x in ends[1][0][[0, -1]]]
        apart = float((ends[0][0] - ends[1][0]).abs().max())
        journal.check(f"graph and eager: {name}", same(ends[0], ends[1]), apart=apart, losses=values, said=said)
        journal.check(f"two runs: {name}", same(ends[1], ends[2]))


def check_waits(journal: Journal, name: str, made: Trainer, epoch: Epoch) -> None:
    with side_stream(CUDA):
        run = made.stepper(epoch, made.teacher_catalog(epoch))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches(made, 3):
                torch.manual_seed(0)
                run(batch)
            journal.check(f"nothing waits: {name}", True)
        except RuntimeError:
            journal.check(f"nothing waits: {name}", False, where=traceback.format_exc()[-600:])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_against_cpu(journal: Journal) -> None:
    """A step's losses and gradients of every variant, against the CPU; all items where negatives would be drawn."""
    shape = (1500, 60)
    data = random_sessions(shape[0], 400)
    for variant in VARIANTS:
        config = Config(variant=variant)  # type: ignore[arg-type]
        for student, teacher in sorted({(e.student, e.teacher) for e in epochs(config)}, key=str):
            bounds = {"k1": 20, "k2": 700} if teacher else {"k1": 0, "k2": shape[0]}
            epoch, found = Epoch(5, student, teacher, 0), []
            for device in ("cpu", "cuda"):
                options: dict[str, Any] = {"device": device, "variant": variant, **bounds}
                made = trainer(shape, data=data, dropout=0.0, init="xavier", **options)
                losses, _ = made.gradients(epoch, batches(made, 1)[0], made.teacher_catalog(epoch))
                grads = {n: p.grad for n, p in made.recommender.named_parameters() if p.grad is not None}
                found.append({n: x.double().cpu() for n, x in (losses | grads).items()})
            worst = max(float((found[1][n] - x).norm() / x.norm()) for n, x in found[0].items())
            journal.check(f"CPU and GPU: {variant}, {student} against {teacher}", worst < 2e-5, worst=worst)


def check_runs(journal: Journal) -> None:
    """Two epochs, and the same broken off in the second and resumed: the same checkpoint, to the last bit."""
    data = random_sessions(5000, 3000)

    def fresh(run: Path | None = None) -> Trainer:
        plan: dict[str, Any] = {"m_random": 0, "m_gap": 1, "m_max": 2, "checkpoint_minutes": 1e-9}
        made = trainer((5000, 64), "bf16, encoders tf32", data, **plan)
        made.run = run or made.run
        return made

    whole, broken = fresh(), fresh()
    whole.fit(lambda line: journal.write("epoch", line=line))
    calls, original = 0, torch.manual_seed

    def counted(seed: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return original(seed)

    torch.manual_seed = counted
    try:
        broken.fit(lambda line: None)
    except KeyboardInterrupt:
        pass
    finally:
        torch.manual_seed = original
    resumed = fresh(broken.run)
    journal.check("a checkpoint is resumed", resumed.resume(), epoch=resumed.state.epoch, step=resumed.state.step)
    resumed.fit(lambda line: None)
    one, other = (checkpoint.load(made.run / LAST)[0] for made in (whole, resumed))
    equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [[line.get("loss") for line in made.state.history] for made in (whole, resumed)]
    journal.check("a resumed run ends in the same bytes", equal and losses[0] == losses[1], losses=losses)


def check_precisions(journal: Journal) -> None:
    """Errors of one step's gradients against float32's, by precision."""
    made = trainer(PAPER, dropout=0.0, init="xavier")
    batch = batches(made, 1)[0]
    for phase in ("id", "text"):
        truth: dict[str, Tensor] = {}
        for name, (ops, encoders) in PRECISIONS.items():
            settings: dict[str, Any] = {"precision": ops, "encoder_precision": encoders}
            made.config = dataclasses.replace(made.config, **settings)
            losses, _ = made.gradients(EPOCHS[phase], batch, made.teacher_catalog(EPOCHS[phase]))
            network = made.recommender.network(EPOCHS[phase].student)
            grads = {n: p.grad.double() for n, p in network.named_parameters() if p.grad is not None}
            truth = truth or grads
            errors = {n: float((g - truth[n]).norm() / truth[n].norm()) for n, g in grads.items()}
            worst = max(errors, key=lambda n: errors[n])
            middle = statistics.median(errors.values())
            journal.write("errors", phase=phase, precision=name, loss=float(losses["loss"]), worst=worst,
                          worst_error=errors[worst], median_error=middle)  # fmt: skip


def measure_quality(journal: Journal, shop: Path, precision: str, seed: int) -> None:
    """A run over the generated shop that `shop` holds: items and offsets of each split, and features."""
    held = np.load(shop)
    names = ("train", "validation", "test")
    train, validation, test = (Sessions(held[f"{name}_items"], held[f"{name}_offsets"]) for name in names)
    features = torch.from_numpy(held["features"])
    data = Dataset(Path(), train, validation, test, {"num_items": len(features), "text_columns": []})
    ops, encoders = PRECISIONS[precision]
    settings: dict[str, Any] = {
        **demo_settings(), "m_random": 2, "m_max": 12, "precision": ops, "encoder_precision": encoders,
    }  # fmt: skip
    config = Config(data="shop", seed=seed, device="cuda", **settings)
    made = Trainer(config, data, features, Path(tempfile.mkdtemp()))
    begun = time.monotonic()
    made.fit(lambda line: None)
    best = made.state.history[made.state.best_epoch]
    losses = [round(line["loss"], 5) for line in made.state.history[1:]]
    ndcg = best["validation"]["fused"]["ndcg@20"]
    seconds = time.monotonic() - begun
    journal.write("quality", precision=precision, seed=seed, ndcg20=ndcg, losses=losses, seconds=seconds)


# --- times ---


def milliseconds(run: Callable[[], Any], count: int) -> dict[str, float]:
    """Of a call: the median of calls that are waited for, with the host's part, and the mean of calls in a row."""
    single, host = [], []
    for _ in range(max(3, count // 2)):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        host.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
        single.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    mean = (time.perf_counter() - begun) / count
    return {
        "ms": round(1e3 * mean, 3),
        "ms_waited_for": round(1e3 * statistics.median(single), 3),
        "ms_host": round(1e3 * statistics.median(host), 3),
    }


def time_step(journal: Journal, shape: tuple[int, int], precision: str, phase: str, kernels: bool = False) -> None:
    for graph in (False, True):
        made = trainer(shape, precision, graph=graph)
        epoch, turn = EPOCHS[phase], itertools.count()
        cut = batches(made, 64)
        targets = sum(len(batch.targets) for batch in cut) / len(cut)
        with side_stream(CUDA):
            made.recommender.network(epoch.student).train()
            run = made.stepper(epoch, made.teacher_catalog(epoch))

            def step(run: Any = run, cut: list[Batch] = cut, turn: Iterator[int] = turn) -> None:
                i = next(turn)
                torch.manual_seed(i)
                run(cut[i % len(cut)])

            for _ in range(4):
                step()
            found = milliseconds(step, 64 if graph else 16)
            peak = torch.cuda.max_memory_allocated() / 2**20
            journal.write("step", shape=shape, precision=precision, phase=phase, graph=graph, **found,
                          targets_per_second=round(1e3 * targets / found["ms"]), peak_mib=round(peak),
                          said=list(made._said))  # fmt: skip
            if graph and kernels:
                profile(journal, step, f"{precision}, {phase}, {shape}")
        del made, run, step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(journal: Journal, step: Callable[[], None], name: str) -> None:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    events = [e for e in record.key_averages() if e.self_device_time_total > 0]
    whole = sum(e.self_device_time_total for e in events) / 4
    journal.write("kernels", name=name, us=round(whole, 1), launches=sum(e.count for e in events) / 4)
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:36]:
        us = round(e.self_device_time_total / 4, 1)
        journal.write("kernel", of=name, name=e.key[:110], us=us, launches=e.count / 4)


def time_published(journal: Journal) -> None:
    made = trainer(PAPER, graph=False)
    made.recommender.train()
    published = PublishedStep(made.recommender, made.bounds)
    cut = batches(made, 6)
    rows = [tuple(x.to(CUDA) for x in prefixes(batch, made.config.max_length)) for batch in cut]
    turn = itertools.count()

    def step() -> None:
        published.run(*rows[next(turn) % len(rows)])

    for _ in range(3):
        step()
    journal.write("published", shape=PAPER, precision="fp32", **milliseconds(step, 12))


@dataclasses.dataclass(frozen=True)
class Unpadded(MaskedPacking):
    """`MaskedPacking` with heads of their own width."""

    def attend(self, qkv: Tensor) -> Tensor:
        t, _, heads, width = qkv.shape
        q, k, v = qkv.permute(1, 2, 0, 3)
        scores = torch.baddbmm(self.bias.expand(heads, t, t), q, k.transpose(1, 2), alpha=width**-0.5)
        return torch.bmm(scores.softmax(2), v).transpose(0, 1).reshape(t, heads * width)


@dataclasses.dataclass(frozen=True)
class Fused(MaskedPacking):
    """`MaskedPacking` by torch's fused attention with a bias."""

    def attend(self, qkv: Tensor) -> Tensor:
        t, _, heads, width = qkv.shape
        q, k, v = pad_heads(qkv).permute(1, 2, 0, 3).unsqueeze(1)
        bias = self.bias.to(q.dtype).expand(1, heads, t, t)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=width**-0.5)
        return mixed[0].transpose(0, 1)[..., :width].reshape(t, heads * width)


class Varlen:
    """torch's attention over sessions of any lengths, in bfloat16."""

    def __init__(self, position: Tensor):
        self.position = position
        starts = torch.nonzero(position == 0).flatten()
        self.ends = torch.cat([starts, starts.new_full((1,), len(position))]).int()

    def attend(self, qkv: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        t, _, heads, width = qkv.shape
        q, k, v = pad_heads(qkv.bfloat16()).unbind(1)
        attend: Any = varlen_attn
        options: dict[str, Any] = {"scale": width**-0.5}
        try:
            mixed = attend(q, k, v, self.ends, self.ends, 50, 50, is_causal=True, **options)
        except TypeError:  # another version of torch
            mixed = attend(q, k, v, self.ends, self.ends, 50, 50, window_size=(-1, 0), **options)
        return mixed[..., :width].reshape(t, heads * width)  # type: ignore[no-any-return]


def time_attention(journal: Journal) -> None:
    """Forward and backward of the paper's session encoder over one batch, by way of attention and precision."""
    made = trainer(PAPER, graph=False)
    batch = batches(made, 3)[2]
    static = StaticBatch(made.static.size if made.static else 0, CUDA)
    static.load(batch)
    mask = static.inputs().packing
    assert isinstance(mask, MaskedPacking)
    few = Inputs.of(batch, CUDA).packing
    before, packings.MAX_PADDING = packings.MAX_PADDING, 1e9
    one = Packing.of(batch.lengths, CUDA)
    packings.MAX_PADDING = before
    held = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
    ways: dict[str, Any] = {
        "one mask, products": mask,
        "the same, heads of 150": Unpadded(**held),
        "one mask, fused": Fused(**held),
        "variable length": Varlen(mask.position),
        "groups": few,
        "one group": one,
    }
    encoder = TransformerSession(300, 2, 2, 1200, 50, 0.1).to(CUDA)
    initialise(encoder, "xavier", 300)
    for precision, (name, packing) in itertools.product(("fp32", "tf32", "bf16"), ways.items()):
        if name == "variable length" and precision != "bf16":
            continue
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            x = torch.randn(packing.position.numel(), 300, device=CUDA, requires_grad=True)

            def run(x: Tensor = x, packing: Any = packing, precision: str = precision) -> None:
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                    out = encoder(x, packing)
                torch.autograd.grad(out.square().mean(), [x, *encoder.parameters()])

            with side_stream(CUDA):
                for _ in range(3):
                    run()
                eager = milliseconds(run, 10)["ms"]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    run()
                graphed = milliseconds(graph.replay, 30)["ms"]
            journal.write("attention", way=name, precision=precision, eager=eager, graph=graphed)
        except Exception as error:
            journal.write("attention", way=name, precision=precision, failed=repr(error)[:300])


# --- stages ---

CHECKS: dict[str, Callable[[Journal], None]] = {
    "cpu": check_against_cpu,
    "runs": check_runs,
    "errors": check_precisions,
    "paper, fp32": lambda j: check_graph(j, PAPER, "fp32", ["id", "text", "random"]),
    "paper, tf32": lambda j: check_graph(j, PAPER, "tf32", ["id", "text"]),
    "paper, mixed": lambda j: check_graph(j, PAPER, "bf16, encoders tf32", ["id", "text", "random"]),
    "paper, mixed32": lambda j: check_graph(j, PAPER, "bf16, encoders fp32", ["id"]),
    "paper, bf16": lambda j: check_graph(j, PAPER, "bf16", ["id", "text"]),
    "paper, aug": lambda j: check_graph(
        j, PAPER, "bf16, encoders tf32", ["id"], variant="alterrec_aug", hard_fraction=0.5
    ),
    "1M, mixed": lambda j: check_graph(j, LARGE, "bf16, encoders tf32", ["id", "text"]),
    "1M, tf32": lambda j: check_graph(j, LARGE, "tf32", ["id"]),
}


QUALITY = {
    f"{precision}, seed {seed}": (precision, seed)
    for precision in ("fp32", "tf32", "bf16, encoders tf32")
    for seed in range(3)
}


def times(journal: Journal) -> None:
    """In order of importance, since the clock may end it; what fails is written down and does not end it."""
    mixed = "bf16, encoders tf32"
    tasks: list[Callable[[], None]] = [
        lambda: time_step(journal, PAPER, mixed, "id", kernels=True),
        lambda: time_published(journal),
        lambda: time_step(journal, PAPER, "bf16, encoders fp32", "id"),
        lambda: time_step(journal, PAPER, "tf32", "id", kernels=True),
        lambda: time_step(journal, PAPER, "fp32", "id"),
        lambda: time_step(journal, PAPER, "bf16", "id"),
        lambda: time_step(journal, LARGE, mixed, "id", kernels=True),
        lambda: time_attention(journal),
        lambda: time_step(journal, PAPER, mixed, "text", kernels=True),
        lambda: time_step(journal, PAPER, mixed, "random"),
        lambda: time_step(journal, PAPER, "tf32", "text"),
        lambda: time_step(journal, LARGE, mixed, "text"),
        lambda: time_step(journal, LARGE, "tf32", "id"),
    ]
    for task in tasks:
        try:
            task()
        except Exception:
            journal.failed = True
            journal.write("failed", what=traceback.format_exc()[-1200:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--shop", type=Path, help="a .npz of sessions and features, for quality by precision")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    journal, deadline = Journal(options.out), time.monotonic() + options.seconds
    if options.stage:
        stage = options.stage
        if stage in QUALITY:
            measure_quality(journal, options.shop, *QUALITY[stage])
        else:
            (CHECKS | {"times": times})[stage](journal)
        return int(journal.failed)
    options.out.mkdir(parents=True, exist_ok=True)
    journal.write("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    failed = False

    logs = Path(tempfile.mkdtemp())

    def start(stage: str) -> subprocess.Popen[str]:
        shop = ["--shop", str(options.shop)] if options.shop else []
        command = [sys.executable, "-m", __spec__.name, "--out", str(options.out), "--stage", stage, *shop]
        with (logs / stage).open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, text=True)

    def end(stage: str, process: subprocess.Popen[str], limit: float) -> None:
        nonlocal failed
        begun = time.monotonic()
        try:
            code: int | None = process.wait(timeout=max(1.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        failed |= bool(code)
        said = "" if code == 0 else (logs / stage).read_text()[-1500:]
        journal.write("stage", stage=stage, code=code, waited=round(time.monotonic() - begun, 1), said=said)

    running = {stage: start(stage) for stage in [*CHECKS, *(QUALITY if options.shop else [])]}
    for stage, process in running.items():
        end(stage, process, deadline - 0.45 * options.seconds)
    end("times", start("times"), deadline)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
