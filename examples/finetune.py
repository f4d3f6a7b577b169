"""Fine-tune a pretrained model on a task, evaluate it, and write a model directory in the layout of a Hub repository.

accelerate launch examples/finetune.py --task retrieval --config examples/configs/finetune_retrieval_coco.yaml \
    --initial_model runs/simla_base_256/model [--name value ...]

Tasks are the entries of `oner.training.tasks.finetuning.TASKS`. `--task NAME --help` lists the options of a task.
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
