"""``python -m train doctor``: check a machine, or the ranks of a launcher together, before a run finds out by itself."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path

from train.checks import software
from train.checks.finding import Finding, Level, ok, problem

_PROBLEM = 2  # exit code
_ROOT = Path(__file__).resolve().parents[1]
_LATE_S = 15  # after --timeout-s: by then the collectives have given up by themselves, if they ever do
_DESCRIPTION = """\
Check this machine, and under a launcher its ranks together, before a run finds out by itself. Needs no recipe.

  python -m train doctor
  deepspeed --num_gpus 8 --module train doctor
  deepspeed --hostfile HOSTS --module train doctor --config train/recipes/lvface_v1.yaml data.path=SHARDS output=RUN

One line a check: ok, warning (slower, or not with every recipe) or problem (a run would fail, hang or go wrong), what was found, and what
cures it. Every node is looked at by its first rank: Python, packages against requirements.txt, GPUs, a JPEG decoded by DALI, apex,
compilers, locks of dead compilations, shared memory, the open-file limit, metrics ports, the disk. Then all ranks together: the same
versions and code, an all-reduce whose sum is known, the speed of each link, clocks. With --config also what the recipe names: data.path,
output, and what it needs of the above; with --deepspeed_config that the two fit together.

Nothing is left behind. Exit codes of a rank: 0 no problem, 2 a problem on any rank."""


class Report:
    """Prints findings as they come, and counts them. What a rank that does not speak finds, another one says."""

    def __init__(self, node: str, *, speaks: bool) -> None:
        """``node``: put before every finding; empty where there is only one."""
        self._node, self._speaks, self.counts = f"{node}  " if node else "", speaks, dict.fromkeys(Level, 0)

    def run(self, name: str, check: Callable[[], Finding | Iterable[Finding]]) -> None:
        """Add what ``check`` finds; a check that breaks is a problem by itself, whoever's it is, and the others go on."""
        try:
            found = check()
            for finding in [found] if isinstance(found, Finding) else found:
                self.add(finding)
        except Exception as error:  # of libraries that are broken in ways nobody foresaw
            reason = f"this check failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self._say(problem(name, reason, "if the lines above do not explain it, it is an error of the doctor"))

    def add(self, finding: Finding) -> None:
        if self._speaks:
            self._say(finding)

    def _say(self, finding: Finding) -> None:
        self.counts[finding.level] += 1
        sys.stdout.write(f"{self._node}{finding}\n")  # in one piece: nodes share the terminal
        sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 no problem, 2 a problem on any rank."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None and (arguments.deepspeed_config or arguments.overrides):
        parser.error("--deepspeed_config and key=value need --config: without a recipe nothing would look at them")
    begin = time.monotonic()
    # Until torch is known to be there, the environment is all that tells ranks apart.
    first_here, first = (os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "RANK"))
    several_nodes = os.environ.get("WORLD_SIZE", "1") != _ranks_here(os.environ)
    report = Report(socket.gethostname() if several_nodes else "", speaks=first_here)
    report.run("python", software.python)
    report.run("packages", lambda: software.packages(_ROOT / "requirements.txt"))
    try:
        import deepspeed  # noqa: F401 - what follows stands on it and on torch
    except Exception as error:
        report.add(problem("deepspeed", f"cannot be imported ({error})", "pip install -r requirements.txt; the other checks need it"))
        return _PROBLEM
    from train.dist import read_ranks

    ranks = read_ranks()
    cfg = _check_recipe(report, arguments, ranks)
    if first_here:
        _check_node(report, arguments, ranks, cfg)
    together = Report("", speaks=first)
    total = _check_together(together, arguments, ranks, report.counts)
    if first:
        said = [_counted(total[Level.PROBLEM], "problem"), _counted(total[Level.WARNING], "warning"), _counted(ranks.world_size, "rank")]
        print(f"{', '.join(said)}, {time.monotonic() - begin:.0f} s", flush=True)
    return _PROBLEM if total[Level.PROBLEM] else 0


def _ranks_here(environment: os._Environ | dict) -> str:
    return environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or environment.get("WORLD_SIZE", "1")


def _check_recipe(report: Report, arguments: argparse.Namespace, ranks):
    """Returns the recipe; None if there is none that can be read."""
    if arguments.config is None:
        return None
    from train.config import load_run_config
    from train.dist import import_deepspeed
    from train.ds_config import load_ds_config

    try:
        cfg = load_run_config(arguments.config, arguments.overrides)
        report.add(ok("recipe", str(arguments.config)))
    except ValueError as error:
        for line in str(error).splitlines():
            report.add(problem("recipe", line, "the checks of data and output need it"))
        return None
    if arguments.deepspeed_config:
        import_deepspeed(ranks.device)
        try:
            _, summary = load_ds_config(arguments.deepspeed_config, cfg, ranks.world_size, ranks.device.type)
            report.add(ok("deepspeed", f"{arguments.deepspeed_config}: ZeRO {summary.zero_stage}, {summary.precision}"))
        except ValueError as error:
            for line in str(error).splitlines():
                report.add(problem("deepspeed", line, "see ds_configs/README.md"))
    return cfg


