"""`longvlm sql`: reads the store and what is attached, says so where a query wants more, and leaves nothing behind."""

import json
import subprocess

import pytest
import stores
from click.testing import CliRunner
from documents import blocks, statements

from longvlm.jobs.cli import main
from longvlm.pipeline.store.ledger import Store
from support import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sql")
    made = Store.create(str(folder / "store"))
    made.register_recipe(stores.LONG, "some/model")
    stores.index(made, ["a", "日本語"])
    (folder / "owners.csv").write_text(f"uri,owner\n{stores.uri_of('a')},me\nelsewhere,you\n")
    (folder / "sites.jsonl").write_text('{"owner": "me", "site": "north"}\n')
    return folder


@pytest.fixture
def sql(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run(*args, **options):
        return CliRunner().invoke(main, ["sql", "--store", str(folder / "store"), "--quiet", *args], **options)

    return run


def objects(said):
    assert said.exit_code == 0, said.output
    return [json.loads(line) for line in said.stdout.splitlines()]


def test_files_are_joined_by_name(sql, folder):
    attached = ("--attach", f"owners={folder}/owners.csv", "--attach", f"sites={folder}/sites.jsonl")
    query = "SELECT uri, owner, site FROM videos JOIN owners USING (uri) JOIN sites USING (owner)"
    assert objects(sql(query, *attached, "--json")) == [{"uri": stores.uri_of("a"), "owner": "me", "site": "north"}]
    assert "north" in sql(query, *attached).stdout


def test_a_wrong_attachment_is_wrong_input(sql):
    said = sql("FROM videos", "--attach", "videos=x.csv")
    assert said.exit_code == 2
    assert "the name videos is taken" in said.stderr


# --- what it may do ---


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("FROM read_text('BESIDE/owners.csv')", "Cannot access file"),
        ("FROM 'BESIDE/owners.csv'", "Cannot access file"),
        ("SELECT * FROM read_csv('/etc/passwd')", "Cannot access file"),
        ("COPY videos TO 'BESIDE/out.csv'", "must be one SELECT"),
        ("ATTACH 'BESIDE/out.duckdb'", "must be one SELECT"),
        ("SET enable_external_access = true", "must be one SELECT"),
        ("INSTALL httpfs", "must be one SELECT"),
        ("PRAGMA enable_profiling", "must be one SELECT"),
        ("PREPARE q AS SELECT 1", "must be one SELECT"),
        ("PIVOT videos ON status", "has to name its values"),
        ("SELECT 1; COPY videos TO 'BESIDE/out.csv'", "statement 2 must be one SELECT"),
        ("SET enable_external_access = true; FROM 'BESIDE/owners.csv'", "statement 1 must be one SELECT"),
        ("SELECT 1; SELECT 2; FROM 'BESIDE/owners.csv'", "statement 3 cannot run: Permission Error: Cannot access"),
        ("SELECT ';'; -- a\nEXPORT DATABASE 'BESIDE/out'; /* b */", "statement 2 must be one SELECT"),
    ],
)
def test_nothing_else_is_read_and_nothing_is_written(sql, folder, query, sentence):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = sql(query.replace("BESIDE", str(folder)))
    assert said.exit_code == 2
    assert sentence in said.stderr
    assert said.stdout == ""  # nor is a first statement run, where a later one may not be
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("form", ["json", "csv", "markdown", "line"])
def test_no_form_of_a_result_opens_a_file(sql, folder, form):
    said = sql(f"SELECT x FROM (SELECT 1 AS x); FROM '{folder}/owners.csv'", f"--{form}")
    assert (said.exit_code, said.stdout) == (2, "")
    assert "Cannot access file" in said.stderr


# --- where the statements come from ---


SCRIPT = """-- how many
SELECT count(*) AS n FROM videos; -- both
/* a; b */ SELECT ';' AS x;
"""


@pytest.mark.parametrize("source", ["argument", "file", "dash", "stdin"])
def test_a_script_is_an_argument_a_file_or_standard_input(sql, tmp_path, source):
    (tmp_path / "script.sql").write_text("\ufeff" + SCRIPT)
    words, given = {
        "argument": ([SCRIPT], None),
        "file": (["-f", str(tmp_path / "script.sql")], None),
        "dash": (["--file", "-"], SCRIPT),
        "stdin": ([], SCRIPT),
    }[source]
    assert objects(sql(*words, "--json", input=given)) == [{"n": 2}, {"x": ";"}]


def test_each_statement_of_a_script_has_a_box_of_its_own(sql):
    shown = sql(SCRIPT).stdout
    assert shown.count("┌") == shown.count("└") == 2


@pytest.mark.parametrize(
    ("words", "given", "sentence"),
    [
        ([], "", "there is no statement"),
        (["-- nothing but this"], None, "there is no statement"),
        ([], b"SELECT '\xe9'", "standard input is not UTF-8"),
        (["SELECT '\udce9'"], None, "the query is not UTF-8"),
        (["SELECT 1", "-f", "x.sql"], None, "leave one of them out"),
        (["-f", "missing.sql"], None, "the file of SQL missing.sql does not exist"),
        (["--json", "--csv", "SELECT 1"], None, "--json and --csv exclude each other"),
        (["-f", "a.sql", "--file", "b.sql"], None, "--file is given more than once"),
    ],
)
def test_no_statements_are_wrong_input(sql, tmp_path, monkeypatch, words, given, sentence):
    monkeypatch.chdir(tmp_path)
    said = sql(*words, input=given)
    assert said.exit_code == 2
    assert sentence in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_an_option_that_there_is_not_is_no_comment(sql):
    assert "No such option '--jsn'" in sql("--jsn", "SELECT 1").stderr


