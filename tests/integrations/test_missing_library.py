"""What every integration does where its library is missing; tests/integrations/recommenders runs the libraries."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from alterrec_fast.integrations import need


@pytest.mark.parametrize(
    ("integration", "library", "install"),
    [
        ("recbole", "recbole", 'pip install "recbole==1.2.1" "numpy<2" "setuptools<81"'),
        ("rectools", "rectools", r'pip install "rectools\[torch\]==0.19.0"'),
        ("sentence_transformers", "datasets", 'pip install "sentence-transformers==6.2.0" datasets'),
    ],
)
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    integration: str, library: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"alterrec_fast.integrations.{integration}", raising=False)
    with pytest.raises(ImportError, match=f"needs {library}.*{install}"):
        importlib.import_module(f"alterrec_fast.integrations.{integration}")


def test_a_library_that_numpy_2_broke_is_named_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_library.py").write_text("raise AttributeError('`np.float_` was removed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"needs old_library, .* \(`np.float_` was removed\): pip install it"):
        need("old_library", "pip install it")
