"""Algorithm 1: two networks trained in turn, each against rank slices of the other, frozen one.

The teacher does not change while its student is trained, so its catalog matrix is computed once an epoch, and a
checkpoint needs no copy of it. The randomness of every step follows from (seed, epoch, step) alone: a run that was
killed goes on from any step and ends in the same result.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.data.batches import Batch, most_tokens, pack, plan
from alterrec_fast.data.sessions import SPLITS, DataError, Dataset
from alterrec_fast.errors import AlterRecError
from alterrec_fast.errors import DivergedError as DivergedError
from alterrec_fast.model.encoders import IdItems
from alterrec_fast.model.networks import ItemVectors, Recommender
from alterrec_fast.model.packing import MaskedPacking, Packing
from alterrec_fast.ops import RankSlice, rank_slice, slice_cross_entropy
from alterrec_fast.ops.slices import uses_bits
from alterrec_fast.systems import SYSTEMS, Epoch, build, epochs
from alterrec_fast.training import checkpoint, records
from alterrec_fast.training.config import Config, ConfigError
from alterrec_fast.training.device import Precision, peak_memory, pick_device
from alterrec_fast.training.evaluate import evaluate, training_counts
from alterrec_fast.training.optimiser import adam, add_rows, learning_rate, set_rate
from alterrec_fast.training.records import HISTORY
from alterrec_fast.training.state import State, check_same_data
from alterrec_fast.training.steps import GraphedStep, Inputs, StaticBatch, Step, is_padded, side_stream

LAST, BEST = "checkpoints/last.safetensors", "checkpoints/best.safetensors"

Progress = Callable[[dict[str, Any]], None]  # takes each new line of the history
_log = logging.getLogger(__name__)


class Trainer:
    """One run: the recommender, an optimiser for each network, and the state; `fit` goes through the plan."""

    def __init__(self, config: Config, dataset: Dataset, features: Tensor | None, run: Path, text: str = ""):
        """features: (V, F), None where the variant reads no text. text: the key of the model that they are of."""
        for name in SPLITS:
            if len(dataset.split(name)) == 0:
                raise DataError(f"{dataset.path}: the {name} split is empty; a run needs all of {', '.join(SPLITS)}")
        self.config, self.dataset, self.run = config, dataset, run
        self.device = pick_device(config.device)
        self.precision, self.system = Precision(config, self.device), SYSTEMS[config.variant]
        if "bf16" in (self.precision.ops, self.precision.encoders):
            self._refuse("bf16")
        self.bounds = config.slice_bounds(dataset.num_items)
        if config.k2 is not None and config.k2 > dataset.num_items:
            _log.warning("k2 = %d lies beyond the catalog: hard negatives are ranks [%d, %d)", config.k2, *self.bounds)
        self.counts = training_counts(dataset.train, dataset.num_items)
        self.num_targets = int((np.minimum(dataset.train.lengths, config.max_length) - 1).sum())  # of an epoch
        with torch.random.fork_rng():
            torch.manual_seed(_seed(config.seed))
            self.recommender = build(config, dataset.num_items, features).to(self.device)
        # On a GPU batches are padded to one shape, so that a step can be a CUDA graph; elsewhere that gains nothing.
        tokens = most_tokens(dataset.train, config.max_length, config.batch_targets)
        padded = is_padded(tokens, self.device) and not self.recommender.needs_groups
        self.static = StaticBatch(tokens, self.device) if padded else None
        rates = {"id": config.lr_id, "text": config.lr_text, "fused": config.lr_id}
        self.optimizers = {
            name: adam(network, rates[name], config.weight_decay, self.device)
            for name, network in self.recommender.networks.items()
        }
        self._said: set[str] = set()  # warnings, each of which is given once
        self.state = State(dataset.fingerprint, text, config.settings())

    def fit(self, progress: Progress) -> Recommender:
        """Trains to the end of the plan or of the patience; returns the recommender of the best epoch, in eval mode."""
        config, state = self.config, self.state
        with torch.random.fork_rng(), side_stream(self.device):
            if state.history:
                records.write_history(self.run / HISTORY, state.history)  # less the epoch that a kill undid
            else:
                self._finish_epoch(0, {"epoch": 0}, progress)  # untrained, the left end of the curves
            for epoch in epochs(config):
                if epoch.number <= state.epoch:
                    continue
                if state.epoch - state.best_epoch >= config.patience:
                    break
                self._finish_epoch(epoch.number, self._run_epoch(epoch), progress)
        tensors, _ = checkpoint.load(self.run / BEST, str(self.device))
        checkpoint.check_tensors(self.run / BEST, tensors, self.recommender.state_dict())
        self.recommender.load_state_dict(tensors)
        return self.recommender.eval()

    def resume(self) -> bool:
        """Takes up the run's last checkpoint; False where there is none. Raises DataError where data or text model are
        others, FileError where the checkpoint is damaged or was written with other settings.
        """
        self._refuse("resume")
        file = self.run / LAST
        if not file.exists():
            return False
        tensors, header = checkpoint.load(file, str(self.device))
        state = State.of(header, file)
        self.config.check_settings(state.settings, file, self.run)
        check_same_data(self.dataset, state.data, self.state.text, state.text)
        checkpoint.check_tensors(file, tensors, self._expected(state))
        state.history = records.with_times(state.history, self.run / HISTORY)
        records.check_history(state.history, str(file))
        self.recommender.load_state_dict(_under(tensors, "model."))
        for name, optimizer in self.optimizers.items():
            moments = _under(tensors, f"adam.{name}.")
            for key, parameter in self.recommender.network(name).named_parameters():
                if moments:
                    optimizer.state[parameter] = _under(moments, f"{key}.")
        self.state = replace(state, settings=self.state.settings)
        return True

    def _refuse(self, what: str) -> None:
        """Raises ConfigError where the system cannot do `what`."""
        if what in self.system.refuses:
            raise ConfigError(f"{self.config.variant} does not take {what}: {self.system.refuses[what]}")

    def _expected(self, state: State) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that a checkpoint of this state holds."""
        under_way = state.epoch + (state.step > 0)
        trained = {epoch.student for epoch in epochs(self.config) if epoch.number <= under_way}
        expected = {f"model.{key}": tensor for key, tensor in self.recommender.state_dict().items()}
        for name in trained:
            for key, parameter in self.recommender.network(name).named_parameters():
                moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter) | {"step": torch.zeros(())}
                expected |= {f"adam.{name}.{key}.{moment}": like for moment, like in moments.items()}
        return expected

    def _run_epoch(self, epoch: Epoch) -> dict[str, Any]:
        """One pass over the training targets; returns the epoch's line of the history, without validation."""
        from tqdm import tqdm

        config, state, (k1, k2) = self.config, self.state, self.bounds
        student = self.recommender.network(epoch.student).train()
        run_step = self.stepper(epoch, self.teacher(epoch))
        rate = set_rate(self.optimizers[epoch.student], learning_rate(config, epoch))
        order = np.random.default_rng([config.seed, epoch.number])
        sums = state.sums = state.sums or dict.fromkeys(("loss", "targets", "slots", "seconds"), 0.0)
        # Losses add up on the device and are read only for a checkpoint, so that no step waits for the one before.
        on_device = partial(torch.tensor, dtype=torch.float64, device=self.device)
        totals = {name: on_device(value) for name, value in sums.items() if name.startswith("loss")}
        begun = saved = time.monotonic()
        before = sums["seconds"]
        bar = tqdm(  # on a terminal only
            total=self.num_targets,
            initial=int(sums["targets"]),
            desc=f"epoch {epoch.number} of {config.m_max}, {epoch.student}",
            unit="target",
            unit_scale=True,
            leave=False,
            disable=None,
        )
        for step, which in enumerate(plan(self.dataset.train, config.max_length, config.batch_targets, order)):
            if step < state.step:
                continue
            torch.manual_seed(_seed(config.seed, epoch.number, step))
            batch = pack(self.dataset.train, which, config.max_length)
            with _finite_scores(f"epoch {epoch.number}, step {step}"):
                losses, slots = run_step(batch)
            for name, loss in losses.items():
                added = loss.double() * len(batch.targets)
                totals[name] = totals[name] + added if name in totals else added
            sums["targets"] += len(batch.targets)
            sums["slots"] += slots
            bar.update(len(batch.targets))
            state.step = step + 1
            now = time.monotonic()
            sums["seconds"] = before + now - begun
            if now - saved > 60.0 * config.checkpoint_minutes:
                sums |= _finite_sums(totals, f"epoch {epoch.number}, step {step}")
                self._save_last()
                saved = now
        bar.close()
        student.eval()
        sums |= _finite_sums(totals, f"epoch {epoch.number}")  # waits for a GPU to end the epoch
        sums["seconds"] = before + time.monotonic() - begun
        total = max(1.0, sums["targets"])
        return {
            "epoch": epoch.number,
            "student": epoch.student,
            "negatives": f"ranks {k1}:{k2} of {epoch.teacher}" if epoch.teacher else config.negatives,
            "learning_rate": rate,
            **{name: sums[name] / total for name in totals},
            "seconds": sums["seconds"],
            "targets_per_second": sums["targets"] / max(sums["seconds"], 1e-9),
            "padding": sums["slots"] / total,
        }

    def stepper(self, epoch: Epoch, teacher: ItemVectors | None) -> Callable[[Batch], tuple[dict[str, Tensor], int]]:
        """What does a step of this epoch for each batch it is called with, as fast as the device can: on CUDA a graph.

        teacher: what `teacher` gave for this epoch. It takes a batch and returns the losses by
        name, valid until its next call, and the token slots that were computed. Calls must come in one stream, which on
        CUDA is not the default one (see `side_stream`).
        """
        if self.static is None:
            if self.device.type == "cuda":
                large = "batches are too large to be padded; their sums have no fixed order"
                self._say_no_graph(self.recommender.needs_groups or large)

            def whole(batch: Batch) -> tuple[dict[str, Tensor], int]:
                losses, packing = self.step(epoch, batch, teacher)
                return losses, packing.slots

            return whole
        static, ranked = self.static, self._ranked(teacher)

        def on_static_tensors() -> dict[str, Tensor]:
            losses = self._gradients(epoch, static.inputs(), teacher, ranked, steps_table=True)
            self.optimizers[epoch.student].step()
            return losses

        run: Step = on_static_tensors
        if self.config.graph is not False:
            reason = self._why_no_graph(epoch)
            if reason:
                self._say_no_graph(reason)
            else:
                run = GraphedStep(on_static_tensors, self._say_no_graph)

        def padded(batch: Batch) -> tuple[dict[str, Tensor], int]:
            static.load(batch)
            return run(), static.size

        return padded

    def step(
        self, epoch: Epoch, batch: Batch, teacher: ItemVectors | None
    ) -> tuple[dict[str, Tensor], Packing | MaskedPacking]:
        """One step of the student's optimiser; takes and returns what `gradients` does."""
        losses = self.gradients(epoch, batch, teacher)
        self.optimizers[epoch.student].step()
        return losses

    def gradients(
        self, epoch: Epoch, batch: Batch, teacher: ItemVectors | None
    ) -> tuple[dict[str, Tensor], Packing | MaskedPacking]:
        """Forward and backward of one batch: gradients are left in the student's parameters.

        teacher: what `teacher` gave for this epoch. Returns the losses by name, and how the
        batch's tokens were packed.
        """
        if self.static is None:
            inputs = Inputs.of(batch, self.device)
        else:
            self.static.load(batch)
            inputs = self.static.inputs()
        return self._gradients(epoch, inputs, teacher, self._ranked(teacher)), inputs.packing

    def _gradients(
        self,
        epoch: Epoch,
        inputs: Inputs,
        teacher: ItemVectors | None,
        ranked: Tensor | None,
        steps_table: bool = False,
    ) -> dict[str, Tensor]:
        """`gradients` of a batch on the device; ranked: what `_ranked` made of the teacher's catalog.

        steps_table: an item table takes its step at once where it can, see `IdItems.step`, and has no gradient.
        """
        config, student = self.config, self.recommender.network(epoch.student)
        table = student.items if steps_table and isinstance(student.items, IdItems) else None
        if table is not None and not table.can_step():
            table = None
        items, target, packing = inputs.items, inputs.target, inputs.packing
        neg, positives = self._negatives(epoch, items, packing, teacher, ranked)
        self.optimizers[epoch.student].zero_grad(set_to_none=True)
        with self.precision.of_encoders():
            with torch.set_grad_enabled(table is None):
                encoded = student.vectors()
            # The loss meets leaves, so that the gradient of the rows looked up is added to the catalog's where it lies:
            # autograd would make a second (V, d), of zeros but for these rows, and sum the two.
            catalog = encoded.catalog.detach().requires_grad_()  # (V, d)
            rows = encoded.inputs.detach().index_select(0, items).requires_grad_()  # (T, k)
            sessions = student.session(rows, packing)  # (T, d)
        query = sessions.detach().requires_grad_()
        options = {"temperature": student.temperature, **self.precision.op_options()}
        with self.precision.of_ops():
            loss = slice_cross_entropy(
                query,
                catalog,
                target,
                neg,
                positives=positives,
                positive_weight=config.positive_weight,
                bias=student.bias,
                **options,
            )
            loss.backward()
        losses = {"loss": loss.detach()}
        with torch.no_grad(), self.precision.of_ops():
            for part, (q, e) in self.recommender.parts(query, catalog).items():
                losses[f"loss_{part}"] = slice_cross_entropy(q, e, target, neg, **options)
        with self.precision.of_encoders():
            sessions.backward(query.grad)
            assert catalog.grad is not None and rows.grad is not None
            if encoded.inputs is not encoded.catalog:
                grad = add_rows(torch.zeros_like(encoded.inputs), items, rows.grad)
                torch.autograd.backward([encoded.catalog, encoded.inputs], [catalog.grad, grad])
            elif table is None:
                encoded.catalog.backward(add_rows(catalog.grad, items, rows.grad))
            else:
                table.step(add_rows(catalog.grad, items, rows.grad), self.optimizers[epoch.student])
        return losses

    def _negatives(
        self,
        epoch: Epoch,
        items: Tensor,
        packing: Packing | MaskedPacking,
        teacher: ItemVectors | None,
        ranked: Tensor | None = None,
    ) -> tuple[RankSlice | None, Tensor | None]:
        """The batch's negatives, None for all items; and its extra positives (T, p), where the system has them."""
        config, (k1, k2) = self.config, self.bounds
        if epoch.teacher is None or teacher is None:
            if config.negatives == "full":
                return None, None
            return RankSlice.uniform(len(items), self.dataset.num_items, k2 - k1, device=self.device), None
        with torch.no_grad(), self.precision.of_encoders():
            query = self.recommender.network(epoch.teacher).queries(teacher, items, packing)
        ranked = teacher.ranked if ranked is None else ranked
        query = query.to(ranked.dtype)
        if ranked.shape[1] > query.shape[1]:
            query = F.pad(query, (0, ranked.shape[1] - query.shape[1]))
        top = min(config.positives, self.dataset.num_items) if self.system.positives else 0
        with self.precision.of_ops():
            neg = rank_slice(query, ranked, start=k1, stop=k2, top=top, **self.precision.op_options())
        return neg.mix(config.hard_fraction), (neg.top if top else None)

    def _ranked(self, teacher: ItemVectors | None) -> Tensor | None:
        """The teacher's catalog as it is ranked: where products are of bf16 on CUDA, rounded once, not at each step,
        and with zeros up to a width of whole 16 bytes."""
        if teacher is None:
            return None
        if self.precision.ops != "bf16" or teacher.catalog.device.type != "cuda":
            return teacher.ranked
        return F.pad(teacher.ranked.bfloat16(), (0, -teacher.ranked.shape[1] % 8))

    def _why_no_graph(self, epoch: Epoch) -> str:
        """Why steps of this epoch cannot be captured as a CUDA graph; empty where they can."""
        k1, k2 = self.bounds
        uniform = epoch.teacher is None and self.config.negatives == "uniform"
        draws = uniform or (epoch.teacher is not None and self.config.hard_fraction < 1.0)
        if draws and not uses_bits(self.dataset.num_items, k2 - k1):
            return "random negatives that are kept as ids are as many as chance has it"
        if self.config.backend == "reference":
            return "backend = 'reference' reads values"
        return ""

    def _say_no_graph(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("steps run one kernel at a time instead of as a CUDA graph: %s", reason)

    def teacher(self, epoch: Epoch) -> ItemVectors | None:
        """The item vectors of the epoch's teacher in eval mode, None without one."""
        if epoch.teacher is None:
            return None
        network = self.recommender.network(epoch.teacher).eval()
        with torch.no_grad(), self.precision.of_encoders():
            return network.vectors()

    def _finish_epoch(self, number: int, line: dict[str, Any], progress: Progress) -> None:
        """Validates, keeps the best, writes history and checkpoint, in an order that a kill at any point forgives."""
        state = self.state
        begun = time.monotonic()
        with _finite_scores(f"validation after epoch {number}"):
            metrics = evaluate(self.recommender, self.dataset.validation, self.counts, self.config).metrics()
        line |= {"validation": metrics, "validation_seconds": time.monotonic() - begun, "peak_memory": peak_memory()}
        state.history.append(line)
        state.epoch, state.step, state.sums = number, 0, {}
        assert metrics["fused"] is not None
        score = metrics["fused"][self.config.monitor]
        if score > state.best:
            state.best, state.best_epoch = score, number
            best = {"epoch": number, "data": state.data, "text": state.text, "settings": state.settings}
            checkpoint.save(self.run / BEST, self.recommender.state_dict(), best)
        records.write_history(self.run / HISTORY, state.history)
        self._save_last()
        progress(line)

    def _save_last(self) -> None:
        tensors = {f"model.{key}": tensor for key, tensor in self.recommender.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for key, parameter in self.recommender.network(name).named_parameters():
                for moment, tensor in optimizer.state.get(parameter, {}).items():
                    tensors[f"adam.{name}.{key}.{moment}"] = tensor
        state = {**asdict(self.state), "history": records.without_times(self.state.history)}
        checkpoint.save(self.run / LAST, tensors, state)


_CALMER = "training diverged: try lower learning rates or higher temperatures"


@contextlib.contextmanager
def _finite_scores(when: str) -> Iterator[None]:
    """The ops' ValueError about a value, with the time when it came and what helps."""
    try:
        yield
    except AlterRecError:
        raise
    except ValueError as error:
        raise DivergedError(f"{when}: {error}; {_CALMER}") from error


def _finite_sums(losses: dict[str, Tensor], when: str) -> dict[str, float]:
    """Sums of losses, read from the device; raises DivergedError where one is not finite: on a GPU no step looks."""
    sums = {name: float(loss) for name, loss in losses.items()}
    if not all(map(math.isfinite, sums.values())):
        raise DivergedError(f"{when}: the loss is not finite; {_CALMER}")
    return sums


def _seed(*parts: int) -> int:
    """One well-mixed seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
