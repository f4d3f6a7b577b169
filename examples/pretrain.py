"""Pretrain a family on pairs of pictures and text, evaluate, and write a model directory that is a Hub repository.

accelerate launch examples/pretrain.py --config examples/configs/oner_emoji.yaml [--name value ...]
"""

import sys

from oner.training.commands.train import main
from oner.training.run.summary import STOPPED

if __name__ == "__main__":
    if main() is None:
        sys.exit(STOPPED)
