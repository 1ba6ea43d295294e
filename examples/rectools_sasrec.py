"""RecTools' SASRec before and after: `.venv-recommenders/bin/python examples/rectools_sasrec.py`.

"After" is another loss and the Lightning module that has it. Each runs in a process of its own, so that the peak memory
is comparable.
"""

import logging
import multiprocessing
import resource
import time
import warnings

import numpy as np

V, SESSIONS = 30_000, 4_000
EPOCHS = 2


def peak_mib() -> float:
    """The most memory that this process has held so far, as the system counts it (in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sessions() -> tuple[np.ndarray, np.ndarray]:
    """(SESSIONS, 6) items, most of which follow from the one before, and the item that comes next."""
    rng = np.random.default_rng(0)
    follows, items = rng.integers(0, 500, V), [rng.integers(0, V, SESSIONS)]
    for _ in range(6):
        items.append(np.where(rng.random(SESSIONS) < 0.9, follows[items[-1]], rng.integers(0, V, SESSIONS)))
    return np.stack(items[:-1], axis=1), items[-1]


def run(fast: bool) -> str:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import pandas as pd
    from pytorch_lightning import Trainer, seed_everything
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    from alterrec_fast.integrations.rectools import FastLightningModule

    def trainer() -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(max_epochs=EPOCHS, accelerator="cpu", enable_model_summary=False, **quiet)

    items, following = sessions()
    users, days = np.indices(items.shape).reshape(2, -1)
    day = pd.Timestamp("2026-01-01") + pd.to_timedelta(days, unit="D")
    frame = {Columns.User: users, Columns.Item: items.ravel(), Columns.Weight: 1.0, Columns.Datetime: day}
    dataset = Dataset.construct(pd.DataFrame(frame))
    # loss="slice" and lightning_module_kwargs={"start": 20, "stop": 2000}: against hard negatives of its own ranking
    how = {"loss": "full", "lightning_module_type": FastLightningModule} if fast else {"loss": "softmax"}
    before, start = peak_mib(), time.perf_counter()
    seed_everything(1, verbose=False)
    model = SASRecModel(
        n_factors=64, session_max_len=6, batch_size=128, lr=0.005, epochs=EPOCHS, get_trainer_func=trainer, **how
    )
    model.fit(dataset)
    seconds, mib = time.perf_counter() - start, peak_mib() - before
    ranking = model.recommend(np.arange(SESSIONS), dataset, k=10, filter_viewed=False)
    rank = ranking[Columns.Rank][ranking[Columns.Item] == following[ranking[Columns.User]]]
    return f"{seconds:6.1f} s  {mib:6.0f} MiB  NDCG@10 {(1 / np.log2(rank + 1)).sum() / SESSIONS:.4f}"


def main() -> None:
    for fast in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            print("after " if fast else "before", process.apply(run, (fast,)))


if __name__ == "__main__":
    main()
