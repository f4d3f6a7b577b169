"""The page of commands and of a run's options, from the parsers of `oner` and the dataclasses of a run."""

import argparse
import inspect
from collections.abc import Iterator

import oner_run_options
from oner_command_line import COMMANDS


def text() -> str:
    """The page."""
    return "\n".join([*_commands(), *_options()])


def _commands() -> Iterator[str]:
    yield "# Commands\n"
    yield "`oner COMMAND --help` prints the same. A mistake is one line and exit status 2.\n"
    for name, command in COMMANDS.items():
        yield f"## oner {name}\n"
        yield f"```text\n{inspect.getdoc(command.add_arguments)}\n```\n"
        if command.is_run:
            yield "Its options are [those of a run](#options-of-a-run).\n"
            continue
        for action in command.parser(name)._actions:
            if action.dest != "help":
                told = " ".join(action.option_strings) or action.dest
                yield f"- `{told}`{_choices(action)}: {_sentence(action.help or '')}"
        yield ""


def _options() -> Iterator[str]:
    yield "## Options of a run\n"
    yield "Of `oner train`, `oner finetune` and `oner estimate`, in a YAML file or as `--name value`.\n"
    groups = oner_run_options.run_options()
    groups |= {f"the task {task}": oner_run_options.task_options(task) for task in oner_run_options.tasks()}
    for title, options in groups.items():
        yield f"### Options of {title}\n"
        yield "| option | what it says | default |\n|---|---|---|"
        for option in options:
            said = f"{_sentence(option.help)}{_listed(option.choices)}".replace("|", "\\|")
            yield f"| `{option.name}` | {said} | `{option.default}` |".replace("\n", " ")
        yield ""


def _choices(action: argparse.Action) -> str:
    return _listed(tuple(action.choices or ()))


def _listed(choices: tuple) -> str:
    return f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""


def _sentence(text: str) -> str:
    # what argparse would fill in, and what Markdown would take for a tag
    return " ".join(text.split()).replace("%%", "%").replace("<", "&lt;")
