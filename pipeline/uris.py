"""Addresses of files: which are local, the one spelling of each, the fsspec filesystem behind it, and no secrets in it.

An address is a path of this machine, the same after `file://`, or `protocol://...` for whatever fsspec reaches. What
tells them apart is `://` alone, which no path needs: `a:b.mp4`, `C:/a.mp4` and `file:a.mp4` are names of local files.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longvlm.schemas.errors import InputError

_CREDENTIALS = re.compile(r"(?<=://)[^/]*@|\?.*", re.DOTALL)
_SECRET = re.compile(
    r"[^/]+://[^/@]*:[^/]*@"  # user:password@host; without a colon it is a container@account of Azure
    r"|https?://.*[?&](X-Amz-\w+|X-Goog-\w+|Signature|AWSAccessKeyId|GoogleAccessId|sig|token|access_token)=",
    re.IGNORECASE | re.DOTALL,
)


class AddressError(InputError):
    """An address that nothing can be at, or that nobody may write down; others beside it may be good."""


def is_local(uri: str) -> bool:
    """Whether an address is a plain path or file://; those under any other name of fsspec's are not, and refused."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The absolute path that a local address means; a leading ~ is the user's home."""
    path = Path(uri.removeprefix("file://")).expanduser()
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links, and a link is a name of its own


def locate(uri: str) -> tuple[Any, str]:
    """Resolve an address: its fsspec filesystem, and the path in it.

    Raises:
        AddressError: nothing speaks the address's protocol, or it holds a secret.
        InputError: the library that speaks it is missing.
    """
    from fsspec import filesystem, get_filesystem_class
    from fsspec.generic import GenericFileSystem
    from fsspec.implementations.local import LocalFileSystem

    if is_local(uri):
        return LocalFileSystem(), local_path(uri)
    refuse_secrets(uri)
    protocol = uri.partition("://")[0]  # one, and no chain of them: "::" may stand in the name of an object
    try:
        kind = get_filesystem_class(protocol)
        if issubclass(kind, LocalFileSystem | GenericFileSystem):  # by another name
            raise AddressError(f"cannot open {uri}: write files of this machine as plain paths.")
        return filesystem(protocol, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)  # noqa: SLF001
    except ImportError as error:
        raise InputError(f"cannot open {uri}: {error}; install what its protocol needs.") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:  # each kind says it in its own way
        raise AddressError(f"cannot open {uri}: {error}; check the address.") from error


def canonical_uri(fs: Any, path: str) -> str:
    """The canonical URI of a file: an absolute path for local files, else with the scheme."""
    uri = str(fs.unstrip_protocol(path))
    return uri.removeprefix("file://")


def refuse_secrets(uri: str) -> None:
    """Raise AddressError for an address with a password or a signature in it: it would stand in tables and in logs."""
    if _SECRET.match(uri):
        protocol = uri.partition("://")[0]
        raise AddressError(
            f"an address of {protocol}:// holds a password, a key or a signature; leave it out, and give credentials "
            "through the environment or fsspec's configuration."
        )


def without_secrets(uri: str) -> str:
    """An address as it may be written down, whatever it holds: without its user, and its query if that may be one."""
    return _CREDENTIALS.sub("...", uri) if _SECRET.match(uri) else uri


@contextmanager
def refusals_as_sentences(name: str, done: str = "read") -> Iterator[None]:
    """Turn what a filesystem raises into InputError, about what is called `name` and was to be `done`."""
    try:
        yield
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{name} does not exist; check the address.") from error
    except IsADirectoryError as error:
        raise InputError(f"{name} is a folder; name a file.") from error
    except PermissionError as error:
        raise InputError(
            f"access to {name} is forbidden ({error}); check its permissions or your credentials."
        ) from error
    except Exception as error:  # every cloud library has exceptions of its own
        raise InputError(
            f"{name} cannot be {done}: {type(error).__name__}: {error}; check the address, the network and your "
            "credentials."
        ) from error
