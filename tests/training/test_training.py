"""Training: the plan of Algorithm 1, determinism, and runs that are killed, resumed, or out of disk."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

import alterrec_fast as af
from alterrec_fast.data.sessions import DataError, Dataset, Sessions
from alterrec_fast.data.shop import ShopConfig, write_shop
from alterrec_fast.data.text import SentenceEncoder
from alterrec_fast.errors import FileError
from alterrec_fast.run import RunError, seed_runs
from alterrec_fast.systems import epochs
from alterrec_fast.trained import evaluate_run
from alterrec_fast.training import checkpoint
from alterrec_fast.training.alternate import BEST, LAST, DivergedError, Trainer
from alterrec_fast.training.config import VARIANTS, Config, ConfigError, from_mapping, read_toml

SMALL: dict[str, Any] = {
    "text_model": "packaged",
    "width": 16,
    "layers": 1,
    "m_random": 1,
    "m_gap": 1,
    "m_max": 4,
    "k1": 2,
    "k2": 60,
    "batch_targets": 128,
}
VIEWS: dict[str, tuple[str, ...]] = {  # of systems without both parts
    "text_only": ("text",),
    **dict.fromkeys(("nfrec_sum", "fdsa", "fdsa_random_features"), ()),
    **dict.fromkeys(("id_only", "sasrec", "gru4rec", "core", "esasrec", "llm2sasrec"), ("id",)),
}
TIMES = ("seconds", "targets_per_second", "validation_seconds", "peak_memory")


def small(shop: Dataset, out: Path, **changes: Any) -> Config:
    return from_mapping({**SMALL, "data": str(shop.path), "out": str(out), **changes}, "test")


def history(run: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl without what depends on the machine's pace."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same_run(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    for name in ("metrics.json", BEST, LAST):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_plan_is_algorithm_1() -> None:
    plan = list(epochs(Config(m_random=2, m_gap=2, m_max=12)))
    assert [epoch.student for epoch in plan] == ["id"] * 2 + ["text"] * 2 + (["id"] * 2 + ["text"] * 2) * 2
    assert [epoch.teacher for epoch in plan] == [None] * 4 + (["text"] * 2 + ["id"] * 2) * 2
    assert [epoch.own for epoch in plan] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    assert [epoch.number for epoch in plan] == list(range(1, 13))
    assert all(epoch.teacher is None for epoch in epochs(Config(variant="random")))
    assert {epoch.student for epoch in epochs(Config(variant="id_only"))} == {"id"}


@pytest.mark.parametrize(
    ("items", "expected"),
    [(40_258, (20, 20_000)), (20_000, (20, 20_000)), (3786, (6, 1893)), (14, (6, 7)), (13, (3, 6)), (5000, (6, 2000))],
)
def test_slice_bounds_follow_the_catalog(items: int, expected: tuple[int, int]) -> None:
    assert Config().slice_bounds(items) == expected
    assert Config(k1=5, k2=10**6).slice_bounds(items) == (5, items)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_reports(variant: str, shop: Dataset, tmp_path: Path) -> None:
    result = af.train(small(shop, tmp_path / "run", variant=variant, m_max=6))
    lines = history(tmp_path / "run")
    assert [line["epoch"] for line in lines] == list(range(7))
    assert all(line["padding"] <= 1.1 for line in lines[1:])
    test = result.metrics["test"]
    assert test["fused"]["hits@20"] > 0.15  # 20 of 200 items by chance: 0.1
    assert tuple(view for view in ("id", "text") if test[view] is not None) == VIEWS.get(variant, ("id", "text"))
    assert ("loss_id" in lines[1]) == ("loss_text" in lines[1]) == (variant == "nfrec_concat")
    groups = result.metrics["groups"]
    assert list(groups) == ["0-30", "31-100", "101-300", "301+"]
    assert sum(group["share"] for group in groups.values()) == pytest.approx(1.0)
    hits = sum(g["targets"] * g["fused"]["hits@20"] for g in groups.values() if g["fused"])
    assert hits / sum(g["targets"] for g in groups.values()) == pytest.approx(test["fused"]["hits@20"])
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_same_seed_same_run_and_the_users_random_state_is_left_alone(shop: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name in ("a", "b"):
        af.train(small(shop, tmp_path / name))
    assert torch.equal(torch.random.get_rng_state(), before)
    same_run(tmp_path / "a", tmp_path / "b")
    af.train(small(shop, tmp_path / "c", seed=1))
    assert history(tmp_path / "a") != history(tmp_path / "c")


def test_a_run_trained_on_a_gpu_opens_on_a_machine_without_one(
    shop: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    af.train(small(shop, tmp_path / "run", variant="id_only", m_max=2, device="cpu"))
    expected = af.load(tmp_path / "run").evaluate()
    file = tmp_path / "run" / "config.toml"
    there = file.read_text().replace('"cpu"', '"cuda:99"').replace('backend = "auto"', 'backend = "triton"')
    file.write_text(there)
    assert af.load(tmp_path / "run").evaluate().metrics() == expected.metrics()
    assert "'cuda:99' is not on this machine" in caplog.text


def test_a_run_stopped_within_an_epoch_goes_on_from_its_step(
    shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(shop, tmp_path / "whole", variant="alterrec_aug", hard_fraction=0.5)
    ends_as_if_never_broken_off(config, 31, monkeypatch)


def ends_as_if_never_broken_off(config: Config, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step; a second run is broken off at this step, counted over epochs, and resumed."""
    whole, calls = Path(config.out), 0
    broken = whole.with_name("broken")
    config = config.replace(checkpoint_minutes=1e-9)
    af.train(config)
    original = Trainer.gradients

    def failing(self: Trainer, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradients", failing)
        with pytest.raises(KeyboardInterrupt):
            af.train(config.replace(out=str(broken)))
    assert checkpoint.load(broken / LAST)[1]["step"] > 0
    af.train(config.replace(out=str(broken)), resume=True)
    same_run(whole, broken)


def start(config: Config, resume: bool) -> subprocess.Popen[bytes]:
    values = {name: value for name, value in config.__dict__.items() if value is not None}
    program = (
        "import json, sys, torch, alterrec_fast as af\n"
        "from alterrec_fast.training.config import from_mapping\n"
        "torch.set_num_threads(1)\n"
        "af.train(from_mapping(json.loads(sys.argv[1]), 'test'), resume=sys.argv[2] == 'True')\n"
    )
    return subprocess.Popen([sys.executable, "-c", program, json.dumps(values), str(resume)])


def written(run: Path) -> tuple[bool, int]:
    """Changes as soon as a run that was started, or resumed, is under way."""
    history = run / "history.jsonl"
    return (run / "config.toml").exists(), history.stat().st_mtime_ns if history.exists() else 0


def test_a_run_killed_at_random_moments_ends_the_same(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "whole", checkpoint_minutes=0.001, m_max=8)
    process, begun = start(config, False), 0.0
    while process.poll() is None:
        if not begun and written(tmp_path / "whole")[0]:
            begun = time.monotonic()
        time.sleep(0.01)
    assert process.returncode == 0
    span = time.monotonic() - begun
    killed = config.replace(out=str(tmp_path / "killed"))
    moments, kills = random.Random(0), 0
    for attempt in range(40):
        before = written(tmp_path / "killed")
        process = start(killed, resume=attempt > 0)
        # A kill comes in the first or second epoch after the start, wherever in it chance has it: by progress and not
        # by the clock, so that there are at least three kills on a machine of any pace.
        for _ in range(moments.randint(1, 2)):
            while process.poll() is None and written(tmp_path / "killed") == before:
                time.sleep(0.002)
            before = written(tmp_path / "killed")
        time.sleep(moments.uniform(0.0, span / 16) if kills < 4 else 0.0)
        if process.poll() is None and kills < 4:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills >= 3
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".*.draft"))  # the drafts of killed writes are swept away


