"""RecBole's atomic files: long form, splits, windows."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alterrec_fast.data.readers import READERS, Options
from alterrec_fast.data.sessions import SPLITS

from .common import NO_HOLDOUT, fails, ids, put, run

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = 'item_id:token\ttitle:token_seq\tprice:float\tbrand:token\n1\tA "fine" mug\t3.5\tAcme\n2\t\t1\t\n'


def test_recbole_long_form(tmp_path):
    text = INTER + "u1\t2\t5\t20\nu1\t1\t4\t1e1\nu2\t1\t3\t5\nu2\t3\t3\t6.5\nu3\t1\t1\t1\n"
    put(tmp_path / "raw", **{"ml.inter": text, "ml.item": ITEM, "ml.user": "user_id:token\n"})
    summary, data = run(tmp_path, "recbole", **NO_HOLDOUT)
    assert ids(data, "train") == [["1", "3"], ["1", "2"]]
    assert data.items.rows() == [("1", 'A "fine" mug', "Acme"), ("2", None, None), ("3", None, None)]
    assert summary.left_out["sessions of one item"] == 1 and summary.notes["items with no text"] == 2
    fails(tmp_path, r"ml\.item: no text column price; found title, brand", "recbole", text_columns=["price"])


def test_recbole_benchmark_files_are_splits_as_given(tmp_path):
    def part(*users: str) -> str:
        return INTER + "".join(f"{user}\t{i}\t1\t{i}\n" for user in users for i in (1, 2))

    files = {"d.train.inter": part("a", "b"), "d.valid.inter": part("c"), "d.test.inter": part("d")}
    put(tmp_path / "raw", **files)
    summary, data = run(tmp_path, "recbole")
    assert summary.sessions == {"train": 2, "validation": 1, "test": 1} and summary.split == "as given"
    _, same = run(tmp_path, "recbole", raw=tmp_path / "raw" / "d.train.inter", overwrite=True)
    assert [ids(same, name) for name in SPLITS] == [ids(data, name) for name in SPLITS]

    put(tmp_path / "raw", **{"d.inter": part("z", "w", "v"), "d.v2.inter": part("z")})  # a file named chooses
    summary, _ = run(tmp_path, "recbole", raw=tmp_path / "raw" / "d.inter", overwrite=True)
    assert summary.split == "by time"
    for extra in ("d.inter", "d.v2.inter"):
        fails(tmp_path, "name a file to choose among several", "recbole")
        (tmp_path / "raw" / extra).unlink()

    put(tmp_path / "raw", **{"d.test.inter": part("d", "a")})
    fails(tmp_path, r"d\.test\.inter, line 4: session 'a' is in split test here and in train before", "recbole")
    put(tmp_path / "raw", **{"d.test.inter": part("d")})
    (tmp_path / "raw" / "d.valid.inter").unlink()
    summary, _ = run(tmp_path, "recbole", overwrite=True)
    assert summary.sessions == {"train": 1, "validation": 1, "test": 1}
    assert summary.split == "by time, test as given"
    (tmp_path / "raw" / "d.train.inter").unlink()
    fails(tmp_path, r"expected NAME\.inter, or NAME\.train\.inter", "recbole")


def test_recbole_sequences_join_the_prefixes_of_a_session(tmp_path):
    text = "session_id:token\titem_id_list:token_seq\titem_id:token\n"
    text += "1\ta\tb\n1\ta b\tc\n1\ta b c\td\n2\tx\ty\n3\t\tz\n4\tx\t\n"
    put(tmp_path / "raw", **{"d.inter": text})
    summary, data = run(tmp_path, "recbole", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b", "c", "d"], ["x", "y"]]
    assert summary.left_out["sessions of one item"] == summary.left_out["rows with no session or item id"] == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.inter": INTER, "b.inter": INTER}, r"expected NAME\.inter, .*found a\.inter, b\.inter; name a file"),
        ({"a.inter": INTER, "a.train.inter": INTER}, r"expected NAME\.inter, .*name a file"),
        ({"x.txt": ""}, r"expected NAME\.inter, .*found x\.txt"),
        ({"a.inter": ""}, r"a\.inter: the file is empty"),
        ({"a.inter": "user_id\titem_id:token\n"}, r"a\.inter, line 1: column 'user_id' has no type"),
        ({"a.inter": INTER.replace("\t", ",") + "u,1,5,1\n"}, r"column item_id is missing; .*by commas, expected tabs"),
        ({"a.inter": "user_id:token\ttimestamp:float\n"}, r"column item_id is missing; found user_id, timestamp"),
        ({"a.inter": "item_id:token\ttimestamp:float\n"}, r"column session_id or user_id is missing; found item_id"),
        ({"a.inter": INTER + "u\t1\t1\t5\nu\t2\t1\tx\n"}, r"a\.inter, line 3: timestamp is 'x'"),
        ({"a.inter": INTER + "u\t1\t1\t5\t9\n"}, r"a\.inter, line 2: 5 fields, but the header has 4"),
        ({"a.train.inter": INTER, "a.test.inter": "user_id:token\titem_id:token\n"}, r"must be in all \.inter files"),
    ],
)
def test_recbole_errors(tmp_path, files, message):
    put(tmp_path / "raw", **files)
    fails(tmp_path, message, "recbole")


# -- windows

WINDOWS = "session_id:token\titem_id_list:token_seq\titem_id:token\n"


def windows(session: list[str], longest: int, step: int = 1) -> list[str]:
    """What RecBole's augmentation makes of a session, a window for every item or every step items."""
    ends = sorted({*range(1, len(session), step), len(session) - 1})
    return [f"{' '.join(session[max(0, end - longest) : end])}\t{session[end]}\n" for end in ends]


