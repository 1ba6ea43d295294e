"""RecBole 1.2.1: sequential models whose score is a dot product, trained and evaluated on tiles of scores.

    from alterrec_fast.integrations.recbole import SASRec, Trainer    # instead of RecBole's own
    from alterrec_fast.integrations.recbole import run_recbole        # or this, instead of RecBole's quick start

`SASRec`, `GRU4Rec`, `CORE`, and any other sequential model of RecBole by its own name, are RecBole's classes under
`SequentialMixin`; a model of your own takes it the same way: ``class Mine(SequentialMixin, MyModel)``. `Trainer` is
RecBole's with `top_k` for full-sort evaluation. The config key ``alterrec_fast`` holds `Options`. Of the B x V logits
at most its `max_saved_bytes`, 64 MiB, are saved for the backward pass.

Notation: B sessions, V items (RecBole's padding item 0 among them), d width, N negatives.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alterrec_fast.integrations import comparable, default_ranks, need, same_gradients, same_scores, trained_leaves
from alterrec_fast.nn.losses import FullSoftmaxLoss, SampledSoftmaxLoss, SliceCrossEntropy
from alterrec_fast.ops import checks, dispatch, rank_slice, top_k

INSTALL = 'pip install "recbole==1.2.1" "numpy<2" "setuptools<81"'
need("recbole.trainer", INSTALL)

from recbole import config as recbole_config  # noqa: E402
from recbole import data as recbole_data  # noqa: E402
from recbole import utils as recbole_utils  # noqa: E402
from recbole.evaluator import Collector  # noqa: E402
from recbole.model import sequential_recommender as stock  # noqa: E402
from recbole.trainer import Trainer as StockTrainer  # noqa: E402

_Model: Any = object  # what the mix-ins are mixed into: a torch module with RecBole's names
PADDING = 0  # RecBole's item for no item: the first row of every item embedding
KEY = "alterrec_fast"  # of RecBole's config
LOSSES = ("full", "sampled", "slice")
DISTRIBUTIONS = ("uniform", "popularity")


@dataclass(frozen=True)
class Options:
    """The config key ``alterrec_fast``, for example ``alterrec_fast: {loss: sampled, negatives: 4096}``.

    loss: "full", RecBole's own CE, in tiles of scores; "sampled", softmax over drawn negatives; "slice", softmax over
        ranks [start, stop) of the model's own ranking of the catalog for the session.
    negatives: of "sampled": how many are drawn at each step, shared by its sessions.
    distribution: of "sampled": "uniform", or "popularity" by an item's count in training, with logQ correction.
    start, stop: of "slice": the ranks; by default 20 and 2000 of 4,000 items or more, else 6 and half of the catalog.
    hard_fraction: of "slice": the share of the ranks that is kept; the others are replaced by uniform negatives
        (`RankSlice.mix`).
    label_smoothing, weight: as in `FullSoftmaxLoss`, smoothing of "full" alone; V numbers by RecBole's item number.
    learn_temperature: whether the loss's temperature, at first the model's `score_temperature`, is trained with it.
    precision: of the loss, as in `rank_slice`; evaluation is in the model's own precision.
    max_saved_bytes: as in `slice_cross_entropy`, but less by default, since RecBole's activations stand beside it.

    Raises TypeError for a value of another kind, and ValueError for one out of range.
    """

    loss: str = "full"
    negatives: int = 1024
    distribution: str = "uniform"
    start: int | None = None
    stop: int | None = None
    hard_fraction: float = 0.5
    label_smoothing: float = 0.0
    learn_temperature: bool = False
    weight: Any = None
    precision: str | None = None
    max_saved_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, choices in (("loss", LOSSES), ("distribution", DISTRIBUTIONS), ("precision", dispatch.PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{KEY}: {name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, least in (("negatives", 1), ("start", 0), ("stop", 0), ("max_saved_bytes", 0)):
            value = getattr(self, name)
            if value is not None or name not in ("start", "stop"):
                checks.check_integer(f"{KEY}: {name}", value)
                if value < least:
                    raise ValueError(f"{KEY}: {name} must be at least {least}, got {value}")
        if self.start is not None and self.stop is not None and self.start > self.stop:
            raise ValueError(f"{KEY}: expected 0 <= start <= stop, got start={self.start}, stop={self.stop}")
        checks.check_fraction(f"{KEY}: hard_fraction", self.hard_fraction)
        checks.check_smoothing(self.label_smoothing, sliced=self.loss != "full", has_positives=False)
        checks.check_flag(f"{KEY}: learn_temperature", self.learn_temperature)

    @classmethod
    def of(cls, config: Any) -> Options:
        """The options of a RecBole config; raises TypeError for no mapping, ValueError for a name that is none."""
        given = config[KEY]
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping | None):
            raise TypeError(f"the config key {KEY} takes a mapping of {', '.join(names)}; got {given!r}")
        if not set(given or {}) <= set(names):
            raise ValueError(f"the config key {KEY} takes {', '.join(names)}; got {given!r}")
        return cls(**(given or {}))


class RankingMixin(_Model):
    """Goes before a RecBole model whose score of an item is ``session_vectors @ item_vectors.T / score_temperature``.

    `Trainer` then ranks by `top_k`. At the first evaluation the scores of two sessions are compared with the model's
    own; a model with another score is refused, not ranked wrongly. Override the three hooks for it.
    """

    _scores_compared = False

    @property
    def score_temperature(self) -> float:
        """What the model divides its scores by."""
        return 1.0

    def session_vectors(self, interaction: Any) -> Tensor:
        """(B, d) for the B rows of the interaction: users, or sessions so far."""
        raise NotImplementedError(f"{type(self).__name__} must define session_vectors(interaction)")

    def item_vectors(self) -> Tensor:
        """(V, d): the model's item embedding."""
        if not hasattr(self, "item_embedding"):
            raise ValueError(f"{type(self).__name__} has no item_embedding: override item_vectors()")
        return self.item_embedding.weight

    def compare_scores(self, interaction: Any) -> None:
        """Raises ValueError where the vectors' scores are not those of the model's `full_sort_predict`; once."""
        if not self._scores_compared:
            two = interaction[:2]
            with comparable(self), torch.no_grad():
                ours, theirs = self._scores(two), self.full_sort_predict(two)
                if ours.numel() != theirs.numel() or not same_scores(ours, theirs.view_as(ours)):
                    raise self._other("scores")
            self._scores_compared = True

    def _scores(self, interaction: Any) -> Tensor:
        """(B, V); raises ValueError where the hooks do not give one vector for each row, as wide as an item's."""
        query, catalog = self.session_vectors(interaction), self.item_vectors()
        expected = (len(interaction), catalog.shape[1])
        if not isinstance(query, Tensor) or query.shape != expected:
            got = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
            raise ValueError(
                f"session_vectors of {type(self).__name__} must be {expected}, got {got}: override it, if the model's "
                "score is a dot product"
            )
        return query @ catalog.T / self.score_temperature

    def _other(self, what: str) -> ValueError:
        return ValueError(
            f"the {what} of {type(self).__name__} are not those of session_vectors @ item_vectors.T / "
            f"score_temperature: override these, or calculate_loss where its loss has further terms"
        )


