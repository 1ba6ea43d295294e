"""RecBole 1.2.1 itself, on a tiny generated data set: the same training and the same metrics with and without us.

A class of a test's own is called as its base in RecBole, which finds a model's settings by its name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model import general_recommender
from recbole.trainer import Trainer as StockTrainer
from recbole.utils import get_model, init_seed

from alterrec_fast.integrations import default_ranks
from alterrec_fast.integrations import recbole as fast

ITEMS = 60
SETTINGS = {
    "data_path": ".",
    "USER_ID_FIELD": "session_id",
    "load_col": {"inter": ["session_id", "item_id", "timestamp"]},
    "train_neg_sample_args": None,
    "MAX_ITEM_LIST_LENGTH": 6,
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 32,
    "train_batch_size": 256,
    "eval_batch_size": 48,
    "metrics": ["Recall", "MRR", "NDCG", "MAP"],
    "topk": [3, 10],
    "valid_metric": "NDCG@10",
    "epochs": 2,
    "learning_rate": 0.01,
    "use_gpu": False,
    "show_progress": False,
    "state": "ERROR",
}


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, where RecBole also leaves its logs: 120 sessions in which items follow one another."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["session_id:token\titem_id:token\ttimestamp:float"]
    for session in range(120):
        item = int(rng.integers(ITEMS))
        for time in range(int(rng.integers(4, 8))):
            lines.append(f"s{session}\ti{item}\t{time}")
            item = (3 * item + int(rng.integers(2))) % ITEMS
    Path("tiny").mkdir()
    Path("tiny/tiny.inter").write_text("\n".join(lines))


def prepared(model: Any, **changes: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(config, model, train, valid, test) from one seed, as RecBole's quick start makes them."""
    config = Config(model, "tiny", config_dict={**SETTINGS, **changes})
    init_seed(1, reproducibility=True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(1, reproducibility=True)
    chosen = get_model(model) if isinstance(model, str) else model
    return config, chosen(config, train._dataset), train, valid, test


def trained(trainer_class: Any, model: Any, saved: bool = False, **changes: Any) -> tuple[Any, Any, Any]:
    """(the losses of the epochs, the best validation result, the test result)."""
    config, network, train, valid, test = prepared(model, **changes)
    trainer = trainer_class(config, network)
    _, best = trainer.fit(train, valid, verbose=False, saved=saved)
    return list(trainer.train_loss_dict.values()), best, trainer.evaluate(test, load_best_model=saved)


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "CORE", "STAMP"])
def test_full_softmax_trains_as_stock_does(name: str) -> None:
    losses, best, result = trained(StockTrainer, name)
    ours, our_best, our_result = trained(fast.Trainer, getattr(fast, name))
    assert ours == pytest.approx(losses, rel=1e-5)
    assert our_best == best
    assert our_result == result
    assert result["ndcg@10"] > 0


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_fifty_steps_under_autocast_to_float16(name: str) -> None:
    options = {"learn_temperature": True, "label_smoothing": 0.1, "weight": [1.0] * (ITEMS + 1)}
    config, network, train, _, test = prepared(getattr(fast, name), alterrec_fast=options, epochs=25)
    assert network.n_items == ITEMS + 1
    trainer = fast.Trainer(config, network)
    with torch.autocast("cpu", torch.float16):
        trainer.fit(train, verbose=False, saved=False)
        metrics = trainer.evaluate(test, load_best_model=False)
    losses = list(trainer.train_loss_dict.values())
    assert len(train) * len(losses) >= 50 and losses[-1] < 0.9 * losses[0]
    assert all(p.isfinite().all() for p in network.parameters()) and float(network.next_item.temperature) != 1.0
    assert metrics["ndcg@10"] > 0


def one_batch(model: Any, **changes: Any) -> tuple[Any, Any]:
    """(model without dropout, the first batch)."""
    _, network, train, _, _ = prepared(model, **changes)
    return network.eval(), next(iter(train))


