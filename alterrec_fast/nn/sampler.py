"""RankSliceSampler: hard negatives of the whole catalog for each target of a batch, mixed with random ones.

Notation: B sessions, L session length, V items, d width, T rows whose target is not ignored, N negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alterrec_fast.nn.losses import real_rows, take_rows
from alterrec_fast.nn.teachers import TeacherCopy, mean_of_items
from alterrec_fast.ops import RankSlice, checks, dispatch, rank_slice
from alterrec_fast.ops.slices import check_weights

RANDOM = ("uniform", "popularity", "log_uniform")
Teacher = Tensor | TeacherCopy | Callable[..., tuple[Tensor, Tensor]]


class RankSliceSampler:
    """Negatives for each target: ranks [start, stop) of a teacher's ranking, a share of them traded for random items.

    Called in the training step, after the forward pass::

        sampler = RankSliceSampler(20, 2000, hard_fraction=0.5)
        loss = SliceCrossEntropy()(query, catalog, target, sampler(query, catalog, target))

    A call gives a `RankSlice` for `SliceCrossEntropy`; `sample` gives ids for `SampledSoftmaxLoss`. No gradient flows.
    Random draws follow from seed, number of the draw and process (and in a DataLoader's worker from its seed), so that
    the processes of a distributed run draw apart and a run that goes on from `state_dict` draws what it would have.
    Under torch.compile the draws end a graph, so that ``fullgraph=True`` takes hard_fraction 1 only.

    Args:
        start, stop: ranks, 0-based and half-open; `range_min` and `range_max` are the same under the names of
            sentence-transformers. start is 0 where left out.
        hard_fraction: in [0, 1]; the share of the stop - start negatives that the teacher's ranks fill. Each hard one
            stays with this probability, and random ones enter in their place (`RankSlice.mix`); 0 ranks nothing.
        random: where the others come from: "uniform", "popularity" (in proportion to the argument of that name) or
            "log_uniform" (item first_item + k in proportion to log((k + 2) / (k + 1)), for ids in order of falling
            frequency, as in TensorFlow and Transformers4Rec).
        popularity: (V,) counts or weights; raise them to a power, such as 0.75, beforehand.
        teacher: who ranks. None: the model itself, by the query and catalog of the call, so with this step's weights.
            A `TeacherCopy`: a frozen or slowly moving copy of it. A (V, f) float32 or bfloat16 tensor: item vectors of
            another modality; a session's query is then the mean of those of its items so far. Any other callable: takes
            the call's inputs, returns (query, catalog).
        exclude_history: whether a session's own items (`history`, and all its targets) are kept out; a row's own target
            always is.
        first_item: rows of the catalog before it are padding.
        ignore_index: a target that stands for no row, as in the loss.
        num_sessions: how many sessions there are; can be left out. With it their thresholds of the last epoch are kept,
            8 bytes for each place of each session, and offered to `rank_slice` as its guess, a hint that no engine
            uses at present; it needs `session` in each call.
        seed: of the random negatives.
        precision, check, backend: as in `rank_slice`.

    Raises:
        TypeError: without stop, for a rank given under both of its names, and for a teacher tensor of another dtype.
        ValueError: for a value out of range, popularity without random="popularity" or the reverse, and a teacher
            tensor that is not (V, f).
    """

    def __init__(
        self,
        start: int | None = None,
        stop: int | None = None,
        *,
        range_min: int | None = None,
        range_max: int | None = None,
        hard_fraction: float = 1.0,
        random: str = "uniform",
        popularity: Tensor | None = None,
        teacher: Teacher | None = None,
        exclude_history: bool = False,
        first_item: int = 0,
        ignore_index: int = -100,
        num_sessions: int | None = None,
        seed: int = 0,
        precision: str | None = None,
        check: bool | None = None,
        backend: str = "auto",
    ):
        first, last = one_of("start", start, "range_min", range_min), one_of("stop", stop, "range_max", range_max)
        if last is None:
            raise TypeError("RankSliceSampler needs the rank at which the negatives stop: stop, or range_max")
        self.start, self.stop = first or 0, last
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"expected 0 <= start <= stop, got start={self.start}, stop={self.stop}")
        if not 0.0 <= hard_fraction <= 1.0:
            raise ValueError(f"hard_fraction must lie in [0, 1], got {hard_fraction}")
        if random not in RANDOM:
            raise ValueError(f"random must be one of {', '.join(RANDOM)}, got {random!r}")
        if (random == "popularity") != (popularity is not None):
            raise ValueError(
                f"popularity goes with random='popularity', got random={random!r} and popularity "
                f"{'None' if popularity is None else tuple(popularity.shape)}"
            )
        if first_item < 0:
            raise ValueError(f"first_item must be at least 0, got {first_item}")
        if num_sessions is not None and num_sessions < 1:
            raise ValueError(f"num_sessions must be at least 1, got {num_sessions}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if popularity is not None:
            check_weights("popularity", popularity, popularity.shape[0], first_item)
        if isinstance(teacher, Tensor):
            if teacher.ndim != 2:
                raise ValueError(f"teacher, where a tensor, must be (V, f), got {tuple(teacher.shape)}")
            if teacher.dtype not in checks.FLOATS:
                raise TypeError(f"teacher, where a tensor, must be float32 or bfloat16, got {teacher.dtype}")
        self.hard_fraction = hard_fraction
        self.random = random
        self.popularity = popularity
        self.teacher = teacher
        self.exclude_history = exclude_history
        self.first_item = first_item
        self.ignore_index = ignore_index
        self.num_sessions = num_sessions
        self.seed = seed
        self.precision = precision
        self.check = check
        self.backend = backend
        self.draws = 0  # random draws so far
        self.thresholds: Tensor | None = None  # (num_sessions, L, 2) float32, L = 1 for queries in rows

    def __call__(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        history: Tensor | None = None,
        session: Tensor | None = None,
        bias: Tensor | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> RankSlice:
        """The negatives as sets: T rows, one for each target that is not ignored, in order.

        Under torch.compile a row for every target.

        Args:
            query: (B, d) or (B, L, d), the model's own.
            catalog: (V, d), the model's own.
            target: (B,) or (B, L) int32 or int64; ignore_index where there is none.
            history: (B, L) ids of each session's items, in order; ids below first_item are padding.
            session: (B,) int32 or int64, each session's place in the data, from 0 to num_sessions - 1.
            bias: (V,), added to the model's own scores; a teacher has none.
            inputs: what a teacher is called with; (history,) where left out.

        Raises:
            TypeError, ValueError, BackendError: as `rank_slice` does, and where `history` or `session` is needed and
                missing. Rows in messages count the targets not ignored.
        """
        kept = real_rows(query, target, self.ignore_index)
        exclude = self._excluded(target, catalog.shape[0], history, kept)
        v, device = catalog.shape[0], query.device
        if self.hard_fraction == 0.0:
            return RankSlice.uniform(
                exclude.shape[0],
                v,
                self.stop - self.start,
                exclude,
                self.first_item,
                self._generator(device),
                device,
                self._weights(v, device),
            )
        slice_ = self._slice(query, catalog, target, history, session, bias, inputs, kept, exclude)
        if self.hard_fraction == 1.0:
            return slice_
        return slice_.mix(self.hard_fraction, self._generator(device), self._weights(v, device))

    def sample(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        num_negatives: int,
        history: Tensor | None = None,
        session: Tensor | None = None,
        bias: Tensor | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """The negatives as ids: (T, num_negatives) int64, of which -1 is none.

        round(hard_fraction * num_negatives) columns hold members of the slice, drawn uniformly without replacement (-1
        where it has fewer); the others hold independent random draws (-1 where one hit an excluded item). Raises as a
        call does, and ValueError for num_negatives below 0 and a first_item beyond the catalog.
        """
        if num_negatives < 0:
            raise ValueError(f"num_negatives must be at least 0, got {num_negatives}")
        kept = real_rows(query, target, self.ignore_index)
        exclude = self._excluded(target, catalog.shape[0], history, kept)
        hard = round(self.hard_fraction * num_negatives)
        generator = self._generator(query.device)
        if not self.first_item < catalog.shape[0]:
            raise ValueError(f"first_item must be below the {catalog.shape[0]} items, got {self.first_item}")
        drawn = self._random_ids(catalog.shape[0], exclude, num_negatives - hard, generator)
        if hard == 0:
            return drawn
        slice_ = self._slice(query, catalog, target, history, session, bias, inputs, kept, exclude)
        return torch.cat([slice_.sample(hard, generator), drawn], 1)

    def log_q(self, num_negatives: int, num_items: int) -> Tensor:
        """(V,) float32, the log of each item's expected count among the random negatives that `sample` draws.

        For ``SampledSoftmaxLoss(log_q=...)``. An item that is never drawn has the count of the rarest one that is.
        Raises ValueError where hard_fraction is above 0: how often an item is a hard negative depends on the session.
        """
        if self.hard_fraction > 0.0:
            raise ValueError(
                f"log_q is defined for hard_fraction = 0, got {self.hard_fraction}: how often an item is a hard "
                "negative depends on the session"
            )
        weights = self._weights(num_items, torch.device("cpu"))
        weights = torch.ones(num_items, dtype=torch.float64) if weights is None else weights.double()
        ranked = weights[self.first_item :]
        return (num_negatives * weights.clamp(min=ranked[ranked > 0].min()) / ranked.sum()).log().float()

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs in order to go on as this one would: plain numbers and tensors.

        The tensors are the sampler's own, as in `nn.Module.state_dict`: store or copy them before it is used again.
        """
        state: dict[str, Any] = {"seed": self.seed, "draws": self.draws, "thresholds": self.thresholds}
        if isinstance(self.teacher, TeacherCopy):
            state["teacher"] = self.teacher.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; the thresholds are copied.

        Raises ValueError where the state holds other entries or thresholds of another num_sessions; RuntimeError where
        the teacher's is of another model.
        """
        expected = {"seed", "draws", "thresholds"} | ({"teacher"} if isinstance(self.teacher, TeacherCopy) else set())
        if set(state) != expected:
            raise ValueError(f"state must hold {sorted(expected)}, got {sorted(state)}")
        thresholds = state["thresholds"]
        if thresholds is not None and thresholds.shape[0] != self.num_sessions:
            raise ValueError(f"state is of {thresholds.shape[0]} sessions, expected num_sessions={self.num_sessions}")
        self.seed, self.draws = state["seed"], state["draws"]
        self.thresholds = None if thresholds is None else thresholds.clone()
        if isinstance(self.teacher, TeacherCopy):
            self.teacher.load_state_dict(state["teacher"])

    def _slice(
        self,
        query: Tensor,
        catalog: Tensor,
        target: Tensor,
        history: Tensor | None,
        session: Tensor | None,
        bias: Tensor | None,
        inputs: tuple[Any, ...] | None,
        kept: Tensor | None,
        exclude: Tensor,
    ) -> RankSlice:
        """The teacher's ranks [start, stop) for the rows kept; remembers their thresholds."""
        if self.teacher is not None:
            bias = None
            with torch.no_grad():
                query, catalog = self._ask(self.teacher, target, catalog.shape[0], history, inputs)
        table = places = None
        if self.num_sessions is not None:
            table = self._table(self.num_sessions, target).view(-1, 2)
            places = self._places(self.num_sessions, session, target, kept)
        slice_ = rank_slice(
            take_rows(query, kept, 1),
            catalog,
            start=self.start,
            stop=self.stop,
            exclude=exclude,
            bias=bias,
            first_item=self.first_item,
            precision=self.precision,
            check=self.check,
            backend=self.backend,
        )
        if table is not None:
            table[places] = slice_.thresholds
        return slice_

    def _ask(
        self, teacher: Teacher, target: Tensor, num_items: int, history: Tensor | None, inputs: tuple[Any, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """The teacher's query, of target's shape and a last dimension, and catalog (V, f)."""
        query: Tensor | None
        if isinstance(teacher, Tensor):
            query, catalog = None, teacher
        else:
            if inputs is None:
                inputs = (_needed("history", history, "the teacher is called with it, or with inputs"),)
            answer: Any = teacher(*inputs)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise TypeError(f"the teacher must return a tuple (query, catalog), got {type(answer).__name__}")
            query, catalog = answer
            if not isinstance(query, Tensor) or not isinstance(catalog, Tensor):
                kinds = f"{type(query).__name__} and {type(catalog).__name__}"
                raise TypeError(f"the teacher's query and catalog must be tensors, got {kinds}")
        if catalog.shape[0] != num_items:
            raise ValueError(f"the teacher's catalog must have {num_items} items, got {catalog.shape[0]}")
        if query is None:
            why = "a teacher of item vectors means the vectors of the session's items"
            history = self._checked_history(history, target, num_items, why)
            query = mean_of_items(catalog, history, self.first_item, per_place=target.ndim == 2)
        if query.shape[:-1] != target.shape:
            raise ValueError(f"the teacher's query must be {tuple(target.shape)} and f, got {tuple(query.shape)}")
        return query, catalog

    def _excluded(self, target: Tensor, num_items: int, history: Tensor | None, kept: Tensor | None) -> Tensor:
        """(T, m) ids that no row may meet: its target, and the session's own items where asked for; -1 is none."""
        if target.dtype not in checks.INTEGERS:
            raise TypeError(f"target must be int32 or int64, got {target.dtype}")
        real = torch.where(target == self.ignore_index, -1, target)
        own = take_rows(real, kept, 0).unsqueeze(1)
        if not self.exclude_history:
            return own
        history = self._checked_history(history, target, num_items, "exclude_history keeps the session's own items out")
        items = history if target.ndim == 1 else torch.cat([history, real], 1)  # (B, m)
        if target.ndim == 2:
            items = items.unsqueeze(1).expand(-1, target.shape[1], -1)
        return torch.cat([own, take_rows(items, kept, 1)], 1)

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

    def _places(self, num_sessions: int, session: Tensor | None, target: Tensor, kept: Tensor | None) -> Tensor:
        """(T,) where in the table of thresholds each row stands."""
        session = _needed("session", session, "num_sessions keeps thresholds of each session")
        if session.dtype not in checks.INTEGERS:
            raise TypeError(f"session must be int32 or int64, got {session.dtype}")
        if session.shape != target.shape[:1]:
            raise ValueError(f"session must be ({target.shape[0]},), got {tuple(session.shape)}")
        if dispatch.choose_check(self.check, session) and ((session < 0) | (session >= num_sessions)).any():
            beyond = session[(session < 0) | (session >= num_sessions)][0]
            raise ValueError(f"session holds {int(beyond)}, expected a number in [0, {num_sessions})")
        if target.ndim == 1:
            return take_rows(session, kept, 0)
        width = self._table(num_sessions, target).shape[1]
        places = session.unsqueeze(1) * width + torch.arange(target.shape[1], device=session.device)
        return take_rows(places, kept, 0)

    def _table(self, num_sessions: int, target: Tensor) -> Tensor:
        """The thresholds of all sessions, with room for target's length, on its device."""
        length = 1 if target.ndim == 1 else target.shape[1]
        table = self.thresholds
        if table is None or table.shape[1] < length:
            # What `rank_slice` gives for an empty slice.
            wider = torch.tensor([math.inf, -math.inf]).repeat(num_sessions, length, 1)
            if table is not None:
                wider[:, : table.shape[1]] = table
            table = wider
        self.thresholds = table.to(target.device)
        return self.thresholds

    def _weights(self, num_items: int, device: torch.device) -> Tensor | None:
        """(V,) in proportion to which random items are drawn; None: all alike."""
        if self.random == "uniform":
            return None
        if self.popularity is not None:
            if self.popularity.shape != (num_items,):
                raise ValueError(f"popularity must be ({num_items},), got {tuple(self.popularity.shape)}")
            return self.popularity.to(device)
        place = torch.arange(num_items, dtype=torch.float64, device=device) - self.first_item
        return torch.log1p(1.0 / (place.clamp(min=0) + 1.0))  # log((k + 2) / (k + 1))

    def _random_ids(self, num_items: int, exclude: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """(T, number) int64 random items, drawn one by one; -1 where a draw hit one of the row's `exclude` (T, m)."""
        shape, device = (exclude.shape[0], number), exclude.device
        weights = self._weights(num_items, device)
        if weights is None:
            ids = torch.randint(self.first_item, num_items, shape, generator=generator, device=device)
        else:
            weights = weights.double().clone()
            weights[: self.first_item] = 0.0
            cumulated = weights.cumsum(0)
            places = torch.rand(shape, dtype=torch.float64, generator=generator, device=device) * cumulated[-1]
            ids = torch.searchsorted(cumulated, places, right=True).clamp(max=num_items - 1)
        ordered = exclude.long().sort(1).values
        found = torch.searchsorted(ordered, ids).clamp(max=exclude.shape[1] - 1)
        return ids.masked_fill(ordered.gather(1, found) == ids, -1)

    def _generator(self, device: torch.device) -> torch.Generator:
        """For the next draw. Workers of a DataLoader start anew each epoch, with another seed."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        worker = torch.utils.data.get_worker_info()
        parts = (
            self.seed,
            self.draws,
            torch.distributed.get_rank() if distributed else 0,
            0 if worker is None else worker.seed,
        )
        self.draws += 1
        state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
        return torch.Generator(device).manual_seed(int(state))


def one_of(name: str, value: int | None, other_name: str, other: int | None) -> int | None:
    """One number that may go by two names; raises TypeError where it goes by both."""
    if value is not None and other is not None:
        raise TypeError(f"{name} and {other_name} are the same, got {name}={value} and {other_name}={other}")
    return other if value is None else value


def _needed(name: str, value: Tensor | None, why: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is needed: {why}")
    return value
