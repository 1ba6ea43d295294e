"""Amazon-M2: locales, test files, printed arrays."""

from pathlib import Path

import pytest

from .common import NO_HOLDOUT, fails, ids, put, run

PRODUCTS = (
    "id,locale,title,price,brand,color,size,model,material,author,desc\n"
    'B1,UK,"Mug, ""blue""",1.5,Acme,,,,,,A mug\nB1,DE,Becher,2,Acme,,,,,,\nB2,UK,Tea,3,,,,,,,"two\nlines"\n'
)


def m2(folder: Path, count: int = 50, name: str = "sessions_train__csv", **files: str) -> Path:
    lines = ["next_item,locale,prev_items"]  # any column order
    for i in range(count):
        lines.append(f"B{i},UK,\"['A{i}' 'B1'\n 'B2']\"")
        lines.append(f"C{i},DE,\"['B1']\"")
    return put(folder, **{name: "\n".join(lines) + "\n", "products_train__csv": PRODUCTS, **files})


def test_amazon_m2_splits_in_file_order(tmp_path):
    m2(tmp_path / "raw")
    summary, data = run(tmp_path, "amazon-m2", locale="UK")
    assert summary.sessions == {"train": 36, "validation": 4, "test": 10}  # 10% of the 40 that test leaves
    assert ids(data, "train")[0] == ["A0", "B1", "B2", "B0"]
    assert ids(data, "validation")[0][0] == "A36" and ids(data, "test")[-1][0] == "A49"
    assert summary.left_out["sessions of other locales"] == 50 and summary.split == "by file order"
    assert data.text_columns == ["title", "desc"]
    assert data.items.rows()[:2] == [("B1", 'Mug, "blue"', "A mug"), ("B2", "Tea", "two\nlines")]
    _, data = run(tmp_path, "amazon-m2", locale="DE", text_columns=["brand"], overwrite=True)
    assert data.items.row(0) == ("B1", "Acme")


def test_amazon_m2_test_file(tmp_path):
    m2(tmp_path / "raw", 20)
    test = m2(tmp_path / "more", 3, "test__csv") / "test.csv"
    summary, data = run(tmp_path, "amazon-m2", locale="UK", test=test, raw=tmp_path / "raw" / "sessions_train.csv")
    assert summary.sessions == {"train": 18, "validation": 2, "test": 3}
    assert ids(data, "test")[0] == ["A0", "B1", "B2", "B0"] and summary.read["test session rows"] == 6
    assert summary.split == "by file order, test as given"


def test_amazon_m2_oddities(tmp_path):
    odd = "prev_items,next_item,locale\n\"['B1'\n 'B2']\",C,UK\n[],C,UK\n['A' ... 'B'],C,UK\n"
    odd += "['B1' 'B2'],,UK\n['B1'],B2,UK\n"
    put(tmp_path / "raw", sessions_train__csv=odd, products_train__csv=PRODUCTS)
    summary, data = run(tmp_path, "amazon-m2", locale="UK", **NO_HOLDOUT)
    assert ids(data, "train") == [["B1", "B2", "C"], ["B1", "B2"], ["B1", "B2"]]
    assert summary.left_out["sessions whose prev_items are printed abridged (...)"] == 1
    assert summary.left_out["sessions of one item"] == summary.left_out["rows with no session or item id"] == 1
    fails(tmp_path, r"sessions_train\.csv: no locale FR; found UK", "amazon-m2", locale="FR")
    fails(tmp_path, r"sessions_train\.csv: no locale was given \(--locale\); found UK", "amazon-m2")
    put(tmp_path / "raw", sessions_train__csv=odd + '"A B",C,UK\n')
    fails(
        tmp_path,
        r"sessions_train\.csv, line 8: prev_items is 'A B', expected a printed array",
        "amazon-m2",
        locale="UK",
    )
    put(tmp_path / "raw", sessions_train__csv=odd, products_train__csv="id,title\nB1,x\n")
    fails(tmp_path, r"products_train\.csv: column locale is missing; found id, title", "amazon-m2", locale="UK")
    (tmp_path / "raw" / "products_train.csv").unlink()
    fails(tmp_path, r"expected products_train\.csv or products_train\.csv\.gz", "amazon-m2", locale="UK")


@pytest.mark.parametrize("printed", ["['B1', 'B2']", '["B1","B2"]', "[ 'B1'\n 'B2' ]", "['B1' \"B2\"]"])
def test_arrays_of_quoted_strings_are_read_however_they_are_spaced(tmp_path, printed):
    quoted = printed.replace('"', '""')
    text = f'prev_items,next_item,locale\n"{quoted}",B 3,UK\n"[\'a b\']",B1,UK\n'
    put(tmp_path / "raw", sessions_train__csv=text, products_train__csv=PRODUCTS)
    _, data = run(tmp_path, "amazon-m2", locale="UK", **NO_HOLDOUT)
    assert ids(data, "train") == [["B1", "B2", "B 3"], ["a b", "B1"]]


@pytest.mark.parametrize(
    "printed",
    [
        "[B1 B2]",
        "[1 2]",
        "[1. 2.]",
        "[b'B1' b'B2']",
        "[['B1'] ['B2']]",
        "array(['B1'])",
        "['B1' nan]",
        "['B1'",
        "[None]",
    ],
)
def test_other_prints_are_refused(tmp_path, printed):
    text = f'prev_items,next_item,locale\n"[\'B1\']",B2,UK\n"{printed}",B1,UK\n'
    put(tmp_path / "raw", sessions_train__csv=text, products_train__csv=PRODUCTS)
    fails(tmp_path, r"sessions_train\.csv, line 3: prev_items is .*expected a printed array", "amazon-m2", locale="UK")


def test_a_missing_id_in_an_array_is_left_out(tmp_path):
    text = "prev_items,next_item,locale\n['B1' 'nan' 'B2'],None,UK\n"
    put(tmp_path / "raw", sessions_train__csv=text, products_train__csv=PRODUCTS)
    summary, data = run(tmp_path, "amazon-m2", locale="UK", **NO_HOLDOUT)
    assert ids(data, "train") == [["B1", "B2"]] and summary.left_out["rows with no session or item id"] == 2
