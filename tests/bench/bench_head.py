"""The Partial-FC head against the matrix products that it cannot do without, and against a plain head.

``python -m tests.bench.bench_head``. Equality first: both heads, loss and gradients. Then time, with the contenders taking turns in one
process; peak memory, each in a fresh process; a sweep over chunk sizes; and the choice of the sampled classes. Writes bench_head.csv and
bench_head.png to --out.

The floor of a step is its bare float32 products, outputs allocated before: logits, gradient of the samples, gradient of the centers; with
the expectations as a second anchor two more. One thread and CPU time on a CPU, events on a GPU. The plain head is autograd over
``cross_entropy(scale * margin(normalize(x) @ normalize(w).T))``: what it holds are four float32 [B, S] matrices.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.class_shard import ClassShard, sample_centers
from model.optimizer import RowSparseAdamW
from model.partial_fc import PartialFC
from tests.bench.timing import medians

MARGIN, SCALE, WEIGHT_DECAY, LR = 0.4, 64.0, 0.1, 1e-3  # CosFace
MIB = 2**20
PLAIN_LIMIT_MIB = 6000  # the plain head is not run where four [B, S] matrices take more


@dataclass(frozen=True)
class Case:
    """One step of the head on one rank."""

    name: str
    B: int  # samples of the global micro-batch
    C: int  # classes of the rank
    D: int
    sample_rate: float = 1.0
    centers: str = "learned"
    with_step: bool = False  # AdamW as well
    ranks: int = 1  # how many share the samples' classes evenly: this one owns the classes of B / ranks samples
    chunk_rows: int | None = None  # the head's own choice

    @property
    def S(self) -> int:
        """Scored classes."""
        return int(self.sample_rate * self.C)

    @property
    def num_products(self) -> int:
        return 5 if self.centers == "pco" else 3

    @property
    def flop(self) -> float:
        return 2.0 * self.num_products * self.B * self.S * self.D

    @property
    def four_matrices(self) -> float:
        """MiB of four float32 [B, S]."""
        return 4 * 4 * self.B * self.S / MIB


REAL_TIMED = [
    Case("early, all classes", 2048, 16093, 512),
    Case("early, sampled, with AdamW", 2048, 32186, 512, sample_rate=0.3, with_step=True),
    Case("stable (pco)", 2048, 16093, 512, centers="pco"),
]
REAL_MEMORY = [
    Case("early, all classes", 2048, 16093, 512),
    Case("early, all classes", 8192, 8047, 512),
    Case("early, 64 ranks of 384", 24576, 32186, 512, sample_rate=0.3, with_step=True, ranks=64),
    Case("stable (pco), 64 ranks of 384", 24576, 32186, 512, centers="pco", with_step=True, ranks=64),
]
REAL_CHUNKS = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (256, 512, 1024, 2048)}
REAL_CLASSES = 2_059_906


def tiny(case: Case) -> Case:
    return replace(case, B=64, C=case.C // 100, D=32, chunk_rows=16)


@dataclass
class Row:
    """One line of the table. Times are medians."""

    what: str
    case: Case
    floor_ms: float | None = None
    head_ms: float | None = None
    plain_ms: float | None = None
    head_mib: float | None = None
    plain_mib: float | None = None

    def cells(self) -> dict[str, object]:
        case, ms, mib = self.case, "{:.1f}".format, "{:.0f}".format
        ratio = self.head_ms / self.floor_ms if self.head_ms and self.floor_ms else None
        share = self.head_mib / case.four_matrices if self.head_mib is not None else None
        columns = {
            "what": self.what,
            "case": case.name,
            "B": case.B,
            "C": case.C,
            "S": case.S,
            "D": case.D,
            "chunk": case.chunk_rows or "default",
            "floor ms": self.floor_ms and ms(self.floor_ms),
            "head ms": self.head_ms and ms(self.head_ms),
            "head / floor": ratio and f"{ratio:.3f}",
            "GFLOP/s": self.head_ms and f"{case.flop / self.head_ms / 1e6:.0f}",
            "plain ms": self.plain_ms and ms(self.plain_ms),
            "head MiB": self.head_mib is not None and mib(self.head_mib),
            "of 4 [B, S]": share is not None and f"{share:.3f}",
            "plain MiB": self.plain_mib is not None and mib(self.plain_mib),
        }
        return {name: "" if value is None or value is False else value for name, value in columns.items()}


class Problem:
    """One case on a device: the head with expectations, a batch, and what each contender does in a step."""

    def __init__(self, case: Case, device: str):
        self.case = case
        generator = torch.Generator().manual_seed(0)
        margin = (1.0, 0.0, MARGIN)
        self.head = PartialFC(case.D, case.C, case.sample_rate, margin, SCALE, chunk_rows=case.chunk_rows, device=device)
        if case.centers == "pco":
            self.head.expectation.copy_(F.normalize(torch.randn(case.C, case.D, generator=generator)))
            self.head.expectation_seen.fill_(True)
        self.head.set_stage(case.sample_rate, case.centers, update_expectation=case.centers == "pco")
        self.embeddings = torch.randn(case.B, case.D, generator=generator).to(device).requires_grad_()
        # One process owns all classes here. Few distinct ones stand for those of the samples that a rank of many would own.
        present = torch.randint(0, case.C, (-(-case.B // case.ranks),), generator=generator)
        self.labels = present.repeat(case.ranks)[: case.B].to(device)

    def run_head(self) -> Tensor:
        self.embeddings.grad = None
        self.head.prepare(self.labels)
        loss = self.head(self.embeddings, self.labels)
        loss.backward()
        if self.case.with_step:
            self.head.step(LR, WEIGHT_DECAY)
        else:
            self.head.discard()
        return loss.detach()

    def plain(self) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """A step of the plain head on the classes that the head's first call scores: (loss, dL/dw of those rows, dL/dembeddings)."""
        case, choice = self.case, self.head._choose(self.labels)
        rows = torch.arange(case.C, device=self.labels.device) if choice.rows is None else choice.rows
        columns = torch.searchsorted(rows, self.labels)
        optimizer = RowSparseAdamW(self.head.weight.clone()) if case.with_step else None

        def cross_entropies(embeddings: Tensor, centers: Tensor) -> Tensor:
            cosine = F.normalize(embeddings) @ F.normalize(centers).T
            sample = torch.arange(case.B, device=cosine.device)
            cosine[sample, columns] -= MARGIN
            return SCALE * cosine

        def step() -> tuple[Tensor, Tensor, Tensor]:
            embeddings = self.embeddings.detach().requires_grad_()
            centers = self.head.weight[rows].requires_grad_()
            logits = cross_entropies(embeddings, centers)
            if case.centers == "pco":
                loss = _joint_loss(logits, cross_entropies(embeddings, self.head.expectation[rows]), columns)
            else:
                loss = F.cross_entropy(logits, columns)
            loss.backward()
            if optimizer:
                optimizer.step(rows, centers.grad, lr=LR, weight_decay=WEIGHT_DECAY)
            return loss.detach(), centers.grad, embeddings.grad

        return step

    def floor(self) -> Callable[[], None]:
        """The bare products; x, w and every output were made before."""
        case, device = self.case, self.labels.device
        x, w = torch.randn(case.B, case.D, device=device), torch.randn(case.S, case.D, device=device)
        logits, dx, dw = torch.empty(case.B, case.S, device=device), torch.empty_like(x), torch.empty_like(w)

        def products() -> None:
            torch.mm(x, w.T, out=logits)
            torch.mm(logits, w, out=dx)
            torch.mm(logits.T, x, out=dw)
            if case.centers == "pco":
                torch.mm(x, w.T, out=logits)
                torch.mm(logits, w, out=dx)

        return products


