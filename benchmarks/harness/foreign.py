"""Implementations of libraries that need an interpreter of their own: `PYTHON -m harness.foreign FILE_DESCRIPTOR`.

Run by processes.py with this folder's parent on the path. Knows the standard library, torch and the library in question
only; worker.py lies beside it.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .worker import BATCHES, Call, Case, Job, Tensors, limit_memory, serve

MAX_LENGTH, LAYERS, HEADS, DROPOUT, RATE = 50, 2, 2, 0.1, 1e-3  # as in bench_step.py


def replay_sampled(case: Case, inputs: Tensors) -> Call:
    """RePlay's CESampled with its own head; sessions are sequences of one place."""
    from replay.nn.head import EmbeddingTyingHead
    from replay.nn.loss import CESampled

    catalog = inputs["catalog"].detach().requires_grad_()
    neg = inputs["neg"] if case.shared else inputs["neg"][:, None]
    inside = torch.ones(case.sessions, 1, 1, dtype=torch.bool)
    head, loss = EmbeddingTyingHead(), CESampled()

    def logits(hidden: Tensor, ids: Tensor) -> Tensor:
        scores: Tensor = head(hidden, catalog[ids])
        return scores

    loss.logits_callback = logits

    def run(i: int) -> Tensors:
        query = inputs["query"][i % BATCHES].detach().requires_grad_()
        target = inputs["target"][i % BATCHES][:, None, None]
        value = loss(query[:, None], {}, target, neg, inside[..., 0], inside)
        grad_query, grad_catalog = torch.autograd.grad(value, (query, catalog))
        return {"loss": value.detach(), "grad_query": grad_query, "grad_catalog": grad_catalog}

    def read(result: Tensors) -> Tensors:
        grads = {"grad_query": result["grad_query"][inputs["rows"]]}
        return result | grads | {"grad_catalog": result["grad_catalog"][inputs["columns"]]}

    return Call(run, read)


def recbole_sasrec(case: Case, inputs: Tensors) -> Call:
    """RecBole's own training loop, one epoch a call: every prefix a row padded to 50, full cross-entropy.

    Its leave-one-out split takes the last two items of each session from training, so that two more stand here.
    """
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import get_model, init_seed

    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
    (folder / "generated").mkdir()
    lines = ["session_id:token\titem_id:token\ttimestamp:float"]
    for number, session in enumerate(_sessions(inputs)):
        lines += [f"{number}\t{item}\t{time}" for time, item in enumerate([*session, session[-1], session[-1]])]
    (folder / "generated" / "generated.inter").write_text("\n".join(lines))
    settings = {
        "data_path": str(folder), "USER_ID_FIELD": "session_id",
        "load_col": {"inter": ["session_id", "item_id", "timestamp"]}, "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": MAX_LENGTH, "hidden_size": case.width, "inner_size": 4 * case.width,
        "n_layers": LAYERS, "n_heads": HEADS, "hidden_dropout_prob": DROPOUT, "attn_dropout_prob": DROPOUT,
        "loss_type": "CE", "train_batch_size": case.sessions, "learning_rate": RATE, "epochs": 1,
        "use_gpu": False, "show_progress": False, "state": "ERROR",
    }  # fmt: skip
    config = Config("SASRec", "generated", config_dict=settings)
    init_seed(0, reproducibility=True)
    train, _, _ = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, get_model("SASRec")(config, train._dataset))
    if train._dataset.item_num != case.items + 1:
        raise ValueError(f"wrong: {train._dataset.item_num - 1} items, expected {case.items}")

    def run(i: int) -> Tensors:
        trainer.fit(train, verbose=False, saved=False)
        targets = len(train._dataset)
        return {"targets": torch.tensor(targets), "loss": torch.tensor(trainer.train_loss_dict[0] / len(train))}

    return Call(run, detail={"targets": _targets(inputs)})


def rectools_sasrec(case: Case, inputs: Tensors) -> Call:
    """RecTools' own training loop, one epoch a call: sessions padded to 50, full cross-entropy at every place.

    `fit_partial` processes the interactions anew at every call, which is no training: it prepares the model here, and a
    call does what it does afterwards.
    """
    import pandas as pd
    from pytorch_lightning import Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    sessions, start = _sessions(inputs), pd.Timestamp("2026-01-01")
    rows = [
        (number, item, 1.0, start + pd.Timedelta(seconds=time))
        for number, session in enumerate(sessions)
        for time, item in enumerate(session)
    ]
    columns = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    dataset = Dataset.construct(pd.DataFrame(rows, columns=columns))

    def quiet_trainer() -> Any:
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)

    model = SASRecModel(
        n_factors=case.width, n_blocks=LAYERS, n_heads=HEADS, dropout_rate=DROPOUT, session_max_len=MAX_LENGTH,
        batch_size=max(1, int(case.sessions * len(sessions) / _targets(inputs))),  # in sessions
        loss="softmax", lr=RATE, train_min_user_interactions=2, get_trainer_func=quiet_trainer,
    )  # fmt: skip
    model.fit_partial(dataset, min_epochs=1, max_epochs=1)
    trainer, batches = model.fit_trainer, model.data_preparator.get_dataloader_train()

    def run(i: int) -> Tensor:
        trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_progress.current.ready + 1
        model.lightning_model.train()
        trainer.fit(model.lightning_model, batches)
        loss: Tensor = trainer.callback_metrics["train_loss"]
        return loss

    def read(loss: Tensor) -> Tensors:
        trained = sum((batch["y"] != 0).sum() for batch in batches)
        return {"targets": torch.as_tensor(trained), "loss": loss}

    return Call(run, read, {"targets": _targets(inputs)})


def _sessions(inputs: Tensors) -> list[list[int]]:
    items, offsets = inputs["items"].tolist(), inputs["offsets"].tolist()
    return [items[begin:end] for begin, end in pairwise(offsets)]


def _targets(inputs: Tensors) -> float:
    return float(len(inputs["items"]) - len(inputs["offsets"]) + 1)


JOBS = {
    "RePlay CESampled": Job(replay_sampled, ("replay.nn.loss",), package="replay-rec"),
    "RecBole SASRec": Job(recbole_sasrec, ("recbole.trainer",), package="recbole"),
    "RecTools SASRec": Job(rectools_sasrec, ("rectools.models", "pytorch_lightning"), package="rectools"),
}


def main() -> None:
    # Other modules of the folder on the path have names that libraries may look for.
    sys.path.remove(str(Path(__file__).parents[1]))
    connection = Connection(int(sys.argv[1]))
    name, case, inputs, output, memory = connection.recv()
    limit_memory(memory)
    serve(connection, JOBS[name], Case(**case), Path(inputs), Path(output))


if __name__ == "__main__":
    main()
