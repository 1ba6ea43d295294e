"""Losses over an item table that need no (V, d) but the table, and the step that goes through its tiles once.

`table_loss` also gives the queries' gradient; the table's comes to be in `step_table`, a tile at a time, and goes
straight into the optimiser. Notation: B sessions, V items, d width, P positives, E looked-up rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alterrec_fast.ops import row_blocks
from alterrec_fast.ops.checks import check_ids_in, check_loss_ids
from alterrec_fast.ops.layer_norm import RowNorm
from alterrec_fast.ops.library import LIBRARY, arguments_of, flattened
from alterrec_fast.ops.reference import BLOCK_BYTES, positive_ids, widen
from alterrec_fast.ops.row_blocks import Block
from alterrec_fast.ops.slice_cross_entropy import SliceLoss
from alterrec_fast.ops.table_rules import KINDS, Rule, round_at_random

PRECISIONS = ("fp32", "bf16", "fp16")  # as the native engine numbers them
TILE_BYTES = 16 << 20  # what a tile of rows may take in plain PyTorch


class TableLoss(NamedTuple):
    """A loss over the table's rows, as they come out of the norm."""

    problem: SliceLoss  # its catalog is the table, its temperature a number
    norm: RowNorm

    def block(self, first: int, stop: int, check: bool = False) -> Block:
        return Block(self.problem, self.norm.of(self.problem.catalog[first:stop]), first, check)


class Forward(NamedTuple):
    """What the forward pass gives."""

    losses: Tensor  # (B,)
    lse: Tensor  # (B,)
    saved: Tensor  # of the native engine: logits that the step need not compute again
    mean: Tensor  # (B, d)


class Registered(NamedTuple):
    """A loss whose backward pass has come, for the step."""

    loss: TableLoss
    lse: Tensor
    saved: Tensor
    grad_losses: Tensor  # (B,)


class LookedUp(NamedTuple):
    items: Tensor  # (E,) int64, ascending
    grads: Tensor  # (E, d) float32, of what was looked up


class Table(NamedTuple):
    rows: Tensor  # (V, d)
    first: Tensor  # moments of the rule's kind, empty where it has none
    second: Tensor
    norm: RowNorm


def table_loss(x: TableLoss, native: bool, saved_size: int, check: bool) -> Forward:
    """Losses of all rows, and what backward and step need. Raises ValueError as `slice_cross_entropy` does."""
    if native:
        return Forward(*torch.ops.alterrec_fast.native_item_table_loss(*flattened(x), saved_size, check))
    p = x.problem
    v = p.catalog.shape[0]
    if check:
        check_loss_ids(p.target, p.positives, p.bias, p.first_item, v, p.ignore_index)
        if p.ids is not None:
            check_ids_in("neg.ids", p.ids, p.first_item, v, -1)
    blocks = (row_blocks.partition(x.block(first, stop, check)) for first, stop in _tiles(p, v))
    whole = next(blocks)
    for part in blocks:
        whole = row_blocks.join(whole, part)
    return Forward(row_blocks.losses(p, whole), whole.lse, whole.lse.new_empty(0), whole.mean)


def query_gradient(x: TableLoss, native: bool, done: Forward, grad_losses: Tensor) -> Tensor:
    """(B, d), of the query's dtype."""
    p = x.problem
    if native:
        arguments = flattened(x._replace(problem=p._replace(members=None)))
        del arguments[list(arguments_of(TableLoss)).index("members")]
        result: Tensor = torch.ops.alterrec_fast.native_item_table_query_gradient(
            grad_losses, done.lse, done.mean, *arguments
        )
        return result
    ids = positive_ids(p.target, p.positives, 0, p.query.shape[0], p.ignore_index).clamp(min=0)
    vectors = x.norm.of(p.catalog.index_select(0, ids.flatten()))
    vectors = widen(vectors, p.precision).view(*ids.shape, -1)
    by = row_blocks.weights(p, done.lse, _pos_logits(x), grad_losses)
    return row_blocks.query_gradient(p, done.mean, vectors, by).to(p.query.dtype)


def bias_gradient(x: TableLoss, done: Forward, grad_losses: Tensor) -> Tensor:
    """(V,), by scoring once more in plain PyTorch, whatever the engine."""
    p = x.problem
    by = row_blocks.weights(p, done.lse, _pos_logits(x), grad_losses)
    parts = [row_blocks.gradients(x.block(a, b), done.lse, by)[2] for a, b in _tiles(p, p.catalog.shape[0])]
    return torch.cat(parts)


