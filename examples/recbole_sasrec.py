"""RecBole's SASRec before and after: `.venv-recommenders/bin/python examples/recbole_sasrec.py`.

"After" is another import and one config key. Each runs in a process of its own, so that the peak memory is comparable.
"""

import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

V, SESSIONS = 30_000, 2_000


def peak_mib() -> float:
    """The most memory that this process has held so far, as the system counts it (in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(fast: bool, folder: str) -> str:
    warnings.simplefilter("ignore")
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    if fast:
        from alterrec_fast.integrations.recbole import SASRec, Trainer
    else:
        from recbole.model.sequential_recommender import SASRec
        from recbole.trainer import Trainer

    os.chdir(folder)  # RecBole leaves logs in the working directory
    settings = {
        "data_path": folder,
        "USER_ID_FIELD": "session_id",
        "load_col": {"inter": ["session_id", "item_id", "timestamp"], "item": ["item_id"]},
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": 8,
        "train_batch_size": 1024,
        "learning_rate": 0.005,
        "epochs": 2,
        "metrics": ["NDCG"],
        "valid_metric": "NDCG@10",
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "alterrec_fast": {"loss": "full"},  # or {"loss": "sampled", "negatives": 2048}; read by our SASRec only
    }
    config = Config(SASRec, "shop", config_dict=settings)
    init_seed(1, reproducibility=True)
    train, valid, test = data_preparation(config, create_dataset(config))
    before, start = peak_mib(), time.perf_counter()
    trainer = Trainer(config, SASRec(config, train.dataset))
    trainer.fit(train, valid, saved=False, verbose=False)
    ndcg = trainer.evaluate(test, load_best_model=False)["ndcg@10"]
    return f"{time.perf_counter() - start:6.1f} s  {peak_mib() - before:6.0f} MiB  NDCG@10 {ndcg:.4f}"


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shop = Path(folder) / "shop"
        shop.mkdir()
        follows, item = rng.integers(0, 500, V), rng.integers(0, 500, SESSIONS)
        lines = ["session_id:token\titem_id:token\ttimestamp:float"]
        for place in range(6):
            lines += [f"{session}\t{item[session]}\t{place}" for session in range(SESSIONS)]
            item = np.where(rng.random(SESSIONS) < 0.9, follows[item], rng.integers(0, V, SESSIONS))
        (shop / "shop.inter").write_text("\n".join(lines))
        (shop / "shop.item").write_text("\n".join(["item_id:token", *map(str, range(V))]))
        for fast in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                print("after " if fast else "before", process.apply(run, (fast, folder)))


if __name__ == "__main__":
    main()
