"""RankSliceSampler: hard negatives of the whole catalog for each target of a batch, mixed with random ones.

Notation: B sessions, L session length, V items, d width, T rows whose target is not ignored, N negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alterrec_fast.nn.buffers import KeepsDtype
from alterrec_fast.nn.fused_item_embedding import FusedItemEmbedding
from alterrec_fast.nn.losses import real_rows, take_rows
from alterrec_fast.nn.teachers import TeacherCopy, mean_of_items
from alterrec_fast.ops import RankSlice, checks, dispatch, rank_slice
from alterrec_fast.ops.layer_norm import NO_NORM, RowNorm
from alterrec_fast.ops.slices import check_weights

RANDOM = ("uniform", "popularity", "log_uniform")
Teacher = Tensor | TeacherCopy | Callable[..., tuple[Tensor, Tensor]]


class RankSliceSampler(KeepsDtype):
    """Negatives for each target: ranks [start, stop) of a teacher's ranking, a share of them replaced by random items.

    Called in the training step, after the forward pass::

        sampler = RankSliceSampler(20, 2000, hard_fraction=0.5)
        loss = SliceCrossEntropy()(query, catalog, target, sampler(query, catalog, target))

    A call gives a `RankSlice` for `SliceCrossEntropy`; `sample` gives ids for `SampledSoftmaxLoss`. No gradient flows,
    and nothing here is trained. Random draws follow from seed, number of the draw and process (and in a DataLoader's
    worker from its seed), so that the processes of a distributed run draw apart and a run that goes on from its
    `state_dict` draws what it would have. That holds seed and number of draws, as one small tensor, and what a
    `TeacherCopy` holds; `popularity` and vectors as a teacher move with ``to`` and are not in it.
    Under torch.compile the draws end a graph, so that ``fullgraph=True`` takes hard_fraction 1 only.

    Args:
        start, stop: ranks, 0-based and half-open.
        hard_fraction: in [0, 1]; the share of the stop - start negatives that the teacher's ranks fill. Each hard one
            stays with this probability, and random ones enter in their place (`RankSlice.mix`); 0 ranks nothing.
        random: where the others come from: "uniform", "popularity" (in proportion to the argument of that name) or
            "log_uniform" (item first_item + k in proportion to log((k + 2) / (k + 1)), for ids in order of falling
            frequency, as in TensorFlow and Transformers4Rec).
        popularity: (V,) counts or weights; raise them to a power, such as 0.75, beforehand.
        teacher: who ranks. None: the model itself, by the query and catalog of the call, so with this step's weights.
            A `TeacherCopy`: a frozen or slowly moving copy of it, which becomes a submodule. A (V, f) float32,
            bfloat16 or float16 tensor: item vectors of another modality; a session's query is then the mean of those of
            its items so far. Any other callable: takes the call's inputs, returns (query, catalog). It is called
            without gradients and is otherwise left alone: a module among these is no submodule, so that it is neither
            moved nor stored with the sampler, keeps its mode, and its owner does not list its parameters.
        exclude_history: whether a session's own items (`history`, and all its targets) are kept out; a row's own target
            always is.
        first_item: rows of the catalog before it are padding.
        ignore_index: a target that stands for no row, as in the loss.
        seed: of the random negatives, in [0, 2 ** 63).
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError: for an argument of another kind, and for a teacher tensor of another dtype.
        ValueError: for a value out of range, popularity without random="popularity" or the reverse, and a teacher
            tensor that is not (V, f).
    """

    popularity: Tensor | None
    teacher: Teacher | None

    def __init__(
        self,
        start: int,
        stop: int,
        *,
        hard_fraction: float = 1.0,
        random: str = "uniform",
        popularity: Tensor | None = None,
        teacher: Teacher | None = None,
        exclude_history: bool = False,
        first_item: int = 0,
        ignore_index: int = -100,
        seed: int = 0,
        precision: str | None = None,
        check: bool | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        for name, value in (("start", start), ("stop", stop), ("first_item", first_item), ("seed", seed)):
            checks.check_integer(name, value)
        checks.check_integer("ignore_index", ignore_index)
        checks.check_number("hard_fraction", hard_fraction)
        checks.check_flag("exclude_history", exclude_history)
        checks.check_flag("check", check)
        if popularity is not None:
            checks.check_tensor("popularity", popularity)
        if not 0 <= start <= stop:
            raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
        if not 0.0 <= hard_fraction <= 1.0:
            raise ValueError(f"hard_fraction must lie in [0, 1], got {hard_fraction}")
        if random not in RANDOM:
            raise ValueError(f"random must be one of {', '.join(RANDOM)}, got {random!r}")
        if first_item < 0:
            raise ValueError(f"first_item must be at least 0, got {first_item}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2 ** 63), got {seed}")
        if (random == "popularity") != (popularity is not None):
            raise ValueError(
                f"popularity goes with random='popularity', got random={random!r} and popularity "
                f"{'None' if popularity is None else tuple(popularity.shape)}"
            )
        if popularity is not None:
            if popularity.ndim != 1:
                raise ValueError(f"popularity must be (V,), got {tuple(popularity.shape)}")
            check_weights("popularity", popularity, popularity.shape[0], first_item)
            popularity = popularity.detach()
        self.start, self.stop = int(start), int(stop)
        self.hard_fraction = float(hard_fraction)
        self.random = random
        self.register_buffer("popularity", popularity, persistent=False)
        self._take_teacher(teacher)
        self.exclude_history = exclude_history
        self.first_item = int(first_item)
        self.ignore_index = int(ignore_index)
        self.precision = precision
        self.check = check
        self.backend = backend
        self._draws = _Draws(int(seed))

    @property
    def seed(self) -> int:
        return self._draws.seed

    @property
    def draws(self) -> int:
        """The number of random draws so far."""
        return self._draws.number

    def forward(
        self,
        query: Tensor,
        catalog: Tensor | FusedItemEmbedding,
        target: Tensor,
        *,
        history: Tensor | None = None,
        bias: Tensor | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> RankSlice:
        """The negatives as sets: T rows, one for each target that is not ignored, in order.

        Under torch.compile a row for every target.

        Args:
            query: (B, d) or (B, L, d), the model's own.
            catalog: (V, d), the model's own; or its FusedItemEmbedding, as a teacher may give as well.
            target: (B,) or (B, L) int32 or int64; ignore_index where there is none.
            history: (B, L) ids of each session's items, in order; ids below first_item are padding.
            bias: (V,), added to the model's scores, and not to a teacher's. An item whose bias is -inf is no negative,
                whoever ranks, and is not drawn.
            inputs: what a teacher is called with; (history,) where left out.

        Raises:
            TypeError, ValueError, BackendError: as `rank_slice` does, and where `history` is needed and missing. Rows
                in messages count the targets not ignored.
        """
        catalog, norm = _rows_of(catalog)
        rows = self._rows(query, catalog, target, bias)
        exclude = self._excluded(target, catalog.shape[0], history, rows)
        v, device = catalog.shape[0], query.device
        if self.hard_fraction == 0.0:
            return RankSlice.uniform(
                exclude.shape[0],
                v,
                self.stop - self.start,
                exclude=exclude,
                first_item=self.first_item,
                generator=self._draws.next(device),
                device=device,
                weights=self._weights(v, device, bias),
            )
        slice_ = self._slice(query, catalog, norm, target, history, bias, inputs, rows, exclude)
        if self.hard_fraction == 1.0:
            return slice_
        return slice_.mix(self.hard_fraction, self._draws.next(device), self._weights(v, device, bias))

    def sample(
        self,
        query: Tensor,
        catalog: Tensor | FusedItemEmbedding,
        target: Tensor,
        *,
        num_negatives: int,
        history: Tensor | None = None,
        bias: Tensor | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """The negatives as ids: (T, num_negatives) int64, of which -1 is none.

        round(hard_fraction * num_negatives) columns hold members of the slice, drawn uniformly without replacement (-1
        where it has fewer); the others hold independent random draws (-1 where one hit an excluded item). Raises as a
        call does, and ValueError for num_negatives below 0 and a first_item beyond the catalog.
        """
        checks.check_integer("num_negatives", num_negatives)
        if num_negatives < 0:
            raise ValueError(f"num_negatives must be at least 0, got {num_negatives}")
        catalog, norm = _rows_of(catalog)
        rows = self._rows(query, catalog, target, bias)
        exclude = self._excluded(target, catalog.shape[0], history, rows)
        hard = round(self.hard_fraction * num_negatives)
        generator = self._draws.next(query.device)
        if not self.first_item < catalog.shape[0]:
            raise ValueError(f"first_item must be below the {catalog.shape[0]} items, got {self.first_item}")
        drawn = self._random_ids(catalog.shape[0], exclude, num_negatives - hard, generator, bias)
        if hard == 0:
            return drawn
        slice_ = self._slice(query, catalog, norm, target, history, bias, inputs, rows, exclude)
        return torch.cat([slice_.sample(hard, generator), drawn], 1)

    def log_q(self, *, num_negatives: int, num_items: int) -> Tensor:
        """(V,) float32, the log of each item's expected count among the random negatives that `sample` draws.

        For ``SampledSoftmaxLoss(log_q=...)``. An item that is never drawn has the count of the rarest one that is.
        Raises ValueError where hard_fraction is above 0: how often an item is a hard negative depends on the session.
        """
        if self.hard_fraction > 0.0:
            raise ValueError(
                f"log_q is defined for hard_fraction = 0, got {self.hard_fraction}: how often an item is a hard "
                "negative depends on the session"
            )
        checks.check_integer("num_negatives", num_negatives)
        checks.check_integer("num_items", num_items)
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
        if num_items <= self.first_item:
            raise ValueError(f"num_items must be above first_item = {self.first_item}, got {num_items}")
        weights = self._weights(num_items, torch.device("cpu"), None)
        weights = torch.ones(num_items, dtype=torch.float64) if weights is None else weights.double()
        ranked = weights[self.first_item :]
        return (num_negatives * weights.clamp(min=ranked[ranked > 0].min()) / ranked.sum()).log().float()

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}, hard_fraction={self.hard_fraction}, random={self.random!r}"

    def get_extra_state(self) -> Tensor:
        """(2,) int64: seed and number of draws; a tensor, as safetensors and distributed checkpoints ask for."""
        return torch.tensor([self._draws.seed, self._draws.number])

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave; raises ValueError for anything else."""
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (2,) or (state < 0).any():
            raise ValueError(f"a RankSliceSampler's state must be (2,) int64, seed and draws, got {state!r}")
        self._draws.seed, self._draws.number = state.tolist()

    def _take_teacher(self, teacher: Any) -> None:
        """A tensor becomes a buffer, a TeacherCopy a submodule; any other callable is held as it is."""
        if isinstance(teacher, Tensor):
            if teacher.ndim != 2:
                raise ValueError(f"teacher, where a tensor, must be (V, f), got {tuple(teacher.shape)}")
            if teacher.dtype not in checks.FLOATS:
                raise TypeError(f"teacher, where a tensor, must be float32, bfloat16 or float16, got {teacher.dtype}")
            self.register_buffer("teacher", teacher.detach(), persistent=False)
        elif isinstance(teacher, TeacherCopy):
            self.teacher = teacher
        elif teacher is None or callable(teacher):
            # Past nn.Module's own setattr: were the model its own teacher, a submodule here would be a cycle.
            self.__dict__["teacher"] = teacher
        else:
            raise TypeError(
                f"teacher must be a tensor (V, f), a TeacherCopy or a callable, got {checks.kind_of(teacher)}"
            )

    def _rows(self, query: Tensor, catalog: Tensor, target: Tensor, bias: Tensor | None) -> Tensor | None:
        """What `real_rows` gives, of arguments that are checked."""
        checks.check_tensor("catalog", catalog)
        if catalog.ndim != 2:
            raise ValueError(f"catalog must be (V, d), got {tuple(catalog.shape)}")
        rows = real_rows(query, target, self.ignore_index)
        if target.dtype not in checks.INTEGERS:
            raise TypeError(f"target must be int32 or int64, got {target.dtype}")
        if bias is not None:
            checks.check_vector("bias", bias, catalog.shape[0], query.device)
        return rows

    def _slice(
        self,
        query: Tensor,
        catalog: Tensor,
        norm: RowNorm,
        target: Tensor,
        history: Tensor | None,
        bias: Tensor | None,
        inputs: tuple[Any, ...] | None,
        rows: Tensor | None,
        exclude: Tensor,
    ) -> RankSlice:
        """The teacher's ranks [start, stop) for the rows whose target is not ignored."""
        if self.teacher is not None:
            if bias is not None:  # its masks alone; +inf becomes NaN and stays an error
                bias = torch.where(bias == -torch.inf, bias, bias * 0.0)
            with torch.no_grad():
                query, catalog, norm = self._ask(self.teacher, target, catalog.shape[0], history, inputs)
        if torch.compiler.is_compiling():  # ignored rows are ranked, too, and may hold anything: NaN would be an error
            query = query.detach().masked_fill((target == self.ignore_index).unsqueeze(-1), 0.0)
        return rank_slice(
            take_rows(query, rows, 1),
            catalog,
            start=self.start,
            stop=self.stop,
            exclude=exclude,
            bias=bias,
            first_item=self.first_item,
            precision=self.precision,
            check=self.check,
            backend=self.backend,
            _norm=norm,
        )

    def _ask(
        self, teacher: Teacher, target: Tensor, num_items: int, history: Tensor | None, inputs: tuple[Any, ...] | None
    ) -> tuple[Tensor, Tensor, RowNorm]:
        """The teacher's query, of target's shape and a last dimension, and catalog (V, f) with its norm."""
        query: Tensor | None
        norm = NO_NORM
        if isinstance(teacher, Tensor):
            query, catalog = None, teacher
        else:
            if inputs is None:
                inputs = (_needed("history", history, "the teacher is called with it, or with inputs"),)
            if not isinstance(inputs, tuple | list):  # a tensor would be taken apart into its rows
                raise TypeError(f"inputs must be a tuple of what the teacher takes, got {checks.kind_of(inputs)}")
            answer: Any = teacher(*inputs)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise TypeError(f"the teacher must return a tuple (query, catalog), got {checks.kind_of(answer)}")
            query, (catalog, norm) = answer[0], _rows_of(answer[1])
            checks.check_tensor("the teacher's query", query)
            checks.check_tensor("the teacher's catalog", catalog)
        if catalog.ndim != 2 or catalog.shape[0] != num_items:
            raise ValueError(f"the teacher's catalog must be ({num_items}, f), got {tuple(catalog.shape)}")
        if query is None:
            why = "a teacher of item vectors means the vectors of the session's items"
            history = self._checked_history(history, target, num_items, why)
            query = mean_of_items(catalog, history, self.first_item, per_place=target.ndim == 2)
        if query.shape[:-1] != target.shape:
            raise ValueError(f"the teacher's query must be {tuple(target.shape)} and f, got {tuple(query.shape)}")
        return query, catalog, norm

    def _excluded(self, target: Tensor, num_items: int, history: Tensor | None, rows: Tensor | None) -> Tensor:
        """(T, m) ids that are never negatives of a row: its target and, if asked for, its session; -1 is none."""
        real = torch.where(target == self.ignore_index, -1, target)
        targets = take_rows(real, rows, 0).unsqueeze(1)
        if not self.exclude_history:
            return targets
        history = self._checked_history(history, target, num_items, "exclude_history keeps the session's own items out")
        items = history if target.ndim == 1 else torch.cat([history, real], 1)  # (B, m)
        if target.ndim == 2:
            items = items.unsqueeze(1).expand(-1, target.shape[1], -1)
        return torch.cat([targets, take_rows(items, rows, 1)], 1)

    def _checked_history(self, history: Tensor | None, target: Tensor, num_items: int, why: str) -> Tensor:
        """history (B, L), whose values are checked where `check` says so."""
        history = _needed("history", history, why)
        if history.ndim != 2 or history.shape[0] != target.shape[0]:
            raise ValueError(f"history must be ({target.shape[0]}, L), got {tuple(history.shape)}")
        if history.dtype not in checks.INTEGERS:
            raise TypeError(f"history must be int32 or int64, got {history.dtype}")
        if dispatch.choose_check(self.check, history) and (history >= num_items).any():
            raise ValueError(f"history holds {int(history.max())}, expected ids below {num_items}; negative is padding")
        return history

    def _weights(self, num_items: int, device: torch.device, bias: Tensor | None) -> Tensor | None:
        """(V,) in proportion to which random items are drawn, 0 where the bias is -inf; None: all alike."""
        weights = None
        if self.popularity is not None:
            if self.popularity.shape != (num_items,):
                raise ValueError(f"popularity must be ({num_items},), got {tuple(self.popularity.shape)}")
            weights = self.popularity.to(device)
        elif self.random == "log_uniform":
            rank = torch.arange(num_items, dtype=torch.float64, device=device) - self.first_item
            weights = torch.log1p(1.0 / (rank.clamp(min=0) + 1.0))  # log((k + 2) / (k + 1))
        if bias is None or not (masked := bias.detach() == -torch.inf).any():
            return weights
        weights = torch.ones(num_items, device=device) if weights is None else weights
        weights = weights.masked_fill(masked, 0)
        if not weights[self.first_item :].any():
            raise ValueError("bias is -inf for every item that could be drawn")
        return weights

    def _random_ids(
        self, num_items: int, exclude: Tensor, number: int, generator: torch.Generator, bias: Tensor | None
    ) -> Tensor:
        """(T, number) int64 random items, drawn one by one; -1 where a draw hit one of the row's `exclude` (T, m)."""
        shape, device = (exclude.shape[0], number), exclude.device
        weights = self._weights(num_items, device, bias)
        if weights is None:
            ids = torch.randint(self.first_item, num_items, shape, generator=generator, device=device)
        else:
            weights = weights.double().clone()
            weights[: self.first_item] = 0.0
            cumulated = weights.cumsum(0)
            places = torch.rand(shape, dtype=torch.float64, generator=generator, device=device) * cumulated[-1]
            ids = torch.searchsorted(cumulated, places, right=True).clamp(max=num_items - 1)
        ordered = exclude.long().sort(1).values
        nearest = torch.searchsorted(ordered, ids).clamp(max=exclude.shape[1] - 1)
        return ids.masked_fill(ordered.gather(1, nearest) == ids, -1)


class _Draws:
    """Seed and number of the draws so far, which give each draw a generator of its own.

    Not attributes of the module: torch.compile would compile anew for every value of an integer among those.
    """

    def __init__(self, seed: int):
        self.seed, self.number = seed, 0

    def next(self, device: torch.device) -> torch.Generator:
        """For the next draw. Workers of a DataLoader start anew each epoch, with another seed."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        worker = torch.utils.data.get_worker_info()
        entropy = (
            self.seed,
            self.number,
            torch.distributed.get_rank() if distributed else 0,
            0 if worker is None else worker.seed,
        )
        self.number += 1
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator(device).manual_seed(int(state))


def _rows_of(catalog: Any) -> tuple[Tensor, RowNorm]:
    """A catalog's rows and the norm over them."""
    return (catalog.table, catalog.norm) if isinstance(catalog, FusedItemEmbedding) else (catalog, NO_NORM)


def _needed(name: str, value: Tensor | None, why: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is needed: {why}")
    checks.check_tensor(name, value)
    return value
