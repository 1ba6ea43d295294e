"""What every integration does where its library is missing; tests/integrations runs the libraries themselves."""

from __future__ import annotations

import importlib
import sys

import pytest


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
