"""Every snippet of docs/tutorial.md, in order, with fewer items and sessions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.loss_helpers import needs_native

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
SMALLER = {
    "V = 1_000_000": "V = 3_000",
    "SESSIONS, BATCH = 20_000, 64": "SESSIONS, BATCH = 300, 16",
    "fullgraph=True)": 'fullgraph=True, backend="aot_eager")',  # the same graph, without its C++
}


@needs_native  # the last snippet's graph
def test_every_snippet_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = TUTORIAL.read_text(encoding="utf-8")
    for full, small in SMALLER.items():
        assert page.count(full) == 1
        page = page.replace(full, small)
    session: dict[str, Any] = {"__name__": "tutorial"}
    for snippet in re.finditer(r"```python\n(.*?)```", page, re.DOTALL):
        line = page[: snippet.start(1)].count("\n")
        exec(compile("\n" * line + snippet[1], str(TUTORIAL), "exec"), session)
    printed = capsys.readouterr().out
    assert printed.count("loss ") == 6 and "torch.Size([16, 20])" in printed
    model, batch = session["model"].eval(), (session["items"], session["target"])
    results = []
    for step in (session["step"], session["Step"]()):
        model.zero_grad()
        loss = step(*batch)
        loss.backward()
        results.append((loss, model.item.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])
    found, items = session["best"].indices, session["items"]
    assert not (found.unsqueeze(2) == items.unsqueeze(1)).any()
