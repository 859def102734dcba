"""Which rank holds the others up, and why: from what is known of every rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from train.config import WatchdogConfig
from train.pulse import KEEPER, Process, Pulse

_STATES = {
    "T": "its process is stopped",
    "t": "a debugger holds its process",
    "D": "its process waits for a disk or a network file system",
    "Z": "its process has died",
    "": "its process has died",
}


def silent_ranks(pulses: Mapping[int, Pulse], me: int) -> list[int]:
    """Ranks that have not answered the alarm that rank ``me`` has raised or passed on."""
    if me != KEEPER and not pulses[me].alarm:  # not even its own came back from the store: nothing is known of the others
        return [KEEPER]
    return [rank for rank, pulse in pulses.items() if rank != me and not pulse.alarm]


def why_silent(process: Process, node: str) -> str:
    """``node``: that of the rank which asks."""
    if process.node != node:
        return f"its process on {process.host} is stopped or has died, or {process.host} cannot be reached"
    return _STATES.get(process.state(), "its process runs, but no Python in it (something keeps the interpreter's lock)")


def verdict(pulses: Mapping[int, Pulse], silent: Mapping[int, str], config: WatchdogConfig) -> str:
    """One sentence: who is stuck, where and for how long, where the others are, and which deadline that exceeded.

    Stuck are the ranks that gave no answer; or else those whose process was stopped; or else those that are farthest behind, and of these
    the ones that do not wait in a collective.

    Args:
        pulses: the last of every rank.
        silent: why they did not answer, of those that did not.
    """
    answering = [pulse for rank, pulse in pulses.items() if rank not in silent]
    stopped = [pulse for pulse in answering if pulse.stopped]
    behind = [pulse for pulse in answering if pulse.entered == min(pulse.entered for pulse in answering)]
    if silent:
        stuck = [pulses[rank] for rank in sorted(silent)]
        what = f"stuck: {silent[stuck[0].rank]}; last seen in {stuck[0].place}"
    elif stopped:
        stuck = stopped
        what = f"stuck: its process was stopped (SIGSTOP, or a suspended job) for {stopped[0].stopped:.0f} s"
    else:
        stuck = [pulse for pulse in behind if not pulse.waiting] or behind
        what = f"stuck in {stuck[0].place}, for {stuck[0].seconds:.0f} s, at {stuck[0].at}"
        if stuck == answering and stuck[0].waiting:
            what += ", waiting for each other"
    late = max(answering, key=lambda pulse: pulse.seconds / config.deadline(pulse.phase))
    limit = f"watchdog.{config.key(late.phase)} allows {config.deadline(late.phase):g} s"
    others = [pulse for pulse in answering if pulse not in stuck]
    return "; ".join([f"{ranks_text(pulse.rank for pulse in stuck)} {what}", *_where(others), limit])


def _where(others: Collection[Pulse]) -> Iterable[str]:
    for phase in dict.fromkeys(pulse.phase for pulse in others):
        there = [pulse for pulse in others if pulse.phase == phase]
        yield f"{ranks_text(pulse.rank for pulse in there)} in phase {phase}, for {max(pulse.seconds for pulse in there):.0f} s"


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3 is`` or ``ranks 0 to 2, 5 are``."""
    ranks = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"rank {text} is" if len(ranks) == 1 else f"ranks {text} are"