def _joint_loss(logits: Tensor, expectation_logits: Tensor, columns: Tensor) -> Tensor:
    """Mean of log(1 + A + B), the loss of the stable stage, from full matrices."""
    terms = []
    for matrix in (logits, expectation_logits):
        target = matrix.gather(1, columns.unsqueeze(1))
        negatives = matrix.scatter(1, columns.unsqueeze(1), -torch.inf)
        terms.append(negatives.logsumexp(1, keepdim=True) - target)
    return torch.cat([torch.zeros_like(terms[0]), *terms], 1).logsumexp(1).mean()


def check_equality(device: str) -> list[str]:
    """Both heads on small cases; what differs by more than rounding allows, as messages."""
    # float32 products; bfloat16 operands on a GPU cost 0.3 % (and the plain head multiplies in float32)
    allowed = 5e-3 if device == "cuda" else 1e-5
    failures = []
    for case in (tiny(case) for case in REAL_TIMED):
        problem = Problem(replace(case, with_step=False), device)
        loss, centers_grad, embeddings_grad = problem.plain()()
        own_loss = problem.head(problem.embeddings, problem.labels)
        own_loss.backward()
        pairs = {
            "loss": (own_loss.detach(), loss),
            "gradient of the centers": (problem.head.pending_gradient()[1], centers_grad),
            "gradient of the embeddings": (problem.embeddings.grad, embeddings_grad),
        }
        for name, (own, other) in pairs.items():
            error = float((own.double() - other.double()).norm() / other.double().norm())
            print(f"equality  {case.name:28} {name:28} relative error {error:.1e}")
            if not error <= allowed:
                failures.append(f"{case.name}: {name} differs from the plain head by {error:.1e}, more than {allowed:.0e}")
    return failures