def read_sessions(folder: Path, rows: list[str]) -> dict[str, list[str]]:
    (folder / "d.inter").write_text(WINDOWS + "".join(rows))
    frame = pl.concat(READERS["recbole"](folder, Options()).interactions)
    return {
        session: group["item_id"].to_list() for (session,), group in frame.group_by("session_id", maintain_order=True)
    }


@given(
    sessions=st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=12), min_size=1, max_size=3),
    longest=st.integers(1, 6),
    backwards=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_windows_in_order_give_back_the_session(tmp_path_factory, sessions, longest, backwards):
    folder = tmp_path_factory.getbasetemp()
    rows = [
        (place, f"s{i}\t{row}") for i, one in enumerate(sessions) for place, row in enumerate(windows(one, longest))
    ]
    rows.sort(key=lambda row: row[0], reverse=backwards)  # sessions interleaved
    found = read_sessions(folder, [row for _, row in rows])
    for i, session in enumerate(sessions):  # backwards "aba" cut to one item may read both ways
        assert found[f"s{i}"] == session or (backwards and len(found[f"s{i}"]) == len(session))


@given(
    length=st.integers(2, 40),
    longest=st.integers(2, 8),
    step=st.integers(1, 8),
    order=st.sampled_from(["forwards", "backwards", "shuffled"]),
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_windows_of_distinct_items_give_back_the_session_in_any_order(
    tmp_path_factory, length, longest, step, order, seed
):
    folder = tmp_path_factory.getbasetemp()
    session = [f"i{i}" for i in range(length)]
    rows = windows(session, longest, min(step, longest))
    if order == "backwards":
        rows.reverse()
    elif order == "shuffled":
        seed.shuffle(rows)
    assert read_sessions(folder, [f"s\t{row}" for row in rows]) == {"s": session}


def test_windows_that_fit_nowhere_are_an_error_with_line(tmp_path):
    put(tmp_path / "raw", **{"d.inter": WINDOWS + "s\ta b\tc\nt\tx\ty\ns\td e\tf\n"})
    fails(tmp_path, r"d\.inter, line 4: the items 'd e f' overlap with no other row of their session", "recbole")
    put(tmp_path / "raw", **{"d.inter": WINDOWS + "s\ta b\tc\ns\td e\tf\ns\tb c d\te\n"})  # now one joins the two
    assert ids(run(tmp_path, "recbole", **NO_HOLDOUT)[1], "train") == [list("abcdef")]


def test_ids_in_windows_are_judged_like_others(tmp_path):
    put(tmp_path / "raw", **{"d.inter": WINDOWS + "s\ta nan\tb\n"})
    summary, data = run(tmp_path, "recbole", **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b"]] and summary.left_out["rows with no session or item id"] == 1
    for printed in ("[1, 2]", "['a' 'b']", "1, 2", "(1, 2)", "1,2", "1;2", "1|2"):
        put(tmp_path / "raw", **{"d.inter": WINDOWS + f"s\ta\tb\nt\t{printed}\tb\n"})
        fails(tmp_path, r"d\.inter, line 3: item_id_list is .*, expected ids with blanks between", "recbole")
    put(tmp_path / "raw", **{"d.inter": WINDOWS + "s\t1,2 3\t4,5\n"})  # commas belong to the ids
    assert ids(run(tmp_path, "recbole", overwrite=True, **NO_HOLDOUT)[1], "train") == [["1,2", "3", "4,5"]]
