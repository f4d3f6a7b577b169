"""Pretrain a family on image-text pairs, evaluate it, and write a model directory in the layout of a Hub repository.

accelerate launch examples/pretrain.py --config examples/configs/oner_emoji.yaml [--name value ...]
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
