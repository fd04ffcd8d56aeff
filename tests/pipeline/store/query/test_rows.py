"""Rows as text: values of every type, in JSON that any program reads."""

import json

import pytest

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.query.rows import json_lines, text_rows, without_blobs
from longvlm.pipeline.store.snapshot import Snapshot


@pytest.fixture(scope="module")
def con():
    with pytest.MonkeyPatch.context() as patch, catalog.connect(Snapshot(), apart=True) as con:
        patch.setenv("TZ", "Asia/Tokyo")
        access.seal(con, Snapshot())
        yield con


def strict(line):
    """What a reader knows that keeps to the letter of JSON."""
    assert line.isascii()
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


VALUES = {
    "true": True,
    "7::TINYINT": 7,
    "9223372036854775807": 9223372036854775807,
    "170141183460469231731687303715884105727::HUGEINT": 170141183460469231731687303715884105727,
    "1.50::DECIMAL(9, 2)": 1.5,
    "0.1": 0.1,
    "1e300::DOUBLE": 1e300,
    "'nan'::DOUBLE": None,
    "'-inf'::FLOAT": None,
    "[1.5, 'infinity'::DOUBLE]": [1.5, None],
    "{'a': 'nan'::DOUBLE, 'b': 'NaN, \"Infinity\" \\'}": {"a": None, "b": 'NaN, "Infinity" \\'},
    "NULL": None,
    "'日本語 😀' || chr(10) || chr(27)": "日本語 😀\n\x1b",
    "'\\xAA\\x00'::BLOB": "qgA=",
    "['\\xAA'::BLOB, NULL]": ["qg==", None],
    "['\\xAA'::BLOB]::BLOB[1]": ["qg=="],
    "{'a': {'b': '\\xAA'::BLOB}, 'c': 1}": {"a": {"b": "qg=="}, "c": 1},
    "MAP {'k': '\\xAA'::BLOB}": {"k": "qg=="},
    "[NULL, {'a': '\\xAA'::BLOB}]": [None, {"a": "qg=="}],
    "row('\\xAA'::BLOB, 2)": ["qg==", 2],
    "MAP {1: 'one'}": {"1": "one"},
    "'{\"a\": [1, true]}'::JSON": {"a": [1, True]},
    "'infinity'::TIMESTAMP": "infinity",
    "'-infinity'::DATE": "-infinity",
    "'10000-01-01'::TIMESTAMP": "10000-01-01 00:00:00",
    "'0044-03-15 (BC)'::DATE": "0044-03-15 (BC)",
    "'2024-01-01 01:00:00+02'::TIMESTAMPTZ": "2023-12-31 23:00:00+00",
    "'2024-01-01 01:02:03.5'::TIMESTAMP": "2024-01-01 01:02:03.5",
    "'12:00:01'::TIME": "12:00:01",
    "INTERVAL '1 month 2 days'": "1 month 2 days",
    "'8d7e3f0a-6f1c-4f0e-9d3b-2a4b6c8d0e1f'::UUID": "8d7e3f0a-6f1c-4f0e-9d3b-2a4b6c8d0e1f",
    "'a'::ENUM('a', 'b')": "a",
    "'101'::BIT": "101",
}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_json_of_its_type(con, value):
    (line,) = json_lines(con, catalog.select(con, f"SELECT {value} AS x"))
    assert strict(line) == {"x": VALUES[value]}


def test_columns_that_share_a_name_are_all_kept(con):
    rows = catalog.select(con, """SELECT 1 AS a, 2 AS "A", 3 AS a_1, 4 AS 'say "a"'""")
    assert rows.columns == ["a", "A", "a_1", 'say "a"']
    (line,) = json_lines(con, rows)
    found = strict(line)
    assert list(found.values()) == [1, 2, 3, 4]
    assert len({name.lower() for name in found}) == 4
    assert list(text_rows(con, rows)) == [("1", "2", "3", "4")]


def test_texts_are_duckdbs_own(con):
    values = "1.50::DECIMAL(9, 2), 'infinity'::DATE, NULL, true, ['\\xAA'::BLOB], 'nan'::DOUBLE"
    assert list(text_rows(con, catalog.select(con, f"SELECT {values}"))) == [
        ("1.50", "infinity", None, "true", "['qg==']", "nan")
    ]


def test_rows_come_in_their_order_however_many(con):
    rows = catalog.select(con, "SELECT i FROM range(5000) t(i) ORDER BY i DESC")
    assert [strict(line)["i"] for line in json_lines(con, rows)] == list(range(4999, -1, -1))


@pytest.mark.parametrize(
    "query", ["SELECT 1 AS x; -- done", "-- first\nSELECT 1 AS x -- then", "SELECT 1 AS x /* ; */ ;; ", "; VALUES (1)"]
)
def test_what_stands_around_a_statement_is_left_out(con, query):
    assert [list(strict(line).values()) for line in json_lines(con, catalog.select(con, query))] == [[1]]


def test_a_blob_is_counted_where_it_is_only_shown(con):
    shown = without_blobs(catalog.select(con, "SELECT 1 AS a, repeat('x', 1234)::BLOB AS a, NULL::BLOB AS b"))
    assert shown.columns == ["a", "a", "b"]
    assert shown.fetchall() == [(1, "<1,234 bytes>", None)]