class SequentialMixin(RankingMixin):
    """`RankingMixin` for a `SequentialRecommender` with ``loss_type: CE``; its loss becomes that of `Options`.

    At the first step the model's own loss of two sessions is compared with the full softmax over the scores, in value,
    in the parameters that it trains (a bias of the items may be zero as yet) and in their gradients (all losses are
    near log V as long as embeddings are small); a model with another loss is refused, not trained wrongly. Where its
    loss has further terms override `calculate_loss` as ``self.next_item_loss(interaction) + further``.
    """

    _loss_compared = False

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        if getattr(self, "loss_type", "CE") != "CE":
            raise ValueError(f"loss_type must be CE, got {self.loss_type}: alterrec_fast has no other loss")
        self.options = options = Options.of(config)
        shared: dict[str, Any] = {"temperature": self.score_temperature, "precision": options.precision}
        if options.learn_temperature:
            shared["temperature"] = torch.nn.Parameter(torch.tensor(float(self.score_temperature)))
        if options.weight is not None:
            shared["weight"] = torch.as_tensor(options.weight, dtype=torch.float32)
        self.next_item: torch.nn.Module
        if options.loss == "full":  # RecBole's CE has the padding row among its candidates, so this has it, too
            shared |= {"max_saved_bytes": options.max_saved_bytes, "label_smoothing": options.label_smoothing}
            self.next_item = FullSoftmaxLoss(**shared)
        elif options.loss == "slice":
            self.ranks = default_ranks(self.n_items - 1, options.start, options.stop, KEY)
            shared |= {"first_item": PADDING + 1, "max_saved_bytes": options.max_saved_bytes}
            self.next_item = SliceCrossEntropy(**shared)
        else:
            popular = options.distribution == "popularity"
            share = _shares(dataset, self.n_items) if popular else None
            self.register_buffer("_cumulative", None if share is None else share.cumsum(0), persistent=False)
            log_q = None if share is None else (share * options.negatives).log().float()
            self.next_item = SampledSoftmaxLoss(log_q=log_q, **shared)

    def session_vectors(self, interaction: Any) -> Tensor:
        """(B, d): the model's `forward`, given sequence, length and user by the names that RecBole's models have."""
        sources = {
            "item_seq": self.ITEM_SEQ,
            "seq_item": self.ITEM_SEQ,
            "item_seq_len": self.ITEM_SEQ_LEN,
            "seq_item_len": self.ITEM_SEQ_LEN,
            "user": self.USER_ID,
        }
        names = list(inspect.signature(self.forward).parameters)
        if not set(names) <= set(sources):
            raise ValueError(f"{type(self).__name__}.forward takes {names}: override session_vectors(interaction)")
        return self.forward(*(interaction[sources[name]] for name in names))

    def calculate_loss(self, interaction: Any) -> Tensor:
        """The mean loss of the sessions' next items; ValueError where the model's own loss is another one."""
        if not self._loss_compared:
            two = interaction[:2]  # since contrastive terms of a loss vanish over one
            with comparable(self), torch.enable_grad():
                full = F.cross_entropy(self._scores(two), two[self.POS_ITEM_ID])
                stock_loss = self._stock_loss(two)
            # The weight of a regulariser may be as small as what is rounded off, so that sums must be equal.
            tolerance = 0.0 if type(stock_loss.grad_fn).__name__.startswith("Add") else 1e-4
            if not torch.allclose(full, stock_loss.view_as(full), tolerance, tolerance):
                raise self._other("losses")
            untrained = trained_leaves(stock_loss) - trained_leaves(full)
            if untrained:
                names = ", ".join(name for name, parameter in self.named_parameters() if parameter in untrained)
                raise ValueError(
                    f"the loss of {type(self).__name__} also trains {names}, of which session_vectors, "
                    "item_vectors and score_temperature know nothing: override them"
                )
            if not same_gradients(full, stock_loss):
                raise self._other("gradients")
            self._loss_compared = True
        return self.next_item_loss(interaction)

    def _stock_loss(self, interaction: Any) -> Tensor:
        """The model's own loss, of RecBole; ValueError where it needs what a batch for a full softmax does not hold."""
        try:
            return super().calculate_loss(interaction)
        except KeyError as error:
            raise ValueError(
                f"the loss of {type(self).__name__} is no softmax over all items: it asks for the field {error}, which "
                "RecBole adds for pairwise training; override calculate_loss, where its score is a dot product"
            ) from error

    def next_item_loss(self, interaction: Any) -> Tensor:
        """The loss that the options name, mean over the sessions."""
        query, catalog, target = self.session_vectors(interaction), self.item_vectors(), interaction[self.POS_ITEM_ID]
        if self.options.loss == "full":
            return self.next_item(query, catalog, target)
        if self.options.loss == "sampled":
            return self.next_item(query, catalog, target, self._draw(catalog.device))
        start, stop = self.ranks
        neg = rank_slice(query, catalog, start=start, stop=stop, exclude=target, first_item=PADDING + 1)
        return self.next_item(query, catalog, target, neg.mix(self.options.hard_fraction))

    def _draw(self, device: torch.device) -> Tensor:
        """(N,) items, with replacement."""
        count = self.options.negatives
        if self._cumulative is None:
            return torch.randint(PADDING + 1, self.n_items, (count,), device=device)
        uniform = torch.rand(count, dtype=self._cumulative.dtype, device=device)
        return torch.searchsorted(self._cumulative, uniform, right=True).clamp(max=self.n_items - 1)


