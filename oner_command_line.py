"""`oner COMMAND ...`: what is done from a shell.

A module beside the package and not inside it: importing `oner` registers the families, and with them imports torch
and transformers, for which `oner --help` need not wait. So the arguments of each command are declared here, from the
standard library alone, and the module that does the work is imported once they have been read.
"""

import argparse
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import oner_run_options as run_options
from oner_evaluate_options import check_evaluation, compare_arguments, evaluate_arguments, suite_arguments
from oner_run_options import Mistake, check_nothing_more
from oner_serve_options import add_page, check_publishing, check_serving, serve_arguments

BACKENDS = ("exact", "faiss", "lancedb", "qdrant")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Pretrain a family on pairs of pictures and texts, measure, and write a model directory that is a Hub repository.

        oner train photos/                      a folder: pictures named by their file names, or a table of captions
        oner train --config oner_emoji          a YAML file, or one that ships, and --name value over what it says
        accelerate launch -m oner_command_line train --config run.yaml     on several processes

    A FOLDER alone begins with the checkpoint that ships, holds out a tenth of the pictures, and leaves
    runs/FOLDER, which `oner search runs/FOLDER "words"` searches.
    """


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Fine-tune a pretrained model on a task, measure, and write a model directory that is a Hub repository.

        oner finetune --task retrieval --config finetune_retrieval_coco --initial_model runs/simla/model

    Tasks: retrieval, cir, vqa, answers, entailment, assignment, nlvr2, grounding, glue; `--task TASK --help` lists
    what each may be told.
    """


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Search pictures by words, by a picture, or by both as one query, and draw the answers as a contact sheet.

        oner search runs/photos "red fruit"                        the pictures that a run was trained on, by its model
        oner search photos/ "made of glass" --image photo.png      a folder, a table of pairs, or a saved index
        oner search "red fruit" --index photos/ --model runs/photos/model
        oner search photos/ "a horse" --plus 0.7:stripes --minus "a rider" --where licence=MIT
        oner search photos/ --like photos/apple.jpg --json

    The index of a folder or table is kept in a hidden directory beside it and used again until a file's name, size
    or time changes, or the model does.
    """
    parser.add_argument("place", nargs="?", help="a run, a folder of pictures, a table of pairs, or a saved index")
    parser.add_argument("words", nargs="?", help="what to look for")
    parser.add_argument("--image", help="a picture to look for; with words, both are one query")
    parser.add_argument("--index", help="the place by name: the one word before it is then what to look for")
    parser.add_argument("--model", help="a model directory, a run, or a name on the Hub; oner-emoji ships")
    parser.add_argument(
        "--plus", action="append", default=[], metavar="[WEIGHT:]WORDS", help="add a query; repeatable"
    )
    parser.add_argument("--minus", action="append", default=[], metavar="[WEIGHT:]WORDS", help="subtract a query")
    parser.add_argument("--plus-image", action="append", default=[], metavar="[WEIGHT:]FILE", help="add a picture")
    parser.add_argument("--minus-image", action="append", default=[], metavar="[WEIGHT:]FILE", help="subtract one")
    parser.add_argument("--like", metavar="ITEM", help="the nearest of an item that is indexed: its path or number")
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help="licence=MIT, licence!=MIT|BSD, year>=2020: on columns of a table of pairs; repeatable, all must be met",
    )  # fmt: skip
    parser.add_argument("--rerank", type=int, metavar="K", help="compare the best K token by token, patch by patch")
    parser.add_argument("--backend", choices=BACKENDS, default="exact", help="what searches; docs/search.md compares")
    parser.add_argument("--top-k", "--top_k", type=int, default=12)
    parser.add_argument(
        "--json", action="store_true", help="print the answers as JSON, and draw no sheet without --out"
    )
    parser.add_argument("--out", help="where the contact sheet goes; results.png by default")
    parser.add_argument("--index-cache", help="where to keep the index; beside the source by default")


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Embed pictures once and keep them as an index, which `oner search` and the pipeline answer from.

        oner index photos/ photos-index --model runs/photos/model
        oner search photos-index "red fruit" --model runs/photos/model
        accelerate launch -m oner_command_line index photos/ photos-index     each process embeds a share

    It is saved as it grows: a call that was killed goes on where it was when it is made again. Made again later, it
    embeds what is new or has changed, and drops what is gone. docs/search.md says which backend to choose.
    """
    parser.add_argument("source", help="a folder of pictures, searched recursively, or a table of pairs")
    parser.add_argument("destination", help="the directory of the index")
    parser.add_argument("--model", help="a model directory, a run, or a name on the Hub; oner-emoji ships")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="exact", help="what will search it; exact needs nothing"
    )
    parser.add_argument("--kind", choices=["ivf", "hnsw"], help="of faiss: lists (default) or a graph of neighbours")
    parser.add_argument("--recall", type=float, help="of faiss: the share of the exact top 10 to be found (0.98)")
    parser.add_argument("--url", help="of lancedb, qdrant: where it is; in the directory of the index by default")


