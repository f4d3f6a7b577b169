"""Evaluate a model directory: print a table, write numbers to results/ and figures to pictures/.

    python examples/evaluate.py --model runs/demo/model --data examples/data/emoji/test_style.parquet \
        --id_column hexcode --gallery examples/data/emoji/train.parquet

A task is an entry of `TASKS` that makes an evaluator; its `run(model, processor)` yields names, each with a number or
an image to save. `multimodal` and `composed` need other images of the same concept, in --data or --gallery.

Composed queries, from a separate table (examples/data/scenes.md, icons.md):

    python examples/evaluate.py --model runs/icons_oner/model --tasks queries --id_column concepts \
        --data runs/icons/unseen_sets_queries.parquet --gallery runs/icons/unseen_sets_gallery.parquet

Images with class numbers instead of captions, for instance a folder with one subfolder per class:

    python examples/evaluate.py --model runs/demo/model --data imagenet/val --class_names imagenet

A model fine-tuned for a task of `oner.training.tasks.finetuning`, on data in that task's format
(`--tasks TASK --help` lists the further options of a task):

    python examples/evaluate.py --model runs/vqa/model --tasks vqa --data questions.json --answer_list answers.json
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