def _shares(dataset: Any, num_items: int) -> Tensor:
    """(V,) float64, each item's chance of being drawn: its count in training and one, so that none is impossible."""
    counts = dataset.item_counter
    share = torch.tensor([counts[item] + 1.0 for item in range(num_items)], dtype=torch.float64)
    share[PADDING] = 0.0
    return share / share.sum()


class SASRec(SequentialMixin, stock.SASRec):
    """RecBole's SASRec."""


class GRU4Rec(SequentialMixin, stock.GRU4Rec):
    """RecBole's GRU4Rec."""


class CORE(SequentialMixin, stock.CORE):
    """RecBole's CORE: cosine scores over a temperature, items under dropout while training."""

    @property
    def score_temperature(self) -> float:
        return self.temperature

    def item_vectors(self) -> Tensor:
        return F.normalize(self.item_dropout(self.item_embedding.weight), dim=-1)


def __getattr__(name: str) -> Any:
    """RecBole's sequential model of this name under `SequentialMixin`; found again by pickle, since it stays here."""
    model = getattr(stock, name, None)
    if not inspect.isclass(model):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}, and RecBole no sequential model of that name"
        )
    doc = f"RecBole's {name}."
    return globals().setdefault(name, type(name, (SequentialMixin, model), {"__module__": __name__, "__doc__": doc}))


