"""The benchmarks run, at sizes too small to say anything about speed; one that finds its contenders unequal fails."""

import csv
import sys

import pytest
import torch

from tests.bench import bench_attention, bench_head


@pytest.fixture(autouse=True)
def threads():
    """The benchmarks set one thread for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    return module.main()


def test_bench_head_writes_a_table_and_a_picture(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the picture of bench_head was not drawn")
    assert run(monkeypatch, bench_head, "--device", "cpu", "--sizes", "tiny", "--repeats", "1", "--out", str(tmp_path)) == 0
    rows = list(csv.DictReader((tmp_path / "bench_head.csv").open()))
    assert [row["what"] for row in rows] == ["time", "time", "time", "memory", "chunks"]
    assert all(float(row["head / floor"]) > 0 for row in rows if row["what"] == "time")
    assert all(float(row["of 4 [B, S]"]) > 0 for row in rows if row["what"] == "memory")
    assert (tmp_path / "bench_head.png").read_bytes().startswith(b"\x89PNG")


def test_bench_head_fails_where_the_heads_differ(monkeypatch, tmp_path, capsys):
    plain = bench_head.Problem.plain
    monkeypatch.setattr(bench_head.Problem, "plain", lambda problem: lambda: [1.001 * result for result in plain(problem)()])
    assert run(monkeypatch, bench_head, "--device", "cpu", "--sizes", "tiny", "--out", str(tmp_path)) == 1
    assert "early, all classes: loss differs from the plain head by 1.0e-03" in capsys.readouterr().err


def test_bench_attention_compares_before_it_times(monkeypatch, capsys):
    assert run(monkeypatch, bench_attention, "--device", "cpu", "--repeats", "1", "--batch", "2") == 0
    assert "equal" in capsys.readouterr().out
