"""Processes that do pieces of work, and do not outlive the program that started them."""

import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

LOOK_UP_S = 1.0
PATIENCE_S = 20.0  # for what SIGTERM makes it save


def make_pool(num_processes: int) -> ProcessPoolExecutor:
    """A pool of fresh interpreters, each of which ends when the program does, however that ends."""
    return ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_watch_parent)


def _watch_parent() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_UP_S)
    while True:  # the first may be taken as a request to save and stop, after which the process waits for work
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_S)
