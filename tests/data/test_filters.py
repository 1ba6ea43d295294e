"""Filters, splits by days, leave-one-out, and sessions of users, against a plain reading; and many batches, spilled."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alterrec_fast.data import interactions, scratch
from alterrec_fast.data.filters import Filters
from alterrec_fast.data.interactions import parse_duration
from alterrec_fast.data.scratch import parse_size
from alterrec_fast.data.sessions import SPLITS, DataError, Dataset

from .readers.common import HEADER, NO_HOLDOUT, fails, ids, put, run

DAY = 86_400
USERS = "user,item_id,timestamp\nu,a,0\nu,b,100\nu,c,2000\nu,d,2100\nv,a,50\nv,b,86390\nv,c,86410\n"
sequences = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=6), min_size=1, max_size=12)


def write(folder, sessions: list[list[str]]) -> None:
    rows = [f"s{s},{item},{100 * s + i}\n" for s, session in enumerate(sessions) for i, item in enumerate(session)]
    put(folder / "raw", interactions__csv=HEADER + "".join(rows))


def kept(sessions: list[list[str]], k: int) -> list[list[str]]:
    """The k-core, by rounds."""
    while True:
        items = [item for session in sessions for item in session]
        smaller = [[item for item in session if items.count(item) >= k] for session in sessions]
        smaller = [session for session in smaller if len(session) >= k]
        if smaller == sessions:
            return sessions
        sessions = smaller


@given(sessions=sequences, k=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_k_core(tmp_path_factory, sessions, k):
    folder = tmp_path_factory.mktemp("case")
    write(folder, sessions)
    if not (expected := kept(sessions, k)):
        fails(folder, rf"outside the {k}-core left out", filters=Filters(k_core=k), **NO_HOLDOUT)
        return
    summary, data = run(folder, filters=Filters(k_core=k), **NO_HOLDOUT)
    assert ids(data, "train") == expected
    left_out = sum(count for what, count in summary.left_out.items() if "core" in what and what.startswith("interact"))
    lost = sum(map(len, sessions)) - sum(map(len, expected))
    in_sessions = summary.left_out.get("interactions of sessions that filters drop", 0)
    assert left_out + in_sessions == lost
    assert summary.left_out[f"sessions outside the {k}-core"] == len(sessions) - len(expected)


def test_filters_in_their_order_with_counts(tmp_path):
    write(tmp_path, [["a", "b"], ["a", "b", "c"], ["c", "a"], ["x", "a", "b"], ["y", "z"]])
    summary, data = run(tmp_path, filters=Filters(last_sessions=4, min_item_count=2), **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b", "c"], ["c", "a"], ["a", "b"]]
    assert summary.left_out["sessions before the last ones asked for"] == 1
    assert summary.left_out["interactions of items that occur less than 2 times"] == 3
    assert summary.left_out["sessions of fewer than 2 items"] == 1
    assert summary.left_out["interactions of sessions that filters drop"] == 2  # 12 read, 7 kept
    _, data = run(tmp_path, filters=Filters(min_session_length=3), overwrite=True, **NO_HOLDOUT)
    assert ids(data, "train") == [["a", "b", "c"], ["x", "a", "b"]]
    options = {"validation_fraction": 0, "test_fraction": 0.2, "overwrite": True}
    _, data = run(tmp_path, filters=Filters(last_sessions=0.5, train_only=True), **options)
    assert ids(data, "train") == [["c", "a"], ["x", "a", "b"]] and ids(data, "test") == [["y", "z"]]
    _, data = run(tmp_path, filters=Filters(min_item_count=2, train_only=True), **options)
    assert ids(data, "train") == [["a", "b"], ["a", "b", "c"], ["c", "a"], ["a", "b"]]
    assert ids(data, "test") == [["y", "z"]]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"k_core": 1}, {"min_item_count": 0}, {"min_session_length": 1}),
        *({"last_sessions": number} for number in (0, 1.5, float("nan"))),
    ],
)
def test_filters_that_cannot_be(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        Filters(**wrong)


def test_sessions_of_users(tmp_path):
    put(tmp_path / "raw", interactions__csv=USERS)
    options = {"user_column": "user", **NO_HOLDOUT}
    _, data = run(tmp_path, session_gap=1800, **options)
    assert ids(data, "train") == [["a", "b"], ["c", "d"], ["b", "c"]]
    _, data = run(tmp_path, session_per="day", overwrite=True, **options)
    assert ids(data, "train") == [["a", "b", "c", "d"], ["a", "b"]]
    _, data = run(tmp_path, session_per="user", overwrite=True, **options)
    assert ids(data, "train") == [["a", "b", "c", "d"], ["a", "b", "c"]]
    in_ms = "".join(f"{line[:4]}{int(line[4:]) + 1_600_000_000}000\n" for line in USERS.splitlines()[1:])
    put(tmp_path / "raw", interactions__csv=USERS.splitlines()[0] + "\n" + in_ms)
    _, data = run(tmp_path, session_gap=1800, overwrite=True, **options)
    assert ids(data, "train") == [["a", "b"], ["c", "d"], ["b", "c"]]
    fails(tmp_path, "need --user-column with --session-gap or --session-per", user_column="user")
    fails(tmp_path, "got both", user_column="user", session_gap=1, session_per="day")
    for gap in (-1, float("nan")):
        fails(tmp_path, f"session_gap is {gap}, expected seconds above 0", user_column="user", session_gap=gap)


def test_files_in_seconds_and_in_milliseconds_are_told_apart(tmp_path):
    names = "user,item_id,timestamp\n"
    seconds, millis = names + "u,a,1600000000\nu,b,1600000060\n", names + "u,c,1600000120000\nu,d,1600000130000\n"
    put(tmp_path / "raw", a__csv=seconds, b__csv=millis)
    raw, options = tmp_path / "raw" / "*.csv", {"user_column": "user", "session_gap": 1800}
    fails(
        tmp_path,
        "column timestamp: times from 1600000000 to 1600000130000, Unix times of two units",
        raw=raw,
        **options,
    )
    put(tmp_path / "raw", b__csv=names + "u,c,0\nu,d,1600000120\n")
    assert run(tmp_path, raw=raw, **options, **NO_HOLDOUT)[1].num_items == 3  # 0 is no time of this century


def test_splits_by_days(tmp_path):
    rows = "".join(f"s{day},{item},{day * DAY + 5}\n" for day in range(10) for item in "ab")
    put(tmp_path / "raw", interactions__csv=HEADER + rows)
    summary, _ = run(tmp_path, test_days=2, validation_days=3)
    assert summary.sessions == {"train": 5, "validation": 3, "test": 2} and "the last 2 days test" in summary.split


def test_leave_one_out(tmp_path):
    write(tmp_path, [list("abcd"), list("ab"), list("xyz")])
    summary, data = run(tmp_path, leave_one_out=True)
    assert summary.split == "leave-one-out"
    assert [ids(data, name) for name in SPLITS] == [
        [["a", "b"]],
        [["a", "b", "c"], ["x", "y"]],
        [list("abcd"), list("ab"), list("xyz")],
    ]
    assert [data.split(name).last_only for name in SPLITS] == [False, True, True]
    printed = str(summary)
    assert "9 interaction rows read" in printed and " 3 sessions kept" in printed and " 9 interactions\n" in printed
    assert summary.notes["sessions too short to train on, of two or three items"] == 2
    inter = "user_id:token\titem_id:token\ttimestamp:float\n"
    files = {"d.train.inter": "u\ta\t1\nu\tb\t2\n", "d.valid.inter": "u\tc\t3\n", "d.test.inter": "u\td\t4\n"}
    put(tmp_path / "recbole", **{name: inter + rows for name, rows in files.items()})
    _, data = run(tmp_path, "recbole", raw=tmp_path / "recbole", leave_one_out=True, overwrite=True)
    assert [ids(data, name) for name in SPLITS] == [[["a", "b"]], [["a", "b", "c"]], [["a", "b", "c", "d"]]]


def test_options_that_another_split_excludes(tmp_path):
    rows = "".join(f"s,{item},{time},train\n" for time, item in enumerate("abcd"))
    put(tmp_path / "raw", interactions__csv="session_id,item_id,timestamp,split\n" + rows)
    given = r"but the files give a split \(train\)"
    fails(tmp_path, f"leave-one-out is asked for, {given}", leave_one_out=True)
    fails(tmp_path, f"test_days is asked for, {given}", test_days=1)
    filters = Filters(min_item_count=2, train_only=True)
    fails(tmp_path, "filter_train_only goes with splits by session", leave_one_out=True, filters=filters)


def test_repeats_at_one_time_are_kept_where_asked(tmp_path):
    put(tmp_path / "raw", interactions__csv=HEADER + "s,a,1\ns,b,1\ns,a,1\n")
    assert ids(run(tmp_path, **NO_HOLDOUT)[1], "train") == [["a", "b"]]
    assert ids(run(tmp_path, keep_repeats=True, overwrite=True, **NO_HOLDOUT)[1], "train") == [["a", "b", "a"]]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_many_batches_give_the_bytes_of_one(tmp_path, monkeypatch, kind):
    rng = np.random.default_rng(0)
    n = 5_000
    columns = {
        "session_id": rng.integers(0, 400, n),
        "item_id": rng.integers(0, 60, n),
        "timestamp": rng.integers(0, 99, n),
    }
    frame = pl.DataFrame(columns | {"other": rng.integers(0, 2, n)})
    getattr(frame, f"write_{kind}")(put(tmp_path / "raw") / f"interactions.{kind}")
    filters = Filters(min_item_count=80, k_core=3)
    once, one = run(tmp_path, filters=filters)
    monkeypatch.setattr(interactions, "HELD", 2_000)
    monkeypatch.setattr(interactions, "BATCH", 64)
    monkeypatch.setattr(interactions, "BLOCK", 50)
    monkeypatch.setattr("alterrec_fast.data.prepare.BLOCK", 50)
    monkeypatch.setattr("alterrec_fast.data.readers.delimited.BATCH", 999)
    monkeypatch.setattr("alterrec_fast.data.readers.tables._BATCH_VALUES", 1)
    monkeypatch.setattr("alterrec_fast.data.readers.tables._MIN_BATCH", 100)
    again, many = run(tmp_path, filters=filters, overwrite=True)
    assert many.fingerprint == one.fingerprint and again == once
    assert not list(tmp_path.glob(".out*"))


def test_times_that_turn_out_to_be_floats_in_a_later_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("alterrec_fast.data.readers.delimited.BATCH", 30)
    whole = "".join(f"s,i{i},{i}\n" for i in range(20, 0, -1))
    put(tmp_path / "raw", interactions__csv=f"{HEADER}{whole}s,x,1.5\n")
    expected = ["i1", "x", *(f"i{i}" for i in range(2, 21))]
    assert ids(run(tmp_path, **NO_HOLDOUT)[1], "train") == [expected]
    put(tmp_path / "raw", interactions__csv=f"{HEADER}s,a,9007199254740995\n{whole}s,x,1.5\n")
    fails(tmp_path, r"interactions\.csv, line 2: timestamp is '9007199254740995'.*a float would round it")


def test_formats(tmp_path):
    text = "1;caf\xe9;03/01/2020\n1;b;02/01/2020\n"
    put(tmp_path / "raw", **{"a.txt": text.encode("latin1")})
    options = {"separator": ";", "has_header": False, "encoding": "latin1", "time_format": "%d/%m/%Y", **NO_HOLDOUT}
    options["columns"] = {"session_id": "1", "item_id": "2", "timestamp": "3"}
    _, data = run(tmp_path, raw=tmp_path / "raw" / "a.txt", **options)
    assert ids(data, "train") == [["b", "caf\xe9"]]
    put(tmp_path / "raw", **{"b.txt": "1;c;2020-01-04\n"})
    fails(
        tmp_path,
        r"b\.txt, line 1: 3 is '2020-01-04', expected a time in the format",
        raw=tmp_path / "raw" / "*.txt",
        **options,
    )
    put(tmp_path / "raw", **{"b.txt": b"1;c;01/01/2020\n1;\x81;01/01/2020\n1;d;01/01/2020\n"})
    fails(tmp_path, r"b\.txt, line 2: byte 0x81", raw=tmp_path / "raw" / "*.txt", **{**options, "encoding": "cp1252"})
    put(tmp_path / "raw", **{"b.txt": "1;c;01/01/2020\n"})
    _, data = run(tmp_path, raw=tmp_path / "raw" / "*.txt", overwrite=True, **options)
    assert ids(data, "train") == [["c", "b", "caf\xe9"]]
    put(tmp_path / "ml", **{"r.dat": "1::10::5::100\n1::20::3::90\n"})
    names = {"session_id": "1", "item_id": "2", "timestamp": "4"}
    _, data = run(
        tmp_path,
        raw=tmp_path / "ml" / "r.dat",
        columns=names,
        separator="::",
        has_header=False,
        overwrite=True,
        **NO_HOLDOUT,
    )
    assert ids(data, "train") == [["20", "10"]]
    parts = pl.DataFrame({"session_id": [1, 1, 2, 2], "item_id": list("abcd"), "timestamp": [4, 3, 2, 1]})
    for i in range(2):
        parts[2 * i : 2 * i + 2].write_parquet(put(tmp_path / "parts") / f"part-{i}.parquet")
    _, data = run(tmp_path, raw=tmp_path / "parts", overwrite=True, **NO_HOLDOUT)
    assert ids(data, "train") == [["d", "c"], ["b", "a"]]


def test_json_lines_name_the_line_of_what_is_wrong(tmp_path):
    file = put(tmp_path / "raw") / "a.jsonl"
    event = {"session": 1, "events": [{"aid": 1, "ts": 1}, {"aid": 2, "ts": 2}]}
    columns = {"session_id": "session", "item_id": "events.aid", "timestamp": "events.ts"}
    options = {"raw": file, "columns": columns, **NO_HOLDOUT}
    file.write_text(json.dumps(event) + "\n\n" + json.dumps(event)[:-1] + "\n")
    fails(tmp_path, r"a\.jsonl, line 3: not JSON", **options)
    file.write_text(json.dumps(event) + "\n\n[1]\n")
    fails(tmp_path, r"a\.jsonl, line 3: list in JSON, expected an object in each line", **options)
    late = {"session": 2, "events": [{"aid": 1, "ts": 1}, {"aid": 2, "ts": "noon"}]}
    file.write_text(json.dumps(event) + "\n\n" + json.dumps(late) + "\n")
    fails(tmp_path, r"a\.jsonl, line 3: events\.ts is 'noon'", **options)


def test_sizes_and_durations():
    assert [parse_size(text) for text in ("4GB", "1.5g", "500MiB", "7")] == [4 << 30, 3 << 29, 500 << 20, 7]
    assert [parse_duration(text) for text in ("30min", "2h", "45s", "1d")] == [1800, 7200, 45, DAY]
    for parse, wrong in ((parse_size, "much"), (parse_duration, "30"), (parse_duration, "0s")):
        with pytest.raises(DataError, match=wrong):
            parse(wrong)
    assert 0 < scratch.free_memory() < 1 << 50


def test_the_spilled_rows_of_a_killed_process_are_removed(tmp_path):
    source = (
        "import os, pathlib, signal\nfrom alterrec_fast.data.scratch import scratch\n"
        "with scratch(pathlib.Path('out')) as space:\n"
        "    (space.folder / 'rows').write_text('spilled')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "rows").exists()
    with scratch.scratch(tmp_path / "other"):
        assert left.exists()
    with scratch.scratch(tmp_path / "out") as space, scratch.scratch(tmp_path / "out"):
        assert not left.exists() and space.folder.exists()  # what is in use stays
    assert not list(tmp_path.iterdir())


def test_a_memory_limit_that_is_too_low(tmp_path):
    write(tmp_path, [["a", "b"]])
    fails(tmp_path, "memory limit of 1,024 bytes, expected", memory_limit=1024)
    assert Dataset.load(run(tmp_path, memory_limit=1 << 30, **NO_HOLDOUT)[1].path).num_items == 2
