"""A trained run for other search engines: item vectors with their ids, and a program that makes a session's query.

The folder holds, for each view (fused, and where the recommender has them id and text), VIEW.npy: (V, d) float32, an
item a row; items.parquet, the ids of the rows; session.pt2, `SessionQueries` by torch.export; and export.json, what
they are. The inner product of a session's query with the vectors of a view is the view's score.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alterrec_fast import files
from alterrec_fast.errors import MissingExtraError, RunError
from alterrec_fast.model.networks import ItemVectors, Recommender
from alterrec_fast.model.packing import Packing
from alterrec_fast.trained import TrainedModel

ONNX_BYTES = 2_000_000_000  # what protobuf holds, less the room for the encoder itself
ITEMS, PROGRAM, ONNX, ABOUT = "items.parquet", "session.pt2", "session.onnx", "export.json"


class SessionQueries(nn.Module):
    """items (B, L) int64, padded at the end, lengths (B,) int64 -> by view the sessions' queries, (B, d) float32."""

    def __init__(self, recommender: Recommender, vectors: dict[str, ItemVectors]):
        """vectors: of the recommender, in whose inputs the items of a session are looked up."""
        super().__init__()
        self.recommender = recommender
        self.views = recommender.views(vectors)
        for name, of_items in vectors.items():
            self.register_buffer(f"rows_{name}", of_items.inputs)

    def forward(self, items: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        b, length = items.shape
        token = torch.arange(b * length)
        packing = Packing(torch.arange(length).repeat(b), token, token, ((b, length),))
        rows = {name: self.get_buffer(f"rows_{name}") for name in self.recommender.networks}
        vectors = {name: ItemVectors(inputs, inputs) for name, inputs in rows.items()}  # no catalog is read
        queries = self.recommender.queries(vectors, items.flatten(), packing)
        last = torch.arange(b) * length + lengths - 1
        return {name: view.query(queries).index_select(0, last) for name, view in self.views.items()}


def export(model: TrainedModel, folder: Path, onnx: bool = False) -> None:
    """Writes the files of the module to `folder`, on the CPU whatever the run's device; each is whole or not there.

    onnx: also session.onnx. Raises RunError where the folder holds anything or the session encoder cannot be exported,
    MissingExtraError where `onnx` needs packages, FileError where a file cannot be written.
    """
    if onnx and (lacking := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]):
        raise MissingExtraError(f"ONNX needs {' and '.join(lacking)}: pip install 'alterrec-fast[onnx]'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not an empty folder; choose another --to")
    files.check_folder(folder)
    with torch.no_grad():
        vectors = {name: of_items.detached() for name, of_items in model.recommender.vectors().items()}
    encoders = [network.items for network in map(model.recommender.network, model.recommender.networks)]
    without_items = copy.deepcopy(model.recommender, {id(encoder): nn.Identity() for encoder in encoders})
    queries = SessionQueries(without_items.cpu(), vectors).eval()
    if onnx and (size := sum(of_items.inputs.nbytes for of_items in vectors.values())) > ONNX_BYTES:
        raise RunError(f"the item vectors take {size:,} bytes, but an ONNX file holds {ONNX_BYTES:,} at most")
    program = _program(queries, model)
    for name, view in queries.views.items():
        files.write_whole(folder / f"{name}.npy", partial(_save, view.catalog.numpy()))
    items = model.dataset.items.select("item_id", *model.dataset.text_columns[:1])
    files.write_whole(folder / ITEMS, lambda draft: items.write_parquet(draft))
    files.write_whole(folder / PROGRAM, lambda draft: _save_program(program, draft))
    if onnx:
        files.write_whole(folder / ONNX, lambda draft: _save_onnx(program, list(queries.views), draft))
    about = {
        "variant": model.config.variant,
        "items": model.dataset.num_items,
        "max_items": model.config.max_length - 1,
        "widths": {name: view.catalog.shape[1] for name, view in queries.views.items()},
    }
    files.write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def _program(queries: SessionQueries, model: TrainedModel) -> torch.export.ExportedProgram:
    b, length = torch.export.Dim("sessions", min=1), torch.export.Dim("items", min=1, max=model.config.max_length - 1)
    example = (torch.zeros(2, min(3, model.config.max_length - 1), dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    try:
        with torch.no_grad():
            return torch.export.export(queries, example, dynamic_shapes=({0: b, 1: length}, {0: b}))
    except Exception as error:  # torch.export has many ways to say that it cannot follow a program
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"the session encoder of {model.config.variant} cannot be exported ({cause})") from error


def _save(vectors: np.ndarray, draft: Path) -> None:
    with draft.open("wb") as file:
        np.save(file, vectors)


def _save_program(program: torch.export.ExportedProgram, draft: Path) -> None:
    with draft.open("wb") as file:
        torch.export.save(program, file)


def _save_onnx(program: torch.export.ExportedProgram, names: list[str], draft: Path) -> None:
    made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, output_names=names)
    assert made is not None
    made.save(str(draft))
