"""
The arguments of `oner evaluate`, `oner compare` and `oner suite`; standard library only, like the whole command line.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import oner_run_options as run_options
from oner_run_options import Mistake, check_nothing_more

# tasks of oner.training.commands.evaluate; a model that was fine-tuned for a task has its own evaluation
EVALUATIONS = (
    "retrieval rerank zero_shot bootstrap multimodal composed queries gap localization attention scenes concepts "
    "codes languages relevance"
).split()
OWN_EVALUATIONS = tuple(task for task in run_options.tasks() if task not in EVALUATIONS)


def add_evaluation_sources(parser: argparse.ArgumentParser) -> None:
    """The model, the data, the tasks and the output directory."""
    parser.add_argument(
        "--model", required=True, help="a model directory, a run, a shipped model, or a name on the Hub"
    )
    parser.add_argument("--data", nargs="+", required=True, help="one or more sources; each is a separate split")
    parser.add_argument("--gallery", help="a source with other images of the same concepts")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*EVALUATIONS, *OWN_EVALUATIONS],
        help="default: all that the model and the data allow",
    )
    parser.add_argument("--output", help="default: the model directory; runs/NAME for a shipped or Hub model")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """The columns of images, captions and ids in a source."""
    parser.add_argument("--image_column")
    parser.add_argument("--text_column")
    parser.add_argument(
        "--id_column", help="rows with the same id are positives of each other (hexcode for the emoji)"
    )
    parser.add_argument(
        "--image_folder", help="folder of the image paths in annotations; default: the folder of the file"
    )
    parser.add_argument("--eval_split", help="split of Karpathy's JSON (dataset_coco.json), for example test")


def add_evaluation_protocol(parser: argparse.ArgumentParser) -> None:
    """The evaluation protocol."""
    parser.add_argument(
        "--class_names",
        help="imagenet, cifar10, cifar100, or a JSON file with a list: the classes for zero_shot and bootstrap, the "
        "only tasks in that case; captions are not needed, and --id_column (label, or the folder of an image) is the "
        "index of each row's class in that list",
    )
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--caption_rules", choices=("albef",), help="rewrite captions and questions as in training")
    parser.add_argument(
        "--templates",
        help="name of a template set, or a JSON file with a list (default: that of the class names, slip for "
        "imagenet, cifar for cifar10 and cifar100; without class names the bare name)",
    )
    parser.add_argument(
        "--guided_text", choices=("prompt", "name"),
        help="text that guides an image: 'a photo of a {}', or the bare name (default with bare names)",
    )  # fmt: skip
    parser.add_argument(
        "--guided_score", choices=("guided", "sum"), default="guided",
        help="order candidates by s' = cos(f(I, t), f(t)) alone (as in the paper), or by s + s'",
    )  # fmt: skip
    parser.add_argument(
        "--keep_aspect", action=argparse.BooleanOptionalAction,
        help="zero-shot: centre-crop images to a square, as SLIP does (default with imagenet)",
    )  # fmt: skip
    parser.add_argument(
        "--languages", nargs="+", help="languages of each row's captions, in order, for the task languages"
    )
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument(
        "--rerank_k", type=int, default=128, help="candidates per query to re-rank (COCO 256, Flickr30k 128)"
    )
    parser.add_argument(
        "--rerank_score", choices=("logit", "difference", "sum"), default="logit",
        help="score for re-ranking: the logit for matched (ALBEF, SIMLA), its difference to the other logit, or "
        "cosine / temperature + rerank_weight times that difference",
    )  # fmt: skip
    parser.add_argument("--rerank_weight", type=float, default=0.25, help="weight of the difference in sum")
    parser.add_argument(
        "--bootstrap_rows", type=int, default=300,
        help="guide only this many evenly spaced images, with ten more passes each (default 300; 0: all)",
    )  # fmt: skip


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Evaluate a model: prints a table, and writes metrics to results/ and contact sheets to pictures/.

        oner evaluate --model runs/demo/model --data examples/data/emoji/test_style.parquet --id_column hexcode \\
            --gallery examples/data/emoji/train.parquet

    `multimodal` and `composed` need other images of the same concept, in --data or --gallery. Composed queries have
    their own table format (examples/data/scenes.md, icons.md): --tasks queries --data QUERIES --gallery GALLERY.
    Images with class labels instead of captions, for instance a folder with one subfolder per class:

        oner evaluate --model runs/demo/model --data imagenet/val --class_names imagenet

    A model that was fine-tuned for a task is evaluated on data in that task's format. The task's other options are
    listed by `oner finetune --task TASK --help`:

        oner evaluate --model runs/vqa/model --tasks vqa --data questions.json --answer_list answers.json
    """
    add_evaluation_sources(parser)
    add_evaluation_protocol(parser)
    parser.add_argument(
        "--limit", "--eval_limit", type=int, help="use only this many evenly spaced rows of each split"
    )
    parser.add_argument("--batch_size", "--eval_batch_size", type=int, default=64)
    parser.add_argument("--device", help="default: an accelerator if there is one")


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Compare several models on the same rows, in one table: retrieval recall in both directions, seconds, parameters.

        oner compare runs/photos/model openai/clip-vit-base-patch32 google/siglip-base-patch16-224 --data pairs.parquet

    A model is a directory or a name on the Hub, of one of oner's families or any model with `get_text_features` and
    `get_image_features`. Writes compare.md and compare.json. --sheets draws all models side by side: where each
    locates a caption in its image (maps), and how images and captions lie in its embedding space (gap).
    """
    parser.set_defaults(class_names=None)  # rows are pairs, not images with class labels
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, runs, or names on the Hub")
    parser.add_argument("--data", nargs="+", required=True, help="one or more sources; each gets its own table")
    add_columns(parser)
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--limit", type=int, help="use only this many evenly spaced rows of each source")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", help="default: an accelerator if there is one")
    parser.add_argument("--sheets", nargs="+", choices=("maps", "gap"), help="compare_SPLIT_maps.png, ..._gap.png")
    parser.add_argument("--output", default=".", help="output folder (default: the current one)")


def check_evaluation(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """Checks for options that exclude each other, and the options of a fine-tuned task. Raises `Mistake`."""
    names = [Path(source).stem for source in options.data]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Mistake(f"several sources are called {', '.join(twice)}, and the results of one would replace another's")
    tasks = options.tasks or []
    own = [task for task in tasks if task in OWN_EVALUATIONS]
    if own and (len(tasks) > 1 or options.class_names is not None):
        raise Mistake(f"{own[0]} has a model of its own and is evaluated by itself; expected it alone in --tasks")
    if "relevance" in tasks and len(tasks) > 1:
        raise Mistake("relevance asks the model of masked words, which does not search; expected it alone in --tasks")
    if "queries" in tasks and (len(tasks) > 1 or options.gallery is None):
        raise Mistake("queries are rows of their own kind; expected them alone in --tasks, and their --gallery")
    if options.class_names is not None:
        if other := [task for task in tasks if task not in ("zero_shot", "bootstrap")]:
            raise Mistake(f"--class_names is for the tasks zero_shot and bootstrap, got {', '.join(other)}")
    if not own:
        return check_nothing_more(options, rest, known)
    run_options.check_names(rest, {one.name: one for one in run_options.task_options(own[0])})


def suite_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Measure how useful a model's features are: probes on images and texts, and retrieval without training.

        oner suite oner-emoji simla-emoji --output runs/suite
        oner suite runs/mine/model --tasks table3 --root data --linear
        oner suite runs/mine/model --images birds train_folder test_folder label

    Tasks: `quick`, the default, which is emoji_groups (unseen concepts), digits, supersense, hypernym and
    emoji_retrieval; emoji_groups_style (seen concepts in an unseen style); and `table3`, the fifteen data sets of
    MoMo's Table 3: imagenet, food101, cifar10, cifar100, cars, aircraft, dtd, pets, caltech101, flowers102, mnist,
    stl10, eurosat, gtsrb, sst.

    Writes results/suite.md and a JSON file for each task into MODEL, or into --output.
    """
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Model directories, or names on the Hub.")
    parser.add_argument("--tasks", nargs="+", help="Tasks or groups of tasks, from the list above.")
    parser.add_argument("--output", help="Output directory; default as for `oner evaluate`.")
    parser.add_argument("--data", default="examples/data", help="Folder with the emoji and glosses.")
    parser.add_argument("--root", default="data", help="Folder with the official files of Table 3's data sets.")
    parser.add_argument("--download", action="store_true", help="Let torchvision download missing files.")
    own = {"action": "append", "nargs": 4}
    parser.add_argument(
        "--images", **own, metavar=("NAME", "TRAIN", "TEST", "COLUMN"),
        help="Probe on your own images: a folder per class, tables, data sets; COLUMN is `label` for folders.",
    )  # fmt: skip
    parser.add_argument(
        "--texts", **own, metavar=("NAME", "TASK", "TRAIN", "TEST"),
        help="Probe on texts in the official TSV files of a GLUE task: sst2, mrpc, qqp, mnli, qnli, rte.",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", action="append", nargs=2, metavar=("NAME", "SOURCE"),
        help="Retrieval on your own pairs; for Karpathy's JSON (dataset_coco.json), the test split.",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of each probe (default 0 1 2).")
    parser.add_argument("--limit", type=int, help="Maximum rows of each split, drawn at random.")
    parser.add_argument("--pool", default="cls", help="Feature: cls, or the mean of patches or tokens.")
    parser.add_argument(
        "--linear", action="store_true", help="Also MAE's probe: batch norm and a linear layer, with LARS."
    )
    parser.add_argument("--linear_epochs", type=int, default=90, help="Epochs of MAE's probe (default 90).")
    parser.add_argument(
        "--linear_batch_size", type=int, default=16384, help="Batch size of MAE's probe (default 16384)."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Batch size of the model.")
    parser.add_argument("--device", help="cuda where there is one, else cpu.")
