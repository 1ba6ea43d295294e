"""The measurements of make integrations at sizes that take seconds: that they run and say what they claim."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alterrec_fast.benchmarks.experiments import sasrec
from alterrec_fast.benchmarks.integrations import __main__ as integrations
from alterrec_fast.benchmarks.integrations import mining

from alterrec_fast.data.sessions import Dataset


def test_mining_finds_the_same_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without faiss, which only make integrations installs."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(mining, "IMPLEMENTATIONS", {"torch": "stock", "ours": "ours"})
    for name, value in {"RANGE_MAX": 200, "QUERIES": 20, "DOCUMENTS": 400, "ROUNDS": 1}.items():
        monkeypatch.setattr(mining, name, value)
    try:
        (section,) = mining.sections(tmp_path, tmp_path, mining.measure)
        assert [row[0] for row in section["rows"]] == ["stock", "ours"]
        assert section["rows"][1][2] == "1.0" and section["rows"][0][5] == "0"
        assert "20 queries, 400 embeddings" in section["text"] and "count the 2,000 negatives" in section["text"]
        monkeypatch.setattr(mining, "measure", lambda **_: {"seconds": 1.0, "cpu": 1.0, "mib": 1.0})
        monkeypatch.setattr(mining, "worst_difference", lambda ours, theirs, integers: 0.1)
        with pytest.raises(SystemExit, match=r"ids differ whose scores are 0\.1 apart"):
            mining.sections(tmp_path, tmp_path, mining.measure)
        monkeypatch.setattr(mining, "worst_difference", lambda ours, theirs, integers: float(integers))
        with pytest.raises(SystemExit, match=r"scores of integer-valued embeddings are 1\.0 apart"):
            mining.sections(tmp_path, tmp_path, mining.measure)
    finally:
        torch.set_num_threads(threads)


def test_every_way_of_training_is_measured(shop: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STOP": 100, "EPOCHS": 1, "SEEDS": 2, "JOBS": 1}.items():
        monkeypatch.setattr(sasrec, name, value)
    assert shop.path.name == "data"
    (section,) = sasrec.sections(shop.path, shop.path.parent / "scratch", sasrec.measure)
    assert len(section["rows"]) == 4 and all("±" in row[2] for row in section["rows"])
    assert "2 seeds" in section["text"] and integrations.as_markdown(section)


def test_a_job_is_measured_in_a_process(tmp_path: Path) -> None:
    job = {"name": "ours", "queries": 3, "documents": 300, "folder": str(tmp_path), "integers": False}
    answer = integrations.call(sys.executable, "integrations.mining", **job)
    assert set(answer) == {"seconds", "cpu", "mib"} and (tmp_path / "ours.npy").exists()
    with pytest.raises(SystemExit, match="ended with code 1"):
        integrations.call(sys.executable, "integrations.mining", name="no")


def test_a_page_holds_what_was_measured_before_with_day_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section: dict[str, Any] = {"heading": "H", "text": "T.", "header": [""], "rows": [["ours"]]}
    page = tmp_path / "page.md"
    page.write_text(f"above\n{integrations.MARK}\nold\n<!-- end -->\nbelow\n")
    monkeypatch.setattr("sys.argv", ["x", "--raw", "none", "--out", str(tmp_path), "--page", str(page)])
    before, *others = (tmp_path / f"{module}.json" for module in integrations.MEASUREMENTS)
    before.write_text(json.dumps([section]))

    module = SimpleNamespace(sections=lambda raw, folder, run: [section])
    monkeypatch.setattr(integrations.importlib, "import_module", lambda name: module)
    machine = SimpleNamespace(this=lambda threads: SimpleNamespace(processor="Abacus 3", cores=7))
    monkeypatch.setattr(integrations, "Machine", machine)
    integrations.main()
    assert json.loads(before.read_text()) == [section]
    for file in others:
        (made,) = json.loads(file.read_text())
        assert re.fullmatch(r"\d+ [A-Z][a-z]+ \d{4}, Abacus 3, 7 cores", made["measured"])
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert text.count("## H\n\nT.\n") == 1 and text.count(", Abacus 3, 7 cores.\n\nT.\n") == len(others)


def test_memory_counts_from_where_it_was_made() -> None:
    """In a process of its own, where no other test's leavings are given back meanwhile."""
    code = (
        "import torch; from alterrec_fast.benchmarks.harness.worker import Memory; memory = Memory(); "
        "block = torch.ones(40 << 18); del block; print(memory.peak_mib(), Memory().peak_mib())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    peak, none = map(float, done.stdout.split())
    assert 35 < peak < 80 and none < 5  # 40 MiB