def publish_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Upload a model directory as a repository on the Hub, made if it is not there.

        oner publish runs/photos owner/photos --private
        oner publish runs/photos owner/search --space            a page that searches the pictures of the run
        oner publish owner/photos owner/search art/ --space      a page over a folder, a table, or an index

    The account is that of `hf auth login`. Nothing is uploaded that is not a whole export, and none of its files
    names a path of this machine (SECURITY.md).
    """
    parser.add_argument("model", help="a model directory, or the run that left it")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument(
        "indexes", nargs="*", metavar="INDEX", help="of a Space: what it searches, as `oner serve` does"
    )
    parser.add_argument("--space", action="store_true", help="a Space: the page of `oner serve`, with small pictures")
    add_page(parser)
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--revision", help="branch to upload to")
    parser.add_argument("--create_pr", action="store_true", help="as a pull request")
    parser.add_argument("--message", help="of the commit")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """
    A model as ONNX graphs, for programs that have no torch: onnxruntime, a browser, another language.

        oner export runs/photos onnx/ --onnx --int8

    A graph for texts, one for pictures and one for both as one query, each from the processor's tensors to unit
    vectors, for any number of rows; the processor's files and onnx.json lie beside them (docs/howto_onnx.md).
    """
    parser.add_argument("model", help="a model directory or name on the Hub, or the run that left it")
    parser.add_argument("destination", help="the directory of the graphs, new or an earlier export's")
    parser.add_argument("--onnx", action="store_true", required=True, help="the format, so far the only one")
    parser.add_argument("--int8", action="store_true", help="also graphs whose weights have 8 bits")


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


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line and not the usage of thirty options."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` tells more\n")


def check_search(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Whether there is something to look for, and where; `place` and `words` become that. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    if options.index is not None:
        if options.words is not None:
            raise Mistake(f"got {options.place!r}, {options.words!r} and --index; expected the words alone beside it")
        options.words, options.place = options.place, options.index
    where = "--index " if options.index is not None else ""
    if options.place is None:
        raise Mistake("where? expected a run, a folder of pictures, a table of pairs, or a saved index")
    check_query(options)
    for told, path in ((where, options.place), ("--image ", options.image)):
        if path is not None and not Path(path).exists():
            raise Mistake(f"{told}{path}: no such {'file' if told == '--image ' else 'folder or file'}{beside(path)}")


def check_query(options: argparse.Namespace) -> None:
    """Whether there is one question, and not two. Raises `Mistake`."""
    asked = bool(options.words or options.image)
    parts = bool(options.plus or options.minus or options.plus_image or options.minus_image)
    if not asked and not parts and options.like is None:
        raise Mistake("give words, --image, or both; or --like an item, or --plus and --minus")
    if options.like is not None and (asked or parts):
        raise Mistake("--like is a question of its own; words, pictures, --plus and --minus do not go with it")
    if options.rerank is not None and (parts or options.like is not None):
        raise Mistake("--rerank compares one query's tokens and patches; it goes with words, --image, or both")


def beside(path: str) -> str:
    """What a path that is not there may have meant."""
    folder = Path(path).parent
    names = [str(folder / one.name) for one in folder.iterdir()] if folder.is_dir() else []
    return run_options.meant(str(Path(path)), names)


def check_run(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """The arguments of a run, beside those of the command. Raises `Mistake`."""
    if words := run_options.given(rest)[""]:
        raise Mistake(f"unexpected {words[0]!r}; expected --name value")
    run_options.check_line(rest, known)


def check_training(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """A folder, and the arguments of a run. Raises `Mistake`."""
    folders = run_options.given(rest)[""]
    if folders and not Path(folders[0]).is_dir():
        raise Mistake(f"{folders[0]}: no such folder{beside(folders[0])}")
    if not folders and not rest:
        raise Mistake("what is there to train on? expected a FOLDER, or --config; `oner train --help` tells more")
    check_run(options, rest[1:] if folders else rest, known)


def check_place(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Whether the first that is named, of a doctor its run and of an index its source, is there. Raises `Mistake`."""
    check_nothing_more(options, rest, known)
    place = options.run if "run" in options else options.source
    if not Path(place).exists():
        raise Mistake(f"{place}: no such folder or file{beside(place)}")


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        summary: What it does, in a line of `oner --help`.
        module: Its `run(options, rest) -> exit status` does it; `rest` is what the parser below does not know.
        add_arguments: Declares its arguments; the docstring is the text above them in `oner COMMAND --help`.
        check: Raises `Mistake` for what can be told of options, rest and the names of the options before anything is
            imported.
        is_run: Its arguments are those of a run alone.
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
        Options and the rest of a command line, checked.

        Raises:
            Mistake: what was got, what was expected, and what may have been meant.
            SystemExit: `--help`, and what argparse itself refuses.
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
        "pretrain on a folder of pictures, or as a YAML file says",
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
        "numbers and pictures of what a model can do",
        "oner.training.commands.evaluate",
        evaluate_arguments,
        check_evaluation,
    ),
    "compare": Command(
        "several models on the same rows, in one table",
        "oner.training.commands.compare",
        compare_arguments,
    ),
    "search": Command(
        "pictures by words, by a picture, or by both as one query",
        "oner.training.commands.search",
        search_arguments,
        check_search,
    ),
    "index": Command(
        "embed pictures once, to be searched later",
        "oner.training.commands.index",
        index_arguments,
        check_place,
    ),
    "serve": Command(
        "a page to search by words, by a picture, or by both; or a Space of it",
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
        "a model as ONNX graphs",
        "oner.training.commands.export",
        export_arguments,
    ),
    "convert": Command(
        "official checkpoints of SIMLA and ALBEF into model directories, and back",
        "oner.training.conversion.command",
        convert_arguments,
    ),
    "estimate": Command(
        "memory, pairs a second and hours of a run, before anything starts",
        "oner.training.cost.estimate",
        estimate_arguments,
        check_run,
    ),
    "doctor": Command(
        "what ails a run, in words, and what helped where it was tried",
        "oner.training.doctor.command",
        doctor_arguments,
        check_place,
    ),
    "suite": Command(
        "what a model's features are good for: probes and retrieval, in one table",
        "oner.training.evaluation.suite",
        suite_arguments,
    ),
}


def is_refusal(error: Exception) -> bool:
    """
    Whether a message says it all: the system refused a file, or our own code refused what it was given. What another
    library raised may be a fault of ours, which its traceback tells.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # started by -m this module has another name
    return isinstance(error, OSError | Mistake) or (
        trace is not None and trace.tb_frame.f_globals["__name__"].startswith("oner")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command; what it does not know itself goes on to it as `rest`, the arguments of a run for example.

    Returns:
        The exit status: the command's own, 0 where all is well, or 2 after a message on what was got and expected.
    """
    listed = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="oner",
        usage="oner [--traceback] COMMAND ...",
        description=f"commands:\n{listed}\n\n`oner COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if given.command is None:
        parser.error(f"expected a command out of {', '.join(COMMANDS)}")
    if given.command not in COMMANDS:
        parser.error(f"{given.command!r} is none of {', '.join(COMMANDS)}{run_options.meant(given.command, COMMANDS)}")
    command = COMMANDS[given.command]
    try:
        options, rest = command.read(given.command, given.rest)
        # torch and transformers are imported here and no earlier
        return import_module(command.module).run(options, rest)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if not is_refusal(error):
            raise
        if given.traceback:
            traceback.print_exc()
        print(f"oner {given.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
