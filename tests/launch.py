"""Start ``python -m train`` from the command line, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.training import ROOT, free_port

_ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def launch_process(
    recipe, *arguments, ranks=1, ds_config=ROOT / "ds_configs/zero1_fp32.json", module="train", launcher=None, environment=(), **options
):
    """Start the entry point as a user would; one rank needs no launcher.

    Args:
        launcher: a command that starts the ranks of the module that comes after it; None: DeepSpeed's.
        environment: variables added to this process's.
        options: of subprocess.Popen.
    """
    configs = ["--config", str(recipe), "--deepspeed_config", str(ds_config)]
    if launcher is None:
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module"]
    command = [*launcher, module, *configs, *map(str, arguments)]
    env = {**_ENVIRONMENT, **dict(environment)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=ROOT, env=env, **options)


def launch(*arguments, **options):
    """Run it to the end."""
    process = launch_process(*arguments, **options)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]
