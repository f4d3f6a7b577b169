"""`oner COMMAND ...`: what is done from a shell. Each command is a module with `add_arguments` and `run`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# command -> its module and what it does; imported only when asked for, so that help costs nothing
COMMANDS = {
    "convert": (
        "oner.training.conversion.command",
        "official checkpoints of SIMLA and ALBEF into model directories, and back",
    ),
    "estimate": ("oner.training.cost.estimate", "memory, pairs a second and hours of a run, before anything starts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command; what it does not know itself goes on to it as `rest`, the arguments of a run for example.

    Returns:
        The exit status: 0, or 2 after a message on what was got and expected.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="oner",
        description=f"commands:\n{listed}\n\n`oner COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    module = import_module(COMMANDS[given.command][0])
    options = argparse.ArgumentParser(
        prog=f"oner {given.command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(options)
    known, rest = options.parse_known_args(given.rest)
    try:
        return module.run(known, rest)
    except (ValueError, OSError) as error:
        print(f"oner {given.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