def step_table(
    table: Table, losses: list[Registered], looked_up: LookedUp, rule: Rule, only_touched: bool, native: bool
) -> tuple[Tensor, Tensor]:
    """The table's step by the gradient of all losses and look-ups, in place; only_touched: of the looked-up rows alone.

    Returns the gradients of the norm's weight and bias, not scaled; empty without a norm.
    """
    if native:
        return _native_step(table, losses, looked_up, rule, only_touched)
    norm, d = table.norm, table.rows.shape[1]
    sums = table.rows.new_zeros(2, d if norm.norm_weight is not None else 0, dtype=torch.float64)
    weighted = [
        (x.loss, x.lse, row_blocks.weights(x.loss.problem, x.lse, _pos_logits(x.loss), x.grad_losses)) for x in losses
    ]
    for where, items, begin, end in _tiles_to_step(table.rows, looked_up.items, losses, only_touched):
        rows = table.rows[where].float()
        grad = torch.zeros_like(rows)
        for loss, lse, by in weighted:
            grad += row_blocks.gradients(loss.block(int(items[0]), int(items[-1]) + 1), lse, by)[0]
        _add_rows(grad, torch.searchsorted(items, looked_up.items[begin:end]), looked_up.grads[begin:end])
        if norm.norm_weight is not None:
            grad, *of_norm = _norm_backward(rows, norm, grad)
            sums += torch.stack(of_norm)
        moments = [(whole, whole[where] if len(whole) else whole) for whole in (table.first, table.second)]
        new = rule.step(rows, grad, moments[0][1], moments[1][1])
        for whole, moment in moments:
            if only_touched and len(whole):  # what was indexed by items is a copy
                whole[where] = moment
        table.rows[where] = round_at_random(new, items, rule.key) if table.rows.dtype == torch.bfloat16 else new
    return sums[0].float(), sums[1].float()


def _native_step(
    table: Table, losses: list[Registered], looked_up: LookedUp, rule: Rule, only_touched: bool
) -> tuple[Tensor, Tensor]:
    problems = [x.loss.problem for x in losses]
    grads: tuple[Tensor, Tensor] = torch.ops.alterrec_fast.native_item_table_step(
        table.rows,
        table.first,
        table.second,
        *table.norm,
        [p.query for p in problems],
        [p.target for p in problems],
        [p.members for p in problems],
        [p.positives for p in problems],
        [p.bias for p in problems],
        [x.grad_losses for x in losses],
        [x.lse for x in losses],
        [x.saved for x in losses],
        [float(p.positive_weight) for p in problems],
        [float(p.temperature) for p in problems],
        [p.first_item for p in problems],
        [p.ignore_index for p in problems],
        [PRECISIONS.index(p.precision) for p in problems],
        *looked_up,
        KINDS.index(rule.kind),
        *(float(x) for x in rule[1:9]),
        only_touched,
        rule.key,
    )
    return grads


