import duckdb
import fsspec
import pyarrow as pa
import pytest
import stores
from pyarrow import parquet

from longvlm.pipeline.store.catalog import connect, query
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.access import attach, seal
from longvlm.schemas.errors import InputError
from longvlm.schemas.sql_text import quoted


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a store, and beside it secret.txt and secret.parquet."""
    folder = tmp_path_factory.mktemp("home")
    store = Store.create(str(folder / "store"))
    store.register_recipe(stores.LONG, "some/model")
    stores.index(store, ["a"])
    (folder / "secret.txt").write_text("secret\n")
    parquet.write_table(pa.table({"secret": [1]}), folder / "secret.parquet")
    return folder


@pytest.fixture(scope="module")
def snapshot(home):
    """Of that store."""
    return Store.open(str(home / "store")).pin()


@pytest.fixture
def sealed(snapshot):
    with connect(snapshot, apart=True) as con:
        con.execute("SET memory_limit = '100MB'")
        seal(con, snapshot)
        yield con


def test_the_views_are_still_there(sealed, home):
    assert query(sealed, "SELECT count(*) AS n FROM tokens").to_pylist() == [{"n": 4}]
    shard = next((home / "store" / "segments").glob("*.parquet"))
    assert query(sealed, f"FROM '{shard}'").num_rows == 4


FORBIDDEN = [
    "FROM read_text('BESIDE/secret.txt')",
    "FROM read_blob('BESIDE/secret.txt')",
    "FROM read_csv('BESIDE/secret.txt')",
    "FROM read_json('BESIDE/secret.txt')",
    "FROM sniff_csv('BESIDE/secret.txt')",
    "FROM read_parquet('BESIDE/secret.parquet')",
    "FROM 'BESIDE/secret.parquet'",
    "FROM parquet_metadata('BESIDE/secret.parquet')",
    "FROM read_parquet('BESIDE/store/segments/../../secret.parquet')",
    "FROM read_text('/etc/passwd')",
    "FROM read_text('/proc/self/environ')",
    "FROM glob('BESIDE/*')",
    "FROM glob('/etc/pass*')",
    "FROM query('FROM read_text(''/etc/passwd'')')",
    "SELECT getenv('HOME')",
    "FROM read_text('http://127.0.0.1:9/x')",
    "FROM read_parquet('s3://elsewhere/x.parquet')",
    "COPY (SELECT 1) TO 'BESIDE/out.csv'",
    "ATTACH 'BESIDE/new.duckdb' AS n",
    "EXPORT DATABASE 'BESIDE/out'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD 'BESIDE/x.duckdb_extension'",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET allowed_paths = ['/etc/passwd']",
    "SET temp_directory = '/etc'",
    "RESET allowed_directories",
    "RESET lock_configuration",
    "SET memory_limit = '1TB'",
    "COPY (SELECT 1) TO 'BESIDE/store/segments/new.parquet'",
    "ATTACH 'BESIDE/store/new.duckdb' AS n",
    "FROM glob('BESIDE/store/segments/*')",
    "FROM read_text('BESIDE/store/segments/_delta_log/*')",
]


def test_nothing_else_is(sealed, home):
    """Not even for a statement that gets past the check that a query is one SELECT."""
    before = sorted(home.rglob("*"))
    for sql in FORBIDDEN:
        with pytest.raises(duckdb.Error) as caught:
            sealed.execute(sql.replace("BESIDE", str(home))).fetchall()
        assert "secret\n" not in str(caught.value)
    assert sorted(home.rglob("*")) == before


def test_a_folder_whose_name_begins_alike_is_another(store, tmp_path):
    stores.index(store, ["a"])
    (tmp_path / "store" / "segments-secret").mkdir()
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "store" / "segments-secret" / "a.parquet")
    snapshot = store.pin()
    with connect(snapshot, apart=True) as con:
        seal(con, snapshot)
        with pytest.raises(InputError, match="Cannot access"):
            query(con, f"FROM '{tmp_path}/store/segments-secret/a.parquet'")


def test_a_query_larger_than_memory_goes_to_a_folder_that_is_removed(sealed):
    (folder,) = sealed.execute("SELECT current_setting('temp_directory')").fetchone()
    sealed.execute("CREATE TEMP TABLE big AS SELECT range AS a, repeat('x' || range, 20) AS b FROM range(1_000_000)")
    assert fsspec.filesystem("file").exists(folder)
    sealed.close()
    assert not fsspec.filesystem("file").exists(folder)


# --- attached inputs ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """One small table in every form, with the column `uri` of the video a, and two files that are none."""
    table = pa.table({"uri": [stores.uri_of("a"), "other"], "owner": ["it's me", "you"]})
    folder = tmp_path_factory.mktemp("inputs") / "it's mine"
    folder.mkdir()
    for name in ("broken.parquet", "broken.duckdb"):
        (folder / name).write_text("x" * 9000)
    parquet.write_table(table, folder / "m.parquet")
    table.to_pandas().to_csv(folder / "m.csv", index=False)
    table.to_pandas().to_csv(folder / "m.csv.gz", index=False)
    table.to_pandas().to_json(folder / "m.jsonl", orient="records", lines=True)
    table.to_pandas().to_json(folder / "m.json", orient="records")
    with duckdb.connect(folder / "m.duckdb") as con:
        con.register("given", table)
        con.execute("CREATE TABLE owners AS FROM given")
        con.execute("CREATE VIEW sly AS FROM read_text('/etc/passwd')")
    return folder


@pytest.mark.parametrize("name", ["m.parquet", "m.csv", "m.csv.gz", "m.jsonl", "m.json", "m.duckdb"])
def test_an_input_of_every_form_joins(snapshot, inputs, name):
    with connect(snapshot, apart=True) as con:
        seal(con, snapshot, attach(con, [f"meta={inputs / name}"]))
        table = "meta.owners" if name.endswith("duckdb") else "meta"
        assert query(con, f"SELECT owner FROM videos JOIN {table} USING (uri)").to_pylist() == [{"owner": "it's me"}]
        with pytest.raises(duckdb.Error, match=r"read-only|not an table"):
            con.execute(f"INSERT INTO {table} VALUES ('x', 'y')")


def test_a_view_of_an_attached_database_reaches_no_further(snapshot, inputs):
    with connect(snapshot, apart=True) as con:
        seal(con, snapshot, attach(con, [f"meta={inputs}/m.duckdb", f"more={inputs}/m.csv"]))
        assert query(con, "FROM more").num_rows == 2
        for sql in ("FROM meta.sly", f"FROM {quoted(f'{inputs}/m.parquet')}"):
            with pytest.raises(InputError, match="Cannot access"):
                query(con, sql)


@pytest.fixture(scope="module")
def unsealed(snapshot):
    """A connection to which nothing is attached: nothing comes of what is tried."""
    with connect(snapshot, apart=True) as con:
        yield con


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("INPUTS/m.csv", "write NAME=FILE"),
        ("meta=", "write NAME=FILE"),
        ("my-meta=INPUTS/m.csv", "write NAME=FILE"),
        ("Videos=INPUTS/m.csv", "the name Videos is taken"),
        ("ledger_videos=INPUTS/m.csv", "is taken"),
        ("main=INPUTS/m.csv", "is taken"),
        ("memory=INPUTS/m.duckdb", "is taken"),
        ("meta=INPUTS/gone.csv", "no such file"),
        ("meta=INPUTS", "must end in one of"),
        ("meta=INPUTS/m.xlsx", "must end in one of"),
        ("meta=INPUTS/broken.parquet", "cannot attach .*check the file"),
        ("meta=INPUTS/broken.duckdb", "cannot attach .*check the file"),
        ("meta=s3://bucket/m.duckdb", "copy it here first"),
        ("meta=carrier-pigeon://m.csv", "Protocol not known"),
    ],
)
def test_what_cannot_be_attached_is_told_in_a_sentence(unsealed, inputs, given, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        attach(unsealed, [given.replace("INPUTS", str(inputs))])
    assert "\n" not in str(caught.value)


def test_a_name_serves_once(snapshot, inputs):
    with connect(snapshot, apart=True) as con, pytest.raises(InputError, match="taken"):
        attach(con, [f"meta={inputs}/m.csv", f"META={inputs}/m.json"])


def test_a_store_in_a_bucket_opens_that_bucket_s_tables_only(s3, inputs):
    store = Store.create("s3://bucket/store")
    store.register_recipe(stores.LONG, "some/model")
    stores.index(store, ["a"])
    s3.put_object(Bucket="bucket", Key="secret.parquet", Body=(inputs / "m.parquet").read_bytes())
    s3.put_object(Bucket="bucket", Key="meta/m.csv", Body=(inputs / "m.csv").read_bytes())
    snapshot = store.pin()
    with connect(snapshot, apart=True) as con:
        also = attach(con, ["meta=s3://bucket/meta/m.csv", f"here={inputs}/m.json"])
        seal(con, snapshot, also)
        assert query(con, "SELECT count(*) AS n FROM tokens").to_pylist() == [{"n": 4}]
        for table in ("meta", "here"):
            assert query(con, f"SELECT owner FROM videos JOIN {table} USING (uri)").num_rows == 1
        for path in ("s3://bucket/secret.parquet", "s3://bucket/store/tokens/../../secret.parquet", "/etc/passwd"):
            with pytest.raises(InputError, match="Cannot access"):
                query(con, f"FROM read_parquet('{path}')")


def test_inputs_of_a_bucket_join_a_local_store(s3, snapshot, inputs):
    s3.put_object(Bucket="bucket", Key="m.parquet", Body=(inputs / "m.parquet").read_bytes())
    with connect(snapshot, apart=True) as con:
        seal(con, snapshot, attach(con, ["meta=s3://bucket/m.parquet"]))
        assert query(con, "FROM videos JOIN meta USING (uri)").num_rows == 1
        with pytest.raises(InputError, match="Cannot access"):
            query(con, "FROM read_parquet('s3://bucket/other.parquet')")