@pytest.mark.parametrize("name", ["SASRec", "CORE"])
def test_slice_is_a_softmax_over_the_models_own_ranks(name: str) -> None:
    options = {"loss": "slice", "start": 2, "stop": 20, "hard_fraction": 1.0}
    model, batch = one_batch(getattr(fast, name), alterrec_fast=options)
    scores, target = model.full_sort_predict(batch).detach(), batch["item_id"]
    ranks = scores[:, 1:].sort(dim=1, descending=True).indices[:, 2:20] + 1
    kept = torch.cat((target[:, None], ranks), dim=1)
    logits = scores.gather(1, kept)
    logits[:, 1:] = logits[:, 1:].masked_fill(ranks == target[:, None], -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros_like(target))
    assert model.calculate_loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_sampled_is_a_softmax_over_what_is_drawn(distribution: str) -> None:
    options = {"loss": "sampled", "negatives": 40, "distribution": distribution}
    model, batch = one_batch(fast.SASRec, alterrec_fast=options)
    torch.manual_seed(3)
    drawn = model._draw(torch.device("cpu"))
    assert drawn.shape == (40,) and drawn.min() >= 1 and drawn.max() <= model.n_items - 1
    scores, target = model.full_sort_predict(batch).detach(), batch["item_id"]
    if distribution == "popularity":
        counts = torch.bincount(torch.from_numpy(counted(model)), minlength=model.n_items) + 1.0
        scores = scores - (40 * counts / counts[1:].sum()).log()
    logits = torch.cat((scores.gather(1, target[:, None]), scores[:, drawn]), dim=1)
    logits[:, 1:] = logits[:, 1:].masked_fill(drawn == target[:, None], -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros_like(target))
    model.calculate_loss(batch)  # the comparison with the model's own loss is behind us
    torch.manual_seed(3)
    assert model.calculate_loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)


def counted(model: Any) -> np.ndarray:
    """Every target of training, which is what popularity counts."""
    _, _, train, _, _ = prepared("SASRec")
    return train._dataset.inter_feat["item_id"].numpy()


def test_popular_items_are_drawn_as_often_as_their_share() -> None:
    options = {"loss": "sampled", "negatives": 200_000, "distribution": "popularity"}
    model, _ = one_batch(fast.SASRec, alterrec_fast=options)
    counts = np.bincount(counted(model), minlength=model.n_items) + 1.0
    share = counts[1:] / counts[1:].sum()
    torch.manual_seed(0)
    seen = torch.bincount(model._draw(torch.device("cpu")), minlength=model.n_items).numpy()
    assert seen[0] == 0
    assert np.abs(seen[1:] / 200_000 - share).max() < 5 * np.sqrt(share.max() / 200_000)


@pytest.mark.parametrize("options", [{"loss": "sampled", "negatives": 32}, {"loss": "slice", "start": 1, "stop": 30}])
def test_training_with_negatives_learns(options: dict[str, Any]) -> None:
    config, network, train, valid, _ = prepared(fast.SASRec, alterrec_fast=options, epochs=8)
    trainer = fast.Trainer(config, network)
    before = trainer.evaluate(valid, load_best_model=False)["ndcg@10"]
    _, best = trainer.fit(train, valid, verbose=False, saved=False)
    assert best["ndcg@10"] > before + 0.1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("NextItNet", {}),
        ("GCSAN", {}),  # a regulariser of weight 5e-5
        ("FEARec", {"contrast": "us", "tau": 1.0, "sim": "dot"}),  # a contrastive term, which is 0 over one session
    ],
)
def test_a_model_whose_loss_has_further_terms_is_refused(name: str, settings: dict[str, Any]) -> None:
    model, batch = one_batch(getattr(fast, name), **settings)
    with pytest.raises(ValueError, match=rf"losses of {name} .* calculate_loss where its loss has further terms"):
        model.calculate_loss(batch)


@pytest.mark.parametrize("name", ["FEARec", "FOSSIL", "HRM", "LightSANs", "NARM", "SINE", "SRGNN"])
def test_models_by_their_names_alone(name: str) -> None:
    model, batch = one_batch(getattr(fast, name))
    assert model.calculate_loss(batch).item() == pytest.approx(
        getattr(fast.stock, name).calculate_loss(model, batch).item(), rel=1e-5
    )
    model.compare_scores(batch)