@pytest.mark.parametrize("place", ["in the settings", "in the generated shop", "in a checkpoint"])
def test_a_kill_while_a_file_is_written_is_forgiven(place: str, shop: Dataset, tmp_path: Path) -> None:
    """Runs stand as such kills leave them: with the draft of one file, and without the files that come after it."""
    run = tmp_path / "run"
    config = small(shop, run, variant="id_only", m_max=1, m_random=0)
    if place == "in the settings":
        run.mkdir()
        (run / ".config.toml-k1ll3d.draft").write_text("data =")
    elif place == "in the generated shop":
        config = config.replace(data="", demo=True)
        (run / ".data-k1ll3d.draft" / "train").mkdir(parents=True)
    else:
        af.train(config.replace(m_max=1))
        (run / "metrics.json").unlink()
        (run / "checkpoints" / ".last.safetensors-k1ll3d.draft").write_bytes(b"half")
    af.train(config, resume=True)
    assert (run / "metrics.json").exists()
    assert not list(run.rglob(".*.draft"))


def test_a_run_knows_its_data(shop: Dataset, tmp_path: Path) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shop.path, folder)
    config = small(shop, run, data=str(folder), variant="id_only", m_max=1, m_random=0)
    af.train(config)
    (run / "metrics.json").unlink()
    write_shop(folder, ShopConfig(num_items=200, num_sessions=400, seed=1), overwrite=True)  # as many items, others
    with pytest.raises(DataError, match="made anew"):
        af.train(config, resume=True)
    with pytest.raises(DataError, match="made anew"):
        af.load(run)


