"""A generated shop whose truth is known: what is bought together, what looks alike, and how likely each next item is.

A family is a small group of items with the same brand, material, product and theme, which their titles say. The next
item of a session is, with fixed probabilities,

- a partner of the last item: a few random items, unrelated to its title ("bought together"), which only IDs can learn;
- similar: another item of the last item's family, which text can learn, and alone can learn for newly launched items;
- of the theme of the session's first item, by popularity;
- any item, by popularity.

Late items are launched during the second half of the time the sessions span and are reached through their family
alone, so that the latest sessions hold targets that training has hardly seen.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from alterrec_fast.data.sessions import Dataset, Sessions

SOURCES = ("partner", "similar", "theme", "popular")
TEXT_SOURCES = ("similar", "theme", "popular")
ID_SOURCES = ("partner", "popular")
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
MAX_LENGTH = 50

# fmt: off
BRANDS = (
    "Alderton", "Bellweather", "Brightwell", "Calloway", "Cobblestone", "Dovecote", "Driftmoor", "Eastgate", "Elmhurst",
    "Fairbourne", "Fernhill", "Foxglove", "Glenrose", "Greystone", "Hartfield", "Hawksworth", "Hollyoak", "Inglenook",
    "Ivybridge", "Juniper Lane", "Kestrel", "Kingsley", "Larkspur", "Linden Row", "Marlowe", "Meadowbrook", "Merrivale",
    "Northwind", "Oakhaven", "Pemberton", "Pinecrest", "Quillan", "Ravenscar", "Rosewood", "Silverbrook", "Stonebridge",
    "Thornbury", "Westerly", "Wildmere", "Yarrow",
)
MATERIALS = (
    "Bamboo", "Brass", "Canvas", "Ceramic", "Copper", "Cotton", "Felt", "Glass", "Leather", "Linen", "Marble", "Oak",
    "Porcelain", "Steel", "Wicker", "Wool",
)
THEMES = (
    "Alpine", "Autumn", "Beach", "Bird", "Botanical", "Butterfly", "Castle", "Cherry Blossom", "Christmas", "Circus",
    "Desert", "Dinosaur", "Easter", "Farmyard", "Garden", "Halloween", "Jungle", "Lighthouse", "Moon", "Mountain",
    "Music", "Ocean", "Owl", "Railway", "Rainbow", "Rose", "Safari", "Space", "Strawberry", "Winter",
)
PRODUCTS = (
    "Alarm Clock", "Apron", "Backpack", "Basket", "Bath Mat", "Bathrobe", "Birdhouse", "Blanket", "Bookend", "Bowl",
    "Bread Bin", "Bucket", "Cake Stand", "Candle Holder", "Card Box", "Chopping Board", "Coaster Set", "Coat Hook",
    "Colander", "Cookie Jar", "Cushion", "Doorstop", "Doormat", "Dress", "Egg Cup", "Fan", "Flask", "Flowerpot",
    "Footstool", "Garland", "Gloves", "Hairbrush", "Handbag", "Hat", "Jewellery Box", "Jug", "Keyring", "Lamp",
    "Lantern", "Lunch Box", "Magazine Rack", "Mirror", "Mug", "Napkin Ring", "Notebook", "Oven Glove", "Pencil Case",
    "Photo Frame", "Picnic Set", "Plate", "Postcard Set", "Puzzle", "Rug", "Salt Shaker", "Scarf", "Shelf", "Slippers",
    "Soap Dish", "Stool", "Sugar Bowl", "Tablecloth", "Teapot", "Tea Towel", "Toy Box", "Tray", "Umbrella", "Vase",
    "Wall Sticker", "Watering Can", "Wind Chime", "Wine Rack", "Wreath",
)
COLOURS = (
    "Amber", "Beige", "Black", "Blue", "Brown", "Cream", "Crimson", "Gold", "Green", "Grey", "Indigo", "Ivory",
    "Lavender", "Mint", "Navy", "Orange", "Peach", "Pink", "Purple", "Red", "Silver", "Turquoise", "White", "Yellow",
)
STYLES = (
    "Antique", "Art Deco", "Classic", "Compact", "Deluxe", "Folding", "Giant", "Handmade", "Large", "Mini", "Modern",
    "Patterned", "Polka Dot", "Retro", "Rustic", "Small", "Spotted", "Striped", "Traditional", "Vintage",
)
# fmt: on
_LOOKS = len(COLOURS) * len(STYLES)
_FAMILIES = len(BRANDS) * len(MATERIALS) * len(THEMES) * len(PRODUCTS)
_LOOK_STEP = 101  # shares no factor with the number of looks: neighbours in a family never look the same


@dataclass(frozen=True)
class ShopConfig:
    """Size, seed and habits of a shop.

    mean_length: items in a session on average; every session has 2 to 50. family_size: items in a family on average;
    sizes run from half of it to half more. head_share: items, the most popular first, that have `partners` partners.
    late_share: items launched late. partner, similar, theme: probabilities of where the next item comes from, the rest
    being popularity; an item without partners goes to its family instead. family_spread, item_spread: standard
    deviations of the log popularity.
    """

    num_items: int = 3_000
    num_sessions: int = 12_000
    mean_length: float = 6.0
    seed: int = 0
    family_size: int = 20
    partners: int = 4
    head_share: float = 0.4
    late_share: float = 0.25
    partner: float = 0.36
    similar: float = 0.36
    theme: float = 0.1
    family_spread: float = 1.0
    item_spread: float = 1.2

    def __post_init__(self) -> None:
        if self.num_items < 100 or self.num_sessions < 10:
            raise ValueError(
                f"a shop needs 100 items and 10 sessions at least, got num_items={self.num_items}, "
                f"num_sessions={self.num_sessions}"
            )
        if not 2 < self.mean_length <= MAX_LENGTH / 2:
            raise ValueError(f"mean_length must be above 2 and at most {MAX_LENGTH / 2:g}, got {self.mean_length}")
        if not 4 <= self.family_size <= _LOOKS // 2:
            raise ValueError(f"family_size must be 4 to {_LOOKS // 2}, got {self.family_size}")
        if self.num_items > _FAMILIES * self.family_size // 2:
            raise ValueError(
                f"num_items must be at most {_FAMILIES * self.family_size // 2:,} for unique titles in families of "
                f"{self.family_size}, got {self.num_items:,}"
            )
        shares = {name: getattr(self, name) for name in ("head_share", "late_share", "partner", "similar", "theme")}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {share}")
        if self.partner + self.similar + self.theme > 1:
            raise ValueError(
                f"partner + similar + theme must be at most 1, got {self.partner} + {self.similar} + {self.theme}"
            )
        if self.head_share + self.late_share > 1 or self.late_share > 0.9:
            raise ValueError(
                f"late_share must be at most 0.9, and head_share + late_share at most 1, got {self.late_share} and "
                f"{self.head_share}"
            )
        if not 1 <= self.partners < self.num_head - 1:
            raise ValueError(
                f"partners must be 1 to {self.num_head - 2} for {self.num_head} popular items, got {self.partners}"
            )

    @property
    def num_head(self) -> int:
        """Items that have partners."""
        return round(self.head_share * self.num_items)


@dataclass(frozen=True)
class Truth:
    """What the sessions were drawn from; row i is catalog row i.

    family: (V,) int32. theme: (V,) int32. launch: (V,) float64 in [0, 1), the time from which the item is sold; the
    sessions span [0, 1). weight: (V,) float64, popularity, 0 for late items. partners: (V, K) int32, -1 in the rows of
    items without partners. partner_odds: (K,) float64, which of them is chosen.
    """

    family: np.ndarray
    theme: np.ndarray
    launch: np.ndarray
    weight: np.ndarray
    partners: np.ndarray
    partner_odds: np.ndarray


@dataclass(frozen=True)
class Shop:
    """A generated shop: `catalog` (``item_id``, ``title``), `sessions` oldest first, and the `truth` behind them."""

    config: ShopConfig
    catalog: pl.DataFrame
    sessions: Sessions
    truth: Truth

    @cached_property
    def first_test_session(self) -> int:
        """Sessions from here on are the test split."""
        return len(self.sessions) - round(TEST_SHARE * len(self.sessions))

    @cached_property
    def first_validation_session(self) -> int:
        """Sessions before this one are the training split."""
        return self.first_test_session - round(VALIDATION_SHARE * len(self.sessions))

    def time(self, session: np.ndarray) -> np.ndarray:
        """(N,) session numbers -> (N,) float64 in [0, 1), when each of them takes place."""
        return session / len(self.sessions)

    def next_item_probabilities(
        self, last: np.ndarray, first: np.ndarray, time: np.ndarray, sources: Collection[str] = SOURCES
    ) -> np.ndarray:
        """(B, V) float64: the probability of each next item after `last`, in a session that began with `first`.

        last, first: (B,) catalog rows. time: (B,) of `time()`. sources: those of SOURCES to count; rows add up to 1
        with all of them. TEXT_SOURCES is the most that titles can tell, ID_SOURCES what they can't. For small catalogs:
        the result is dense.
        """
        unknown = set(sources) - set(SOURCES)
        if unknown:
            raise ValueError(f"sources must be of {', '.join(SOURCES)}, got {', '.join(sorted(unknown))}")
        config, truth = self.config, self.truth
        B, V = len(last), len(truth.family)
        rows = np.arange(B)
        result = np.zeros((B, V))
        has_partners = truth.partners[last, 0] >= 0
        if "partner" in sources:
            pick = rows[has_partners]
            result[pick[:, None], truth.partners[last[pick]]] += config.partner * truth.partner_odds

        sold = truth.launch <= time[:, None]  # (B, V)
        similar = (truth.family == truth.family[last][:, None]) & sold
        similar[rows, last] = False
        others = similar.sum(1)
        to_family = np.where(has_partners, config.similar, config.partner + config.similar)
        if "similar" in sources:
            result += similar * (to_family / np.maximum(others, 1))[:, None]
        if "theme" in sources:
            share = truth.weight / np.bincount(truth.theme, truth.weight)[truth.theme].clip(min=np.finfo(float).tiny)
            result += config.theme * share * (truth.theme == truth.theme[first][:, None])
        if "popular" in sources:
            rest = 1 - config.partner - config.similar - config.theme
            result += (rest + to_family * (others == 0))[:, None] * (truth.weight / truth.weight.sum())
        return result

    def oracle_ranks(self, sessions: range, sources: Collection[str] = SOURCES, block: int = 512) -> np.ndarray:
        """(N,) int64: the 0-based rank that an oracle of `sources` gives each target, for every prefix of `sessions`.

        Targets come session by session, oldest first. Ties go to the lower item. An average of ``ranks < 20`` is the
        Hits@20 that no model can beat on average, where `sources` is all of them.
        """
        last, target, session = prefixes(self.sessions, sessions)
        first = self.sessions.items[self.sessions.offsets[session]]
        time = self.time(session)
        ranks = np.empty(len(target), np.int64)
        ids = np.arange(len(self.truth.family))
        for start in range(0, len(target), block):
            now = slice(start, start + block)
            scores = self.next_item_probabilities(last[now], first[now], time[now], sources)
            goal = target[now][:, None]
            reached = np.take_along_axis(scores, goal, 1)
            ranks[now] = ((scores > reached) | ((scores == reached) & (ids < goal))).sum(1)
        return ranks


def prefixes(sessions: Sessions, which: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Last item, target and session number, each (N,), of every prefix of the sessions `which`, a range of step 1."""
    items = sessions.items[sessions.offsets[which.start] : sessions.offsets[which.stop]]
    session = np.repeat(np.arange(which.start, which.stop), np.diff(sessions.offsets[which.start : which.stop + 1]))
    same = session[1:] == session[:-1]
    return items[:-1][same], items[1:][same], session[1:][same]


