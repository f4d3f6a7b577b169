"""The command line `oner COMMAND ...`.

This module is outside the package: importing `oner` registers the families and therefore imports torch
and transformers, which `oner --help` should not wait for. So the arguments of each command are declared here, with the
standard library only, and the module that does the work is imported after they have been parsed.
"""

import argparse
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dis import opmap
from importlib import import_module
from pathlib import Path
from types import TracebackType

import oner_run_options as run_options
from oner_evaluate_options import check_evaluation, compare_arguments, evaluate_arguments, suite_arguments
from oner_run_options import Mistake, beside, check_nothing_more
from oner_search_options import check_index, check_search, index_arguments, search_arguments
from oner_serve_options import add_page, check_publishing, check_serving, serve_arguments


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Pretrain a model on image-text pairs, evaluate it, and write a model directory that is a complete Hub repository.

        oner train photos/                      a folder: images with descriptive file names, or a table of captions
        oner train --config oner_emoji          a YAML file or a shipped configuration; --name value overrides it
        accelerate launch -m oner_command_line train --config run.yaml     on several processes

    With only a FOLDER, training starts from the shipped checkpoint, holds out a tenth of the images, and writes
    runs/FOLDER, which you can search with `oner search runs/FOLDER "words"`.
    """


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Fine-tune a pretrained model on a task, evaluate it, and write a model directory that is a complete Hub repository.

        oner finetune --task retrieval --config finetune_retrieval_coco --initial_model runs/simla/model

    Tasks: retrieval, cir, vqa, answers, entailment, assignment, nlvr2, grounding, glue. `--task TASK --help` lists
    the options of a task.
    """


