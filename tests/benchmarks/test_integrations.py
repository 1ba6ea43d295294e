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


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are measured in this process; without faiss, which only make integrations installs."""
    monkeypatch.setattr(mining, "IMPLEMENTATIONS", {"torch": "stock", "ours": "ours"})
    monkeypatch.setattr(mining, "RANGE_MAX", 200)

    def mine(_module: str, *options: str) -> dict[str, float]:
        given = dict(zip(options[::2], options[1::2], strict=True))
        sizes = int(given["--queries"]), int(given["--documents"])
        return mining.mine(given["--mine"], *sizes, given["--negatives"], given["--embeddings"] == "integers")

    def train(_module: str, *options: str) -> dict[str, float]:
        given = dict(zip(options[::2], options[1::2], strict=True))
        return sasrec.train(given["--train"], Path(given["--data"]), int(given["--seed"]), int(given["--epochs"]))

    monkeypatch.setattr(mining, "call", mine)
    monkeypatch.setattr(sasrec, "call", train)


def test_mining_finds_the_same_and_says_so(in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        (section,) = mining.sections(20, 400, 1)
        assert [row[0] for row in section["rows"]] == ["stock", "ours"]
        assert section["rows"][1][2] == "1.0" and section["rows"][0][5] == "0"
        assert "20 queries, 400 embeddings" in section["text"] and "count the 2,000 negatives" in section["text"]
        monkeypatch.setattr(mining, "worst_difference", lambda *_, integers=False: 0.1)
        with pytest.raises(SystemExit, match=r"ids differ whose scores are 0\.1 apart"):
            mining.sections(20, 400, 1)
        monkeypatch.setattr(mining, "worst_difference", lambda *_, integers=False: float(integers))
        with pytest.raises(SystemExit, match=r"scores of integer-valued embeddings are 1\.0 apart"):
            mining.sections(20, 400, 1)
    finally:
        torch.set_num_threads(threads)


def test_every_way_of_training_is_measured(
    in_this_process: None, shop: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sasrec, "STOP", 100)
    (section,) = sasrec.sections(shop.path, 2, 1, 1)
    assert len(section["rows"]) == 4 and all("±" in row[2] for row in section["rows"])
    assert "2 seeds" in section["text"] and integrations.as_markdown(section)


def test_a_page_holds_what_was_measured_before_with_day_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section: dict[str, Any] = {"heading": "H", "text": "T.", "header": [""], "rows": [["ours"]]}
    page = tmp_path / "page.md"
    page.write_text(f"above\n{integrations.MARK}\nold\n<!-- end -->\nbelow\n")
    monkeypatch.setattr("sys.argv", ["x", "--raw", "none", "--out", str(tmp_path), "--page", str(page)])
    before, *others = (tmp_path / f"{module}.json" for module in integrations.MEASUREMENTS)
    before.write_text(json.dumps([section]))

    def measure(command: list[str], check: bool) -> None:
        Path(command[command.index("--json") + 1]).write_text(json.dumps([section]))

    monkeypatch.setattr(integrations.subprocess, "run", measure)
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