@pytest.mark.parametrize("query", statements(*blocks((ROOT / "README.md").read_text(), "sql")))
def test_a_query_of_the_readme_can_be_pasted_as_printed(sql, query):
    pasted = subprocess.run(["sh", "-c", f'printf %s "{query};"'], capture_output=True, text=True, check=True)
    assert pasted.stdout == f"{query};"  # a shell leaves it alone
    said = sql(pasted.stdout)
    assert said.exit_code == 0, said.stderr
    assert "┌" in said.stdout


def test_all_queries_of_the_readme_can_be_piped_at_once(sql):
    (block,) = blocks((ROOT / "README.md").read_text(), "sql")
    said = sql(input=block)
    assert said.exit_code == 0, said.stderr
    assert said.stdout.count("┌") == 5


# --- what is shown ---


def test_a_wide_result_is_as_wide_as_the_terminal(sql):
    said = sql("FROM videos")
    lines = said.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "video_id" in lines[1]
    assert "…" in lines[1]
    assert "outdated" in lines[1]
    assert "29 columns (" in lines[-1]


def test_many_rows_are_the_first_and_the_last(sql):
    lines = sql("FROM range(1000)").stdout.splitlines()
    assert len(lines) < 60
    assert "1000 rows" in "".join(lines)


def test_long_and_broken_texts_and_blobs_take_one_line(sql):
    said = sql("SELECT 'one' || chr(10) || 'two' AS lines, repeat('long ', 99) AS long, 'abc'::BLOB AS blob, 1 AS x")
    (row,) = [line for line in said.stdout.splitlines() if "one" in line]
    assert r"one\ntwo" in row
    assert "long long" in row
    assert "<3 bytes>" in row
    assert max(map(len, said.stdout.splitlines())) <= 100


def test_what_a_terminal_would_obey_is_written_out(sql):
    query = "SELECT 'a' || chr(27) || '[31mb' || chr(8238) AS x, 'y' AS \"\x1b[31m\""
    for form in ([], ["--line"], ["--markdown"]):
        said = sql(query, *form)
        assert said.exit_code == 0
        assert "\x1b" not in said.stdout
        assert r"\u202e" in said.stdout


def test_both_columns_of_one_name_are_shown(sql):
    query = "SELECT 1 AS a, 2 AS a"
    assert sql(query).stdout.splitlines()[3:4] == ["├───────┼───────┤"]
    assert sql(query, "--csv").stdout == "a,a\n1,2\n"
    assert objects(sql(query, "--json")) == [{"a": 1, "a_1": 2}]


ODD = "SELECT 'a,\"b\"|c' AS x, 'one' || chr(10) || 'two' AS y, NULL AS z UNION ALL SELECT 'd', 'e', 3"


def test_csv_has_every_value_in_full(sql):
    assert sql(ODD, "--csv").stdout == 'x,y,z\n"a,""b""|c","one\ntwo",\nd,e,3\n'


def test_markdown_is_a_table(sql):
    shown = '| x | y | z |\n| --- | --- | --- |\n| a,"b"\\|c | one<br>two |  |\n| d | e | 3 |\n'
    assert sql(ODD, "--markdown").stdout == shown


def test_lines_show_a_value_each(sql):
    assert sql(ODD, "--line").stdout == 'x = a,"b"|c\ny = one\ntwo\nz = NULL\n\nx = d\ny = e\nz = 3\n'


# --- what is said of a query that cannot run ---


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("SELECT ur FROM videos", ["Candidate bindings:", '"uri"', "LINE 1: SELECT ur FROM videos\n               ^^"]),
        ("FROM vidoes", ['Did you mean "videos"?']),
        ("SELECT 1;\nSELEC 2", ['syntax error at or near "SELEC"', "LINE 2: SELEC 2\n        ^^^^^"]),
        ("SELECT max(uri, 1, 2) FROM videos", ["Candidate functions:\n\tmax("]),
        ("SELECT 1; SELECT nope", ['statement 2 cannot run: Binder Error: Referenced column "nope"']),
        ("SELECT uri::INT FROM videos", ["Could not convert string"]),
    ],
)
def test_duckdbs_whole_message_is_told(sql, query, parts):
    said = sql(query)
    assert said.exit_code == 2
    assert said.stderr.startswith("longvlm: ")
    assert [part for part in parts if part not in said.stderr] == []


def test_a_query_that_fails_on_the_way_says_so(sql):
    said = sql("SELECT if(i = 9000, error('out of luck'), i) AS i FROM range(10000) t(i)", "--json")
    assert said.exit_code == 2
    assert said.stderr == "longvlm: the query cannot run: Invalid Input Error: out of luck\n"