def generate(config: ShopConfig) -> Shop:
    """The shop that `config` describes; the same for the same config, on every run and machine with the same numpy.

    Sessions' items are int32, in time order. Memory grows with num_items and with the items of all sessions; no row
    is handled on its own in Python.
    """
    rng = np.random.Generator(np.random.PCG64(config.seed))
    catalog, truth, member_order, family_start = _make_catalog(config, rng)
    return Shop(config, catalog, _draw_sessions(config, truth, member_order, family_start, rng), truth)


def write_shop(path: str | Path, config: ShopConfig, overwrite: bool = False) -> Dataset:
    """Generates a shop and writes it as a data set: the last 20% of the sessions test, the 10% before validation."""
    shop = generate(config)
    cuts = (0, shop.first_validation_session, shop.first_test_session, len(shop.sessions))
    items, offsets = shop.sessions.items, shop.sessions.offsets
    splits = {
        name: Sessions(items[offsets[start] : offsets[stop]], offsets[start : stop + 1] - offsets[start])
        for name, start, stop in zip(("train", "validation", "test"), cuts[:-1], cuts[1:], strict=True)
    }
    info = {
        "source": "shop",
        "seed": config.seed,
        "num_sessions": len(shop.sessions),
        "num_interactions": len(items),
        **{f"num_{name}_sessions": len(split) for name, split in splits.items()},
    }
    return Dataset.write(path, splits, shop.catalog, ["title"], info, overwrite)


