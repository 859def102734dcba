"""Stands in for the ranks of a trial of ``train tune``: ``python -m tests.faults.tune_ranks FOLDER ... fault=KIND``."""

import os
import signal
import sys
import time

import numpy as np

if __name__ == "__main__":
    kind = next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("fault="))
    if kind == "hang":
        if os.fork():  # both must go: a launcher and its rank
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"pid {os.getpid()}", flush=True)
        time.sleep(600)
    elif kind == "memory":
        np.ones(2**52)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
