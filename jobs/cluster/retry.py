"""Patience with a store that is out of reach for a while: an hour's work is not given up for a minute of silence."""

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

from longvlm.jobs.cluster.resources import STORE_PATIENCE_S
from longvlm.pipeline.uris import is_local

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# What no waiting cures: a mistake of the program, a refusal, a full or read-only disk.
_HOPELESS = (TypeError, ValueError, LookupError, AttributeError, PermissionError, FileNotFoundError)
_HOPELESS_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def persist(store_uri: str, call: Callable[..., Any], *args: Any) -> Any:
    """What `call(*args)` returns, called again after growing pauses as long as a remote store is out of reach.

    The call must be one that may be made twice: writing a file under a new name, committing files of the same names.
    A local disk that refuses is full or broken, and not waited for.

    Raises the last error after `STORE_PATIENCE_S`, and at once an error that no waiting cures.
    """
    if is_local(store_uri):
        return call(*args)
    deadline = time.monotonic() + STORE_PATIENCE_S
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return call(*args)
        except Exception as error:  # every store has exceptions of its own
            if _is_hopeless(error) or time.monotonic() + pause_s > deadline:
                raise
            logging.getLogger("longvlm").warning(
                "the store is out of reach (%s: %s); trying again in %.0f s", type(error).__name__, error, pause_s
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_hopeless(error: Exception) -> bool:
    return isinstance(error, _HOPELESS) or (isinstance(error, OSError) and error.errno in _HOPELESS_ERRNOS)
