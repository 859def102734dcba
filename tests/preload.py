"""Imported once by the server from which test ranks are forked: what would cost every rank seconds."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import torch._inductor.compile_fx  # noqa: F401 - deepspeed.initialize imports it lazily, and every rank would pay

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no JIT build of the shared-memory collective
