"""The configuration of a run: one flat dataclass, checked as a whole, read from and written to TOML."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from alterrec_fast import files
from alterrec_fast.data import DEFAULT_MODEL
from alterrec_fast.errors import ConfigError as ConfigError
from alterrec_fast.errors import FileError
from alterrec_fast.systems import DEFAULTS, SYSTEMS

if TYPE_CHECKING:  # pydantic and tomli_w are of the extra "train"; a Config can be made without them
    from pydantic import ConfigDict

VARIANTS = tuple(SYSTEMS)

MACHINE = ("backend", "device", "graph", "checkpoint_minutes", "out")  # settings that a resumed run may change
EXTENDABLE = ("m_max", "patience")  # settings that a resumed run may raise
PLACE = ("data", "demo")  # where the data is; which data it is, the fingerprint tells
MOST = {
    "width": 1 << 16, "layers": 1 << 10, "inner": 1 << 20, "max_length": 1 << 20, "m_max": 1 << 20,
    "batch_targets": 1 << 30, "eval_targets": 1 << 30, "patience": 1 << 30,
}  # fmt: skip
OF_SYSTEM: Any = None  # what is left at it is the preset's value, or else the system's own default: systems/


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run. Names in parentheses are the paper's."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    # What is trained, on what, and where it goes.
    data: str = ""  # folder made by `prepare`; empty with demo
    demo: bool = False  # train on the generated shop
    out: str = ""  # run directory; "runs/demo" with demo
    variant: str = "alterrec"  # one of VARIANTS
    seed: int = 0
    preset: str | None = (
        None  # "published" or "paper": settings that are left unset are of the paper's code, or its text
    )

    # Text.
    text_model: str = DEFAULT_MODEL  # hub name, path, or "packaged"; a run writes down the revision, NAME@REVISION

    # Networks (appendix G and the published code).
    width: int = 300  # d
    layers: int = 2
    heads: int = 2
    block: Literal["post", "pre", "ligr"] = OF_SYSTEM  # of transformers: where LayerNorms stand; LiGR has gates
    inner: int = OF_SYSTEM  # feed-forward width of a block, of a GRU its hidden width; 0: 4 * width, of a GRU 2 * width
    max_length: int = 50  # sessions are cut to their last items
    dropout: float = OF_SYSTEM
    init: Literal["uniform", "xavier", "normal"] = OF_SYSTEM
    id_session: Literal["transformer", "gru", "mean"] = "transformer"
    text_session: Literal["transformer", "gru", "mean"] = "transformer"
    item_bias: bool = False  # a trained bias of each item in the scores of the network that has the ID table
    temperature_id: float = OF_SYSTEM
    temperature_text: float = 0.07
    temperature_fusion: float = 1.0  # of a single network of IDs and text

    # Alternate training (Algorithm 1). Epochs are passes over all training targets by one network.
    m_random: int = 2
    m_gap: int = 2
    m_max: int = 30
    negatives: Literal["full", "uniform"] = OF_SYSTEM  # of epochs without a teacher: all items, or k2 - k1 drawn
    k1: int | None = None  # hard negatives are ranks [k1, k2); None: by the size of the catalog, see slice_bounds
    k2: int | None = None
    positives: int = 5  # ranks [0, p) join as positives in alterrec_aug (p)
    positive_weight: float = 0.5  # beta
    hard_fraction: float = OF_SYSTEM  # members of the slice that stay; the rest is drawn uniformly
    alpha: float = OF_SYSTEM  # weight of the ID scores in the fused score

    # Optimiser: Adam for each network, its learning rate stepped by the network's own epochs.
    batch_targets: int = 512
    lr_id: float = 1e-3
    lr_text: float = 1e-3
    lr_gamma: float = OF_SYSTEM  # 1: a constant learning rate
    lr_step_id: int = OF_SYSTEM
    lr_step_text: int = OF_SYSTEM
    weight_decay: float = 0.0

    # Validation.
    monitor: str = "ndcg@20"  # of the fused score; the best epoch by it is kept
    patience: int = OF_SYSTEM  # epochs without a better one, then training stops
    group_edges: tuple[int, ...] = (30, 100, 300)  # last training count of each long-tail group but the open one
    eval_targets: int = 8192  # targets scored at once

    # Machine.
    device: str = "auto"  # "auto": cuda where there is one, else cpu
    backend: Literal["auto", "reference", "native", "triton"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] | None = None  # of the slice and the loss; None: bf16 on CUDA, else fp32
    encoder_precision: Literal["fp32", "tf32", "bf16"] | None = None  # of encoders on CUDA; None: tf32, fp32 with fp32
    graph: bool | Literal["auto"] = "auto"  # on CUDA each step is one CUDA graph; false: one kernel at a time
    checkpoint_minutes: float = 10.0  # a checkpoint is written at every epoch's end, and within long epochs this often

    def __post_init__(self) -> None:
        if self.variant not in SYSTEMS:
            raise ConfigError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        system = SYSTEMS[self.variant]
        if self.preset is not None and self.preset not in system.presets:
            known = f"one of {', '.join(system.presets)}" if system.presets else "left out"
            raise ConfigError(f"preset must be {known} for {self.variant}, got {self.preset!r}")
        for name, value in _defaults(self.variant, self.preset).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        positive = ("width", "layers", "heads", "m_gap", "batch_targets", "eval_targets", "temperature_id",
                    "temperature_text", "temperature_fusion", "lr_id", "lr_text", "lr_step_id", "lr_step_text",
                    "patience", "checkpoint_minutes")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("inner", "m_random", "positives", "positive_weight", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:  # nor may it be nan
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("hard_fraction", "alpha", "lr_gamma"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} must be finite, got {value}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 (an item and its target), got {self.max_length}")
        if self.width % self.heads:
            raise ConfigError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        warm = 2 * self.m_random if system.alternates else 0
        if self.m_max < max(1, warm):
            least = f"2 * m_random = {warm} (m_random may be lowered)" if warm else "1"
            raise ConfigError(f"m_max must be at least {least}, got {self.m_max}")
        if (self.k1 is None) != (self.k2 is None):
            raise ConfigError(f"k1 and k2 go together, got {self.k1} and {self.k2}")
        if self.k1 is not None and self.k2 is not None and not 0 <= self.k1 < self.k2:
            raise ConfigError(f"expected 0 <= k1 < k2, got k1 = {self.k1} and k2 = {self.k2}")
        if list(self.group_edges) != sorted(set(self.group_edges)):
            raise ConfigError(f"group_edges must rise, got {self.group_edges}")
        if self.group_edges and self.group_edges[0] < 0:
            raise ConfigError(f"group_edges must be at least 0, got {self.group_edges}")
        if self.monitor not in METRICS:
            raise ConfigError(f"monitor must be one of {', '.join(METRICS)}, got {self.monitor!r}")
        if self.demo and self.data:
            raise ConfigError(f"demo trains on its own generated shop; leave data out, got {self.data!r}")

    def slice_bounds(self, num_items: int) -> tuple[int, int]:
        """[k1, k2) for a catalog of V items: as set, clipped to V, or by the catalog's size."""
        if self.k1 is not None and self.k2 is not None:
            if self.k1 >= num_items:
                raise ConfigError(f"k1 = {self.k1} lies beyond the catalog of {num_items} items")
            return self.k1, min(self.k2, num_items)
        if num_items >= 20_000:
            return 20, 20_000
        if num_items >= 14:
            return 6, min(2000, num_items // 2)
        return num_items // 4, num_items // 2

    def settings(self) -> dict[str, Any]:
        """What decides a run's result, as it stands in a checkpoint's JSON."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in (*MACHINE, *PLACE)}
        settings: dict[str, Any] = json.loads(json.dumps(values))
        return settings

    def check_settings(self, written: Any, checkpoint: Path, run: Path) -> None:
        """Raises FileError unless these are the settings that `checkpoint` was written with, or extend them."""
        if not isinstance(written, dict) or not written:
            raise FileError(f"{checkpoint}: holds no settings")
        values = self.settings()
        for name in sorted({*values, *written}):
            if not same_or_more(name, written.get(name), values.get(name)):
                raise FileError(
                    f"{run / 'config.toml'}: {name} = {values.get(name)!r}, but {checkpoint.name} was trained with "
                    f"{written.get(name)!r}; one of the two files was changed"
                )

    def replace(self, **changes: Any) -> Config:
        """The config with these settings changed; with another variant or preset, defaults of the old one give way."""
        values = dataclasses.asdict(self)
        if any(changes.get(name, values[name]) != values[name] for name in ("variant", "preset")):
            former = _defaults(self.variant, self.preset)
            values = {name: value for name, value in values.items() if name not in former or value != former[name]}
        return from_mapping({**values, **changes}, "settings")

    def to_toml(self) -> str:
        """TOML of every field; None, which TOML lacks, is left out and is the default of the fields that hold it."""
        import tomli_w

        return tomli_w.dumps({name: value for name, value in dataclasses.asdict(self).items() if value is not None})


def _defaults(variant: str, preset: str | None) -> dict[str, Any]:
    """What settings at OF_SYSTEM become; the preset, where there is one, must be one of the system's."""
    system = SYSTEMS[variant]
    return DEFAULTS | dict(system.defaults) | dict(system.presets[preset] if preset else {})


def same_or_more(name: str, before: Any, now: Any) -> bool:
    """Whether a run with this value of a setting may go on with that one."""
    if name in EXTENDABLE and isinstance(before, int) and isinstance(now, int):
        return now >= before
    return bool(before == now)


METRICS = ("hits@10", "hits@20", "ndcg@10", "ndcg@20", "mrr@20")


def from_mapping(values: Mapping[str, Any], where: str) -> Config:
    """A Config of these values, strings read as numbers where those are due. Raises ConfigError, naming `where`."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_python(dict(values))
    except ValidationError as error:
        known = [field.name for field in dataclasses.fields(Config)]
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                lines.append(f"unknown setting {name!r}; known are {', '.join(known)}")
            elif name:
                lines.append(f"{name}: {problem['msg']}, got {problem['input']!r}")
            else:
                lines.append(problem["msg"].removeprefix("Value error, "))
        raise ConfigError(f"{where}: {'; '.join(lines)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file; raises FileError where it cannot be read, ConfigError where it is not TOML."""
    text = files.read_text(path)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def demo_settings(variant: str = "alterrec", preset: str | None = None) -> dict[str, Any]:
    """What --demo sets unless told otherwise: sized for the generated shop and two cores. Less what the preset sets."""
    settings = {
        "text_model": "packaged",
        "width": 64,
        "init": "xavier",  # small weights as in the published code need more steps than so small a shop gives
        "temperature_text": 1.0,  # Xavier LayerNorms make logits large enough
        "m_random": 4,
        "m_max": 16,
        "k1": 5,  # at least `positives`, so that alterrec_aug has no positive among its negatives
        "k2": 205,
        "hard_fraction": 0.5,
        "batch_targets": 128,
        "lr_id": 0.002,
        "lr_step_id": 6,
    }
    of_preset = SYSTEMS[variant].presets.get(preset or "", {}) if variant in SYSTEMS else {}
    return {name: value for name, value in settings.items() if name not in of_preset}