def time_case(case: Case, repeats: int, device: str, plain: bool = True) -> Row:
    problem = Problem(case, device)
    contenders = {"floor": problem.floor(), "head": problem.run_head, **({"plain": problem.plain()} if plain else {})}
    found = medians(contenders, repeats, device)
    return Row("time", case, found["floor"], found["head"], found.get("plain"))


def peak_extra(case: Case, which: str, device: str) -> float:
    """MiB above what was there before that one step of the ``head`` or the ``plain`` head takes at its peak, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_extra_here, (case, which, device))


def _peak_extra_here(case: Case, which: str, device: str) -> float:
    def make_step(case: Case) -> Callable[[], object]:
        problem = Problem(case, device)
        return problem.run_head if which == "head" else problem.plain()

    make_step(tiny(case))()  # brings code into memory, which is no part of a step
    step = make_step(case)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """KiB of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def time_sampling(num_classes: int, repeats: int, device: str) -> None:
    """The choice of the sampled classes against the field's ``rand``, ``topk``, ``sort``."""
    labels = torch.randint(0, num_classes, (min(24576, num_classes),)).to(device)
    shard, count = ClassShard(num_classes, 0, 1), int(0.3 * num_classes)

    def field() -> Tensor:
        keys = torch.rand(num_classes, device=device)
        keys[labels] = 2.0
        return keys.topk(count).indices.sort().values

    found = medians({"field": field, "ours": lambda: sample_centers(shard, labels, 0.3, 0, 0)}, repeats, device)
    times = f"rand + topk + sort {found['field']:.1f} ms  ours {found['ours']:.1f} ms  ratio {found['ours'] / found['field']:.3f}"
    print(f"sampling  {num_classes} classes, rate 0.3  {times}")


def print_rows(rows: list[Row]) -> None:
    table = [row.cells() for row in rows]
    header = list(table[0])
    widths = {name: max(len(name), *(len(str(line[name])) for line in table)) for name in header}
    print("  ".join(name.ljust(widths[name]) for name in header))
    for line in table:
        print("  ".join(str(line[name]).ljust(widths[name]) for name in header))


def write_csv(path: Path, rows: list[Row], machine: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["machine", *rows[0].cells()])
        writer.writeheader()
        writer.writerows({"machine": machine, **row.cells()} for row in rows)


