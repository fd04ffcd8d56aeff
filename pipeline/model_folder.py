"""Model folders: where they lie, and what stands in them; to look into one loads neither torch nor transformers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from longvlm.schemas.errors import InputError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, tokenizers and chat templates
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
ADAPTER = "adapter_config.json"  # peft's
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"

_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\s]+")  # as git's names are, near enough


def resolve(model: str) -> Path:
    """The folder of a model: itself if it is one, otherwise the hub's snapshot, downloaded once and then cached.

    Args:
        model: a folder, or a hub id, after which `@` and a branch, a tag or a commit may stand.

    Raises:
        InputError: there is neither a folder nor a repository of that name, or no such revision, or the hub cannot be
            reached; or what lies there is an adapter of a model.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _snapshot(model)
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"the model {model} is an adapter of another one (it has an {ADAPTER}); merge it into that one first "
            "(peft's merge_and_unload, then save_pretrained), and name the folder that this makes."
        )
    return folder


def short_name(model: str) -> str:
    """The name of a folder without those it lies in, or a hub id without its owner, but with its revision."""
    return Path(model).name if Path(model).expanduser().is_dir() else model.partition("/")[2]


def _snapshot(model: str) -> Path:
    """The hub's snapshot of a model."""
    repository, at, revision = model.partition("@")
    if repository.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(
            f"the model folder {model} does not exist; name an existing folder or a hub id such as "
            "openai/clip-vit-large-patch14."
        )
    if at and not _REVISION.fullmatch(revision):
        raise InputError(
            f"the model {model} names no revision after the @; write a branch, a tag or a commit there, or nothing."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    pinned = revision or None
    try:
        folder = Path(snapshot_download(repository, revision=pinned, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            patterns = [*SMALL_FILES, "pytorch_model*.bin"]
            folder = Path(snapshot_download(repository, revision=pinned, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise InputError(
            f"the hub's {repository} has no revision {revision}; name one of its branches, tags or commits after the @."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{repository} is neither a folder here nor a model that the hub shows you; check its spelling, or log in "
            "if it is private."
        ) from error
    except OSError as error:  # every way of not reaching the hub derives from it
        what = f"revision {revision}" if at else "it"
        reason = str(error).splitlines()[0].rstrip(".")
        if isinstance(error, LocalEntryNotFoundError):  # whose words are about its options
            reason = f"it is out of reach, and the cache here does not hold all of {what}"
        raise InputError(
            f"the model {model} is not a folder here and could not be fetched from the hub ({reason}); give the path "
            "of a downloaded copy."
        ) from error
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of a model folder's JSON files.

    Raises:
        InputError: it is not there or no JSON object.
    """
    try:
        read = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"the model folder {folder} lacks {name}; copy it there from where the model comes."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / name} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(read, dict):
        raise InputError(f"{folder / name} is JSON, but no object with fields; copy it again.")
    return read


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, as transformers makes it.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make one up
        raise InputError(f"the model folder {folder} lacks a tokenizer; copy {TOKENIZER_FILES[0]} there.")
    from transformers import AutoTokenizer  # takes seconds to load
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reads the whole configuration again, whose defaults draw warnings of their own
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special, transformers whatever a wrong type leads to
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the tokenizer in {folder} cannot be loaded ({reason}); copy its files there.") from error
    finally:
        logging.set_verbosity(verbosity)


def open_to_others(path: Path) -> None:
    """Give a file the mode that new files get here: safetensors writes its own for its user alone."""
    new = path.with_name(f"{path.name}.mode")
    new.touch()
    shutil.copymode(new, path)
    new.unlink()


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: one that holds all goes before shards, safetensors before pickles."""
    for whole in (SAFETENSORS, PICKLE):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / f"{whole}.index.json").is_file():
            weight_map = read_json(folder, f"{whole}.index.json").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{folder / whole}.index.json has no weight_map that names shards; copy it again.")
            shards = sorted(set(map(str, weight_map.values())))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise InputError(f"the model folder {folder} lacks {', '.join(missing)}, named by its index; copy it.")
            return [folder / shard for shard in shards]
    raise InputError(f"the model folder {folder} has no weights; it needs {SAFETENSORS}, its shards, or {PICKLE}.")
