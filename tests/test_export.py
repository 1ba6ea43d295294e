"""What a run exports ranks as the run does: by a plain product, Faiss and usearch, by torch.export and ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
from typer.testing import CliRunner
from usearch.index import search as usearch

import alterrec_fast as af
from alterrec_fast.cli import app
from alterrec_fast.data.sessions import Dataset
from alterrec_fast.errors import MissingExtraError
from alterrec_fast.export import export
from alterrec_fast.trained import TrainedModel
from alterrec_fast.training.config import from_mapping

SETTINGS = {"text_model": "packaged", "width": 16, "layers": 2, "m_random": 1, "m_max": 2, "k1": 2, "k2": 60}
K = 10


def trained(shop: Dataset, folder: Path, **changes: Any) -> TrainedModel:
    af.train(from_mapping({**SETTINGS, "data": str(shop.path), "out": str(folder), **changes}, "test"))
    return af.load(folder)


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alterrec_fast.run.write_report", lambda run: None)  # its figures take seconds
        yield


@pytest.fixture(scope="module")
def model(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return trained(shop, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "new" / "vectors"
    done = CliRunner().invoke(app, ["export", str(model.path), "--to", str(folder), "--onnx"])
    assert done.exit_code == 0, done.output
    return folder


def padded(shop: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Test sessions of any length as items (B, L), with item 199 as padding, and lengths (B,)."""
    sessions = [torch.from_numpy(shop.test[i].astype(np.int64))[-49:] for i in range(20)]
    lengths = torch.tensor([len(session) for session in sessions])
    return torch.nn.utils.rnn.pad_sequence(sessions, batch_first=True, padding_value=199), lengths


def test_every_search_engine_gives_the_runs_ranking(model: TrainedModel, exported: Path, shop: Dataset) -> None:
    items, lengths = padded(shop)
    ids = pl.read_parquet(exported / "items.parquet")["item_id"]
    sessions = pl.DataFrame(
        {"session_id": range(20), "item_id": [ids.gather(shop.test[i]).to_list() for i in range(20)]}
    )
    own = model.recommend_many(sessions, K, repeats=True)
    expected = own["item_id"].to_numpy().reshape(20, K)
    query = torch.export.load(exported / "session.pt2").module()(items, lengths)["fused"].detach().numpy()
    vectors = np.load(exported / "fused.npy", mmap_mode="r")

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, by_faiss = index.search(query, K)
    by_usearch = usearch(np.array(vectors), query, K, metric="ip", exact=True).keys
    by_product = np.argsort(-(query @ vectors.T), axis=1, kind="stable")[:, :K]
    for rows in (by_product, by_faiss, by_usearch):
        assert (ids.to_numpy()[rows.astype(np.int64)] == expected).all()
    np.testing.assert_allclose(scores.ravel(), own["score"].to_numpy(), rtol=1e-4, atol=1e-5)


def test_the_views_are_those_of_the_run(model: TrainedModel, exported: Path) -> None:
    views = model.recommender.views(model.recommender.vectors())
    about = json.loads((exported / "export.json").read_text())
    assert about == {
        "variant": "alterrec",
        "items": 200,
        "max_items": 49,
        "widths": {"fused": 32, "id": 16, "text": 16},
    }
    for name, view in views.items():
        np.testing.assert_array_equal(np.load(exported / f"{name}.npy"), view.catalog.detach().numpy())
    assert (exported / "session.pt2").stat().st_size < 400_000  # item encoders and sentence embeddings stay behind


def test_onnx_gives_the_same_queries(exported: Path, shop: Dataset) -> None:
    items, lengths = padded(shop)
    expected = torch.export.load(exported / "session.pt2").module()(items, lengths)
    session = onnxruntime.InferenceSession(exported / "session.onnx")
    found = session.run(list(expected), {"items": items.numpy(), "lengths": lengths.numpy()})
    for name, queries in zip(expected, found, strict=True):
        np.testing.assert_allclose(queries, expected[name].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["nfrec_concat", "id_only", "core", "fdsa", "sasrec"])
def test_other_systems_are_exported_too(variant: str, shop: Dataset, tmp_path: Path) -> None:
    model = trained(shop, tmp_path / "run", variant=variant, m_random=0, m_max=1, id_session="mean")
    assert CliRunner().invoke(app, ["export", str(model.path), "--to", str(tmp_path / "out")]).exit_code == 0
    items, lengths = padded(shop)
    queries = torch.export.load(tmp_path / "out" / "session.pt2").module()(items, lengths)
    best = (queries["fused"] @ torch.from_numpy(np.load(tmp_path / "out" / "fused.npy")).T).argmax(1)
    ids = shop.items["item_id"]
    for i in range(20):
        assert model.recommend(ids.gather(shop.test[i]).to_list(), 1, repeats=True)[0].item == ids[int(best[i])]


def test_what_is_refused(model: TrainedModel, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = CliRunner().invoke(app, ["export", str(model.path), "--to", str(exported)])
    assert again.exit_code == 1 and "is not an empty folder" in again.output
    monkeypatch.setattr("alterrec_fast.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnx and onnxscript: pip install 'alterrec-fast\[onnx\]'"):
        export(model, exported / "new", onnx=True)
