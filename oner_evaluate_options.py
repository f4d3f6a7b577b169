"""What `oner evaluate` and `oner suite` may be told, from the standard library alone, as all of the command line."""

import argparse
from collections.abc import Sequence

import oner_run_options as run_options
from oner_run_options import Mistake, check_nothing_more

# those of oner.training.commands.evaluate; a model that was fine-tuned for a task has an evaluation of its own
EVALUATIONS = (
    "retrieval rerank zero_shot bootstrap multimodal composed queries gap localization attention scenes concepts "
    "codes languages"
).split()
OWN_EVALUATIONS = tuple(task for task in run_options.tasks() if task not in EVALUATIONS)


def add_evaluation_sources(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, on what, and where the answers go."""
    parser.add_argument(
        "--model", required=True, help="a model directory, a run, one that ships, or a name on the Hub"
    )
    parser.add_argument("--data", nargs="+", required=True, help="one or more sources; each is a split of its own")
    parser.add_argument("--gallery", help="a source with other pictures of the same concepts")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*EVALUATIONS, *OWN_EVALUATIONS],
        help="default: all that the model and the data allow",
    )
    parser.add_argument("--output", help="default: the model directory; runs/NAME for one that ships or of the Hub")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Where a source has its pictures, captions and ids."""
    parser.add_argument("--image_column")
    parser.add_argument("--text_column")
    parser.add_argument("--id_column", help="rows with equal ids are positives of each other (hexcode for the emoji)")
    parser.add_argument(
        "--image_folder", help="what the picture paths of annotations are relative to; if none, the file"
    )
    parser.add_argument("--eval_split", help="of Karpathy's JSON (dataset_coco.json): test, say")


def add_evaluation_protocol(parser: argparse.ArgumentParser) -> None:
    """How it is measured."""
    parser.add_argument(
        "--class_names",
        help="imagenet, cifar10, cifar100, or a JSON file with a list: the classes of zero_shot and bootstrap, the "
        "only tasks then; captions are not needed, and --id_column (label, or the folder of a picture) holds the "
        "number of each row's class, its place in that list",
    )
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--caption_rules", choices=("albef",), help="rewrite captions and questions as in training")
    parser.add_argument(
        "--templates",
        help="name of a template set, or a JSON file with a list (default: those of the class names, slip for "
        "imagenet, cifar for cifar10 and cifar100; without class names the bare name)",
    )
    parser.add_argument(
        "--guided_text", choices=("prompt", "name"),
        help="what stands beside a guided picture: 'a photo of a {}', or the bare name (default with bare names)",
    )  # fmt: skip
    parser.add_argument(
        "--guided_score", choices=("guided", "sum"), default="guided",
        help="candidates are ordered by s' = cos(f(I, t), f(t)) alone (the paper's), or by s + s'",
    )  # fmt: skip
    parser.add_argument(
        "--keep_aspect", action=argparse.BooleanOptionalAction,
        help="zero-shot: take the middle square of a picture, as SLIP does (default with imagenet)",
    )  # fmt: skip
    parser.add_argument("--languages", nargs="+", help="of each row's captions, in their order: the task of that name")
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 5, 10])
    parser.add_argument("--rerank_k", type=int, default=128, help="candidates of a query (COCO 256, Flickr30k 128)")
    parser.add_argument(
        "--rerank_score", choices=("logit", "difference", "sum"), default="logit",
        help="what orders the candidates: the logit for matched (ALBEF, SIMLA), its difference to the other logit, or "
        "cosine / temperature + rerank_weight times that difference",
    )  # fmt: skip
    parser.add_argument("--rerank_weight", type=float, default=0.25, help="of the difference in sum")
    parser.add_argument(
        "--bootstrap_rows", type=int, default=300,
        help="guide only so many evenly spaced pictures, at ten more passes each (default 300; 0: all)",
    )  # fmt: skip


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Evaluate a model directory: a table on the screen, numbers in results/, pictures in pictures/.

        oner evaluate --model runs/demo/model --data examples/data/emoji/test_style.parquet --id_column hexcode \\
            --gallery examples/data/emoji/train.parquet

    `multimodal` and `composed` need other pictures of the same concept, in --data or --gallery. Composed queries are
    a table of their own (examples/data/scenes.md, icons.md): --tasks queries --data QUERIES --gallery GALLERY.
    Pictures with class numbers instead of captions, for instance a folder with one folder a class:

        oner evaluate --model runs/demo/model --data imagenet/val --class_names imagenet

    A model that was fine-tuned for a task is evaluated on data in that task's format; what else the task may be told
    are further options, which `oner finetune --task TASK --help` lists:

        oner evaluate --model runs/vqa/model --tasks vqa --data questions.json --answer_list answers.json
    """
    add_evaluation_sources(parser)
    add_evaluation_protocol(parser)
    parser.add_argument("--limit", "--eval_limit", type=int, help="use only so many rows of each split, evenly spaced")
    parser.add_argument("--batch_size", "--eval_batch_size", type=int, default=64)
    parser.add_argument("--device", help="default: an accelerator if there is one")


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Several models on the same rows, in one table: recall of retrieval both ways, seconds, parameters.

        oner compare runs/photos/model openai/clip-vit-base-patch32 google/siglip-base-patch16-224 --data pairs.parquet

    A model is a directory or a name on the Hub, of a family of ours or any with `get_text_features` and
    `get_image_features`. Writes compare.md and compare.json; --sheets draws all models side by side: where each sees
    a caption in its picture (maps), and how pictures and captions lie in its space (gap).
    """
    parser.set_defaults(class_names=None)  # rows are pairs, not pictures of classes
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, runs, or names on the Hub")
    parser.add_argument("--data", nargs="+", required=True, help="one or more sources; each is a table of its own")
    add_columns(parser)
    parser.add_argument("--captions", choices=("all", "first"), default="all")
    parser.add_argument("--limit", type=int, help="use only so many rows of each source, evenly spaced")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", help="default: an accelerator if there is one")
    parser.add_argument("--sheets", nargs="+", choices=("maps", "gap"), help="compare_SPLIT_maps.png, ..._gap.png")
    parser.add_argument("--output", default=".", help="the folder of all files (default: this one)")


