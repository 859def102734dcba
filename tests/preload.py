"""Imported once by the server from which test ranks are forked: what would cost every rank seconds."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch._inductor.compile_fx

from train.dist import import_deepspeed

import_deepspeed(torch.device("cpu"))
