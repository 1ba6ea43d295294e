"""What a step does on a GPU, recorded on tensors without memory: nothing reads from the device, and few launches.

The meta device stands in for CUDA; ops launch their Triton kernels to a recorder. An H100 counted 204 launches in the
step whose trace has about as many.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alterrec_fast.data.batches import pack
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.ops import dispatch
from alterrec_fast.systems import Epoch
from alterrec_fast.training.alternate import Trainer
from alterrec_fast.training.config import Config
from alterrec_fast.training.steps import StaticBatch

pytest.importorskip("triton")
META = torch.device("meta")
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view", "_reshape_alias"}
KERNELS = {  # of operations that launch several on CUDA, as an H100's profile has them; the sort's are most
    "native_layer_norm_backward": 2,
    "_index_put_impl_": 12,
    "embedding_dense_backward": 2,
    "native_dropout": 1,
}
ADAM = 3  # its step counts, and the kernel for two lists of parameters
READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "_unique2", "unique_dim", "masked_select"}


def launcher(name: str) -> Any:
    """What runs an op's Triton kernels, called with the op's arguments."""
    module = importlib.import_module(f"alterrec_fast.ops.{name.removesuffix('_backward')}")
    backward = name.endswith("_backward")
    op, triton = (module._backward_op, module._triton_backward) if backward else (module._op, module._triton)
    return lambda *arguments: triton(op._packed(arguments[:-1]))  # the last one is the engine


class Recorder(TorchDispatchMode):
    """Counts kernels by the operation that launches them; fails where one reads from the device or copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "alterrec_fast":
            with self:
                return launcher(name)(*args, **(kwargs or {}))
        assert name not in READS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in [*args, *(kwargs or {}).values(), out] if isinstance(x, Tensor) and x.ndim > 0}
        assert len(devices) <= 1, f"{name} copies between {devices}"
        if not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += KERNELS.get(name, 1)
        return out


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    from alterrec_fast.kernels import shapes, tiles

    made = Recorder()
    monkeypatch.setattr(dispatch, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(shapes, "target", lambda _: ("cuda", 90))
    tiles.replace_launcher(lambda kernel, *_, **__: made.kernels.update([kernel.fn.__name__]))
    yield made
    tiles.replace_launcher(None)


def without_memory(shop: Dataset, run: Path, **changes: Any) -> Trainer:
    """A trainer as on CUDA, of which no tensor has memory."""
    config = Config(data="x", width=60, k1=5, k2=100, precision="bf16", device="cpu", **changes)
    made = Trainer(config, shop, torch.zeros(shop.num_items, 12), run)
    made.device = META
    made.recommender.to(META).train()
    made.static = StaticBatch(576, META)
    return made


@pytest.mark.parametrize(("student", "teacher"), [("id", "text"), ("text", "id"), ("id", None)])
@pytest.mark.parametrize("variant", ["alterrec", "alterrec_aug"])
def test_a_step_reads_nothing_and_launches_little(
    variant: str, student: str, teacher: str | None, shop: Dataset, tmp_path: Path, recorder: Recorder
) -> None:
    made = without_memory(shop, tmp_path, variant=variant, hard_fraction=0.5 if variant == "alterrec_aug" else 1.0)
    assert made.static is not None
    epoch = Epoch(5, student, teacher, 0)
    catalog = made.teacher(epoch)
    made.static.load(pack(shop.train, np.arange(30), 50))
    with recorder:
        losses = made._gradients(epoch, made.static.inputs(), catalog, made._ranked(catalog))
        _ = {name: loss.double() * 30 for name, loss in losses.items()}
    kernels = sum(recorder.kernels.values()) + ADAM
    drawn = sum(recorder.kernels[name] for name in ("random_", "bitwise_or", "bitwise_and"))  # 3 for each binary digit
    assert 100 < kernels - drawn <= 260, recorder.kernels


def test_the_batch_is_the_only_copy(shop: Dataset, tmp_path: Path, recorder: Recorder) -> None:
    made = without_memory(shop, tmp_path)
    assert made.static is not None
    with pytest.raises(AssertionError, match="copies between"), recorder:
        made.static.load(pack(shop.train, np.arange(30), 50))


def test_the_recorder_sees_what_waits(recorder: Recorder) -> None:
    x = torch.zeros(3, device=META)
    with recorder, pytest.raises(AssertionError, match="waits"):
        x.nonzero()
    with recorder, pytest.raises(AssertionError, match="copies"):
        torch.ones(3).to(META)