def publish_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Upload a model directory to a repository on the Hub, which is created if necessary.

        oner publish runs/photos owner/photos --private
        oner publish runs/photos owner/search --space            a page that searches the images of the run
        oner publish owner/photos owner/search art/ --space      a page over a folder, a table, or an index

    The account is that of `hf auth login`. Only a complete export is uploaded, and none of its files
    contains a path of this machine (SECURITY.md).
    """
    parser.add_argument("model", help="a model directory, or the run that wrote it")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument(
        "indexes", nargs="*", metavar="INDEX", help="with --space: what the page searches, as in `oner serve`"
    )
    parser.add_argument("--space", action="store_true", help="a Space: the page of `oner serve`, with small images")
    add_page(parser)
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to")
    parser.add_argument("--create_pr", action="store_true", help="upload as a pull request")
    parser.add_argument("--message", help="commit message")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Export a model as ONNX graphs, for programs without torch: onnxruntime, a browser, another language.

        oner export runs/photos onnx/ --onnx --int8

    One graph for texts, one for images, and one for both as one query. Each maps the processor's tensors to unit
    vectors, for any batch size; the processor's files and onnx.json are written beside them (docs/howto_onnx.md).
    """
    parser.add_argument("model", help="a model directory, a name on the Hub, or a run")
    parser.add_argument("destination", help="directory for the graphs, new or from an earlier export")
    parser.add_argument("--onnx", action="store_true", required=True, help="the format; the only one so far")
    parser.add_argument("--int8", action="store_true", help="also write graphs with 8-bit weights")


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Convert official checkpoints to model directories and back.

        oner convert --from simla simla.pth runs/simla --tokenizer vocab.txt
        oner convert --from albef ALBEF.pth runs/albef
        oner convert --from albef ALBEF.pth runs/simla --family simla --draw_missing
        oner convert --from dalle encoder.pkl runs/image-tokenizer
        oner convert --to simla runs/simla simla.pth

    A model directory contains config.json and model.safetensors, for `from_pretrained`. If the file has a
    teacher or queues, it also contains objective.safetensors, from which a run with `--initial_model` starts. Names
    without a counterpart are printed.
    """
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="origin", choices=["albef", "dalle", "simla"], help="Layout of the input file.")
    way.add_argument("--to", dest="target", choices=["albef", "simla"], help="Layout of the output file.")
    parser.add_argument(
        "--family",
        choices=["codis", "simla"],
        help="With --from: family of the new model; by default codis for ALBEF's files (ALBEF is CODIS without its "
        "codebook) and simla for SIMLA's. SIMLA can start from ALBEF's weights, but some are missing.",
    )
    parser.add_argument("source", help="Input file, or with --to the model directory.")
    parser.add_argument("destination", help="Output directory, new or empty; with --to the output file.")
    parser.add_argument("--image_size", type=int, help="New image size; position embeddings are resized to it.")
    parser.add_argument("--heads", type=int, help="Attention heads of both encoders; default: width / 64.")
    parser.add_argument(
        "--set",
        dest="fields",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Another field of the configuration, as JSON: --set cls_token_id=2. Repeatable.",
    )
    parser.add_argument("--tokenizer", help="A BERT vocabulary (vocab.txt); a processor is then written too.")
    parser.add_argument(
        "--draw_missing", action="store_true", help="Initialise missing tower weights at random, and list them."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of --draw_missing.")
    parser.add_argument(
        "--fold_token_types",
        action="store_true",
        default=None,
        help="Add the first token type to every position of a text.",
    )
    parser.add_argument("--decoder", help="With --from dalle: decoder.pkl, to decode codes into images.")
    parser.add_argument(
        "--objective", help="With --to: teacher and queues; default: objective.safetensors of the directory, if any."
    )


def estimate_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Estimate the cost of a run before it starts: memory by part, pairs a second, hours.

        oner estimate --config examples/configs/oner_base_224.yaml --device h100 --count 8 --pairs 5100000

    Takes the arguments of a run (`python examples/pretrain.py --help`) in addition to its own. Operations and
    activations are those of the actual training step, rehearsed on tensors without data. The speed is a device's peak
    times an assumed utilisation (MFU), which cannot be rehearsed.
    """
    devices = ["a100", "h100", "h200", "l4", "l40s", "rtx4090", "v100"]
    shardings = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    parser.add_argument("--device", default="h100", choices=devices, help="Device: peak throughput and memory.")
    parser.add_argument("--count", type=int, default=1, help="Number of devices.")
    parser.add_argument("--mfu", type=float, help="Assumed share of the peak; default: a measured value.")
    parser.add_argument("--peak_tflops", type=float, help="Peak TFLOP/s of another device in the run's precision.")
    parser.add_argument("--memory_gib", type=float, help="Memory of another device in GiB.")
    parser.add_argument("--words", type=int, default=12, help="Average number of words in a caption.")
    parser.add_argument("--pairs", type=int, help="Number of training pairs, to convert epochs to steps.")
    parser.add_argument("--sharding", default="ddp", choices=shardings, help="How the run is distributed.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Diagnose a run in plain words: what was measured, what was expected, and which remedy helped where it was tried.

        oner doctor runs/mine

    Reads the log, the last checkpoint, the model and a small sample of the rows, of a run that has ended, was stopped,
    or is in progress; writes nothing. It detects: matching that says no to everything, contrast at the logarithm of
    its keys, a collapsed modality, a temperature at its bound, a teacher far behind, dead codes, near duplicates among
    the negatives, a loop that waits for data, words without a token, overfitting.

    Exit status: 0 no problem found, 1 a problem found, 2 RUN is not a run.
    """
    parser.add_argument("run", metavar="RUN", help="The output_dir of a run.")
    parser.add_argument("--rows", type=int, default=256, help="Number of rows to sample (default 256); 0: none.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line instead of printing the usage of thirty options."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` tells more\n")


def check_run(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks the arguments of a run, apart from those of the command. Raises `Mistake`."""
    if words := run_options.given(rest)[""]:
        raise Mistake(f"unexpected {words[0]!r}; expected --name value")
    run_options.check_line(rest, known)


def check_training(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks the folder and the arguments of a run. Raises `Mistake`."""
    folders = run_options.given(rest)[""]
    if folders and Path(folders[0]).is_file():
        raise Mistake(f"{folders[0]} is a file; expected a FOLDER, of pictures or with a table; or --config")
    if folders and not Path(folders[0]).is_dir():
        raise Mistake(f"{folders[0]}: no such folder{beside(folders[0])}")
    if not folders and not rest:
        raise Mistake("what is there to train on? expected a FOLDER, or --config; `oner train --help` tells more")
    check_run(options, rest[1:] if folders else rest, known)


def check_place(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks that the run of `doctor` exists. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    if not Path(options.run).exists():
        raise Mistake(f"{options.run}: no such folder or file{beside(options.run)}")


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        summary: Its line in `oner --help`.
        module: Its `run(options, rest) -> exit status` does the work; `rest` is what the parser below does not know.
        add_arguments: Declares its arguments; its docstring is the description in `oner COMMAND --help`.
        check: Raises `Mistake` for errors in options, rest and option names that can be detected before anything is
            imported.
        is_run: Its arguments are only those of a run.
    """

    summary: str
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace, Sequence[str], Sequence[str]], None] = check_nothing_more
    is_run: bool = False

    def parser(self, name: str) -> argparse.ArgumentParser:
        """The parser of `oner NAME`."""
        parser = Parser(
            prog=f"oner {name}",
            description=inspect.getdoc(self.add_arguments),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_arguments(parser)
        return parser

    def read(self, name: str, line: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """
        Parses and checks a command line into options and the rest.

        Raises:
            Mistake: says what was given, what was expected, and suggests a correction.
            SystemExit: on `--help`, and for errors that argparse detects.
        """
        if self.is_run:
            if {"-h", "--help", "--help-all", "--help_all"} & set(line):
                print(run_options.help_text(name, inspect.getdoc(self.add_arguments), line), end="")
                raise SystemExit(0)
            options, rest = argparse.Namespace(), list(line)
            self.check(options, rest, ())
            return options, rest
        parser = self.parser(name)
        options, rest = parser.parse_known_intermixed_args(line)  # words after options too
        self.check(options, rest, list(vars(options)))
        return options, rest


COMMANDS = {
    "train": Command(
        "pretrain on a folder of images, or with a YAML configuration",
        "oner.training.commands.train",
        train_arguments,
        check_training,
        is_run=True,
    ),
    "finetune": Command(
        "fine-tune on retrieval, VQA, entailment, NLVR2, grounding",
        "oner.training.commands.finetune",
        finetune_arguments,
        check_run,
        is_run=True,
    ),
    "evaluate": Command(
        "evaluate a model: metrics and contact sheets",
        "oner.training.commands.evaluate",
        evaluate_arguments,
        check_evaluation,
    ),
    "compare": Command(
        "compare several models on the same rows, in one table",
        "oner.training.commands.compare",
        compare_arguments,
    ),
    "search": Command(
        "search images by text, by an image, or by both as one query",
        "oner.training.commands.search",
        search_arguments,
        check_search,
    ),
    "index": Command(
        "embed images once, to search them later",
        "oner.training.commands.index",
        index_arguments,
        check_index,
    ),
    "serve": Command(
        "serve a search page in the browser, or write it as a Space",
        "oner.training.commands.serve",
        serve_arguments,
        check_serving,
    ),
    "publish": Command(
        "upload a model to the Hub, or a page that searches with it",
        "oner.training.commands.publish",
        publish_arguments,
        check_publishing,
    ),
    "export": Command(
        "export a model as ONNX graphs",
        "oner.training.commands.export",
        export_arguments,
    ),
    "convert": Command(
        "convert official checkpoints of SIMLA and ALBEF to model directories and back",
        "oner.training.conversion.command",
        convert_arguments,
    ),
    "estimate": Command(
        "estimate memory, pairs a second and hours of a run before it starts",
        "oner.training.cost.estimate",
        estimate_arguments,
        check_run,
    ),
    "doctor": Command(
        "diagnose a run, and suggest remedies",
        "oner.training.doctor.command",
        doctor_arguments,
        check_place,
    ),
    "suite": Command(
        "probe a model's features and measure retrieval, in one table",
        "oner.training.evaluation.suite",
        suite_arguments,
    ),
}


def shown_plainly(name: str) -> Callable[..., str]:
    """What formats warnings while a command runs: of ours the message alone, of others also where it comes from."""
    usual = warnings.formatwarning
    packages = tuple(f"{run_options.PACKAGES / package}/" for package in ("modeling", "processing", "training"))

    def formatted(message: Warning, category: type, filename: str, lineno: int, line: str | None = None) -> str:
        if filename.startswith(packages):
            return f"oner {name}: {message}\n"
        return usual(message, category, filename, lineno, line)

    return formatted


def is_refusal(error: Exception) -> bool:
    """
    Whether the message of an error is enough: the system refused a file, or our own code refused an input. An error
    from another library may be a bug of ours, for which the traceback is needed, and so is a `TypeError` that no line
    of ours raises: Python's own, of a wrong call.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # with python -m this module has another name
    return isinstance(error, OSError | Mistake) or (
        trace is not None
        and trace.tb_frame.f_globals["__name__"].startswith("oner")
        and (not isinstance(error, TypeError) or raises(trace))
    )


def raises(trace: TracebackType) -> bool:
    """Whether the error came from a `raise` of this frame, not from what Python or an extension did there."""
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command; arguments that its parser does not know are passed on as `rest`, for example those of a run.

    Returns:
        The exit status: the command's own, 0 on success, or 2 after an error message.
    """
    listed = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="oner",
        usage="oner [--traceback] COMMAND ...",
        description=f"commands:\n{listed}\n\n`oner COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"oner {run_options.version()}")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if argv is None:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot write ends nothing
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if given.command is None:
        parser.error(f"expected a command out of {', '.join(COMMANDS)}")
    if given.command not in COMMANDS:
        parser.error(f"{given.command!r} is none of {', '.join(COMMANDS)}{run_options.meant(given.command, COMMANDS)}")
    command = COMMANDS[given.command]
    usual = warnings.formatwarning
    warnings.formatwarning = shown_plainly(given.command)
    try:
        options, rest = command.read(given.command, given.rest)
        # torch and transformers are imported here and no earlier
        return import_module(command.module).run(options, rest)
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        if not is_refusal(error):
            raise
        if given.traceback:
            traceback.print_exc()
        print(f"oner {given.command}: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = usual


if __name__ == "__main__":
    sys.exit(main())
