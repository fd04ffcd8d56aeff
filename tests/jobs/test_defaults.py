from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from longvlm.jobs.cli import main


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A working folder and a configuration folder, and nothing in the environment."""
    found = SimpleNamespace(here=tmp_path / "here", user=tmp_path / "config" / "longvlm")
    found.here.mkdir()
    found.user.mkdir(parents=True)
    monkeypatch.chdir(found.here)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("LONGVLM_STORE", "LONGVLM_MODEL", "LONGVLM_RAY_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def taken(monkeypatch):
    """Run commands that only tell what their options are."""

    def run(*words):
        told = {}
        command, name = main, None
        for name in words[: 2 if words[0] == "recipe" else 1]:
            command = command.commands[name]
        monkeypatch.setattr(command, "callback", lambda **options: told.update(options))
        done = CliRunner().invoke(main, [*words, "--quiet"])
        assert done.exit_code == 0, done.output
        return told

    return run


def test_an_option_comes_before_the_environment_the_folders_file_and_the_users_file(places, taken, monkeypatch):
    (places.user / "longvlm.toml").write_text('store = "user"\nmodel = "users"\nray_address = "auto"\n')
    assert (
        taken("answer", "--ask", "Why?").items() >= {"store": "user", "model": "users", "ray_address": "auto"}.items()
    )
    (places.here / "longvlm.toml").write_text('store = "folder"\n')
    assert taken("answer", "--ask", "Why?").items() >= {"store": "folder", "model": "users"}.items()
    monkeypatch.setenv("LONGVLM_STORE", "environment")
    assert taken("answer", "--ask", "Why?")["store"] == "environment"
    assert taken("answer", "--ask", "Why?", "--store", "option")["store"] == "option"
    assert taken("recipe", "list")["store"] == "environment"
    assert taken("train", "--to", "to", "--data", "d.csv")["model"] == "users"
    assert taken("evaluate", "--benchmark", "tinyworld")["store"] == "environment"
    assert "model" not in taken("status")


def test_rays_own_variable_is_part_of_the_environment(places, taken, monkeypatch):
    (places.here / "longvlm.toml").write_text('ray_address = "file"\nstore = "s"\n')
    monkeypatch.setenv("RAY_ADDRESS", "rays")
    assert taken("answer", "--ask", "Why?")["ray_address"] == "rays"
    monkeypatch.setenv("LONGVLM_RAY_ADDRESS", "ours")
    assert taken("answer", "--ask", "Why?")["ray_address"] == "ours"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('stor = "x"', "sets stor, which nothing reads; it may set store, model, ray_address."),
        ("store = 3", 'sets store to no text; write it as store = "...".'),
        ("store = ", "cannot be read ("),
        (b"\xff", "cannot be read ("),
    ],
)
def test_a_file_that_cannot_be_meant_is_a_sentence(places, text, says):
    file = places.here / "longvlm.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = CliRunner().invoke(main, ["status"])
    assert done.exit_code == 2
    assert f"longvlm: {file}" in done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_secret_in_a_file_is_refused_as_on_the_command_line(places):
    (places.here / "longvlm.toml").write_text('store = "s3://KEY:SECRET@bucket/store"')
    done = CliRunner().invoke(main, ["status"])
    assert done.exit_code == 2
    assert "SECRET" not in done.output


def test_a_submitted_job_takes_along_what_is_set_here(places, monkeypatch):
    (places.here / "longvlm.toml").write_text('store = "s3://bucket/index"\nray_address = "none"\n')
    monkeypatch.setenv("LONGVLM_MODEL", "tinyworld")
    sent = []

    def submit_job(order):
        sent.append(order)
        return SimpleNamespace(job_id="job", follow_hint="...")

    monkeypatch.setattr("longvlm.jobs.operate.submit.submit_job", submit_job)
    words = ["submit", "--address", "http://head:8265", "--no-wait", "index", "s3://bucket/videos"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert CliRunner().invoke(main, [*words, "--store", "s3://other"]).exit_code == 0
    assert [order.command for order in sent] == [
        ("index", "--store", "s3://bucket/index", "--model", "tinyworld", "s3://bucket/videos"),
        ("index", "--model", "tinyworld", "s3://bucket/videos", "--store", "s3://other"),
    ]
