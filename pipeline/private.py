"""Folders in the temporary directory that are a user's own."""

import os
import stat
import tempfile
from pathlib import Path


def private_folder(name: str, parent: str | None = None) -> Path:
    """This user's folder of a name, made where it is missing: nobody else can read it, or lay something in it.

    Args:
        name: what it is for; the user's number is put behind it.
        parent: by default the temporary directory.

    Raises:
        PermissionError: what stands there is another user's, or open to others.
    """
    root = Path(parent or tempfile.gettempdir()) / f"{name}{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    facts = root.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise PermissionError(f"{root} must be a folder of this user's alone; remove it, or set TMPDIR.")
    return root
