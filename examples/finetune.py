"""Fine-tune a pretrained model on a task, evaluate, and write a model directory that is a Hub repository.

accelerate launch examples/finetune.py --task retrieval --config examples/configs/finetune_retrieval_coco.yaml \
    --initial_model runs/simla_base_256/model [--name value ...]

Tasks are the entries of `oner.training.tasks.finetuning.TASKS`. `--task NAME --help` lists what a task may be told.
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