def test_a_run_keeps_the_revision_of_its_text_model(
    shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = ["1" * 40]
    asked: list[str] = []

    def features(dataset: Dataset, encoder: SentenceEncoder) -> np.ndarray:
        asked.append(f"{encoder.source}@{encoder.revision}")
        return np.full((dataset.num_items, 4), float(asked[-1][-1]), np.float32)

    monkeypatch.setattr("alterrec_fast.data.text.pin_model", lambda model: f"{model}@{newest[0]}")
    monkeypatch.setattr("alterrec_fast.data.text.item_features", features)
    config = small(shop, tmp_path / "run", variant="text_only", text_model="org/model", m_max=1, m_random=0)
    first = af.train(config).metrics
    (tmp_path / "run" / "metrics.json").unlink()
    newest[0] = "2" * 40
    assert af.train(config, resume=True).metrics == first
    assert af.load(tmp_path / "run").evaluate().metrics() == first["test"]
    assert asked == [f"org/model@{'1' * 40}"] * 3
    with pytest.raises(RunError, match="text_model"):
        af.train(config.replace(text_model="org/other"), resume=True)


def test_a_run_may_be_moved_with_its_shop(tmp_path: Path) -> None:
    config = from_mapping({**SMALL, "demo": True, "out": str(tmp_path / "here"), "variant": "id_only"}, "test")
    before = af.train(config.replace(m_max=2)).metrics
    (tmp_path / "here").rename(tmp_path / "there")
    model = af.load(tmp_path / "there")
    assert model.evaluate().metrics() == before["test"]
    assert not (tmp_path / "here").exists()


def test_scores_that_are_not_finite_end_a_run_with_a_word_of_advice(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run", variant="id_only", lr_id=1e38)
    with pytest.raises(DivergedError, match=r"epoch 1, step \d+: .*lower learning rates"):
        af.train(config)
    assert "NaN" not in (tmp_path / "run" / "history.jsonl").read_text()


def test_no_checkpoint_holds_losses_that_are_not_finite(
    shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU no step looks at its scores, so that a checkpoint within the epoch is the first to meet the NaN."""
    monkeypatch.setattr(Trainer, "stepper", lambda *_: lambda batch: ({"loss": torch.tensor(torch.nan)}, 1))
    config = small(shop, tmp_path / "run", variant="id_only", checkpoint_minutes=1e-9)
    with pytest.raises(DivergedError, match=r"epoch 1, step 0: the loss is not finite; .*lower learning rates"):
        af.train(config)


@pytest.mark.parametrize(
    ("device", "message"), [("cdua", "'cdua' is not there"), ("meta", "must be auto, cpu"), ("cuda:99", "'cuda:99'")]
)
def test_a_device_that_is_not_there_is_named(device: str, message: str, shop: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        af.train(small(shop, tmp_path / "run", variant="id_only", device=device))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_every_split_is_needed(name: str, shop: Dataset, tmp_path: Path) -> None:
    splits = {split: shop.split(split) for split in ("train", "validation", "test")}
    splits[name] = Sessions(np.empty(0, np.int32), np.zeros(1, np.int64))
    data = Dataset.write(tmp_path / "data", splits, shop.items, [], {})
    with pytest.raises(DataError, match=f"the {name} split is empty"):
        af.train(small(data, tmp_path / "run", variant="id_only"))


def test_a_slice_cut_at_the_catalogs_end_is_said(
    shop: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    af.train(small(shop, tmp_path / "run", variant="id_only", m_max=1, m_random=0, k2=5000))
    assert "k2 = 5000 lies beyond the catalog: hard negatives are ranks [2, 200)" in caplog.text


def limit_file_size() -> None:
    """Writes beyond 60 kB fail from here on, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_loses_nothing(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run")
    af.train(config.replace(m_max=3))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in (BEST, LAST, "history.jsonl")}
    program = (
        "import sys; from pathlib import Path; from alterrec_fast.training import checkpoint\n"
        "from alterrec_fast.errors import FileError\n"
        "tensors, state = checkpoint.load(Path(sys.argv[1]))\n"
        "try: checkpoint.save(Path(sys.argv[1]), tensors, state)\n"
        "except FileError as error: print(error); sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run" / LAST)],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 3, done.stderr
    assert "could not be written" in done.stdout and "untouched" in done.stdout
    for name, content in before.items():
        assert (tmp_path / "run" / name).read_bytes() == content
    assert not list((tmp_path / "run").rglob(".*.draft"))


def test_a_run_directory_is_not_taken_twice(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run")
    first = af.train(config)
    with pytest.raises(RunError, match="--resume"):
        af.train(config)
    assert af.train(config, resume=True).metrics == first.metrics
    with pytest.raises(RunError, match=r"width = 16 \(now 32\)"):
        af.train(config.replace(width=32), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt and no run"):
        af.train(config.replace(out=str(tmp_path / "other")))
    with pytest.raises(FileError, match=r"nothing can be written there \(Not a directory\)"):
        af.train(config.replace(out=str(tmp_path / "other" / "notes.txt")))
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(RunError, match="run over one seed"):
        af.train_seeds(config, [0, 1], resume=True)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_two_processes_do_not_train_in_one_place(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run", variant="id_only", m_max=1, m_random=0)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(RunError, match="another process"):
        af.train(config)
    af.train(config)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_made_meanwhile_is_not_trained_over(
    resume: bool, shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run begins and ends after the place was looked at, and before it is locked."""
    config = small(shop, tmp_path / "run", variant="id_only", m_max=1, m_random=0)
    with monkeypatch.context() as patch:

        def features(*_: object) -> None:
            patch.undo()
            af.train(config.replace(width=32))

        patch.setattr("alterrec_fast.run.sentence_features", features)
        with pytest.raises(RunError, match=r"width = 32 \(now 16\)" if resume else "holds a run already"):
            af.train(config, resume=resume)
    assert read_toml(tmp_path / "run" / "config.toml")["width"] == 32
    assert af.load(tmp_path / "run").recommender.state_dict()["networks.id.items.table"].shape[1] == 32


def test_two_processes_do_not_train_seeds_in_one_place(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run", variant="id_only", m_max=1, m_random=0)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(RunError, match="another process"):
        af.train_seeds(config, [0, 1])


def test_the_files_of_a_run_follow_the_umask(shop: Dataset, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        af.train(small(shop, tmp_path / "run", variant="id_only", m_max=1, m_random=0))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*")}
    assert modes.pop("checkpoints") == 0o750
    assert set(modes.values()) == {0o640}, modes


def test_several_seeds_give_mean_and_deviation(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run", variant="id_only", m_max=2)
    result = af.train_seeds(config, [0, 1])
    single = [json.loads((tmp_path / "run" / f"seed-{s}" / "metrics.json").read_text()) for s in (0, 1)]
    values = [one["test"]["fused"]["hits@20"] for one in single]
    assert result.metrics["test"]["fused"]["hits@20"] == pytest.approx(sum(values) / 2)
    assert result.metrics["test_std"]["fused"]["hits@20"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert result.metrics["test"]["text"] is None
    assert af.train_seeds(config, [0, 1], resume=True).metrics == result.metrics
    again = evaluate_run(tmp_path / "run")
    assert again == {key: result.metrics[key] for key in ("test", "test_std", "groups", "groups_std")}
    one = af.train_seeds(config, [1], resume=True)
    assert evaluate_run(tmp_path / "run")["test"] == one.metrics["test"] == single[1]["test"]
    with pytest.raises(RunError, match=r"holds .*seed-0.* already"):
        af.train_seeds(config, [0, 1])
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        af.train_seeds(config.replace(out=str(tmp_path / "other")), [0, -1])
    assert not (tmp_path / "other").exists()


def test_a_device_that_fails_is_not_called_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    with pytest.raises((AssertionError, RuntimeError)) as failure:
        checkpoint.load(tmp_path / "a.safetensors", "cuda:99")
    assert not isinstance(failure.value, FileError)


def test_seeds_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for seed in (10, 2, 1):
        (tmp_path / f"seed-{seed}").mkdir()
    (tmp_path / "seed-1 (copy)").mkdir()
    (tmp_path / "seed-2.bak").mkdir()
    assert [path.name for path in seed_runs(tmp_path)] == ["seed-1", "seed-2", "seed-10"]
    assert seed_runs(tmp_path / "seed-1") == [tmp_path / "seed-1"]


def test_patience_ends_a_run_and_the_best_epoch_is_kept(shop: Dataset, tmp_path: Path) -> None:
    config = small(shop, tmp_path / "run", variant="id_only", lr_id=1e-9, m_max=20, patience=3, m_random=0)
    result = af.train(config)
    lines = history(tmp_path / "run")
    scores = [line["validation"]["fused"]["ndcg@20"] for line in lines]
    assert result.metrics["best_epoch"] == scores.index(max(scores))
    assert len(lines) == result.metrics["best_epoch"] + 4


def test_recommend_and_evaluate(shop: Dataset, tmp_path: Path) -> None:
    result = af.train(small(shop, tmp_path / "run"))
    model = af.load(tmp_path / "run")
    ids = shop.items["item_id"].to_list()
    best = model.recommend(ids[:2], n=5)
    assert len(best) == len({one.item for one in best}) == 5
    assert not {one.item for one in best} & set(ids[:2])
    assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)
    assert best[0].title == shop.items["title"][ids.index(best[0].item)]
    assert len(model.recommend(ids[:2], n=500)) == 198
    assert len(model.recommend(ids[:2], n=500, repeats=True)) == 200
    with pytest.raises(ValueError, match="unknown items 'nothing'"):
        model.recommend(["nothing"])
    with pytest.raises(ValueError, match="empty session"):
        model.recommend([])
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        model.recommend(ids[:2], n=-1)
    assert model.recommend(ids[:2], n=0) == []
    assert model.evaluate("test").metrics() == result.metrics["test"]
    assert model.evaluate("validation").metrics() == result.metrics["validation"]
    with pytest.raises(RunError, match="no trained model"):
        af.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widht": 3}, "unknown setting 'widht'"),
        ({"width": "wide"}, "width: .*'wide'"),
        ({"width": 15}, "multiple of heads, got 15 and 2"),
        ({"k1": 5}, "k1 and k2 go together"),
        ({"k1": 5, "k2": 5}, "k1 = 5 and k2 = 5"),
        ({"m_max": 3, "m_random": 2}, "m_max must be at least 2"),
        ({"hard_fraction": 2}, r"hard_fraction must lie in \[0, 1\], got 2"),
        ({"variant": "alter"}, "variant"),
        ({"monitor": "auc"}, "'auc'"),
        ({"demo": True, "data": "x"}, "demo"),
        ({"group_edges": [3, 2]}, "group_edges must rise"),
        ({"group_edges": [-3, 2]}, "group_edges must be at least 0"),
        ({"weight_decay": "nan"}, "weight_decay must be at least 0, got nan"),
        ({"positive_weight": "inf"}, "positive_weight must be finite, got inf"),
        ({"batch_targets": 10**20}, "batch_targets must be at most"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(settings, "file.toml")


def test_config_survives_toml(tmp_path: Path) -> None:
    config = Config(data="x", k1=3, k2=9, precision="bf16", group_edges=(1, 2))
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert from_mapping(read_toml(tmp_path / "config.toml"), "file") == config
    with pytest.raises(FileError, match=r"missing\.toml"):
        read_toml(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("width = ")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(tmp_path / "bad.toml")


def test_damaged_checkpoints_are_named(shop: Dataset, tmp_path: Path) -> None:
    af.train(small(shop, tmp_path / "run", m_max=2))
    path = tmp_path / "run" / BEST
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileError, match=r"best\.safetensors"):
        af.load(tmp_path / "run")