def draw(path: Path, rows: list[Row], machine: str) -> None:
    """Left: milliseconds of the contenders; middle: memory; right: the sweep over chunk sizes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    timed = [row for row in rows if row.what == "time"]
    for offset, (name, color) in enumerate({"floor": "0.7", "head": "tab:blue", "plain": "tab:orange"}.items()):
        values = [getattr(row, f"{name}_ms") or 0.0 for row in timed]
        left.bar([place + 0.27 * offset for place in range(len(timed))], values, 0.25, label=name, color=color)
    left.set_xticks([place + 0.27 for place in range(len(timed))], [row.case.name.replace(", ", "\n") for row in timed], fontsize=8)
    left.set_ylabel("ms a step")
    left.set_title("Time: bare products, this head, a plain head")
    left.legend()

    memory = [row for row in rows if row.what == "memory"]
    for offset, (name, color) in enumerate({"four": "0.7", "head": "tab:blue", "plain": "tab:orange"}.items()):
        values = [row.case.four_matrices if name == "four" else getattr(row, f"{name}_mib") or 0.0 for row in memory]
        label = "four float32 [B, S]" if name == "four" else name
        middle.bar([place + 0.27 * offset for place in range(len(memory))], values, 0.25, label=label, color=color)
    middle.set_xticks([place + 0.27 for place in range(len(memory))], [f"B={row.case.B}\nS={row.case.S}" for row in memory], fontsize=8)
    middle.set_yscale("log")
    middle.set_ylabel("MiB above what was there")
    middle.set_title("Peak memory of a step (the plain head is not run beyond 6 GB)")
    middle.legend()

    sweep = [row for row in rows if row.what == "chunks"]
    right.plot([row.case.chunk_rows for row in sweep], [row.head_ms / row.floor_ms for row in sweep], "o-", color="tab:blue")
    right.axhline(1.0, color="0.7")
    right.set_ylim(0.8, 1.2)
    right.set_xscale("log", base=2)
    right.set_xlabel("samples a chunk")
    right.set_ylabel("time / bare products", color="tab:blue")
    memory_axis = right.twinx()
    memory_axis.plot([row.case.chunk_rows for row in sweep], [row.head_mib for row in sweep], "s--", color="tab:green")
    memory_axis.set_ylabel("peak MiB", color="tab:green")
    right.set_title(f"Chunk size, B={sweep[0].case.B} S={sweep[0].case.S}")
    figure.suptitle(f"Partial-FC head, D={sweep[0].case.D}, {machine}", fontsize=10)
    figure.savefig(path, dpi=110)


def machine_name(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16 operands, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}), one thread, float32, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_head", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", choices=("real", "tiny"), default="real", help="tiny: small and few cases, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each contender; the median counts")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench_head.csv and bench_head.png")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    torch.set_num_threads(1)
    machine = machine_name(device)
    print(f"bench_head  {machine}  median of {repeats}")

    failures = check_equality(device)
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        return 1

    size = tiny if arguments.sizes == "tiny" else (lambda case: case)
    rows = [time_case(size(case), repeats, device) for case in REAL_TIMED]
    print_rows(rows)
    for case in map(size, REAL_MEMORY if arguments.sizes == "real" else REAL_MEMORY[:1]):
        row = Row("memory", case, head_mib=peak_extra(case, "head", device))
        if case.four_matrices < PLAIN_LIMIT_MIB:
            row.plain_mib = peak_extra(case, "plain", device)
        rows.append(row)
    print_rows(rows[len(REAL_TIMED) :])
    sweep = []
    for chunk_rows in REAL_CHUNKS[device] if arguments.sizes == "real" else (16,):
        case = replace(size(REAL_TIMED[0]), chunk_rows=chunk_rows)
        row = replace(time_case(case, repeats, device, plain=False), what="chunks")
        row.head_mib = peak_extra(case, "head", device)
        sweep.append(row)
    print_rows(sweep)
    time_sampling(REAL_CLASSES if arguments.sizes == "real" else 20_000, repeats, device)

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "bench_head.csv", rows + sweep, machine)
    draw(arguments.out / "bench_head.png", rows + sweep, machine)
    print(f"wrote {arguments.out}/bench_head.csv and bench_head.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
