"""exp(logits) of the negatives and its row sums: the twin against float64, the Triton kernel in Triton's interpreter against both.

The interpreter runs the kernel on numpy in a process of its own, because TRITON_INTERPRET is read when Triton is imported. What it does not
look at (types, layouts, whether the code compiles) a test compiles for two GPUs, without having one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels.exp_logits import exp_logits, exp_logits_torch, exp_logits_triton

ROOT = Path(__file__).resolve().parents[2]
SCALE = 64.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    n: int
    S: int
    D: int
    dtype: str

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


# (n, S, D). The interpreter gets blocks of 16 rows, columns and inner elements: 37, 70 and 24, 40 leave remainders, and the 17 row
# blocks of 260 rows are more than one group.
SHAPES = [
    (37, 70, 40),
    (6, 37, 24),
    (16, 16, 24),
    (260, 18, 24),
    (1, 5, 40),
    (7, 1, 24),
    (1, 1, 40),
    (5, 0, 24),
]
CASES = [Case(*shape, dtype) for shape in SHAPES for dtype in DTYPES]
CASES_BF16 = [case for case in CASES if case.dtype == "bf16"]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_bf16_case = pytest.mark.parametrize("case", CASES_BF16, ids=str)


def operands(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, centers, columns with the first and the last column, -1, and one column twice; the last sample lies on a negative center."""
    generator = torch.Generator().manual_seed(case.n + case.S)
    x, centers = (torch.nn.functional.normalize(torch.randn(rows, case.D, generator=generator)) for rows in (case.n, case.S))
    columns = torch.randint(-1, max(case.S, 1), (case.n,), generator=generator)
    edges = torch.tensor([0, case.S - 1, -1, case.S // 2, case.S // 2])[: case.n]
    columns[: len(edges)] = edges
    if case.S == 0:
        columns.fill_(-1)
    elif case.S > 1:
        x[-1] = centers[(columns[-1] + 1) % case.S]
    return (x * SCALE).to(DTYPES[case.dtype]), centers.to(DTYPES[case.dtype]), columns


def reference(case: Case) -> torch.Tensor:
    """[n, S] float64 exp(logits), 0 in each row's own column."""
    x, centers, columns = operands(case)
    exps = torch.exp(x.double() @ centers.double().T)
    for row, column in enumerate(columns.tolist()):
        if column >= 0:
            exps[row, column] = 0.0
    return exps


def result(implementation, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """[n + 2, S + 3] buffer, NaN before the call, of which ``out`` is the middle, and the [n] sums."""
    buffer = torch.full((case.n + 2, case.S + 3), torch.nan, dtype=DTYPES[case.dtype])
    return buffer, implementation(*operands(case), middle(buffer))


def middle(buffer: torch.Tensor) -> torch.Tensor:
    return buffer[1:-1, 1:-2]


def float32_error(case: Case) -> float:
    """Relative error of exp that float32 allows.

    An error of the logit is a relative error of its exp. A product of D terms errs by at most D 2^-24 |x| |w|, and |x| |w| < 65 (the
    scale, and norms rounded to bfloat16). exp itself and scaling by log2(e) on the way round numbers below 2 * 65 once each.
    """
    return (case.D + 4) * 65 * 2.0**-24


def check(case: Case, buffer: torch.Tensor, sums: torch.Tensor, rounding: float) -> None:
    """``rounding``: relative error of a conversion to bfloat16."""
    expected, out = reference(case), middle(buffer)
    columns = operands(case)[2]
    tiny = 2.0**-126  # smaller values may be flushed to zero
    out_error = float32_error(case) + (rounding if case.dtype == "bf16" else 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=out_error, atol=tiny)
    assert (out[columns >= 0, columns[columns >= 0]] == 0.0).all(), "the own column must be exactly 0"
    assert sums.dtype == torch.float32
    # S additions of positive numbers; far below the 2^-8 of sums over rounded values
    torch.testing.assert_close(sums.double(), expected.sum(1), rtol=float32_error(case) + case.S * 2.0**-24, atol=tiny)
    outside = buffer.clone()
    middle(outside).fill_(torch.nan)
    assert outside.isnan().all(), "wrote beside out"


@each_case
def test_twin_matches_float64(case):
    check(case, *result(exp_logits_torch, case), rounding=2.0**-8)


@each_bf16_case
def test_triton_matches_float64_and_the_twin(case, interpreted):
    buffer, sums = interpreted[str(case)]
    check(case, buffer, sums, rounding=2.0**-7)  # the interpreter truncates where a GPU rounds to nearest
    twin_buffer, twin_sums = result(exp_logits_torch, case)
    torch.testing.assert_close(sums, twin_sums, rtol=2 * float32_error(case) + case.S * 2.0**-23, atol=2.0**-126)
    torch.testing.assert_close(middle(buffer), middle(twin_buffer), rtol=2 * float32_error(case) + 2.0**-7, atol=2.0**-126)


@pytest.mark.parametrize("implementation", ["twin", "triton"])
def test_sums_are_of_the_values_before_rounding(implementation, request):
    case = Case(37, 70, 40, "bf16")
    buffer, sums = result(exp_logits_torch, case) if implementation == "twin" else request.getfixturevalue("interpreted")[str(case)]
    expected = reference(case).sum(1)
    error, error_if_rounded = (((s - expected) / expected).abs().max() for s in (sums.double(), middle(buffer).double().sum(1)))
    assert error < 1e-5 < 1e-3 < error_if_rounded


def test_float32_twin_needs_no_second_matrix_and_no_look_at_values():
    """A look at values (nonzero, indexing by a mask, item) would wait for the GPU."""
    x, centers, columns = operands(Case(6, 37, 24, "fp32"))
    out = torch.empty(6, 37)
    with _Operations() as operations:
        exp_logits_torch(x, centers, columns, out)
    elsewhere = [name for name, made in operations.seen if made.shape == out.shape and made.untyped_storage().data_ptr() != out.data_ptr()]
    assert elsewhere == []
    names = {name for name, _ in operations.seen}
    assert "mm" in names
    assert names.isdisjoint({"nonzero", "index", "index_put_", "masked_select", "_local_scalar_dense"})


class _Operations(TorchDispatchMode):
    """Records (name, result) of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, made))
        return made


def test_cpu_tensors_take_the_twin_and_need_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    spec = importlib.util.find_spec("model.kernels.exp_logits")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    for case in CASES[:2]:
        chosen, twin = result(fresh.exp_logits, case), result(exp_logits_torch, case)
        assert all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(chosen, twin, strict=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"out": torch.empty(6, 36)}, r"must be \[n, D\], \[S, D\], \[n\], \[n, S\], got \(6, 24\), \(37, 24\), \(6,\), \(6, 36\)"),
        ({"columns": torch.zeros(5, dtype=torch.int64)}, r"\(5,\)"),
        ({"out": torch.empty(6, 37, dtype=torch.bfloat16)}, "must share bfloat16 or float32"),
        ({"x": torch.empty(6, 24, dtype=torch.float64)}, "must share bfloat16 or float32"),
        ({"columns": torch.zeros(6, dtype=torch.int32)}, "columns be int64"),
    ],
)
@pytest.mark.parametrize("implementation", [exp_logits, exp_logits_torch, exp_logits_triton])
def test_operands_that_do_not_fit_are_refused(implementation, change, expected):
    x, centers, columns = operands(Case(6, 37, 24, "fp32"))
    arguments = {"x": x, "centers": centers, "columns": columns, "out": torch.empty(6, 37)}
    with pytest.raises(ValueError, match=expected):
        implementation(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"centers": torch.empty(24, 37).bfloat16().T}, r"elements of a row of centers must be adjacent, got strides \(1, 37\)"),
        ({name: torch.empty(shape) for name, shape in (("x", (6, 24)), ("centers", (37, 24)), ("out", (6, 37)))}, "multiplies bfloat16"),
    ],
)
def test_operands_that_the_kernel_cannot_take_are_refused(change, expected):
    x, centers, columns = operands(Case(6, 37, 24, "bf16"))
    arguments = {"x": x, "centers": centers, "columns": columns, "out": torch.empty(6, 37, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=expected):
        exp_logits_triton(**(arguments | change))


def test_twin_writes_into_a_transposed_buffer():
    case = Case(6, 37, 24, "fp32")
    x, centers, columns = operands(case)
    transposed, plain = torch.empty(37, 6).T, torch.empty(6, 37)
    sums = [exp_logits_torch(x, centers, columns, out) for out in (transposed, plain)]
    torch.testing.assert_close(transposed, plain, rtol=2 * float32_error(case), atol=2.0**-126)
    torch.testing.assert_close(*sums, rtol=2 * float32_error(case), atol=0.0)


def test_kernel_compiles_for_gpus_and_uses_their_tensor_cores(tmp_path):
    """On sm80 (A100) and sm90 (H100) the product must run on tensor cores."""
    _needs_triton()
    _run_here("compile_for_gpus", tmp_path / "ptx.json", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    instructions = json.loads((tmp_path / "ptx.json").read_text())
    assert instructions == {"sm80": ["mma.sync"], "sm90": ["wgmma.mma_async"]}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``result`` of the Triton kernel for every bfloat16 case."""
    _needs_triton()
    path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    _run_here("interpret_cases", path, TRITON_INTERPRET="1")
    return torch.load(path, weights_only=True)


def _needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: its exp_logits kernel was neither run nor compiled")


def _run_here(function: str, path: Path, **environment: str) -> None:
    """Call a function of this file in a new process whose environment is this one plus ``environment``."""
    code = f"import sys; from pathlib import Path; from tests.unit.test_exp_logits import {function}; {function}(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(path)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


def interpret_cases(path: Path) -> None:
    torch.save({str(case): result(exp_logits_triton, case) for case in CASES_BF16}, path)


def compile_for_gpus(path: Path) -> None:
    """Write which multiply-add instructions the kernel has on each GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.kernels import _exp_logits_triton as module

    kernel = module._exp_logits_kernel
    constants = {"UPCAST": False, "GROUP_M": module._GROUP_M}
    constants |= {"BLOCK_M": module._BLOCK_M, "BLOCK_N": module._BLOCK_N, "BLOCK_K": module._BLOCK_K}
    pointers = {"x": "bf16", "centers": "bf16", "columns": "i64", "out": "bf16", "partial_sums": "fp32"}
    types = dict.fromkeys(kernel.arg_names, "i32") | {name: f"*{pointed}" for name, pointed in pointers.items()}
    types |= dict.fromkeys(constants, "constexpr")
    # what Triton learns from a call with whole vectors: addresses and row lengths are multiples of 16
    aligned = [*pointers, "D", "S", "x_stride", "centers_stride", "out_stride"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    found = {}
    for capability in (80, 90):
        source = ASTSource(kernel, types, constants, attributes)
        options = {"num_warps": module._NUM_WARPS, "num_stages": module._NUM_STAGES}
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        found[f"sm{capability}"] = [name for name in ("wgmma.mma_async", "mma.sync", "fma.rn.f32") if name in ptx]
    path.write_text(json.dumps(found))
