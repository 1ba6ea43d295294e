"""FusedItemEmbedding: an item table whose gradient is never stored: losses over all items, and an update by tiles.

Notation: B sessions, L session length, V items, d width, N negatives, P positives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alterrec_fast.nn.buffers import KeepsDtype
from alterrec_fast.nn.losses import SliceCrossEntropy
from alterrec_fast.nn.table_optimizer import TableOptimizer, check_options
from alterrec_fast.ops import RankSlice, TopK, checks, dispatch, library, rank_slice, sampled_softmax, top_k
from alterrec_fast.ops.item_table import (
    Forward,
    LookedUp,
    Registered,
    Table,
    TableLoss,
    bias_gradient,
    query_gradient,
    step_table,
    table_loss,
)
from alterrec_fast.ops.layer_norm import RowNorm
from alterrec_fast.ops.losses import finish_loss
from alterrec_fast.ops.slice_cross_entropy import checked_problem, saved_by_native
from alterrec_fast.ops.table_rules import Rule

NORMS = (None, "layer")
DTYPES = (torch.float32, torch.bfloat16)
MOMENTS = {"adam": 2, "rowwise_adagrad": 1, "sgd": 0}
CHANGED = (
    "the item table was changed between a loss's or look-up's forward pass and {when}: call step() once all backward "
    "passes are done, and change the table only between steps"
)


class FusedItemEmbedding(KeepsDtype):
    """An embedding table of items with its optimiser, for catalogs whose gradient would not fit beside them.

    ::

        items = FusedItemEmbedding(10_000_000, 128, norm="layer", optimizer="adam", lr=1e-3)
        query = encoder(items(history))
        items.cross_entropy(query, target).backward()
        optimizer.step()  # of the encoder
        items.step()

    A loss keeps a few small tensors in its backward pass; `step` goes through the table once, tile by tile: the tile's
    gradient of every loss and look-up since the last step goes through the LayerNorm straight into the optimiser. Of
    (V, d) there are the table and the optimiser's moments, nothing else. Losses, batches and look-ups add up until
    `step`, as gradients do; what is never passed backward adds nothing; looked-up rows are summed in the order of item,
    then of call and token. On the CPU the result does not depend on the number of threads.

    adam equals torch.optim.Adam on the dense gradient. After `sampled_softmax` and look-ups alone it is
    torch.optim.SparseAdam on the rows that they touched, and leaves all others alone. rowwise_adagrad keeps one number
    for a row: s += mean of g ** 2, x -= lr g / (sqrt(s) + eps); a LayerNorm's weight and bias have one for each
    element. sgd is torch.optim.SGD without momentum.

    The table, moments, and the LayerNorm's weight and bias are buffers: `parameters()` does not list them, the state
    dict does. They keep their dtype under ``half()``. Table and moments are float32 under autocast too; products follow
    it. A bfloat16 table is rounded at random, up in proportion to the part cut off, by draws that follow from seed,
    step, row and place; its moments are float32. Initialise `table` in place before the first call if you want other
    values than N(0, 1/d). Under torch.compile every method ends the graph. On a GPU it is plain torch in tiles.

    Args:
        num_items: V.
        dim: d.
        norm: None, or "layer": losses, ranking and look-ups see the rows under a LayerNorm.
        optimizer: "adam", "rowwise_adagrad" or "sgd".
        lr: the learning rate, a float or a tensor of one number; `optimizer.param_groups[0]["lr"]` from then on.
        dtype: of the table, float32 or bfloat16.
        device: of the buffers.
        first_item: rows before it are padding: no candidates and no targets; they may be looked up and never change.
        seed: of the initial values and of the rounding, in [0, 2 ** 63).
        max_saved_bytes: as in `slice_cross_entropy`, for each loss until `step`.
        backend: as in `rank_slice`, for all methods; "triton" serves `rank_slice` and `top_k` alone.
        betas, eps, weight_decay: as in the torch.optim class; weight decay after sparse losses alone is of the touched
            rows.
        clip_value: gradients are clipped to [-clip_value, clip_value], element by element.

    Raises:
        TypeError: for an argument of another kind, and one that the optimiser does not have.
        ValueError: for a value out of range; for clip_norm, which would need the whole gradient at once.
    """

    table: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    moment1: Tensor
    moment2: Tensor
    norm_moment1: Tensor
    norm_moment2: Tensor
    steps: Tensor
    seed: Tensor

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        norm: str | None = None,
        optimizer: str = "adam",
        lr: float | Tensor = 1e-3,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        first_item: int = 0,
        seed: int = 0,
        max_saved_bytes: int = 256 << 20,
        backend: str | None = None,
        **options: Any,
    ):
        super().__init__()
        for name, value in (("num_items", num_items), ("dim", dim), ("first_item", first_item), ("seed", seed)):
            checks.check_integer(name, value)
        if num_items < 0 or dim < 1:
            raise ValueError(f"num_items and dim must be at least 0 and 1, got {num_items} and {dim}")
        if not 0 <= first_item <= num_items:
            raise ValueError(f"first_item must lie in [0, {num_items}], got {first_item}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2 ** 63), got {seed}")
        if norm not in NORMS:
            raise ValueError(f"norm must be None or 'layer', got {norm!r}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        group = check_options(optimizer, lr, options)
        self.num_items, self.dim, self.first_item = int(num_items), int(dim), int(first_item)
        self.kind, self.max_saved_bytes, self.backend = optimizer, int(max_saved_bytes), backend
        self.register_buffer("table", torch.empty(num_items, dim, dtype=dtype, device=device))
        vector = torch.ones(dim, device=device)
        self.register_buffer("norm_weight", vector if norm else None)
        self.register_buffer("norm_bias", torch.zeros_like(vector) if norm else None)
        for i in range(2):
            of_rows = torch.Size((num_items,)) if optimizer == "rowwise_adagrad" else self.table.shape
            has = i < MOMENTS[optimizer]
            self.register_buffer(f"moment{i + 1}", torch.zeros(of_rows if has else 0, device=device))
            self.register_buffer(f"norm_moment{i + 1}", torch.zeros((2, dim) if has and norm else 0, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("seed", torch.tensor(seed, device=device))
        self._pending: list[_Pending] = []
        self.optimizer = TableOptimizer(self, group)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the table from N(0, 1/d) by its seed; LayerNorm, moments and step count as at the start."""
        generator = torch.Generator(self.table.device).manual_seed(int(self.seed))
        self.table.normal_(0.0, self.dim**-0.5, generator=generator)
        for name, buffer in self.named_buffers():
            if name not in ("table", "seed"):
                buffer.fill_(1.0 if name == "norm_weight" else 0.0)
        self._pending.clear()

    @property
    def norm(self) -> RowNorm:
        """The LayerNorm over the rows, of no weight where there is none."""
        return RowNorm(self.norm_weight, self.norm_bias)

    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape, int32 or int64 -> (..., d) float32, their rows; gradients reach the table by `step`.

        Raises TypeError for other ids and, on the CPU, IndexError for one outside the catalog.
        """
        checks.check_tensor("ids", ids)
        if ids.dtype not in checks.INTEGERS:
            raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
        rows: Tensor = _LookUp.apply(self._anchor(), self, ids.detach().long().flatten())
        return rows.view(*ids.shape, self.dim)

    @torch.compiler.disable
    def cross_entropy(
        self,
        query: Tensor,
        target: Tensor,
        neg: RankSlice | None = None,
        *,
        positives: Tensor | None = None,
        bias: Tensor | None = None,
        positive_weight: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        precision: str | None = None,
        check: bool | None = None,
    ) -> Tensor:
        """`SliceCrossEntropy` over the table's rows: the full softmax, or the negatives of a slice.

        Args:
            query: (B, d) or (B, L, d) float32, bfloat16 or float16; gets a gradient, which has none itself.
            target, neg, positives: as in `SliceCrossEntropy.forward`.
            bias: (V,); gets a gradient, for which the scores are computed once more.
            positive_weight, ignore_index, reduction, precision, check: as in `SliceCrossEntropy`.
            temperature: above 0; a number.

        Raises:
            TypeError, ValueError, BackendError: as `slice_cross_entropy` does.
            RuntimeError: in the backward pass, where the table was changed since.
        """
        checks.check_number("temperature", temperature)
        loss = _OverTable(
            self,
            positive_weight=positive_weight,
            temperature=temperature,
            first_item=self.first_item,
            ignore_index=ignore_index,
            reduction=reduction,
            max_saved_bytes=self.max_saved_bytes,
            precision=precision,
            check=check,
            backend=self.backend,
        )
        result: Tensor = loss(query, self.table, target, neg, positives=positives, bias=bias)
        return result

    @torch.compiler.disable
    def sampled_softmax(
        self,
        query: Tensor,
        target: Tensor,
        neg: Tensor,
        *,
        log_q: Tensor | None = None,
        positives: Tensor | None = None,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> Tensor:
        """`sampled_softmax` over the rows that it touches, which are looked up: memory and update follow their number.

        Args:
            query, target, neg, positives, log_q (V,), bias (V,), weight (V,): as in `sampled_softmax`.
            options: further ones of `sampled_softmax`, but sparse_grad.

        Raises TypeError, ValueError and BackendError as `sampled_softmax` does.
        """
        for name, ids in (("target", target), ("neg", neg), ("positives", positives)):
            if ids is not None or name != "positives":
                checks.check_tensor(name, ids)
        vectors = {"log_q": log_q, "bias": bias, "weight": weight}
        given = [target.masked_fill(target == ignore_index, -1), neg] + ([] if positives is None else [positives])
        touched, place = torch.cat([ids.long().flatten() for ids in given]).unique(return_inverse=True)
        none = int((touched < 0).sum())
        places = [p.view_as(ids) - none for p, ids in zip(place.split([x.numel() for x in given]), given, strict=True)]
        places = [p.masked_fill(p < 0, -1) for p in places]
        touched = touched[none:]
        options |= {name: x[touched] for name, x in vectors.items() if x is not None}
        return sampled_softmax(
            query,
            self(touched),
            places[0].masked_fill(places[0] < 0, ignore_index),
            places[1],
            positives=places[2] if positives is not None else None,
            ignore_index=ignore_index,
            **({"backend": self.backend} | options),
        )

    def rank_slice(self, query: Tensor, **options: Any) -> RankSlice:
        """`rank_slice` of the table's rows; `options` as there. A LayerNorm is applied tile by tile on the CPU."""
        options = {"first_item": self.first_item, "backend": self.backend} | options
        return rank_slice(query, self.table, _norm=self.norm, **options)

    def top_k(self, query: Tensor, **options: Any) -> TopK:
        """`top_k` of the table's rows; `options` as there. A LayerNorm is applied tile by tile on the CPU."""
        options = {"first_item": self.first_item, "backend": self.backend} | options
        return top_k(query, self.table, _norm=self.norm, **options)

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """(V, d), all rows as losses see them; the table itself without a norm. No gradient flows."""
        return self.norm.of(self.table)

    def step(self, *, grad_scale: Tensor | float | None = None, found_inf: Tensor | float | None = None) -> None:
        """Updates the table by what was passed backward since the last step; nothing happens where that is nothing.

        Args:
            grad_scale: what the losses were multiplied by, as a GradScaler does.
            found_inf: the step is skipped, and its gradients dropped, where it is not 0.

        Raises RuntimeError where the table was changed since a forward pass, and in a process group of several ranks.
        """
        self.optimizer.step(grad_scale=grad_scale, found_inf=found_inf)

    def extra_repr(self) -> str:
        norm = "layer" if self.norm_weight is not None else None
        return f"{self.num_items}, {self.dim}, norm={norm!r}, optimizer={self.kind!r}, dtype={self.table.dtype}"

    @torch.no_grad()
    def apply_pending(self, group: dict[str, Any], grad_scale: Tensor | float | None, skip: bool) -> None:
        """What the optimiser's `step` does."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise RuntimeError("FusedItemEmbedding does not sum gradients over the ranks of a process group yet")
        pending, self._pending = self._pending, []
        for version in {x.version for x in pending}:
            self._check_version(version, "step()")
        losses = [x.record for x in pending if isinstance(x.record, Registered)]
        looked_up = _sorted([x.record for x in pending if isinstance(x.record, LookedUp)], self.dim, self.table)
        if grad_scale is not None:  # a scaler looks at parameters' gradients alone
            grads = [*(x.grad_losses for x in losses), looked_up.grads]
            skip = skip or not all(bool(x.isfinite().all()) for x in grads)
        if skip or not pending:
            return
        self.steps += 1
        on_host = self.table.device.type == "cpu"
        scale = 1.0 if grad_scale is None else 1.0 / grad_scale
        scale = float(scale) if on_host else scale
        sparse = not losses and self.kind == "adam"
        rule, of_norm_rule = (
            Rule.of(kind, group, self.steps, self.seed, scale, on_host)
            for kind in ("sparse_adam" if sparse else self.kind, self.kind)
        )
        table = Table(self.table, self.moment1, self.moment2, self.norm)
        native = on_host and not library.NO_EXTENSION and self._engine(self.table) == "native"
        only_touched = sparse or (not losses and group["weight_decay"] == 0.0)
        of_norm = step_table(table, losses, looked_up, rule, only_touched, native)
        if self.norm_weight is not None and self.norm_bias is not None:
            both = torch.stack([self.norm_weight, self.norm_bias])
            new = of_norm_rule.step(both, torch.stack(of_norm), self.norm_moment1, self.norm_moment2, by_row=False)
            self.norm_weight.copy_(new[0])
            self.norm_bias.copy_(new[1])
        torch.autograd.graph.increment_version(self.table)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what was passed backward since the last step."""
        self._pending.clear()

    def _row_losses(
        self, query: Tensor, catalog: Tensor, target: Tensor, neg: RankSlice | None, **options: Any
    ) -> Tensor:
        """As `slice_cross_entropy`."""
        checked = checked_problem(query, catalog, target, neg, **options)
        loss = TableLoss(checked.problem, self.norm)
        native = self._engine(query) == "native"
        saved_size = 0
        if native and torch.is_grad_enabled():
            saved_size = min(
                options["max_saved_bytes"], saved_by_native(query.shape[0], query.shape[1], catalog.shape[0])
            )
        losses = _Loss.apply(self._anchor(), query, checked.problem.bias, self, loss, native, saved_size, checked.check)
        return finish_loss(checked.problem, losses, options["reduction"], query.shape[:-1])

    def _engine(self, tensor: Tensor) -> str:
        """ "native" or "reference"."""
        if tensor.device.type != "cpu" and self.backend in (None, "auto"):
            return "reference"
        engine = dispatch.choose_backend(self.backend, tensor, "slice_cross_entropy")
        if engine == "triton":
            raise dispatch.BackendError("backend='triton': it has no kernels for item tables; 'auto' always works")
        return engine

    def _anchor(self) -> Tensor:
        """What makes autograd call the backward pass of a look-up, whose table is a buffer, and of a loss whose query
        needs no gradient."""
        return torch.zeros((), device=self.table.device, requires_grad=torch.is_grad_enabled())

    def _register(self, record: Registered | LookedUp, version: int) -> None:
        self._check_version(version, "its backward pass")
        self._pending.append(_Pending(record, version))

    def _check_version(self, version: int, when: str) -> None:
        if version != self.table._version:
            raise RuntimeError(CHANGED.format(when=when))

    def _apply(self, fn: Any, recurse: bool = True) -> FusedItemEmbedding:
        super()._apply(fn, recurse)
        self.optimizer.take_buffers(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pending": []}  # copies start without gradients, as those of parameters do


class _Pending(NamedTuple):
    record: Registered | LookedUp
    version: int  # of the table in the forward pass


class _OverTable(SliceCrossEntropy):
    """Rows and reduction as in `SliceCrossEntropy`, with the table's own op."""

    def __init__(self, items: FusedItemEmbedding, **options: Any):
        super().__init__(**options)
        self._op = items._row_losses  # type: ignore[assignment]


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, items: FusedItemEmbedding, ids: Tensor) -> Tensor:
        ctx.items, ctx.version = items, items.table._version
        ctx.save_for_backward(ids)
        return items.norm.of(items.table.index_select(0, ids)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.items.first_item:
            real = ids >= ctx.items.first_item
            ids, grad = ids[real], grad[real]
        ctx.items._register(LookedUp(ids, grad.detach().float().contiguous()), ctx.version)
        return None, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        query: Tensor,
        bias: Tensor | None,
        items: FusedItemEmbedding,
        loss: TableLoss,
        native: bool,
        saved_size: int,
        check: bool,
    ) -> Tensor:
        p = loss.problem
        p = p._replace(query=query.detach(), bias=None if bias is None else bias.detach())
        ctx.loss, ctx.items, ctx.native, ctx.version = loss._replace(problem=p), items, native, items.table._version
        done = table_loss(ctx.loss, native, saved_size, check)
        ctx.save_for_backward(done.lse, done.saved, done.mean)
        return done.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, saved, mean = ctx.saved_tensors
        done = Forward(grad, lse, saved, mean)
        grad = grad.detach().contiguous()
        ctx.items._register(Registered(ctx.loss, done.lse, done.saved, grad), ctx.version)
        _, needs_query, needs_bias, *_ = ctx.needs_input_grad
        of_query = query_gradient(ctx.loss, ctx.native, done, grad) if needs_query else None
        of_bias = bias_gradient(ctx.loss, done, grad).to(ctx.loss.problem.bias.dtype) if needs_bias else None
        return None, of_query, of_bias, *(None,) * 5


def _sorted(records: list[LookedUp], dim: int, like: Tensor) -> LookedUp:
    """All looked-up rows by item, then by call and token."""
    if not records:
        return LookedUp(like.new_empty(0, dtype=torch.int64), like.new_empty(0, dim, dtype=torch.float32))
    items = torch.cat([x.items for x in records])
    items, order = items.sort(stable=True)
    return LookedUp(items, torch.cat([x.grads for x in records])[order])
