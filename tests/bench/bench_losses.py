"""What each loss of the head costs beside the plain margin softmax on class centers: one step, forward and backward, in one run.

    python -m tests.bench.bench_losses

All take turns in one process, CPU time of one thread (on a GPU, events). tests/distributed/test_losses.py holds them against float64.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F

from model.norm_margin import AdaFace, MagFace
from model.partial_fc import PartialFC
from tests.bench.timing import medians

BASELINE = "learned"
LOSSES = {
    BASELINE: {},
    "vpl": {"centers": "vpl"},
    "replace": {"centers": "replace"},
    "pco_shared": {"centers": "pco_shared"},
    "pco (five products, not three)": {"centers": "pco"},
    "epl (five products, not three)": {"centers": "epl"},
    "AdaFace": {"margin": AdaFace()},
    "MagFace": {"margin": MagFace()},
    "CurricularFace": {"curricular": True},
    "inter-class filter": {"interclass_filter": 0.4},
    "UniFace": {"loss": "uniface"},
}


def step(arguments: dict, B: int, C: int, D: int, device: str):
    """What takes one step of a head made with ``arguments``; every class has an expectation and a last embedding."""
    generator = torch.Generator().manual_seed(0)
    head = PartialFC(D, C, **{"margin": (1.0, 0.0, 0.4), **arguments}, device=device)
    rows = F.normalize(torch.randn(C, D, generator=generator)).to(device)
    state = {**head.state(), "expectation": rows, "expectation_seen": torch.ones(C, dtype=torch.bool)}
    if head.centers == "vpl":
        state |= {"last_embedding": rows, "last_embedding_step": torch.zeros(C, dtype=torch.int64)}
    head.load_state(state)
    embeddings = torch.randn(B, D, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, C, (B,), generator=generator).to(device)

    def take() -> None:
        embeddings.grad = None
        head.prepare(labels)
        head(embeddings, labels).backward()
        head.discard()

    return take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2048, help="B")
    parser.add_argument("--classes", type=int, default=16093, help="C, all scored")
    parser.add_argument("--size", type=int, default=512, help="D")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (arguments.batch, arguments.classes, arguments.size, arguments.device)
    found = medians({name: step(choice, *sizes) for name, choice in LOSSES.items()}, arguments.repeats, arguments.device)
    print(f"head's losses  {arguments.device}  B={sizes[0]} S={sizes[1]} D={sizes[2]}  median of {arguments.repeats}")
    for name, ms in found.items():
        print(f"{name:32}{ms:9.1f} ms  {ms / found[BASELINE]:6.3f} x {BASELINE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
