"""Filters of sessions and items as papers use them, and splits, on sessions of item numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .interactions import FREE, Coded
from .scratch import Scratch
from .sessions import SPLITS, DataError

TRAIN, VALIDATION, TEST = range(len(SPLITS))
_OF_ITEMS = "interactions of items"  # how a reason begins that counts interactions
LEAVE_ONE_OUT = "leave-one-out"  # how a split was found, in words


@dataclass(frozen=True)
class Filters:
    """What is left out before or after the split, in this order.

    last_sessions: keep the latest so many sessions, or the latest share of them if below 1. min_item_count: leave out
    items that occur less often. min_session_length: leave out shorter sessions, after the items. k_core: leave out
    items of fewer than so many interactions and sessions of fewer, again and again until none is. train_only: count and
    leave out in training sessions alone, after the split.
    """

    last_sessions: float | None = None
    min_item_count: int = 1
    min_session_length: int = 2
    k_core: int | None = None
    train_only: bool = False

    def __post_init__(self) -> None:
        for name, least in (("last_sessions", 0), ("min_item_count", 1), ("min_session_length", 2), ("k_core", 2)):
            value = getattr(self, name)
            if value is not None and not (value >= least and value > 0):  # nor NaN
                raise DataError(f"{name} is {value}, expected {f'at least {least}' if least else 'a number above 0'}")
        if self.last_sessions is not None and self.last_sessions > 1 and self.last_sessions % 1:
            raise DataError(f"last_sessions is {self.last_sessions}, expected a whole number or a share below 1")


@dataclass(frozen=True)
class Splitting:
    """How sessions that the files leave open are divided. test_days, validation_days: the last days that are test, and
    those before that are validation, in place of the fractions. leave_one_out: each session's last item is the test
    target, the one before the validation target."""

    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    test_days: float | None = None
    validation_days: float | None = None
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        fractions = self.validation_fraction, self.test_fraction
        if not all(0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
            given = f"{self.validation_fraction} and {self.test_fraction}"
            raise DataError(
                f"validation_fraction and test_fraction must be in [0, 1) and sum to less than 1, got {given}"
            )
        for name in ("test_days", "validation_days"):
            if (days := getattr(self, name)) is not None and not days > 0:
                raise DataError(f"{name} is {days}, expected a number above 0")
        if self.validation_days is not None and self.test_days is None:
            raise DataError("validation_days goes with test_days, the days after them")
        if self.leave_one_out and self.test_days is not None:
            raise DataError("a split is by leave-one-out or by test_days, got both")


def apply(filters: Filters, coded: Coded, num_items: int, space: Scratch, left_out: dict[str, int]) -> Coded:
    """The sessions and interactions that pass; what does not is counted in left_out."""
    total, known = len(coded.items), set(left_out)
    chosen = coded.split == TRAIN if filters.train_only else np.ones(len(coded), bool)
    if filters.last_sessions is not None:
        order = coded.order[chosen[coded.order]]
        count = filters.last_sessions if filters.last_sessions >= 1 else round(len(order) * filters.last_sessions)
        dropped = order[: max(0, len(order) - int(count))]
        left_out["sessions before the last ones asked for"] = len(dropped)
        coded, chosen = _without_sessions(coded, chosen, dropped, space)
    if filters.min_item_count > 1:
        reason = f"{_OF_ITEMS} that occur less than {filters.min_item_count} times"
        coded, chosen, left_out[reason] = _without_rare(coded, chosen, num_items, filters.min_item_count, space)
    if filters.min_item_count > 1 or filters.min_session_length > 2:
        short = np.flatnonzero(chosen & (coded.lengths < filters.min_session_length))
        left_out[f"sessions of fewer than {filters.min_session_length} items"] = len(short)
        coded, chosen = _without_sessions(coded, chosen, short, space)
    if filters.k_core is not None:
        reasons = [f"{what} outside the {filters.k_core}-core" for what in (_OF_ITEMS, "sessions")]
        left_out |= dict.fromkeys(reasons, 0)
        while True:
            coded, chosen, rare = _without_rare(coded, chosen, num_items, filters.k_core, space)
            short = np.flatnonzero(chosen & (coded.lengths < filters.k_core))
            left_out[reasons[0]] += rare
            left_out[reasons[1]] += len(short)
            if rare == 0 and len(short) == 0:
                break
            coded, chosen = _without_sessions(coded, chosen, short, space)
    of_items = sum(count for reason, count in left_out.items() if reason not in known and reason.startswith(_OF_ITEMS))
    if lost := total - len(coded.items) - of_items:
        left_out["interactions of sessions that filters drop"] = lost
    return coded


def _without_sessions(
    coded: Coded, chosen: np.ndarray, dropped: np.ndarray, space: Scratch
) -> tuple[Coded, np.ndarray]:
    if len(dropped) == 0:
        return coded, chosen
    stays = np.ones(len(coded), bool)
    stays[dropped] = False
    return coded.choose(stays, space), chosen[stays]


def _without_rare(
    coded: Coded, chosen: np.ndarray, num_items: int, least: int, space: Scratch
) -> tuple[Coded, np.ndarray, int]:
    """Without the interactions of items that the chosen sessions hold less than least times, and how many those are.

    A session that loses all of them stays with none."""
    counts = np.zeros(num_items, np.int64)
    for run, items in coded.blocks():
        counts += np.bincount(items[np.repeat(chosen[run], coded.lengths[run])], minlength=num_items)
    rare = int(counts[counts < least].sum())
    if rare == 0:
        return coded, chosen, 0
    return coded.select(chosen, counts >= least, space), chosen, rare


def split(coded: Coded, how: Splitting, per_second: Callable[[], float]) -> tuple[Coded, str]:
    """The sessions with a split for each, and in words how it was found. per_second: as in Raw.

    Raises DataError where another split is asked for than the files give.
    """
    given = {SPLITS[code] for code in np.unique(coded.split) if code != FREE}
    if given and (how.leave_one_out or how.test_days is not None):
        wanted = "leave-one-out" if how.leave_one_out else "test_days"
        raise DataError(f"{wanted} is asked for, but the files give a split ({', '.join(sorted(given))}); expected one")
    code = coded.split.copy()
    free = coded.order[coded.split[coded.order] == FREE]
    if how.leave_one_out:
        return coded, LEAVE_ONE_OUT
    if len(free) == 0:
        return coded, "as given"
    words = "by file order" if coded.times is None else "by time"
    num_test = _share(len(free), how.test_fraction)
    num_validation = None
    if how.test_days is not None:
        if coded.times is None:
            raise DataError("test_days needs timestamps, which the files do not have")
        words, day = f"by time, the last {how.test_days:g} days test", 86_400 * per_second()
        ages = coded.times[free[-1]] - coded.times[free]
        num_test = int((ages < how.test_days * day).sum())
        if how.validation_days is not None:
            num_validation = int((ages < (how.test_days + how.validation_days) * day).sum()) - num_test
    if (code == TEST).any():
        num_test, words = 0, f"{words}, test as given"
    if num_validation is None:
        num_validation = _share(len(free) - (num_test if coded.times is None else 0), how.validation_fraction)
    code[free] = TRAIN
    code[free[max(0, len(free) - num_test - num_validation) :]] = VALIDATION
    code[free[max(0, len(free) - num_test) :]] = TEST
    return replace(coded, split=code), words


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction else 0
