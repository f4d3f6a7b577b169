"""Evaluate a model directory: a table on the screen, numbers in results/, pictures in pictures/.

    python examples/evaluate.py --model runs/demo/model --data examples/data/emoji/test_style.parquet \
        --id_column hexcode --gallery examples/data/emoji/train.parquet

A task is one entry of `TASKS`: it makes an evaluator, whose `run(model, processor)` yields names, each with a number
or a picture to be saved. `multimodal` and `composed` need other pictures of the same concept, in --data or --gallery.

Composed queries, a table of their own (examples/data/scenes.md, icons.md), for instance

    python examples/evaluate.py --model runs/icons_oner/model --tasks queries --id_column concepts \
        --data runs/icons/unseen_sets_queries.parquet --gallery runs/icons/unseen_sets_gallery.parquet

Pictures with class numbers instead of captions, for instance a folder with one folder a class:

    python examples/evaluate.py --model runs/demo/model --data imagenet/val --class_names imagenet

A model that was fine-tuned for a task of `oner.training.tasks.finetuning`, on data in that task's format; what else
the task may be told are further options, and `--tasks TASK --help` lists them:

    python examples/evaluate.py --model runs/vqa/model --tasks vqa --data questions.json --answer_list answers.json
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
