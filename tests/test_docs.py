"""What the documents say is true: queries run, links lead somewhere, generated parts are as they are generated."""

import re
import runpy
import tomllib

import click
import numpy as np
import pyarrow as pa
import pytest
import stores
from click.testing import CliRunner
from documents import blocks, prose, statements

from longvlm.jobs.cli import main
from longvlm.jobs.operate.alerts import read_alerts
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.training.conversations import read_conversations
from longvlm.pipeline.vision.requantise import as_int8
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas import recipe, tables, training
from longvlm.schemas.errors import ErrorCode, InputError
from longvlm.schemas.identity import new_write_id, video_id
from support import ROOT

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
GUIDES = {"README.md": README, **{f"docs/{name}": text for name, text in DOCS.items()}}
QUERIES = statements(*blocks(README, "sql"))
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
DICTIONARY = GENERATE["DICTIONARY"]
MENTIONS = [
    pytest.param(said, id=f"{name}: {said}")
    for name, text in GUIDES.items()
    for said in re.findall(r"`(longvlm [^`]+)`", prose(text))
]


def commands(group=main, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


def called(words, group=main):
    """The command that a line calls, and the words that are left to it."""
    name, command, rest = group.resolve_command(click.Context(group), words)
    return called(rest, command) if isinstance(command, click.Group) else (name, command, rest)


# --- the README ---


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself_and_stands_in_the_reference(command):
    shown = CliRunner().invoke(main, [*command, "--help"])
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) > 4
    assert f"\n## longvlm {' '.join(command)}\n" in DOCS["commands.md"]


