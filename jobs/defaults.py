"""Defaults of options that most commands share, from a file `longvlm.toml`.

What holds, in this order: the option, its environment variable, the file in the working folder, the file in the user's
configuration folder, what is built in.
"""

import tomllib
from pathlib import Path
from typing import Any

import click

from longvlm.schemas.errors import InputError

FILE = "longvlm.toml"
KEYS = ("store", "model", "ray_address")


def read_defaults(group: click.Group) -> dict[str, Any]:
    """The defaults for the commands of a group, as click's `default_map`.

    Raises:
        InputError: a file is no TOML, or holds something else than text under one of KEYS.
    """
    files = (Path(click.get_app_dir("longvlm")) / FILE, Path(FILE))
    found = {key: value for file in files for key, value in _read(file).items()}
    return _for_commands(group, found)


def _for_commands(group: click.Group, found: dict[str, str]) -> dict[str, Any]:
    """A value for each command that has an option of its name."""
    defaults: dict[str, Any] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            defaults[name] = _for_commands(command, found)
        else:
            options = {param.name for param in command.params if isinstance(param, click.Option)}
            defaults[name] = {key: value for key, value in found.items() if key in options}
    return defaults


def _read(file: Path) -> dict[str, str]:
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file.absolute()} cannot be read ({error}); write TOML there, or remove it.") from error
    if unknown := [key for key in settings if key not in KEYS]:
        raise InputError(f"{file.absolute()} sets {unknown[0]}, which nothing reads; it may set {', '.join(KEYS)}.")
    if wrong := [key for key, value in settings.items() if not isinstance(value, str)]:
        raise InputError(f'{file.absolute()} sets {wrong[0]} to no text; write it as {wrong[0]} = "...".')
    return settings