class Biased(fast.stock.SASRec):
    """Adds a bias of each item to the scores, which is zero at first."""

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self.bias = torch.nn.Parameter(torch.zeros(self.n_items))

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        return super().full_sort_predict(interaction) + self.bias

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        return self.loss_fct(self.full_sort_predict(interaction), interaction[self.POS_ITEM_ID])


def test_a_bias_that_is_zero_as_yet_is_not_left_out() -> None:
    class SASRec(fast.SequentialMixin, Biased):
        pass

    model, batch = one_batch(SASRec)
    with pytest.raises(ValueError, match="the loss of SASRec also trains bias, of which session_vectors, "):
        model.calculate_loss(batch)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BERT4Rec", r"session_vectors of BERT4Rec must be \(2, 16\), got \(2, \d+, 16\): override it"),
        ("SASRecCPR", r"session_vectors of SASRecCPR must be \(2, 16\), got list: override it"),
        ("RepeatNet", r"RepeatNet has no item_embedding: override item_vectors\(\)"),
        ("DIN", r"DIN\.forward takes .*: override session_vectors\(interaction\)"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(name: str, message: str) -> None:
    model, batch = one_batch(getattr(fast, name))
    with pytest.raises(ValueError, match=message):
        model.calculate_loss(batch)


def test_a_loss_that_needs_drawn_negatives_is_refused() -> None:
    class TransRec(fast.TransRec):
        def session_vectors(self, interaction: Any) -> torch.Tensor:
            return self.item_embedding(interaction[self.ITEM_SEQ])[:, -1]

    for kind in (fast.TransRec, TransRec):
        model, batch = one_batch(kind)
        with pytest.raises(ValueError, match="TransRec"):
            model.calculate_loss(batch)
    with pytest.raises(ValueError, match=r"loss of TransRec is no softmax over all items: it asks for .*neg_item_id"):
        model.calculate_loss(batch)


def shrunk(model: Any, **changes: Any) -> tuple[Any, Any]:
    """`one_batch` with embeddings so small that every score is near zero, and every loss near log V."""
    network, batch = one_batch(model, **changes)
    for module in network.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.data *= 1e-3
    return network, batch


class Sharpened(fast.stock.GRU4Rec):
    """Divides its scores by a temperature of its own."""

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        return super().full_sort_predict(interaction) / 0.7

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        return self.loss_fct(self.full_sort_predict(interaction), interaction[self.POS_ITEM_ID])


class GRU4Rec(fast.SequentialMixin, Sharpened):
    pass


@pytest.mark.parametrize("model", [fast.NPE, GRU4Rec], ids=["NPE", "GRU4Rec"])
def test_small_embeddings_hide_no_other_score(model: Any) -> None:
    """NPE's scores are over relu(item_embedding.weight)."""
    network, batch = shrunk(model)
    with pytest.raises(ValueError, match=f"the gradients of {model.__name__} are not those of session_vectors @ "):
        network.calculate_loss(batch)
    with pytest.raises(ValueError, match=f"the scores of {model.__name__} are not those of session_vectors @ "):
        network.compare_scores(batch)


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "CORE"])
def test_small_embeddings_pass(name: str) -> None:
    network, batch = shrunk(getattr(fast, name))
    assert network.calculate_loss(batch).isfinite()
    network.compare_scores(batch)


class RectifiedNPE(fast.NPE):
    def item_vectors(self) -> torch.Tensor:
        return self.relu(self.item_embedding.weight)


def test_the_hook_for_another_score_is_enough() -> None:
    network, batch = shrunk(type("NPE", (RectifiedNPE,), {}))
    assert network.calculate_loss(batch).isfinite()
    network.compare_scores(batch)


