"""The backbone's attention against an explicit float32 softmax(q k^T / sqrt(d)) v on the same weights.

``python -m tests.bench.bench_attention``. Equality first: outputs and every gradient. Then time, forward and backward, with the two
taking turns in one process: of the whole module, whose projections are the same in both, and of what lies between the projections alone
(unbinding q, k and v, mixing, joining the heads). One thread and CPU time on a CPU, events on a GPU.

Exit code 1 if they differ; how fast they are decides nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.vit import PRESETS, Attention
from tests.bench.timing import medians

Step = Callable[[], dict[str, Tensor]]  # one forward and backward: the output, and every gradient by name

# Relative, in the norm. float32: sums of some hundred terms in another order. bfloat16: both round the same mixed values, one bit apart.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class ExplicitAttention(Attention):
    """The same module as the equation reads: q, k and v in float32, the [b, heads, n, n] weights in memory."""

    def mix(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).float().unbind(0)  # each [b, heads, n, head_dim]
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights, input and gradients")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, help="images; default: 32 of vit_t, 8 of vit_l")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    equal = True
    for name, batch in (("vit_t", 32), ("vit_l", 8)):
        equal &= compare(name, arguments.batch or batch, device, dtype, arguments.repeats)
    return 0 if equal else 1


def compare(name: str, b: int, device: torch.device, dtype: torch.dtype, repeats: int) -> bool:
    """Print how the two differ and how long they take, at the width and heads of a preset; False if they differ too much."""
    width, heads, n = PRESETS[name].width, PRESETS[name].heads, PRESETS[name].num_tokens
    torch.manual_seed(0)
    ours = Attention(width, heads).to(device, dtype)
    explicit = ExplicitAttention(width, heads).to(device, dtype)
    explicit.load_state_dict(ours.state_dict())
    x, upstream = (torch.randn(b, n, width, device=device, dtype=dtype) for _ in range(2))
    qkv = torch.randn(b, n, 3 * width, device=device, dtype=dtype)

    print(f"attention of {name}  {device}  {dtype}  b={b} n={n} width={width} heads={heads} head_dim={width // heads}  median of {repeats}")
    equal = True
    for what, modules, data in (("whole module", (ours, explicit), x), ("without projections", (ours.mix, explicit.mix), qkv)):
        steps = [step(module, data, upstream) for module in modules]
        worst, where = largest_error(*(run() for run in steps))
        equal &= worst < TOLERANCE[dtype]
        verdict = "equal" if worst < TOLERANCE[dtype] else f"DIFFERENT, more than {TOLERANCE[dtype]:.0e}"
        ours_ms, explicit_ms = medians(dict(zip(("ours", "explicit"), steps, strict=True)), repeats, device.type, warm_up=3).values()
        times = f"explicit {explicit_ms:8.2f}    ours {ours_ms:8.2f}    ratio {ours_ms / explicit_ms:.3f}"
        print(f"  forward + backward ms  {what:<20}  {times}    {verdict}: {worst:.1e} ({where})")
    return equal


def step(module: Callable[[Tensor], Tensor], data: Tensor, upstream: Tensor) -> Step:
    data = data.clone().requires_grad_()
    parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}

    def run() -> dict[str, Tensor]:
        output = module(data)
        gradients = torch.autograd.grad(output, [data, *parameters.values()], upstream)
        return {"output": output.detach(), **dict(zip(["input", *parameters], gradients, strict=True))}

    return run


def largest_error(ours: dict[str, Tensor], explicit: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error among output and gradients, and of which."""
    errors = {key: ((ours[key] - explicit[key]).float().norm() / explicit[key].float().norm()).item() for key in explicit}
    where = max(errors, key=errors.get)
    return errors[where], where


if __name__ == "__main__":
    sys.exit(main())
