"""Start ``python -m train`` from the command line, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.training import ROOT, free_port

_ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def launch_process(recipe, *arguments, ranks=1, ds_config=ROOT / "ds_configs/zero1_fp32.json", module="train", environment=()):
    """Start the entry point as a user would; one rank needs no launcher. ``environment``: variables added to it."""
    options = ["--config", str(recipe), "--deepspeed_config", str(ds_config), *map(str, arguments)]
    launcher = [sys.executable, "-m", module]
    if ranks > 1:
        port = free_port()
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
        launcher += ["--module", module]
    env = {**_ENVIRONMENT, **dict(environment)}
    return subprocess.Popen([*launcher, *options], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(*arguments, **options):
    """Run it to the end."""
    process = launch_process(*arguments, **options)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]