def test_pairwise_training_is_refused() -> None:
    negatives = {"distribution": "uniform", "sample_num": 1, "dynamic": False, "alpha": 1.0, "candidate_num": 0}
    with pytest.raises(ValueError, match="loss_type must be CE, got BPR"):
        one_batch(fast.SASRec, loss_type="BPR", train_neg_sample_args=negatives)


def test_a_model_with_another_score_is_refused() -> None:
    class SASRec(fast.SASRec):
        def full_sort_predict(self, interaction: Any) -> torch.Tensor:
            return super().full_sort_predict(interaction) + torch.arange(self.n_items)

    config, network, _, valid, _ = prepared(SASRec)
    with pytest.raises(ValueError, match="scores of SASRec"):
        fast.Trainer(config, network).evaluate(valid, load_best_model=False)


def test_a_forward_of_other_arguments_asks_for_the_hook() -> None:
    class SASRec(fast.SASRec):
        def forward(self, sessions: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    model, batch = one_batch(SASRec)
    with pytest.raises(ValueError, match="override session_vectors"):
        model.calculate_loss(batch)


def test_evaluation_makes_no_score_matrix() -> None:
    rows: list[int] = []

    class SASRec(fast.SASRec):
        def full_sort_predict(self, interaction: Any) -> torch.Tensor:
            rows.append(len(interaction))
            return super().full_sort_predict(interaction)

    config, network, _, valid, _ = prepared(SASRec)
    fast.Trainer(config, network).evaluate(valid, load_best_model=False)
    assert rows == [2]  # the comparison of the first two sessions


def test_metrics_that_need_every_score_take_recboles_way() -> None:
    changes = {"metrics": ["NDCG", "GAUC"], "epochs": 1}
    assert trained(fast.Trainer, fast.SASRec, **changes)[1:] == trained(StockTrainer, "SASRec", **changes)[1:]


class BPR(fast.RankingMixin, general_recommender.BPR):
    """A model of users whose histories RecBole masks."""

    def session_vectors(self, interaction: Any) -> torch.Tensor:
        return self.get_user_embedding(interaction["session_id"])


@pytest.mark.parametrize("topk", [[3, 10], [ITEMS - 3], [ITEMS]])
def test_histories_are_left_out_as_in_stock(topk: list[int]) -> None:
    """The longer rankings reach what a history leaves, and beyond the catalog without its padding."""
    changes = {
        "topk": topk,
        "valid_metric": f"NDCG@{topk[0]}",
        "eval_batch_size": 20 * ITEMS,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": False},
    }
    theirs = trained(StockTrainer, "BPR", **changes)
    assert trained(fast.Trainer, BPR, **changes) == theirs
    assert theirs[2][f"recall@{topk[-1]}"] > 0


def test_collector_counts_repeated_positives_once_and_passes_items_on() -> None:
    config = Config("SASRec", "tiny", config_dict={**SETTINGS, "topk": [2]})
    collector = fast.TopKCollector(config)
    setattr(collector.register, "rec.items", True)
    ranking = fast._Ranking(torch.tensor([[4, 1], [2, 9]]), num_items=10)
    collector.eval_batch_collect(ranking, None, torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 7, 2]))
    assert collector.data_struct["rec.topk"].tolist() == [[0, 1, 2], [1, 0, 1]]
    assert collector.data_struct["rec.items"].tolist() == [[4, 1], [2, 9]]


def test_quick_start_and_its_checkpoint() -> None:
    result = fast.run_recbole("STAMP", "tiny", config_dict={**SETTINGS, "epochs": 1, "checkpoint_dir": "saved"})
    assert result["test_result"].keys() == result["best_valid_result"].keys()
    (file,) = Path("saved").glob("STAMP-*.pth")
    assert Path(result["model_file"]) == file and isinstance(result["model"], fast.STAMP)
    stored = torch.load(file, weights_only=False)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in result["model"].state_dict().items())
    config, network, train, valid, test = prepared(fast.STAMP)
    trainer = fast.Trainer(config, network)
    assert trainer.evaluate(test, model_file=str(file)) == result["test_result"]
    trainer.resume_checkpoint(str(file))
    trainer.fit(train, valid, verbose=False, saved=False)
    assert list(trainer.train_loss_dict) == [1]  # of two epochs, one was behind it