@dataclass
class _Ranking:
    """items (B, k) int64, best first: what takes the place of RecBole's (B, V) scores on their way to the collector."""

    items: Tensor
    num_items: int


class TopKCollector(Collector):
    """RecBole's collector, which also takes the best items alone instead of all scores."""

    def eval_batch_collect(self, scores_tensor: Any, interaction: Any, positive_u: Tensor, positive_i: Tensor) -> None:
        """positive_u, positive_i (P,) int64: row and item of each positive, repeats count once."""
        if not isinstance(scores_tensor, _Ranking):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        items, num_items = scores_tensor.items, scores_tensor.num_items
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", items)
        if self.register.need("rec.topk"):
            rows = torch.arange(items.shape[0], device=items.device)
            pairs = (positive_u.to(items.device) * num_items + positive_i.to(items.device)).unique()
            hits = torch.isin(rows[:, None] * num_items + items, pairs)  # (B, k)
            positives = torch.bincount(pairs // num_items, minlength=items.shape[0])
            self.data_struct.update_tensor("rec.topk", torch.cat((hits.long(), positives[:, None]), dim=1))


class Trainer(StockTrainer):
    """RecBole's trainer, whose full-sort evaluation is `top_k`: no (B, V) tensor, and the same metrics.

    Metrics that need every score (GAUC, AUC) and models without `RankingMixin` take RecBole's way. Checkpoints load
    under torch 2.6 and later, where RecBole 1.2.1's own trainer fails: torch.load there takes weights alone by default.
    """

    def __init__(self, config: Any, model: torch.nn.Module):
        super().__init__(config, model)
        self.eval_collector = TopKCollector(config)
        self._catalog: Tensor | None = None  # during an evaluation the item vectors, made once

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> Any:
        """As RecBole's."""
        if eval_data and load_best_model:
            self._load_model(self._read(model_file or self.saved_model_file))
        self._catalog = None
        result = super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        self._catalog = None
        return result

    def resume_checkpoint(self, resume_file: str) -> None:
        """As RecBole's: goes on after the checkpoint's epoch, and writes to the same file."""
        checkpoint = self._read(resume_file)
        self.saved_model_file = str(resume_file)
        self.start_epoch = checkpoint["epoch"] + 1
        self.cur_step = checkpoint["cur_step"]
        self.best_valid_score = checkpoint["best_valid_score"]
        self._load_model(checkpoint)
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def _read(self, file: str) -> dict[str, Any]:
        # RecBole's checkpoints hold its config as an object, in a pickle protocol that weights_only has no way to read.
        return torch.load(file, map_location=self.device, weights_only=False)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["state_dict"])
        self.model.load_other_parameter(checkpoint.get("other_parameter"))

    def _full_sort_batch_eval(self, batched_data: Any) -> tuple[Any, Any, Tensor, Tensor]:
        interaction, history, positive_u, positive_i = batched_data
        most, register = max(self.config["topk"]), self.eval_collector.register
        whole = any(register.need(name) for name in ("rec.meanrank", "rec.score", "data.label"))
        if whole or not isinstance(self.model, RankingMixin) or most >= self.tot_item_num:
            return super()._full_sort_batch_eval(batched_data)
        sessions = interaction.to(self.device)
        self.model.compare_scores(sessions)
        if self._catalog is None:
            self._catalog = self.model.item_vectors()
        query = self.model.session_vectors(sessions)
        exclude = None if history is None else _lists(history, query.shape[0], query.device)
        _, items = top_k(query, self._catalog, k=most, exclude=exclude, first_item=PADDING + 1)
        if items.numel() and items.min() < 0:  # a history that leaves fewer than k items: RecBole fills up from it
            return super()._full_sort_batch_eval(batched_data)
        return interaction, _Ranking(items, self.tot_item_num), positive_u, positive_i