def test_the_tree_is_the_tree():
    listed, above = set(), []
    for line in README.split("## The tree")[1].split("\n## ")[0].splitlines():
        if found := re.match(r"( *)(\w+)/ ", line):
            above = [*above[: len(found[1]) // 2], found[2]]
            listed.add("/".join(above))
    rooms = ("longvlm", "schemas", "pipeline", "tinyworld", "jobs")
    folders = {path.parent.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("__init__.py")}
    assert listed == {*map(str, folders), "infra", "docs", "benchmarks", "tests"}


def test_the_readme_is_short_and_its_first_screen_a_screen():
    assert len(README.splitlines()) <= 150
    assert README.split("\n## ")[0].count("\n") <= 60


def test_there_are_five_queries():
    assert len(QUERIES) == 5


# --- what is generated ---


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_generated_parts_are_as_they_are_generated(path):
    wanted = GENERATE["documents"]().get(path, path.read_text())
    assert path.read_text() == wanted, f"docs/{path.name} is behind the program; `make docs` writes it anew."


def test_every_column_has_a_sentence_and_every_sentence_a_column():
    shown = {name: [column for column, _ in columns] for name, columns in GENERATE["views"]().items()}
    columns = {"tables": {name: schema.names for name, schema in tables.TABLES.items()}, "views": shown}
    assert DICTIONARY.keys() == columns.keys()
    for kind, relations in columns.items():
        assert DICTIONARY[kind].keys() == relations.keys()
        for name, own in relations.items():
            told = DICTIONARY[kind][name]
            assert told["about"]
            assert set(told.get("columns", {})) <= set(own), f"{name} has no such column"
            for column in own:
                said = GENERATE["meaning"](told, column)
                assert said["is"].endswith(".")
                assert said.keys() <= {"is", "unit", "null"}


def test_every_command_that_speaks_json_says_what_it_prints():
    speaking = {
        " ".join(command)
        for command in commands()
        if "--json" in {word for option in called(list(command))[1].params for word in option.opts}
    }
    told = DOCS["commands.md"].split("## JSON")[1].split("<!-- generated")[0]
    assert set(re.findall(r"^\| `longvlm ([\w ]+)` \|", told, re.MULTILINE)) == speaking


# --- what is written by hand ---


@pytest.mark.parametrize("said", MENTIONS)
def test_a_command_that_is_mentioned_has_these_options(said):
    words = [word for word in said.split()[1:] if word not in ("COMMAND", "--help")]
    if words:
        _, command, rest = called(words)
        known = {name for option in command.params for name in option.opts}
        assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("name", GUIDES)
def test_queries_run_over_an_empty_store(name):
    with catalog.connect(Snapshot()) as con:
        for query in (query for block in blocks(GUIDES[name], "sql") for query in statements(block)):
            catalog.query(con, query)


@pytest.mark.parametrize("name", [*GUIDES, "infra/README.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_what_make_is_asked_for_can_be_made():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for text in GUIDES.values() for word in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)}
    assert {"demo", "test", "docs"} <= asked <= targets


def test_every_failure_has_a_meaning_and_a_remedy():
    rows = re.findall(
        r"^\|(?: `(\w+)`)? \| a (?:video|question|verdict) \| (.+) \| (.+) \|$", DOCS["operations.md"], re.MULTILINE
    )
    assert {code for code, _, _ in rows if code} == {code.value for code in ErrorCode}
    assert len(rows) > len(ErrorCode)  # some mean different things of videos and of questions


def test_the_example_of_alerts_can_be_read(tmp_path):
    (tmp_path / "alerts.sql").write_text(blocks(DOCS["operations.md"], "sql")[0])
    assert len(read_alerts(str(tmp_path / "alerts.sql"))) == 2


def test_recipe_files_are_right_and_every_setting_is_told():
    for name, read in (
        ("concepts.md", lambda settings: recipe.from_settings(settings, stores.TOWER)),
        ("training.md", training.from_settings),
    ):
        for block in blocks(DOCS[name], "toml"):
            assert read(tomllib.loads(block)).name == "custom"
        with pytest.raises(InputError, match="it may set") as refused:
            read({"nothing": 1})
        known = re.search(r"it may set (.*)\.$", str(refused.value))[1].split(", ")
        assert [setting for setting in known if f"`{setting}`" not in DOCS[name]] == []


def test_recipes_of_families_are_right_for_them():
    towers = {name: tower for name, (tower, _, _) in GENERATE["CHECKPOINTS"].items()}
    grid, spread = map(tomllib.loads, blocks(DOCS["families.md"], "toml"))
    tall = recipe.from_settings({**grid, "num_global_layers": 0}, towers["Qwen3-VL 2B"])
    assert (tall.tower.frame_size, tall.patches_per_segment) == ((512, 288), 5 * 144)
    whole = recipe.from_settings({**spread, "num_global_layers": 0}, towers["SmolVLM2 500M"])
    assert whole.schedule_for(whole.patches_per_segment) == ()
    assert f"of 2.2B they are {towers['SmolVLM2 2.2B'].num_patches})" in DOCS["families.md"]


def test_the_table_of_costs_is_of_the_default_recipe():
    """By hand, for two rows: the generator could be wrong as well as the table."""
    costs = DOCS["families.md"].split("<!-- generated: costs -->")[1].split("<!-- end")[0]
    bytes_of_2b = 360 * 80 * (4 * 2048 * 2 + 2 + 8 + 24)
    int8_of_2b = 360 * 80 * (4 * 2048 + 2 * 128 + 2 + 8 + 24)
    stored = f"16.00 KiB | {bytes_of_2b / 1e9:.2f} GB | 8.25 KiB | {int8_of_2b / 1e9:.2f} GB"
    assert f"| Qwen3-VL 2B | 320 x 512 | 800 | {stored} |" in costs
    bytes_of_clip = 360 * (80 * (1024 * 2 + 2 + 8) + 5 * 1024 * 2)
    int8_of_clip = 360 * (80 * (1024 + 2 * 16 + 2 + 8) + 5 * 1024 * 2)
    stored = f"2.00 KiB | {bytes_of_clip / 1e9:.2f} GB | 1.03 KiB | {int8_of_clip / 1e9:.2f} GB"
    assert f"| {stored} | {360 * 80 + 5:,} |" in costs


def test_the_example_of_conversations_can_be_learnt_from(tmp_path):
    (tmp_path / "rows.jsonl").write_text(*blocks(DOCS["training.md"], "jsonl"))
    assert read_conversations(str(tmp_path / "rows.jsonl"))["video"].to_pylist() == ["clip-03"] * 3


# --- a store, read as the data dictionary says ---


def fail(store, name):
    outcomes = write_shards(
        store.uri, pa.Table.from_pylist([stores.unit(name, new_write_id())], tables.ENCODED), stores.LONG.fingerprint
    )
    store.commit(outcomes, stores.videos(outcomes, [name], stores.LONG.fingerprint))


def forget(store, name):
    row = {"video_id": video_id(stores.uri_of(name)), "status": "deleted", "error_code": "forgotten"}
    store.append("videos", pa.Table.from_pylist([row], tables.VIDEOS))


def move(store, name, to):
    (row,) = [row for row in stores.newest(store).to_pylist() if row["uri"] == stores.uri_of(name)]
    row |= {"video_id": video_id(stores.uri_of(to)), "uri": stores.uri_of(to)}
    store.append("videos", pa.concat_tables([pa.Table.from_pylist([row], tables.VIDEOS), stores.deleted([name])]))


def test_a_store_is_read_without_this_program(tmp_path):
    store = Store.create(str(tmp_path / "store"))
    store.register_recipe(stores.LONG, "some/model")
    made = stores.index(store, ["kept", "replaced", "failed", "deleted", "back", "forgotten", "lifted", "moved"])
    stores.index(store, ["replaced"], seed=1)
    stores.index(store, ["kept"], stores.TINY, seed=2)
    fail(store, "failed")
    fail(store, "bad")
    store.append("videos", stores.deleted(["deleted", "back"]))
    stores.index(store, ["back"], seed=3)
    for name in ("forgotten", "lifted"):
        forget(store, name)
        stores.index(store, [name], seed=4)
    store.append("videos", stores.deleted(["lifted"]))
    stores.index(store, ["lifted"], seed=5)
    move(store, "moved", "here")

    found = {}
    for snippet in blocks(DOCS["data-dictionary.md"], "python"):
        exec(snippet.replace("path/to/store", store.uri), found)
    names = ["write_id", "video_id", "recipe", "uri"]
    with catalog.connect(store.pin()) as con:
        live = con.sql(f"SELECT {', '.join(names)} FROM live_videos ORDER BY ALL").fetchall()
    assert found["live"].select(*names).order("write_id").fetchall() == live
    assert len(live) == 7

    rows = found["of_live"].to_arrow_table().to_pylist()
    shown = ("kept", "replaced", "failed", "back", "lifted", "here")
    assert {row["uri"] for row in rows} == {stores.uri_of(name) for name in shown}
    (row,) = [row for row in rows if row["write_id"] == made["write_id"][0].as_py() and row["segment"] == 2]
    local, sizes, spans, cls, positions = found["decode"](row)
    assert positions is None
    assert (local.shape, sizes.shape, spans.shape, cls.shape) == ((8, 64), (8,), (8, 2), (2, 64))
    stored = made["segments"][0].as_py()[2]
    for name, values in (("local", local), ("sizes", sizes), ("spans", spans), ("cls", cls)):
        assert values.tobytes() == stored[name]
    small = as_int8(pa.Table.from_pylist([row], tables.TOKENS))
    assert np.array_equal(found["decode"](small.to_pylist()[0])[0], from_arrow(small).local.numpy())
    assert found["decode"]({**row, "cls": None})[3] is None
    placed = found["decode"]({**row, "positions": np.arange(24.0).tobytes()})[4]
    assert placed.tolist() == np.arange(24.0).reshape(8, 3).tolist()
