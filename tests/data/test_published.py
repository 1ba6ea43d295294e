"""Files in the layouts that data sets were published in, each prepared by the line that `prepare --help` shows."""

import gzip
import json
import shlex

import pytest
from typer.testing import CliRunner

from alterrec_fast import cli
from alterrec_fast.data.sessions import Dataset

from .readers.common import ids, put

ALL = ["--validation-fraction", "0", "--test-fraction", "0"]


def _lines(*objects: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


REVIEW = {"rating": 5.0, "title": "t", "text": "x", "images": [], "asin": "V1", "helpful_vote": 0}
PRODUCT = {"main_category": "All Beauty", "features": ["a", "b"], "price": None, "details": {"Brand": "B"}}
FILES = [
    {
        "yoochoose-clicks.dat": "1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:50:09.868Z,214536500,0\n"
        "2,2014-04-07T13:56:37.614Z,214662742,0\n2,2014-04-07T13:57:37.614Z,214536500,S\n"
    },
    {
        "train-item-views.csv": "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n"
        "1;NA;31331;102000;2016-05-09\n2;NA;81766;10;2016-05-10\n2;NA;32118;5;2016-05-10\n"
    },
    {
        "events.csv": "timestamp,visitorid,event,itemid,transactionid\n"
        "1433221332117,257597,view,355908,\n"
        "1433221333117,257597,addtocart,355909,\n1433228333117,257597,view,1,\n1433228334117,257597,transaction,2,17\n"
    },
    {
        "otto-recsys-train.jsonl": _lines(
            {
                "session": 0,
                "events": [
                    {"aid": 7, "ts": 1659304800025, "type": "clicks"},
                    {"aid": 8, "ts": 1659304904511, "type": "carts"},
                    {"aid": 8, "ts": 1659304904511, "type": "orders"},
                ],
            },
            {
                "session": 1,
                "events": [
                    {"aid": 9, "ts": 1659304900025, "type": "clicks"},
                    {"aid": 7, "ts": 1659304900024, "type": "clicks"},
                ],
            },
        )
    },
    {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n"
        "2,1,4.0,1141415820\n2,296,4.0,1141415821\n",
        "movies.csv": "movieId,title,genres\n1,Toy Story (1995),Animation\n"
        '296,"Pulp, Fiction (1994)",Crime\n306,Red,Drama\n',
    },
    {
        "All_Beauty.jsonl.gz": _lines(
            {**REVIEW, "parent_asin": "B2", "user_id": "A", "timestamp": 1588687728923},
            {**REVIEW, "parent_asin": "B1", "user_id": "A", "timestamp": 1588615855070},
            {**REVIEW, "parent_asin": "B1", "user_id": "C", "timestamp": 1688615855070},
            {**REVIEW, "parent_asin": "B2", "user_id": "C", "timestamp": 1688615855071},
        ),
        "meta_All_Beauty.jsonl.gz": _lines(
            {**PRODUCT, "title": "Comb", "parent_asin": "B1"}, {**PRODUCT, "title": "Brush", "parent_asin": "B2"}
        ),
    },
]
EXPECTED = [
    [["214536500", "214536502"], ["214662742", "214536500"]],
    [["31331", "81766"], ["32118", "81766"]],
    [["355908", "355909"], ["1", "2"]],
    [["7", "8", "8"], ["7", "9"]],
    [["1", "296"], ["306", "296"]],
    [["B1", "B2"], ["B1", "B2"]],
]


CASES = list(zip(cli.PUBLISHED, FILES, EXPECTED, strict=True))


@pytest.mark.parametrize(("line", "files", "expected"), CASES)
def test_a_published_layout_is_prepared_by_the_line_that_help_shows(tmp_path, monkeypatch, line, files, expected):
    packed = {name: gzip.compress(text.encode()) if name.endswith(".gz") else text for name, text in files.items()}
    monkeypatch.chdir(put(tmp_path / "raw", **packed))
    result = CliRunner().invoke(cli.app, ["prepare", "generic", *shlex.split(line), *ALL])
    assert result.exit_code == 0, result.output
    data = Dataset.load("OUT")
    assert sorted(ids(data, "train")) == sorted(expected)
    if "movies.csv" in files:
        assert data.items.rows()[1] == ("296", "Pulp, Fiction (1994)", "Crime")
    if "All_Beauty.jsonl.gz" in files:
        assert data.items["title"].to_list() == ["Comb", "Brush"]
