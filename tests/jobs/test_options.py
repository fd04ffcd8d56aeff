"""Options that stand twice: a list is kept whole, and of two values for one none is dropped unsaid."""

import click
import pytest

from longvlm.jobs.cli import main
from longvlm.jobs.options import refuse_repeated
from longvlm.schemas.errors import InputError


def commands(group=main, words=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


OPTIONS = [
    pytest.param(words, option, id=f"{' '.join(words)} {option.opts[-1]}")
    for words, command in commands()
    for option in command.params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_an_option_given_twice_is_a_list_or_refused(words, option):
    given = [option.opts[-1]] * 2 if option.is_flag else [f"{option.opts[-1]}=1", f"{option.opts[-1]}=2"]
    context = click.Context(main)
    if option.multiple or option.is_flag:
        refuse_repeated(context, main, [*words, *given])
    else:
        with pytest.raises(InputError, match=f"^{option.opts[-1]} is given more than once"):
            refuse_repeated(context, main, [*words, *given])


def test_what_may_be_repeated_says_so():
    lists = [option for _, command in commands() for option in command.params if getattr(option, "multiple", False)]
    assert len(lists) > 8
    assert [option.opts[-1] for option in lists if "repea" not in option.help and option.help != "As for index."] == []


def test_options_that_set_the_same_exclude_each_other():
    with pytest.raises(InputError, match="--csv and --json exclude each other"):
        refuse_repeated(click.Context(main), main, ["sql", "--csv", "x", "--json"])


@pytest.mark.parametrize(
    "args",
    [
        ["submit", "index", "s", "--where", "a", "--where", "b"],  # the job's own, which are looked at by themselves
        ["index", "s", "--include", "a", "--include", "b", "--nonsense"],
        ["index", "--store"],
        ["recipe"],
        ["recipe", "nonsense"],
    ],
)
def test_what_else_is_wrong_is_left_to_parsing(args):
    refuse_repeated(click.Context(main), main, args)
