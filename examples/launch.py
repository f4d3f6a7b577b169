"""`accelerate launch` with the exit status of the program: accelerate itself turns every status but 0 into 1.

    python examples/launch.py --num_processes 4 examples/pretrain.py --config examples/configs/oner_emoji.yaml

So a script sees status 75 if a signal stopped the run and the same command would resume it.
"""

import sys
from collections.abc import Sequence
from subprocess import CalledProcessError

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> int:
    """Starts what `accelerate launch` would, and returns its exit status, or 128 + the number of a signal."""
    options = launch_command_parser().parse_args(argv)
    try:
        launch_command(options)
    except CalledProcessError as error:  # from a single process
        status = error.returncode
    except ChildFailedError as error:  # from several, by torchrun
        status = error.get_first_failure()[1].exitcode
    else:
        return 0
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
