"""Pretrain a family on pairs of pictures and text, evaluate, and write a model directory that is a Hub repository.

accelerate launch examples/pretrain.py --config examples/configs/oner_emoji.yaml [--name value ...]
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
