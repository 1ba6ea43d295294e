"""The generated shop: reproducible, long-tailed, and with two structures that each explain a part of the sessions."""

import dataclasses

import numpy as np
import pytest

from alterrec_fast.data.sessions import DataError, Dataset
from alterrec_fast.data.shop import (
    ID_SOURCES,
    MAX_LENGTH,
    SOURCES,
    TEXT_SOURCES,
    Shop,
    ShopConfig,
    generate,
    prefixes,
    write_shop,
)

SMALL = ShopConfig(num_items=400, num_sessions=600)


@pytest.fixture(scope="module")
def shop() -> Shop:
    return generate(ShopConfig())


@pytest.fixture(scope="module")
def train_count(shop: Shop) -> np.ndarray:
    items = shop.sessions.items[: shop.sessions.offsets[shop.first_validation_session]]
    return np.bincount(items, minlength=len(shop.catalog))


@pytest.fixture(scope="module")
def test_range(shop: Shop) -> range:
    return range(shop.first_test_session, len(shop.sessions))


@pytest.fixture(scope="module")
def hits(shop: Shop, train_count: np.ndarray, test_range: range) -> dict[str, np.ndarray]:
    """For each simple model, (N,) bool: is the test target among its first 20?"""
    V = len(shop.catalog)
    last, target, _ = prefixes(shop.sessions, test_range)
    before, after, _ = prefixes(shop.sessions, range(shop.first_validation_session))
    markov = np.zeros((V, V), np.float32)
    np.add.at(markov, (before, after), 1)
    titles = [title.split() for title in shop.catalog["title"]]
    vocabulary = {word: i for i, word in enumerate(sorted({word for title in titles for word in title}))}
    bags = np.zeros((V, len(vocabulary)), np.float32)
    for row, title in enumerate(titles):
        bags[row, [vocabulary[word] for word in title]] = 1
    words = bags @ bags.T
    np.fill_diagonal(words, 0)

    def hit(scores: np.ndarray) -> np.ndarray:
        best = np.argpartition(-scores, 19, axis=1)[:, :20]
        return (best[last if len(scores) > 1 else np.zeros_like(last)] == target[:, None]).any(1)

    return {"popular": hit(train_count[None].astype(np.float32)), "markov": hit(markov), "words": hit(words)}


def same(a: Shop, b: Shop) -> bool:
    return (
        a.catalog.equals(b.catalog)
        and np.array_equal(a.sessions.items, b.sessions.items)
        and np.array_equal(a.sessions.offsets, b.sessions.offsets)
        and all(np.array_equal(getattr(a.truth, f.name), getattr(b.truth, f.name)) for f in dataclasses.fields(a.truth))
    )


def test_a_seed_decides_everything():
    assert same(generate(SMALL), generate(SMALL))
    assert not same(generate(SMALL), generate(dataclasses.replace(SMALL, seed=1)))


def test_catalog(shop: Shop):
    assert len(shop.catalog) == 3_000
    assert shop.catalog["title"].n_unique() == shop.catalog["item_id"].n_unique() == 3_000
    assert shop.catalog["item_id"][123] == "SKU-000123"
    assert shop.catalog.null_count().sum_horizontal().item() == 0


def test_titles_name_the_family(shop: Shop):
    """The first words of a title (brand, theme, material, product) are the same within a family and nowhere else."""
    first = np.array([shop.truth.family[0]])
    members = np.flatnonzero(shop.truth.family == first)
    shared = set.intersection(*(set(shop.catalog["title"][int(i)].split()) for i in members))
    assert len(shared) >= 4
    holders = [i for i, title in enumerate(shop.catalog["title"]) if shared <= set(title.split())]
    assert holders == members.tolist()


def test_sessions(shop: Shop):
    lengths = shop.sessions.lengths
    assert len(shop.sessions) == 12_000
    assert shop.sessions.items.dtype == np.int32 and shop.sessions.offsets.dtype == np.int64
    assert lengths.min() == 2 and lengths.max() <= MAX_LENGTH
    assert 5.7 < lengths.mean() < 6.2
    assert shop.sessions.items.min() >= 0 and shop.sessions.items.max() < 3_000


def test_nothing_is_sold_before_its_launch(shop: Shop):
    session = np.repeat(np.arange(len(shop.sessions)), shop.sessions.lengths)
    assert (shop.truth.launch[shop.sessions.items] <= shop.time(session)).all()
    assert 0.2 < (shop.truth.launch > 0).mean() < 0.3


def test_partners_are_others_and_distinct(shop: Shop):
    partners = shop.truth.partners
    head = np.flatnonzero(partners[:, 0] >= 0)
    assert len(head) == 1_200
    assert (partners[head] != head[:, None]).all()
    assert all(len(set(row)) == 4 for row in partners[head].tolist())
    same_family = (shop.truth.family[partners[head]] == shop.truth.family[head][:, None]).mean()
    assert same_family < 0.03, "partners must not be told by the title"