def _make_catalog(config: ShopConfig, rng: np.random.Generator) -> tuple[pl.DataFrame, Truth, np.ndarray, np.ndarray]:
    """The catalog, the truth, the items by family and launch (V,), and where each family starts (families + 1,)."""
    V = config.num_items
    smallest = max(2, config.family_size // 2)
    sizes = rng.integers(smallest, 2 * config.family_size - smallest + 1, V // smallest + 1)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    starts = np.append(starts[starts < V], V)
    num_families = len(starts) - 1

    members = rng.permutation(V).astype(np.int32)  # items, family by family
    place = np.arange(V, dtype=np.int64)
    family_of_place = np.repeat(np.arange(num_families, dtype=np.int32), np.diff(starts))
    family = np.empty(V, np.int32)
    family[members] = family_of_place

    names = rng.choice(_FAMILIES, num_families, replace=False)
    names, brand = np.divmod(names, len(BRANDS))
    names, material = np.divmod(names, len(MATERIALS))
    product, theme_of_family = np.divmod(names, len(THEMES))
    looks = np.empty(V, np.int64)
    first_look = rng.integers(0, _LOOKS, num_families)
    looks[members] = (first_look[family_of_place] + _LOOK_STEP * (place - starts[family_of_place])) % _LOOKS
    colour, style = np.divmod(looks, len(STYLES))

    def words(vocabulary: tuple[str, ...], index: np.ndarray) -> pl.Series:
        return pl.Series(vocabulary, dtype=pl.String).gather(index)

    number = pl.Series(np.arange(V)).cast(pl.String).str.zfill(max(6, len(str(V - 1))))
    catalog = pl.DataFrame(
        {
            "number": number,
            "style": words(STYLES, style),
            "colour": words(COLOURS, colour),
            "brand": words(BRANDS, brand[family]),
            "theme": words(THEMES, theme_of_family[family]),
            "material": words(MATERIALS, material[family]),
            "product": words(PRODUCTS, product[family]),
        }
    ).select(
        item_id=pl.concat_str(pl.lit("SKU-"), "number"),
        title=pl.concat_str("brand", "theme", "material", "product", "style", "colour", separator=" "),
    )

    late = rng.permutation(V) < round(config.late_share * V)
    launch = np.where(late, 0.5 + 0.5 * rng.random(V), 0.0)
    spread = config.family_spread * rng.standard_normal(num_families)[family]
    weight = np.where(late, 0.0, np.exp(spread + config.item_spread * rng.standard_normal(V)))

    num_head = min(config.num_head, V - int(np.count_nonzero(late)))
    head = np.argpartition(-weight, num_head - 1)[:num_head].astype(np.int32)
    # K different steps from the item's own place around the head: random partners, never the item itself, never twice
    step = rng.integers(1, max(2, num_head // config.partners), (num_head, config.partners))
    around = (np.arange(num_head)[:, None] + np.cumsum(step, 1)) % num_head
    head = rng.permutation(head)
    partners = np.full((V, config.partners), -1, np.int32)
    partners[head] = head[around]
    odds = np.arange(config.partners, 0, -1, dtype=np.float64)

    order = members[np.lexsort((launch[members], family_of_place))]
    theme = theme_of_family[family].astype(np.int32)
    return catalog, Truth(family, theme, launch, weight, partners, odds / odds.sum()), order, starts


def _draw_sessions(
    config: ShopConfig, truth: Truth, members: np.ndarray, family_start: np.ndarray, rng: np.random.Generator
) -> Sessions:
    """All sessions at once, position by position: the loop runs at most MAX_LENGTH times."""
    S = config.num_sessions
    lengths = np.minimum(1 + rng.geometric(1 / (config.mean_length - 1), S), MAX_LENGTH)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    items = np.empty(offsets[-1], np.int32)

    # Families in order of launch: what a family sells at a time is its first members, counted by one binary search.
    launch_key = truth.family[members] + truth.launch[members]
    place = np.empty(len(members), np.int64)
    place[members] = np.arange(len(members))
    # Popular items theme by theme: one cumulative weight serves draws from a theme and from the whole shop.
    sold_early = np.flatnonzero(truth.weight)
    by_theme = sold_early[np.argsort(truth.theme[sold_early], kind="stable")].astype(np.int32)
    cumulative = np.concatenate(([0.0], np.cumsum(truth.weight[by_theme])))
    theme_start = np.searchsorted(truth.theme[by_theme], np.arange(len(THEMES) + 1))
    partner_cumulative = np.cumsum(truth.partner_odds)[:-1]

    def popular(u: np.ndarray, start: np.ndarray | int, stop: np.ndarray | int) -> np.ndarray:
        low, high = cumulative[start], cumulative[stop]
        pick = np.searchsorted(cumulative, low + u * (high - low), side="right") - 1
        picked: np.ndarray = by_theme[np.clip(pick, start, np.asarray(stop) - 1)]
        return picked

    active = np.arange(S)
    first = last = popular(rng.random(S), 0, len(by_theme))
    items[offsets[:-1]] = first
    for position in range(1, int(lengths.max())):
        still = lengths[active] > position
        active, first, last = active[still], first[still], last[still]
        way, u = rng.random(len(active)), rng.random(len(active))
        has_partners = truth.partners[last, 0] >= 0
        family = truth.family[last]
        sold = np.searchsorted(launch_key, family + active / S, side="right") - family_start[family]

        partner = has_partners & (way < config.partner)
        similar = ~partner & (way < config.partner + config.similar)
        theme = ~partner & ~similar & (way < config.partner + config.similar + config.theme)
        similar &= sold > 1
        rest = ~(partner | similar | theme)

        following = np.empty_like(last)
        following[partner] = truth.partners[last[partner], np.searchsorted(partner_cumulative, u[partner], "right")]
        begin = family_start[family[similar]]
        chosen = begin + (u[similar] * (sold[similar] - 1)).astype(np.int64)
        following[similar] = members[chosen + (chosen >= place[last[similar]])]  # all but the last item itself
        session_theme = truth.theme[first[theme]]
        following[theme] = popular(u[theme], theme_start[session_theme], theme_start[session_theme + 1])
        following[rest] = popular(u[rest], 0, len(by_theme))
        items[offsets[active] + position] = following
        last = following
    return Sessions(items, offsets)