def check_evaluation(options: argparse.Namespace, rest: Sequence[str], known: Sequence[str]) -> None:
    """What excludes each other; and of a task that has a model of its own, its options. Raises `Mistake`."""
    tasks = options.tasks or []
    own = [task for task in tasks if task in OWN_EVALUATIONS]
    if own and (len(tasks) > 1 or options.class_names is not None):
        raise Mistake(f"{own[0]} has a model of its own and is evaluated by itself; expected it alone in --tasks")
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
    What a model's features are good for: probes of images and texts, and retrieval without training.

        oner suite oner-emoji simla-emoji --output runs/suite
        oner suite runs/mine/model --tasks table3 --root data --linear
        oner suite runs/mine/model --images birds train_folder test_folder label

    Tasks: `quick`, the default, which is emoji_groups (of concepts never seen), digits, supersense, hypernym and
    emoji_retrieval; emoji_groups_style (concepts seen, in a style never seen); and `table3`, the fifteen sets of
    MoMo's Table 3: imagenet, food101, cifar10, cifar100, cars, aircraft, dtd, pets, caltech101, flowers102, mnist,
    stl10, eurosat, gtsrb, sst.

    Writes results/suite.md and a JSON file for each task into MODEL, or into --output.
    """
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Model directories, or names on the Hub.")
    parser.add_argument("--tasks", nargs="+", help="Of those above, or their groups.")
    parser.add_argument("--output", help="Directory of the results; as of `oner evaluate` by default.")
    parser.add_argument("--data", default="examples/data", help="Folder with emoji and glosses.")
    parser.add_argument("--root", default="data", help="Folder of the official files of Table 3's sets.")
    parser.add_argument("--download", action="store_true", help="Let torchvision bring those that are missing.")
    own = {"action": "append", "nargs": 4}
    parser.add_argument(
        "--images", **own, metavar=("NAME", "TRAIN", "TEST", "COLUMN"),
        help="Probe of your images: folders of a class each, tables, data sets; COLUMN is `label` for folders.",
    )  # fmt: skip
    parser.add_argument(
        "--texts", **own, metavar=("NAME", "TASK", "TRAIN", "TEST"),
        help="Probe of texts in the official TSV files of a task of GLUE: sst2, mrpc, qqp, mnli, qnli, rte.",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", action="append", nargs=2, metavar=("NAME", "SOURCE"),
        help="Retrieval of your pairs; of Karpathy's JSON (dataset_coco.json) its test split.",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of each probe (default 0 1 2).")
    parser.add_argument("--limit", type=int, help="At most so many rows of each part, drawn at random.")
    parser.add_argument("--pool", default="cls", help="The feature: cls, or mean of patches or tokens.")
    parser.add_argument("--linear", action="store_true", help="MAE's probe too: batch norm and a linear map by LARS.")
    parser.add_argument("--linear_epochs", type=int, default=90, help="Of MAE's probe (default 90).")
    parser.add_argument("--linear_batch_size", type=int, default=16384, help="Of MAE's probe (default 16384).")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows that a model reads at once.")
    parser.add_argument("--device", help="cuda where there is one, else cpu.")
