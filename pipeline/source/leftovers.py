"""Files that lie in a source and are nobody's videos: companions, bins, old versions, transfers under way."""

import re
from collections import Counter
from pathlib import PurePosixPath

_FOLDERS = frozenset(  # lower case
    {
        *(".appledouble", ".fseventsd", ".spotlight-v100", ".temporaryitems", ".documentrevisions-v100", "__macosx"),
        *("@eadir", ".@__thumb", "@tmp", ".thumbnails", ".dropbox.cache", ".sync", "lost+found"),
        *(".trashes", ".trash", "#recycle", "@recycle", ".recycle", ".recycle.bin", "$recycle.bin", "recycler"),
        *("#snapshot", "@snapshot", ".snapshot", ".snapshots", "@recently-snapshot", ".zfs", ".stversions"),
        "system volume information",
    }
)
_TRASH_OF_USER = re.compile(r"\.trash-\d+")  # of freedesktop's bins
# AppleDouble; Android's bin and uploads; NFS's and FUSE's of files that are removed while they are open; Syncthing's
_BEGINNINGS = ("._", ".trashed-", ".pending-", ".nfs", ".fuse_hidden", ".syncthing.", "~syncthing~")
_PARTS = re.compile(  # of downloads, also in front of the ending where yt-dlp puts it
    r"\.(part(-frag\d+)?|crdownload|download|partial|filepart|opdownload|!ut|!qb|aria2|ytdl|tmp|temp)$"
    r"|\.temp\.[a-z0-9]+$"
)
_ENDING = re.compile(r"\.[a-z0-9!_-]{1,12}")
_MOST_KINDS = 100  # a bucket may hold as many endings as files
_MOST_TOLD = 8


def leftover(path: str) -> str | None:
    """What kind of leftover a file is, by its path below the source: its folder, or how its name begins or ends."""
    *folders, name = PurePosixPath(path).parts or ("",)
    if path.endswith("/"):  # a folder itself
        folders.append(name)
    for folder in folders:
        if folder.lower() in _FOLDERS or _TRASH_OF_USER.fullmatch(folder.lower()):
            return folder
    if beginning := next((beginning for beginning in _BEGINNINGS if name.startswith(beginning)), None):
        return f"{beginning}*"
    ending = _PARTS.search(name.lower())
    return ending[0] if ending else None


def count_left_out(left_out: Counter[str], path: str, kind: str | None = None) -> None:
    """Count a file that is left out, by the kind of leftover or else by its ending."""
    ending = PurePosixPath(path).suffix.lower()
    kind = kind or (ending if _ENDING.fullmatch(ending) else "other" if ending else "no ending")
    left_out[kind if kind in left_out or len(left_out) < _MOST_KINDS else "other"] += 1


def describe_left_out(left_out: Counter[str]) -> str:
    """What was left out in words: `14 files (.srt 9, .jpg 5)`."""
    kinds = [f"{kind} {number}" for kind, number in left_out.most_common(_MOST_TOLD)]
    more = [f"{len(left_out) - _MOST_TOLD} more kinds"] if len(left_out) > _MOST_TOLD else []
    return f"{left_out.total()} file{'s' * (left_out.total() != 1)} ({', '.join([*kinds, *more])})"
