"""Every command line of the documents does, as it is printed, what it is printed for."""

import csv
import json
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial

import pytest
from click.testing import CliRunner
from documents import blocks, shell_commands
from transformers import LlamaConfig, LlamaForCausalLM

from clips import write_clip
from judge_server import JudgeServer
from longvlm import tinyworld
from longvlm.jobs import demo
from longvlm.jobs.cli import main
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.evaluate import tinyworld as evaluate_tinyworld
from longvlm.jobs.evaluate.tinyworld import TinyWorldSpec
from longvlm.jobs.operate import upkeep_command
from longvlm.schemas import training
from models import byte_tokenizer, save_llava, save_qwen3_vl
from support import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "infra" / "README.md"]
# Commands whose lines are only parsed, the line of a submitted job too; each with the reason.
PARSED = {
    "doctor": "tries the workers of a Ray: tests/jobs/operate/test_doctor.py has one",
    "serve": "serves until it is ended: tests/jobs/serve asks it",
    "submit": "sends a job to a cluster: tests/jobs/operate/test_submit.py has one",
}
KNOWN = ("one", "private", "v_1")  # videos of the stores; the sources have one more, so that a run finds work
REFERENCE = ROOT / "docs" / "commands.md"
ON_S3 = ("maintain", "recipe", "status")  # whose lines in the reference keep their stores in the bucket
UPLOADED = (  # where a bucket holds what, of the working folder
    ("s3://bucket/videos", "videos"),
    ("s3://bucket/index", "index"),
    ("s3://my-videos/", "videos"),
)


def printed():
    """What is run together: the lines of a block of code, or a line of a reference's examples.

    Other stores that they put into the bucket are in a folder: a command takes hundreds of requests there, and the jobs
    have tests of their own that do so. Lines that an earlier block has too are not run again.
    """
    found = {}
    for path in DOCUMENTS:
        text = path.read_text()
        examples = [[line] for line in re.findall(r"^ {4}(longvlm .*)$", text, re.MULTILINE) if "[OPTIONS]" not in line]
        for lines in [*(list(shell_commands(f"```\n{block}```\n")) for block in blocks(text)), *examples]:
            own = tuple(placed(" ".join(line.split()), path) for line in lines if line.startswith("longvlm "))
            if own and not any(set(own) <= set(earlier) for earlier in found):
                found[own] = pytest.param(own, id=f"{path.relative_to(ROOT)}: {own[0]}")
    return list(found.values())


def placed(line, path):
    """A line with its store where it is put here."""
    if path == REFERENCE and line.split()[1] in ON_S3:
        return line
    return line.replace("s3://bucket/index", "index").replace("s3://my-index/store", "index")


PRINTED = printed()


def longvlm(words):
    """Run a command line, which has to end well."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, f"longvlm {shlex.join(words)}\n{done.output}"


def upload(client, folder, bucket, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}{path.relative_to(folder)}", Body=path.read_bytes())


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_files(folder):
    """The files that the lines name: questions, labels, conversations, uris, tables to join."""
    uri = "s3://bucket/videos/{}.mp4".format
    questions = [
        {"question_id": "what", "question": "what is it?"},
        {"question_id": "red", "question": "is the circle red?", "type": "bool"},
    ]
    for name in ("questions.jsonl", "standing.jsonl", "etc/longvlm/questions.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name in ("questions.csv", "standing.csv", "q.csv"):
        write_csv(folder / name, ("question", "type"), ("is the circle red?", "bool"))
    write_csv(folder / "labels.csv", ("video", "question", "answer"), ("one", "is the circle red?", "yes"))
    turns = [{"from": "human", "value": "<video>\nwhat is it?"}, {"from": "gpt", "value": "a circle"}]
    conversations = [{"id": name, "video": name, "conversations": turns} for name in ("one", "private")]
    (folder / "conversations.json").write_text(json.dumps(conversations))
    (folder / "conversations.jsonl").write_text('{"video_id": "one", "q": "is the circle red?", "a": "yes"}\n')
    write_csv(folder / "uris.csv", ("uri",), (uri("one"),))
    (folder / "uris.txt").write_text(uri("one") + "\n")
    write_csv(folder / "sites.csv", ("uri", "site"), (uri("one"), "north"))
    write_csv(folder / "shifts.csv", ("external_id", "shift"), ("x", "night"))
    (folder / "test_q.json").write_text(
        json.dumps([{"video_name": "1", "question": "is it red", "question_id": "v_1_0"}])
    )
    (folder / "test_a.json").write_text(json.dumps([{"answer": "yes", "type": 3, "question_id": "v_1_0"}]))
    (folder / "generic_qa.json").write_text(json.dumps([{"Q": "what is it?", "A": "a circle", "video_name": "v_1"}]))


def write_models(folder):
    """The model of the tiny world in place of every LongVLM; small ones of random weights for others and a judge."""
    llava, judge = save_llava(folder / "path/to/llava"), folder / "path/to/judge"
    qwen = save_qwen3_vl(folder / "Qwen/Qwen3-VL-2B-Instruct")
    (folder / "llava-hf").mkdir()
    (folder / "models").mkdir()
    (folder / "llava-hf/llava-1.5-7b-hf").symlink_to(llava)
    for name in ("path/to/longvlm", "models/longvlm", "mine"):
        (folder / name).symlink_to(tinyworld.MODEL)
    tokenizer = byte_tokenizer(start="<s>", end="</s>", max_length=4096, lower=False, close=False)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    ends = {"eos_token_id": list(range(0, 256, 2))}  # else random weights hardly ever come to an end
    for model in (llava, qwen, judge):
        (model / "generation_config.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def buckets(s3_environment, s3_client, empty_s3):
    """Gives a function that leaves only the empty buckets of the documents on the S3 server, which processes reach."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_environment, "RAY_ADDRESS": IN_PROCESS}.items():
            patch.setenv(name, value)

        def start_anew():
            empty_s3()
            for name in ("bucket", "my-videos", "my-index"):
                s3_client.create_bucket(Bucket=name)

        yield start_anew
        empty_s3()