def _lists(pairs: tuple[Tensor, Tensor], batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """rows and items (E,) in any order -> values (E,), offsets (B + 1,), as `top_k` takes them."""
    rows, items = (ids.to(device) for ids in pairs)
    counts = torch.bincount(rows, minlength=batch_size)
    return items[rows.argsort()], torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def run_recbole(
    model: str | type,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """RecBole's quick start in one process, with the model under `SequentialMixin` and with `Trainer`.

    model: a name of RecBole's, or a class with `SequentialMixin`. Returns RecBole's dict (best_valid_score,
    valid_score_bigger, best_valid_result, test_result), and in it model, the one that was tested, and model_file, the
    path of its checkpoint, which `Trainer.evaluate` and `Trainer.resume_checkpoint` read; None with saved=False.

    Raises TypeError for a model that is neither.
    """
    if not isinstance(model, str) and not (inspect.isclass(model) and issubclass(model, SequentialMixin)):
        raise TypeError(f"model must be a name of RecBole's or a class with SequentialMixin, got {model!r}")
    chosen = getattr(sys.modules[__name__], model) if isinstance(model, str) else model
    config = recbole_config.Config(chosen, dataset, config_file_list, config_dict)
    recbole_utils.init_seed(config["seed"], config["reproducibility"])
    recbole_utils.init_logger(config)
    getLogger().info(config)
    train, valid, test = recbole_data.data_preparation(config, recbole_data.create_dataset(config))
    recbole_utils.init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    network = chosen(config, train._dataset).to(config["device"])
    trainer = Trainer(config, network)
    score, valid_result = trainer.fit(train, valid, saved=saved, show_progress=config["show_progress"])
    test_result = trainer.evaluate(test, load_best_model=saved, show_progress=config["show_progress"])
    return {
        "best_valid_score": score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": valid_result,
        "test_result": test_result,
        "model": network,
        "model_file": trainer.saved_model_file if saved else None,
    }
