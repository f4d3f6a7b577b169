"""Signals to a whole process group, and the data workers in it."""

import os
import signal
import threading


def outlive_signals_to_the_group(worker: int) -> None:
    """
    A `worker_init_fn`. Ctrl-C and a scheduler's SIGTERM reach every process of a run; a worker that obeyed them would
    be gone before the run could finish its step and save. Only the main process may end a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_sigterm, args=(os.getppid(),), daemon=True).start()


def _end_at_sigterm(parent: int) -> None:
    # a SIGTERM of the main process, when it is done with its workers
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
