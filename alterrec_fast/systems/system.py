"""What an entry of the registry is: docs/architecture.md, "Systems"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from alterrec_fast.model.encoders import GruSession, MeanSession, initialise
from alterrec_fast.model.networks import Network, Recommender
from alterrec_fast.model.transformer import Style, TransformerSession

if TYPE_CHECKING:  # a Config asks the registry for its defaults
    from alterrec_fast.training.config import Config


@dataclass(frozen=True)
class Epoch:
    """One pass over the training targets by one network."""

    number: int  # from 1
    student: str  # the network that is trained
    teacher: str | None  # the frozen network whose rank slices are the negatives; None: as `negatives` says
    own: int  # epochs that the student was trained for before


Plan = Callable[["Config"], Iterator[Epoch]]
Build = Callable[["Config", int, Tensor | None], Recommender]


def one_network(name: str) -> Plan:
    """The plan of a system of one network: m_max epochs of it."""

    def plan(config: Config) -> Iterator[Epoch]:
        yield from (Epoch(n + 1, name, None, n) for n in range(config.m_max))

    return plan


# Settings that are left unset take these, or what the entry says in their place.
DEFAULTS: dict[str, Any] = {
    "inner": 0,
    "dropout": 0.1,
    "block": "post",
    "init": "uniform",
    "negatives": "full",
    "temperature_id": 1.0,
    "lr_gamma": 0.1,
    "lr_step_id": 2,
    "lr_step_text": 5,
    "hard_fraction": 1.0,
    "alpha": 0.5,
    "patience": 15,
}
CONSTANT = {"lr_gamma": 1.0}  # the learning rate of published baselines
RECBOLE = {"dropout": 0.5, "inner": 256, "init": "normal"} | CONSTANT  # what transformers have there


@dataclass(frozen=True)
class System:
    """An entry of the registry. The docstring of `build` says what it is, its source, and where it deviates."""

    build: Build  # settings, number of items, features (V, F) or None -> the recommender, from torch's random state
    plan: Plan
    views: tuple[str, ...] = ()  # of "id" and "text", what is reported beside the fused score; of one it is the same
    text: bool = False  # whether it reads the items' text
    alternates: bool = False  # whether it is an ID and a text network that take turns, fused with alpha
    positives: bool = False  # whether the first ranks of a teacher join as targets
    defaults: Mapping[str, Any] = field(default_factory=dict)  # in place of those in DEFAULTS
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by name, in place of both
    refuses: Mapping[str, str] = field(default_factory=dict)  # of "resume" and "bf16": the reason

    @property
    def about(self) -> str:
        """What it is, in a line."""
        return (self.build.__doc__ or "").strip().splitlines()[0]


def session_encoder(config: Config, kind: str, style: Style | None = None) -> nn.Module:
    """A session encoder of the width and depth that are set: "transformer", "gru" or "mean"."""
    if kind == "mean":
        return MeanSession()
    if kind == "gru":
        return GruSession(config.width, config.inner or 2 * config.width, config.dropout)
    style = style or Style(config.block)
    inner = config.inner or 4 * config.width
    return TransformerSession(
        config.width, config.layers, config.heads, inner, config.max_length, config.dropout, style
    )


def recbole_style(config: Config) -> Style:
    """Transformers as RecBole builds them, after BERT."""
    return Style(config.block, "gelu", 1e-12, attention_dropout=config.dropout, norm_input=True)


def initialised(config: Config, networks: Mapping[str, Network], kind: type[Recommender] = Recommender) -> Recommender:
    """A recommender of these networks with parameters drawn as `init` says; each network's scores have weight 1."""
    for network in networks.values():
        initialise(network, config.init, config.width)
    return kind(networks, dict.fromkeys(networks, 1.0))