def test_quick_start_without_a_checkpoint_still_gives_the_model() -> None:
    result = fast.run_recbole(fast.GRU4Rec, "tiny", config_dict={**SETTINGS, "epochs": 1}, saved=False)
    assert result["model_file"] is None and isinstance(result["model"], fast.GRU4Rec)
    for other in (fast.stock.SASRec, fast.Trainer, 3):
        with pytest.raises(TypeError, match="model must be a name of RecBole's or a class with SequentialMixin, got"):
            fast.run_recbole(other, "tiny", config_dict=SETTINGS)


def test_models_by_name() -> None:
    assert pickle.loads(pickle.dumps(fast.NARM)) is fast.NARM
    with pytest.raises(AttributeError, match="RecBole no sequential model"):
        _ = fast.LightGCN
    with pytest.raises(AttributeError, match="RecBole no sequential model"):
        _ = fast.NoSuchModel


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "bpr"}, r"loss must be one of \('full', 'sampled', 'slice'\), got 'bpr'"),
        ({"distribution": "zipf"}, "distribution must be one of"),
        ({"negatives": 0}, "alterrec_fast: negatives must be at least 1, got 0"),
        ({"start": -1}, "alterrec_fast: start must be at least 0, got -1"),
        ({"start": 30, "stop": 20}, "alterrec_fast: expected 0 <= start <= stop, got start=30, stop=20"),
        ({"hard_fraction": 1.5}, r"alterrec_fast: hard_fraction must lie in \[0, 1\], got 1.5"),
        ({"precision": "int8"}, "alterrec_fast: precision must be one of .*, got 'int8'"),
        ({"max_saved_bytes": -1}, "alterrec_fast: max_saved_bytes must be at least 0, got -1"),
        ({"range_max": 9}, "takes loss, negatives"),
        ({"negative": 10}, "takes loss, negatives"),
    ],
)
def test_options_are_checked(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fast.Options.of({"alterrec_fast": given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"negatives": 1e3}, r"alterrec_fast: negatives must be an integer, got float 1000\.0"),
        ({"stop": "20"}, "alterrec_fast: stop must be an integer, got str '20'"),
        ({"start": True}, "alterrec_fast: start must be an integer, got bool True"),
        ({"hard_fraction": "half"}, "alterrec_fast: hard_fraction must be a number, got str 'half'"),
        ("sampled", "takes a mapping of loss, negatives, .*; got 'sampled'"),
        (["slice"], "takes a mapping of loss"),
    ],
)
def test_options_of_a_wrong_kind_are_named(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fast.Options.of({"alterrec_fast": given})


def test_default_ranks_follow_the_catalogs_size() -> None:
    """ml-100k, RecBole's own data set, has 1,682 items; ranks 20 to 2000 could not be taken of them."""
    assert default_ranks(1682, None, None, "here") == (6, 841)
    assert default_ranks(4000, None, None, "here") == default_ranks(10**7, None, None, "here") == (20, 2000)
    for size in range(6_000):
        start, stop = default_ranks(size, None, None, "here")
        assert 0 <= start <= stop <= size and (stop > start or size < 2)
    model, batch = one_batch(fast.SASRec, alterrec_fast={"loss": "slice"})
    assert model.ranks == (6, (model.n_items - 1) // 2)
    assert model.calculate_loss(batch).isfinite()
    model, _ = one_batch(fast.SASRec, alterrec_fast={"loss": "slice", "stop": 20})
    assert model.ranks == (6, 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": 2000}, r"alterrec_fast: stop must be at most \d+, the number of items, got 2000"),
        ({"start": 50}, r"alterrec_fast: expected .*, got start=50, stop=\d+ by the catalog's size"),
        ({"stop": 5}, "alterrec_fast: expected .*, got start=6 by the catalog's size, stop=5"),
    ],
)
def test_ranks_beyond_the_catalog_are_named_by_the_option(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_batch(fast.SASRec, alterrec_fast={"loss": "slice", **given})