def test_long_tail(shop: Shop, train_count: np.ndarray, test_range: range):
    counts = np.sort(train_count)
    n = len(counts)
    gini = ((2 * np.arange(1, n + 1) - n - 1) * counts).sum() / (n * counts.sum())
    assert 0.55 < gini < 0.8
    target = prefixes(shop.sessions, test_range)[1]
    assert 0.06 < (train_count[target] <= 2).mean() < 0.15


def test_both_structures_show_and_text_alone_reaches_rare_items(
    shop: Shop, train_count: np.ndarray, test_range: range, hits: dict[str, np.ndarray]
):
    rate = {name: hit.mean() for name, hit in hits.items()}
    assert rate["markov"] > 4 * rate["popular"]
    assert rate["words"] > 4 * rate["popular"]
    rare = train_count[prefixes(shop.sessions, test_range)[1]] <= 2
    assert hits["words"][rare].mean() > 5 * hits["markov"][rare].mean()
    assert hits["words"][rare].mean() > 0.4
    assert (hits["words"] | hits["markov"]).mean() > 1.3 * max(rate["words"], rate["markov"])


def test_oracle_beats_its_halves_and_every_model(shop: Shop, test_range: range, hits: dict[str, np.ndarray]):
    rate = {
        sources: (shop.oracle_ranks(test_range, sources) < 20).mean() for sources in (SOURCES, TEXT_SOURCES, ID_SOURCES)
    }
    assert 0.5 < rate[SOURCES] < 0.75
    assert rate[TEXT_SOURCES] > 0.3 and rate[ID_SOURCES] > 0.3
    assert rate[SOURCES] > 1.3 * max(rate[TEXT_SOURCES], rate[ID_SOURCES])
    assert rate[SOURCES] > 1.05 * max(hit.mean() for hit in hits.values())


def test_probabilities_add_up_and_parts_sum_to_the_whole(shop: Shop, test_range: range):
    last, _, session = (array[:64] for array in prefixes(shop.sessions, test_range))
    first, time = shop.sessions.items[shop.sessions.offsets[session]], shop.time(session)
    whole = shop.next_item_probabilities(last, first, time)
    assert (whole >= 0).all()
    np.testing.assert_allclose(whole.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(
        whole, sum(shop.next_item_probabilities(last, first, time, [source]) for source in SOURCES), atol=1e-15
    )
    with pytest.raises(ValueError, match=r"sources must be of partner, .* got price"):
        shop.next_item_probabilities(last, first, time, ["price"])


def test_sessions_follow_the_stated_probabilities(shop: Shop):
    """Over all steps, the observed next item has the log-probability that its own distribution expects."""
    last, target, session = (array[-4_000:] for array in prefixes(shop.sessions, range(len(shop.sessions))))
    first = shop.sessions.items[shop.sessions.offsets[session]]
    probability = shop.next_item_probabilities(last, first, shop.time(session))
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(probability)
        expected = np.nansum(probability * log, 1)
        variance = np.nansum(probability * log**2, 1) - expected**2
    observed = log[np.arange(len(target)), target]
    assert np.isfinite(observed).all(), "an impossible step was drawn"
    z = (observed - expected).sum() / np.sqrt(variance.sum())
    assert abs(z) < 4


def test_write_shop(tmp_path):
    dataset = write_shop(tmp_path / "shop", SMALL)
    shop = generate(SMALL)
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split) for split in splits] == [420, 60, 120]
    np.testing.assert_array_equal(np.concatenate([split.items for split in splits]), shop.sessions.items)
    np.testing.assert_array_equal(np.concatenate([split.lengths for split in splits]), shop.sessions.lengths)
    assert dataset.items.equals(shop.catalog)
    assert dataset.info["source"] == "shop" and dataset.num_items == 400 and dataset.text_columns == ["title"]
    assert dataset.info["num_interactions"] == len(shop.sessions.items)
    with pytest.raises(DataError, match="exists already"):
        write_shop(tmp_path / "shop", SMALL)
    write_shop(tmp_path / "shop", dataclasses.replace(SMALL, seed=1), overwrite=True)
    assert Dataset.load(tmp_path / "shop").info["seed"] == 1


def test_larger_shop_has_unique_titles_and_valid_items():
    shop = generate(ShopConfig(num_items=200_000, num_sessions=20_000))
    assert shop.catalog["title"].n_unique() == 200_000
    assert shop.catalog["item_id"][199_999] == "SKU-199999"
    assert shop.sessions.items.max() < 200_000


@pytest.mark.parametrize(
    "change",
    [
        {"num_items": 99},
        {"num_sessions": 9},
        {"mean_length": 1.0},
        {"mean_length": 40.0},
        {"family_size": 1},
        {"family_size": 400},
        {"num_items": 10**9},
        {"late_share": -0.1},
        {"partner": 0.7, "similar": 0.5},
        {"head_share": 0.8, "late_share": 0.3},
        {"partners": 5_000},
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, float]):
    with pytest.raises(ValueError, match="got"):
        ShopConfig(**change)


def test_extreme_configs_generate():
    for change in ({"late_share": 0.9, "head_share": 0.1}, {"family_size": 4}, {"mean_length": 2.1}, {"partner": 0.0}):
        shop = generate(dataclasses.replace(SMALL, **change))
        assert len(shop.sessions) == 600