def _check_node(report: Report, arguments: argparse.Namespace, ranks, cfg) -> None:
    from train.checks import machine, recipe
    from train.config import MetricsConfig

    here, on_gpu = ranks.local_world_size, ranks.device.type == "cuda"
    impl, compiled = (cfg.optimizer.impl, cfg.model.compile) if cfg else ("torch", False)
    compiling = ["model.compile: true"] * compiled + ["optimizer.impl: deepspeed"] * (impl == "deepspeed")
    metrics, shards = cfg.metrics if cfg else MetricsConfig(), recipe.count_shards(cfg.data.path) if cfg else 0
    report.run("gpu", lambda: machine.gpus(machine.TorchDevices.here(), here))
    report.run("dali", lambda: software.dali(None))
    if on_gpu:
        report.run("dali", lambda: software.dali(ranks.device_id))
        report.run("nvcc", lambda: software.nvcc(impl == "deepspeed"))
    report.run("apex", lambda: software.apex(impl == "apex"))
    report.run("compiler", lambda: software.compiler(compiling))
    report.run("compile locks", lambda: software.compile_locks(software.extensions_folder()))
    report.run("shared memory", lambda: machine.shared_memory(Path("/dev/shm"), here, on_gpu))
    if cfg:
        report.run("data", lambda: recipe.data(cfg.data))
        report.run("output", lambda: recipe.output(cfg))
    report.run("open files", lambda: machine.open_files(ranks.world_size, shards))
    report.run("ports", lambda: machine.ports(metrics.host, metrics.port, here))
    report.run("disk", lambda: machine.disk(arguments.folder or (cfg.output if cfg else Path()), arguments.disk_mib))


def _check_together(report: Report, arguments: argparse.Namespace, ranks, mine: dict[Level, int]) -> dict[Level, int]:
    """Checks of all ranks; ends the process where they hang. ``mine``: what this rank has counted. Returns the counts of all ranks."""
    from train.checks import together
    from train.dist import process_group

    if ranks.world_size == 1:
        hint = "start the doctor under the launcher: deepspeed --num_gpus N --module train doctor"
        report.add(ok("ranks", f"one rank by itself; to check several together, {hint}"))
        return _added([mine, report.counts])
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    cure = f"can every node reach {where}? Are NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME right? NCCL_DEBUG=INFO tells more"

    def give_up() -> None:
        print(problem("ranks", f"rank {ranks.rank} hangs in a collective after {arguments.timeout_s:g} s", cure), flush=True)
        os._exit(_PROBLEM)

    timer = threading.Timer(arguments.timeout_s + _LATE_S, give_up)  # must not hold the group: as a thread it may outlive that
    timer.daemon = True
    try:
        with process_group(ranks, timedelta(seconds=arguments.timeout_s)) as joined:
            timer.start()  # not before: here the ranks of a node have waited for the one that looked at it
            here = together.what_runs_here(_ROOT)
            report.run("agreement", lambda: together.agreement(joined, here))
            report.run("all-reduce", lambda: together.all_reduce(joined, arguments.link_mib))
            report.run("links", lambda: together.links(joined, arguments.link_mib))
            report.run("clocks", lambda: together.clocks(joined))
            counts = joined.gather(_added([mine, report.counts]))
    except Exception as error:  # of torch, DeepSpeed, NCCL: all mean that the ranks cannot work together
        reason = str(error).strip().partition("\n")[0]
        print(problem("ranks", f"rank {ranks.rank} of {ranks.world_size} cannot work with the others: {reason}", cure), flush=True)
        os._exit(_PROBLEM)  # not by sys.exit: teardown would wait for the others
    timer.cancel()
    timer.join()
    return _added(counts)


def _added(counts: Sequence[dict[Level, int]]) -> dict[Level, int]:
    return {level: sum(each[level] for each in counts) for level in Level}


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train doctor", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)

    def positive(kind: type) -> Callable[[str], float]:
        def parse(text: str) -> float:
            number = kind(text)
            if not 0 < number < float("inf"):
                raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
            return number

        return parse

    parser.add_argument("--config", type=Path, help="recipe (YAML) whose data, output and needs are checked too")
    parser.add_argument("--deepspeed_config", type=Path, help="DeepSpeed's JSON, checked against the recipe; needs --config")
    parser.add_argument(
        "--folder", type=Path, help="where to measure the disk (default: the recipe's output, or else the working directory)"
    )
    parser.add_argument("--disk-mib", type=positive(int), default=256, metavar="N", help="MiB to write and read there (default: 256)")
    parser.add_argument("--link-mib", type=positive(int), default=64, metavar="N", help="MiB to send between ranks (default: 64)")
    parser.add_argument(
        "--timeout-s", type=positive(float), default=120.0, metavar="S",
        help="after so many seconds ranks that do not answer are a problem; within them a node must have been looked at (default: 120)",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. data.path=SHARDS; need --config")
    return parser
