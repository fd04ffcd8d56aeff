"""Chat templates in the child that renders them: as transformers does, and within limits."""

import subprocess
import sys

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from longvlm.pipeline import chat_templates
from longvlm.pipeline.chat_templates import ChatTemplateError, render

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was ist das?\u2028 日本 \ud83d"}]},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{{ bos_token }}{% for message in messages %}{% generation %}<|{{ message.role }}|>{% endgeneration %}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content | tojson }}{% endif %}\n"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ dict(a=1) }}{% if add_generation_prompt %}<|me|>{% endif %}"
)


def test_a_prompt_is_transformers_own():
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=CHATML, add_generation_prompt=True, **TOKENS)
    assert render(CHATML, MESSAGES, TOKENS) == expected
    assert expected.endswith("<|me|>")


def test_tools_are_none_and_a_day_is_always_the_same():
    with_tools = "{%- if tools %}{{ tools | tojson }}{%- endif %}{% if tools is not none %}some{% endif %}asked"
    assert render(with_tools, MESSAGES, TOKENS) == "asked"
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endif %}"
    assert render(dated, MESSAGES, TOKENS) == "26 Jul 2024, 00:00"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 'a' * 10**10 }}", "512 MB"),
        (
            "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
            "512 MB",
        ),
        ("{{ '%5000000s' % 'a' }}", "4,000,000 characters"),
        ("{{ 'a' | center(10**10) }}", "512 MB"),
    ],
)
def test_a_template_that_fails_is_told_and_the_next_is_rendered(template, says):
    with pytest.raises(ChatTemplateError, match=says) as caught:
        render(template, MESSAGES, TOKENS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert render("{{ messages[0].content }}", MESSAGES, TOKENS) == "Be brief."


@pytest.mark.usefixtures("impatient")
def test_a_template_that_would_not_end_is_told_and_the_next_is_rendered():
    with pytest.raises(ChatTemplateError, match=r"^it was not done after 0\.2 s$"):
        render(
            "{% for i in range(9) %}{{ 10 ** (10 ** 9) }}{% endfor %}", MESSAGES, TOKENS
        )  # Python is in C for minutes
    assert render("{{ messages[0].content }}", MESSAGES, TOKENS) == "Be brief."
    assert chat_templates._Renderer().cpu_limit_s == 2  # of all others


def test_the_child_holds_no_credentials_is_started_again_and_ends_with_its_parent(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    chat_templates._renderer.close()
    assert render("a", [], {}) == "a"
    child = psutil.Process(chat_templates._renderer._child.pid)
    assert "AWS_SECRET_ACCESS_KEY" not in child.environ()
    child.kill()
    child.wait()
    assert render("b", [], {}) == "b"
    render_and_die = (
        "import os, signal; from longvlm.pipeline import chat_templates as c; c.render('a', [], {}); "
        "print(c._renderer._child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    said = subprocess.run([sys.executable, "-c", render_and_die], capture_output=True, text=True, check=False).stdout
    psutil.wait_procs([psutil.Process(int(said))] if psutil.pid_exists(int(said)) else [], timeout=60)
    assert not psutil.pid_exists(int(said)) or psutil.Process(int(said)).status() == psutil.STATUS_ZOMBIE
