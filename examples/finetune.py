"""Fine-tune a pretrained model on a task, evaluate, and write a model directory that is a Hub repository.

accelerate launch examples/finetune.py --task retrieval --config examples/configs/finetune_retrieval_coco.yaml \
    --initial_model runs/simla_base_256/model [--name value ...]

Tasks are the entries of `oner.training.tasks.finetuning.TASKS`. `--task NAME --help` lists what a task may be told.
"""

import sys

from oner.training.commands.finetune import main
from oner.training.run.summary import STOPPED

if __name__ == "__main__":
    if main() is None:
        sys.exit(STOPPED)
