"""`oner COMMAND ...`: what is done from a shell.

A module beside the package and not inside it: importing `oner` registers the families, and with them imports torch
and transformers, for which `oner --help` need not wait. So the arguments of each command are declared here, from the
standard library alone, and the module that does the work is imported once they have been read.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Official checkpoints into model directories and back.

        oner convert --from simla simla.pth runs/simla --tokenizer vocab.txt
        oner convert --from albef ALBEF.pth runs/albef
        oner convert --from albef ALBEF.pth runs/simla --family simla --draw_missing
        oner convert --from dalle encoder.pkl runs/image-tokenizer
        oner convert --to simla runs/simla simla.pth

    A model directory holds config.json and model.safetensors, for `from_pretrained`; and, where the file has a
    teacher or queues, objective.safetensors, with which a run by `--initial_model` begins. All names that found no
    place are printed.
    """
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--from", dest="origin", choices=["albef", "dalle", "simla"], help="Layout of the file that is read."
    )
    way.add_argument("--to", dest="target", choices=["albef", "simla"], help="Layout of the file that is written.")
    parser.add_argument(
        "--family",
        choices=["codis", "simla"],
        help="With --from: whose model it becomes; by default codis of ALBEF's files, which is ALBEF without its "
        "codebook, and simla of SIMLA's. SIMLA begins with ALBEF's weights, and lacks some.",
    )
    parser.add_argument("source", help="The file to read, or with --to the model directory.")
    parser.add_argument("destination", help="The directory to write, new or empty; with --to the file.")
    parser.add_argument("--image_size", type=int, help="Pictures to read from now on; positions are resized to it.")
    parser.add_argument("--heads", type=int, help="Attention heads of both encoders; width / 64 if none.")
    parser.add_argument(
        "--set",
        dest="fields",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Another field of the configuration, as JSON: --set cls_token_id=2. Repeatable.",
    )
    parser.add_argument("--tokenizer", help="A BERT vocabulary (vocab.txt): a processor is written too.")
    parser.add_argument(
        "--draw_missing", action="store_true", help="Draw at random what the file lacks of the towers, and name it."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of what is drawn.")
    parser.add_argument(
        "--fold_token_types",
        action="store_true",
        default=None,
        help="Add the first token type to every position of a text.",
    )
    parser.add_argument("--decoder", help="With --from dalle: decoder.pkl, for codes to be drawn as pictures.")
    parser.add_argument(
        "--objective", help="With --to: teacher and queues; objective.safetensors of the directory if it holds one."
    )


def estimate_arguments(parser: argparse.ArgumentParser) -> None:
    """
    What a run will cost, before anything starts: memory by part, pairs a second, hours.

        oner estimate --config examples/configs/oner_base_224.yaml --device h100 --count 8 --pairs 5100000

    Takes the arguments of a run (`python examples/pretrain.py --help`) beside its own. Operations and activations are
    those of the run's own step, rehearsed on tensors without contents; the rate follows from a device's peak and a
    stated share of it (MFU), which no rehearsal can know.
    """
    devices = ["a100", "h100", "h200", "l4", "l40s", "rtx4090", "v100"]
    shardings = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    parser.add_argument("--device", default="h100", choices=devices, help="Peak and memory of a device.")
    parser.add_argument("--count", type=int, default=1, help="Devices.")
    parser.add_argument("--mfu", type=float, help="Share of the peak that is assumed; as measured if none.")
    parser.add_argument("--peak_tflops", type=float, help="Another device's TFLOP/s in the run's precision.")
    parser.add_argument("--memory_gib", type=float, help="Another device's memory.")
    parser.add_argument("--words", type=int, default=12, help="Words of a caption on average.")
    parser.add_argument("--pairs", type=int, help="Training pairs, for a run of epochs.")
    parser.add_argument("--sharding", default="ddp", choices=shardings, help="How the run is spread.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """
    What ails a run, in words: what was measured, what was expected, and what helped where it was tried.

        oner doctor runs/mine

    Reads the log, the last checkpoint, the model and a small sample of the rows, of a run that ended, was stopped, or
    goes on; writes nothing. It knows: matching that says no to everything, contrast at the logarithm of its keys, a
    collapsed side, a temperature at its bound, a teacher far behind, dead codes, near duplicates among the
    negatives, a loop that waits for data, words without a token, overfitting.

    Exit status: 0 where nothing was found, 1 where something was, 2 where RUN is no run.
    """
    parser.add_argument("run", metavar="RUN", help="The output_dir of a run.")
    parser.add_argument("--rows", type=int, default=256, help="Rows of the sample (default 256); 0: no sample.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        summary: What it does, in a line of `oner --help`.
        module: Its `run(options, rest) -> exit status` does it; `rest` is what the parser below does not know.
        add_arguments: Declares its arguments; the docstring is the text above them in `oner COMMAND --help`.
    """

    summary: str
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None]

    def parser(self, name: str) -> argparse.ArgumentParser:
        """The parser of `oner NAME`."""
        parser = argparse.ArgumentParser(
            prog=f"oner {name}",
            description=inspect.getdoc(self.add_arguments),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_arguments(parser)
        return parser


COMMANDS = {
    "convert": Command(
        "official checkpoints of SIMLA and ALBEF into model directories, and back",
        "oner.training.conversion.command",
        convert_arguments,
    ),
    "estimate": Command(
        "memory, pairs a second and hours of a run, before anything starts",
        "oner.training.cost.estimate",
        estimate_arguments,
    ),
    "doctor": Command(
        "what ails a run, in words, and what helped where it was tried",
        "oner.training.doctor.command",
        doctor_arguments,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command; what it does not know itself goes on to it as `rest`, the arguments of a run for example.

    Returns:
        The exit status: the command's own, 0 where all is well, or 2 after a message on what was got and expected.
    """
    listed = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="oner",
        description=f"commands:\n{listed}\n\n`oner COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    command = COMMANDS[given.command]
    options, rest = command.parser(given.command).parse_known_args(given.rest)

    # torch and transformers are imported here and no earlier
    module = import_module(command.module)
    try:
        return module.run(options, rest)
    except (ValueError, OSError) as error:
        print(f"oner {given.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
