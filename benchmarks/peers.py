"""Contestants that need an interpreter of their own: `PYTHON peers.py FILE_DESCRIPTOR`, run by contest.py.

Knows the standard library, torch and the library in question only; worker.py and verdicts.py lie beside it.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from verdicts import compare_loss, compare_pass
from worker import BATCHES, Call, Shape, Task, Tensors, limit_memory, serve

del sys.path[0]  # this folder, whose other modules have names that libraries may look for


def replay_sampled(shape: Shape, inputs: Tensors) -> Call:
    """RePlay's CESampled with its own head; sessions are sequences of one place."""
    from replay.nn.head import EmbeddingTyingHead
    from replay.nn.loss import CESampled

    catalog = inputs["catalog"].detach().requires_grad_()
    negatives = inputs["negatives"] if shape.shared else inputs["negatives"][:, None]
    inside = torch.ones(shape.sessions, 1, 1, dtype=torch.bool)
    head, loss = EmbeddingTyingHead(), CESampled()

    def logits(hidden: Tensor, ids: Tensor) -> Tensor:
        scores: Tensor = head(hidden, catalog[ids])
        return scores

    loss.logits_callback = logits

    def run(i: int) -> Tensors:
        query = inputs["query"][i % BATCHES].detach().requires_grad_()
        target = inputs["target"][i % BATCHES][:, None, None]
        value = loss(query[:, None], {}, target, negatives, inside[..., 0], inside)
        grad_query, grad_catalog = torch.autograd.grad(value, (query, catalog))
        return {"loss": value.detach(), "grad_query": grad_query, "grad_catalog": grad_catalog}

    return Call(run)


MAX_LENGTH, LAYERS, HEADS, DROPOUT, RATE = 50, 2, 2, 0.1, 1e-3  # as in training.py


def _sessions(inputs: Tensors) -> list[list[int]]:
    items, offsets = inputs["items"].tolist(), inputs["offsets"].tolist()
    return [items[begin:end] for begin, end in pairwise(offsets)]


def recbole_sasrec(shape: Shape, inputs: Tensors) -> Call:
    """RecBole's own training loop, one epoch a call: every prefix a row padded to 50, full cross-entropy.

    Its leave-one-out split takes the last two items of each session from training, so that two more stand there.
    """
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import get_model, init_seed

    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
    (folder / "made").mkdir()
    lines = ["session_id:token\titem_id:token\ttimestamp:float"]
    for number, session in enumerate(_sessions(inputs)):
        lines += [f"{number}\t{item}\t{time}" for time, item in enumerate([*session, session[-1], session[-1]])]
    (folder / "made" / "made.inter").write_text("\n".join(lines))
    settings = {
        "data_path": str(folder),
        "USER_ID_FIELD": "session_id",
        "load_col": {"inter": ["session_id", "item_id", "timestamp"]},
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": MAX_LENGTH,
        "hidden_size": shape.width,
        "inner_size": 4 * shape.width,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dropout_prob": DROPOUT,
        "attn_dropout_prob": DROPOUT,
        "loss_type": "CE",
        "train_batch_size": shape.sessions,
        "learning_rate": RATE,
        "epochs": 1,
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
    }
    config = Config("SASRec", "made", config_dict=settings)
    init_seed(0, reproducibility=True)
    train, _, _ = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, get_model("SASRec")(config, train._dataset))
    if train._dataset.item_num != shape.items + 1:
        raise ValueError(f"wrong: {train._dataset.item_num - 1} items, expected {shape.items}")

    def run(i: int) -> Tensors:
        trainer.fit(train, verbose=False, saved=False)
        targets = len(train._dataset)
        return {"targets": torch.tensor(targets), "loss": torch.tensor(trainer.train_loss_dict[0] / len(train))}

    return Call(run, detail=partial(_targets, inputs))


def rectools_sasrec(shape: Shape, inputs: Tensors) -> Call:
    """RecTools' own training loop, one epoch a call: sessions padded to 50, full cross-entropy at every place.

    `fit_partial` processes the interactions anew at every call, which is no training: it makes the model ready here,
    and a call does what it does afterwards.
    """
    import pandas as pd
    from pytorch_lightning import Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    sessions = _sessions(inputs)
    start = pd.Timestamp("2026-01-01")
    rows = [
        (number, item, 1.0, start + pd.Timedelta(seconds=time))
        for number, session in enumerate(sessions)
        for time, item in enumerate(session)
    ]
    columns = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    dataset = Dataset.construct(pd.DataFrame(rows, columns=columns))
    targets = int(_targets(inputs)["targets"])

    def quiet_trainer() -> Trainer:
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)

    model = SASRecModel(
        n_factors=shape.width,
        n_blocks=LAYERS,
        n_heads=HEADS,
        dropout_rate=DROPOUT,
        session_max_len=MAX_LENGTH,
        batch_size=max(1, shape.sessions * len(sessions) // targets),  # in sessions
        loss="softmax",
        lr=RATE,
        train_min_user_interactions=2,
        get_trainer_func=quiet_trainer,
    )
    model.fit_partial(dataset, min_epochs=1, max_epochs=1)
    trainer, batches = model.fit_trainer, model.data_preparator.get_dataloader_train()

    def run(i: int) -> Tensor:
        trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_progress.current.ready + 1
        model.lightning_model.train()
        trainer.fit(model.lightning_model, batches)
        loss: Tensor = trainer.callback_metrics["train_loss"]
        return loss

    def read(loss: Tensor, rows: Tensor) -> Tensors:
        trained = sum((batch["y"] != 0).sum() for batch in batches)
        return {"targets": torch.as_tensor(trained), "loss": loss}

    return Call(run, read, partial(_targets, inputs))


def _targets(inputs: Tensors) -> dict[str, float]:
    return {"targets": float(len(inputs["items"]) - len(inputs["offsets"]) + 1)}


TASKS = {
    "RePlay CESampled": Task(replay_sampled, compare_loss, ("replay.nn.loss",), package="replay-rec"),
    "RecBole SASRec": Task(recbole_sasrec, compare_pass, ("recbole.trainer",), package="recbole"),
    "RecTools SASRec": Task(
        rectools_sasrec, compare_pass, ("rectools.models", "pytorch_lightning"), package="rectools"
    ),
}


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    name, shape, paths, memory = connection.recv()
    limit_memory(memory)
    serve(connection, TASKS[name], Shape(**shape), (Path(paths[0]), Path(paths[1])))


if __name__ == "__main__":
    main()
