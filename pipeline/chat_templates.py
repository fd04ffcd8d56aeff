"""Chat templates of checkpoints, rendered in a confined child process, within limits.

A template is a program in Jinja. Jinja's sandbox keeps it from the machine, but sets no end to its loops, its numbers
and its texts. So the kernel ends the child whose template takes too long: Python could be within one multiplication.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

from longvlm.pipeline.confine import confine, isolated_python, safe_environment

CPU_LIMIT_S = 2  # templates take milliseconds
MEMORY_LIMIT_BYTES = 512 << 20  # above what Python and transformers take
MAX_CHARACTERS = 4_000_000  # of a prompt: more than any context holds
_SERVE = "from longvlm.pipeline.chat_templates import serve; serve(float(sys.argv[1]))"


class ChatTemplateError(Exception):
    """A chat template that cannot be rendered; the message says why, to stand in brackets."""


class _Renderer:
    """The child process that renders, one template at a time; started when it is needed, and again if it ended."""

    def __init__(self, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self.cpu_limit_s = cpu_limit_s  # of a template
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, asked: dict[str, Any]) -> str:
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            assert self._child is not None
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            try:
                self._child.stdin.write(json.dumps(asked).encode() + b"\n")
                self._child.stdin.flush()
                said = self._child.stdout.readline()
            except BrokenPipeError:
                said = b""
            if not said.endswith(b"\n"):
                raise ChatTemplateError(self._ended())
        reply = json.loads(said)
        if "error" in reply:
            raise ChatTemplateError(reply["error"])
        return str(reply["text"])

    def _start(self) -> None:
        self.close()
        self._child = subprocess.Popen(  # noqa: S603 - this interpreter, running `serve`
            isolated_python(_SERVE, str(self.cpu_limit_s)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=safe_environment(),
            start_new_session=True,  # without our terminal, into which keystrokes could be put
        )

    def _ended(self) -> str:
        """Why the child ended, which did not reply."""
        assert self._child is not None
        self._child.kill()  # it may have closed the pipe only
        status = self._child.wait()
        self.close()
        if status == -signal.SIGPROF:
            return f"it was not done after {self.cpu_limit_s:g} s"
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        return f"the process that filled it ended, {how}"

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


_renderer = _Renderer()
atexit.register(_renderer.close)


def render(template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
    """The prompt of a conversation up to where an answer begins, as transformers' `apply_chat_template` writes it.

    Args:
        template: Jinja.
        messages: of the conversation; what JSON can say.
        special_tokens: a tokenizer's `special_tokens_map`.

    Raises:
        ChatTemplateError: the template is none, refuses the messages, or goes beyond a limit.
    """
    return _renderer.render({"template": template, "messages": messages, "special_tokens": special_tokens})


def serve(cpu_limit_s: float) -> None:
    """The child's main loop: a line of JSON for each that comes, until the parent closes the pipe."""
    from transformers.utils import chat_template_utils  # before the rights are given up: it opens files

    chat_template_utils.datetime = _SomeDay  # what `strftime_now` asks

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    confine()
    _limit_memory()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # whose signal ends a process, whatever it is at
        reply = _reply(chat_template_utils.render_jinja_template, asked)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


class _SomeDay(datetime):
    """The one day on which all templates are filled: a question is the same prompt tomorrow, or it would be new then.

    It is the day that LLaMA's templates name where nobody tells them any other.
    """

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2024, 7, 26, tzinfo=tz)


def _reply(render_jinja_template: Any, asked: dict[str, Any]) -> dict[str, str]:
    try:
        (text,), _ = render_jinja_template(
            [asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=True,
            **asked["special_tokens"],
        )
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_LIMIT_BYTES >> 20} MB of memory"}
    except Exception as error:  # noqa: BLE001 - a template is a program, which may fail in any way
        return {"error": shorten(str(error), 300, placeholder=" ...") or type(error).__name__}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it writes more than {MAX_CHARACTERS:,} characters"}
    return {"text": text}


def _limit_memory() -> None:
    if sys.platform.startswith("linux"):  # elsewhere the kernel does not hold to it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
