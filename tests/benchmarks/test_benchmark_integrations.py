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
from alterrec_fast.benchmarks import integrations, integrations_mining, integrations_sasrec

from alterrec_fast.data.sessions import Dataset


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants run in this process; without faiss, which only make integrations installs."""
    monkeypatch.setattr(integrations_mining, "CONTESTANTS", {"torch": "stock", "ours": "ours"})
    monkeypatch.setattr(integrations_mining, "RANGE_MAX", 200)

    def mine(_module: str, *options: str) -> dict[str, float]:
        given = dict(zip(options[::2], options[1::2], strict=True))
        sizes = int(given["--queries"]), int(given["--documents"])
        integers = given.get("--embeddings") == "integers"
        return integrations_mining.contestant(given["--contestant"], *sizes, given["--negatives"], integers)

    def train(_module: str, *options: str) -> dict[str, float]:
        given = dict(zip(options[::2], options[1::2], strict=True))
        numbers = int(given["--seed"]), int(given["--epochs"])
        return integrations_sasrec.contestant(given["--contestant"], Path(given["--data"]), *numbers)

    monkeypatch.setattr(integrations_mining, "call", mine)
    monkeypatch.setattr(integrations_sasrec, "call", train)


def test_mining_finds_the_same_and_says_so(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        (section,) = integrations_mining.sections(20, 400, 1)
        assert [row[0] for row in section["rows"]] == ["stock", "ours"]
        assert section["rows"][1][2] == "1.0" and section["rows"][0][5] == "0"
        assert "20 queries, 400 embeddings" in section["text"] and "count the 2,000 negatives" in section["text"]
        assert "integer-valued embeddings all found the same" in section["text"]
        monkeypatch.setattr(integrations_mining, "worst_difference", lambda *_, integers=False: 0.1)
        with pytest.raises(SystemExit, match=r"ids differ whose scores are 0\.1 apart"):
            integrations_mining.sections(20, 400, 1)
        monkeypatch.setattr(integrations_mining, "worst_difference", lambda *_, integers=False: float(integers))
        with pytest.raises(SystemExit, match=r"scores of integer-valued embeddings are 1\.0 apart"):
            integrations_mining.sections(20, 400, 1)
    finally:
        torch.set_num_threads(threads)


def test_every_way_of_training_is_measured(here: None, shop: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations_sasrec, "STOP", 100)
    (section,) = integrations_sasrec.sections(shop.path, 2, 1, 1)
    assert len(section["rows"]) == 4 and all("±" in row[2] for row in section["rows"])
    assert "table" not in section and "2 seeds" in section["text"]
    integrations.markdown(section)


def test_a_page_holds_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section: dict[str, Any] = {"heading": "H", "text": "T.", "header": ["", "s"], "rows": [["ours", "1"]]}
    page = tmp_path / "page.md"
    page.write_text(f"above\n{integrations.MARK}\nold\n<!-- end -->\nbelow\n")
    for measurement in integrations.MEASUREMENTS:
        (tmp_path / f"{measurement.module}.json").write_text(json.dumps([section]))
    monkeypatch.setattr("sys.argv", ["x", "--raw", "none", "--out", str(tmp_path), "--page", str(page)])
    integrations.main()
    table = "## H\n\nT.\n\n|  | s |\n| --- | --- |\n| ours | 1 |\n"
    assert table in page.read_text() and "old" not in page.read_text() and "below" in page.read_text()
    assert table in capsys.readouterr().out
    with pytest.raises(ValueError, match="every row must have 1 cells"):
        integrations.markdown({**section, "header": [""]})


def test_what_is_measured_keeps_its_day_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section: dict[str, Any] = {"heading": "H", "text": "T.", "header": [""], "rows": [["ours"]]}
    monkeypatch.setattr("sys.argv", ["x", "--raw", "none", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
    (tmp_path / "page.md").write_text(f"{integrations.MARK}\n<!-- end -->\n")
    kept, *others = (tmp_path / f"{measurement.module}.json" for measurement in integrations.MEASUREMENTS)
    kept.write_text(json.dumps([section]))

    def measure(command: list[str], check: bool) -> None:
        Path(command[command.index("--json") + 1]).write_text(json.dumps([section]))

    monkeypatch.setattr(integrations.subprocess, "run", measure)
    monkeypatch.setattr(integrations.machine, "look", lambda threads: SimpleNamespace(processor="Abacus 3", cores=7))
    integrations.main()
    assert json.loads(kept.read_text()) == [section]
    for file in others:
        (made,) = json.loads(file.read_text())
        assert re.fullmatch(r"\d+ [A-Z][a-z]+ \d{4}, Abacus 3, 7 cores", made["measured"])
        assert integrations.markdown(made).startswith(f"## H\n\n{made['measured']}.\n\nT.\n")
    page = (tmp_path / "page.md").read_text()
    assert page.count("## H\n\nT.\n") == 1 and page.count(", Abacus 3, 7 cores.\n\nT.\n") == len(others)
    monkeypatch.undo()
    assert re.search(r"\d{4}, .+, \d+ cores$", integrations.here_and_now())


def test_memory_counts_from_where_it_was_made() -> None:
    """In a process of its own, where no other test's leavings are given back meanwhile."""
    code = (
        "import torch; from alterrec_fast.benchmarks.own_process import Memory; memory = Memory(); "
        "block = torch.ones(40 << 18); del block; print(memory.peak_mib(), Memory().peak_mib())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    peak, none = map(float, done.stdout.split())
    assert 35 < peak < 80 and none < 5  # 40 MiB