@pytest.fixture(scope="module")
def made(tmp_path_factory, buckets, s3_client):
    """A folder with all that the lines name; `index` and `S` are stores of s3://bucket/videos, with answers."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "videos").mkdir()
    for number, name in enumerate((*KNOWN, "new")):
        write_clip(folder / "videos" / f"{name}.mp4", 25 + number)
    write_files(folder)
    write_models(folder)
    buckets()
    upload(s3_client, folder / "videos", "bucket", "videos/")
    s3_client.delete_object(Bucket="bucket", Key="videos/new.mp4")
    store = ("--store", str(folder / "index"))
    longvlm(["index", "s3://bucket/videos", *store, "--model", "tinyworld", "--recipe", "long"])
    longvlm(["index", "s3://bucket/videos", *store, "--decode", "keyframe", "--restale"])
    longvlm(["recipe", "promote", *store, "long"])
    longvlm(["answer", *store, "--ask", "is the circle red?", "--max-new-tokens", "5"])
    shutil.copytree(folder / "index", folder / "S")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working folder: a copy of `made`. The tiny world has one video here, and a training one step of float32."""
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("OPENAI_API_KEY", "made-up")
    monkeypatch.setattr(upkeep_command, "_agreed", lambda: True)
    monkeypatch.setattr(demo, "NUM_VIDEOS", 1)
    for name, recipe in training.RECIPES.items():
        monkeypatch.setitem(training.RECIPES, name, partial(replace, recipe(), precision="float32", max_steps=1))
    monkeypatch.setattr(evaluate_tinyworld, "TinyWorldSpec", lambda seed, _: TinyWorldSpec(seed, 1))
    return tmp_path / "work"


@pytest.fixture
def judge():
    server = JudgeServer()
    yield server
    server.stop()


def words_of(line, judge_url):
    """The words of a line behind `longvlm`; where a test has no place, as at the root of the disk, one of its own."""
    words = shlex.split(line.replace("https://HOST/v1", judge_url), comments=True)[1:]
    return [word.replace("/models/", "models/").replace("/etc/longvlm/", "etc/longvlm/") for word in words]


def parse(name, *words):
    """Parse a command line that is not run, and that of a job to be submitted."""
    asked = main.commands[name].make_context(name, list(words)).params
    if name == "submit":
        parse(asked["job"], *asked["args"])


@pytest.mark.parametrize("lines", PRINTED)
def test_what_is_printed_together_runs_in_its_order(lines, folder, buckets, s3_client, judge):
    text = "\n".join(line for line in lines if words_of(line, judge.url)[0] not in PARSED)
    if "s3://" in text:
        buckets()
    for place, name in UPLOADED:
        if place in text:
            bucket, _, prefix = place.removeprefix("s3://").partition("/")
            upload(s3_client, folder / name, bucket, prefix and f"{prefix}/")
    if "--to mine" in text:
        (folder / "mine").unlink()  # it is made here
    for line in lines:
        words = words_of(line, judge.url)
        if words[0] in PARSED:
            parse(*words)
        else:
            longvlm(words)