def _tile_rows(sessions: int, width: int) -> int:
    """Rows of a tile: their scores take BLOCK_BYTES at most, and they TILE_BYTES; whole bytes of bits."""
    rows = min(BLOCK_BYTES // (4 * max(1, sessions)), TILE_BYTES // (4 * max(1, width)))
    return max(8, rows // 8 * 8)


def _tiles(p: SliceLoss, items: int) -> Iterator[tuple[int, int]]:
    """The bounds of the tiles; at least one, which may be empty."""
    step = _tile_rows(*p.query.shape)
    yield from ((first, min(items, first + step)) for first in range(0, max(1, items), step))


def _tiles_to_step(
    rows: Tensor, looked_up: Tensor, losses: list[Registered], only_touched: bool
) -> Iterator[tuple[slice | Tensor, Tensor, int, int]]:
    """The tiles of a step: where their rows are, as a slice of the table or as items, and always as items (n,); and
    where their part of the looked-up rows begins and ends."""
    v, d = rows.shape
    step = _tile_rows(max((len(x.lse) for x in losses), default=1), d)
    touched = looked_up.unique_consecutive() if only_touched else torch.arange(v, device=rows.device)
    tiles = [items for items in touched.split(step) if len(items)]
    firsts = torch.tensor([int(items[0]) for items in tiles], dtype=torch.int64, device=rows.device)
    bounds = torch.searchsorted(looked_up, firsts).tolist()
    for items, begin, end in zip(tiles, bounds, [*bounds[1:], len(looked_up)], strict=True):
        where = items if only_touched else slice(int(items[0]), int(items[-1]) + 1)
        yield where, items, begin, end


def _add_rows(matrix: Tensor, ids: Tensor, rows: Tensor) -> None:
    """matrix (n, d) += rows at ids, which ascend; every sum has one order."""
    if matrix.device.type == "cpu":
        matrix.index_add_(0, ids, rows)
    else:  # by a stable sort; index_add_ adds by atomics there
        matrix.index_put_((ids,), rows, accumulate=True)


def _norm_backward(rows: Tensor, norm: RowNorm, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of rows (n, d), weight and bias, from that of the norm's output."""
    assert norm.norm_weight is not None and norm.norm_bias is not None
    leaves = [x.detach().requires_grad_() for x in (rows, norm.norm_weight, norm.norm_bias)]
    with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
        out = F.layer_norm(leaves[0], (rows.shape[1],), leaves[1], leaves[2], norm.norm_eps)
        return torch.autograd.grad(out, leaves, grad)


def _pos_logits(x: TableLoss) -> Tensor:
    """(B, 1 + P), -inf for none."""
    p = x.problem
    ids = positive_ids(p.target, p.positives, 0, p.query.shape[0], p.ignore_index)
    vectors = widen(x.norm.of(p.catalog.index_select(0, ids.clamp(min=0).flatten())), p.precision)
    y = torch.einsum("bd,bpd->bp", widen(p.query, p.precision), vectors.view(*ids.shape, -1))
    if p.bias is not None:
        y = y + p.bias.detach()[ids.clamp(min=0)].float()
    return (y / p.temperature).masked_fill(ids < 0, -torch.inf)


def _define() -> None:
    """The schemas of the native kernels; they are called with tensors that need no gradient."""
    types = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", Tensor | None: "Tensor?"}
    loss = ", ".join(f"{types[kind]} {name}" for name, kind in arguments_of(TableLoss).items())
    query = loss.replace("Tensor? members, ", "")
    lists = (
        "Tensor[] queries, Tensor[] targets, Tensor?[] members, Tensor?[] positives, Tensor?[] biases, "
        "Tensor[] grad_losses, Tensor[] lses, Tensor[] saved, float[] positive_weights, float[] temperatures, "
        "int[] first_items, int[] ignore_indices, int[] precisions"
    )
    numbers = "float step_size, float root_correction, float beta1, float beta2, float eps, float weight_decay"
    LIBRARY.define(f"native_item_table_loss({loss}, int saved_size, bool check) -> (Tensor, Tensor, Tensor, Tensor)")
    LIBRARY.define(f"native_item_table_query_gradient(Tensor grad_losses, Tensor lse, Tensor mean, {query}) -> Tensor")
    LIBRARY.define(
        "native_item_table_step(Tensor(a!) table, Tensor(b!) first, Tensor(c!) second, Tensor? norm_weight, "
        f"Tensor? norm_bias, float norm_eps, {lists}, Tensor items, Tensor grads, int kind, {numbers}, float scale, "
        "float clip, bool only_touched, int key) -> (Tensor, Tensor)"
    )

    register_fake = torch.library.register_fake
    register_fake("alterrec_fast::native_item_table_loss", _fake_loss, lib=LIBRARY)
    register_fake("alterrec_fast::native_item_table_query_gradient", _fake_query_gradient, lib=LIBRARY)
    register_fake("alterrec_fast::native_item_table_step", _fake_step, lib=LIBRARY)


def _fake_loss(query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    losses = query.new_empty(query.shape[0], dtype=torch.float32)
    saved = query.new_empty(arguments[-2], dtype=torch.uint8)
    return losses, torch.empty_like(losses), saved, query.new_empty(query.shape, dtype=torch.float32)


def _fake_query_gradient(grad_losses: Tensor, lse: Tensor, mean: Tensor, query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _fake_step(table: Tensor, first: Tensor, second: Tensor, norm_weight: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    grad = table.new_empty(0 if norm_weight is None else table.shape[1], dtype=torch.float32)
    return grad, torch.empty_like(grad)


_define()
