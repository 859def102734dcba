"""The benchmarks run, at sizes too small to say anything about speed; one that finds its contenders unequal fails."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

from tests.bench import (
    ablation,
    bench_attention,
    bench_embed,
    bench_head,
    bench_ijb,
    bench_index,
    bench_loader,
    bench_losses,
    bench_mfr,
    bench_pack,
    bench_verify,
)


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


def test_bench_losses_names_every_loss_and_its_ratio(monkeypatch, capsys):
    assert run(monkeypatch, bench_losses, "--device", "cpu", "--repeats", "1", "--batch", "8", "--classes", "40", "--size", "8") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:32].strip() for line in lines] == list(bench_losses.LOSSES)
    assert lines[0].endswith("1.000 x learned")


def test_bench_loader_compares_every_backend_with_pillow_before_it_times(monkeypatch, packed_people, capsys):
    arguments = ("--data", str(packed_people), "--batch", "4", "--batches", "1", "--repeats", "1")
    if not torch.cuda.is_available():
        assert run(monkeypatch, bench_loader, *arguments) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["29", "bare", "table", "reader", "pillow"]
    monkeypatch.setattr(bench_loader, "TOLERANCE", -1.0)
    assert run(monkeypatch, bench_loader, *arguments) == 1
    assert "differs from Pillow's by" in capsys.readouterr().err


def test_bench_index_opens_a_set_in_every_process(monkeypatch, capsys):
    monkeypatch.setattr(bench_index, "RANKS", 2)
    assert run(monkeypatch, bench_index, "--images", "50000", "--identities", "500", "--shards", "4", "--batches", "2") == 0
    assert "50,000 records, 500 identities; 2 processes" in capsys.readouterr().out


def test_bench_ijb_goes_through_every_part_and_compares(monkeypatch, capsys):
    sizes = ("--images", "300", "--templates", "80", "--genuine", "50", "--pairs", "2000", "--subjects", "20", "--embedding-size", "8")
    assert run(monkeypatch, bench_ijb, *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "300 images in 80 templates, 2,000 pairs, D = 8"
    assert sum(" s   peak " in line for line in lines) == 11
    monkeypatch.setattr(bench_ijb, "TOLERANCE", -1.0)
    assert run(monkeypatch, bench_ijb, *sizes) == 1
    assert "2000 scores differ by " in capsys.readouterr().err


def test_bench_mfr_compares_with_bare_products_and_another_method(monkeypatch, capsys):
    sizes = ("--images", "900", "--persons", "90", "--embedding-size", "32", "--far", "1e-3")
    assert run(monkeypatch, bench_mfr, *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu, ")
    assert lines[1].startswith("404,550 pairs   estimated ")
    assert lines[-1] == "equal up to rounding"
    wrong = bench_mfr.by_sorting(*bench_mfr.clustered_vectors(900, 90, 32), 1e-2, -1.0)
    monkeypatch.setattr(bench_mfr, "by_sorting", lambda *args: wrong)
    assert run(monkeypatch, bench_mfr, *sizes) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_bench_verify_checks_before_it_times(monkeypatch, capsys):
    monkeypatch.setattr(bench_verify, "DISTINCT", 20)
    monkeypatch.setattr(bench_verify, "CHANGED", 20)
    assert run(monkeypatch, bench_verify, "--images", "50", "--repeats", "1") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["verify", "images/s", "images/s", "one"]
    packed_set = bench_verify.packed_set

    def damaged_set(*arguments):
        path = packed_set(*arguments)
        shard = path / "shard_00000.rec"
        shard.write_bytes(shard.read_bytes()[:-9] + bytes(9))
        return path

    monkeypatch.setattr(bench_verify, "packed_set", damaged_set)
    assert run(monkeypatch, bench_verify, "--images", "50", "--repeats", "1") == 1
    assert "verify found 2 problems in 50 images, expected none in 50" in capsys.readouterr().err


def test_bench_pack_compares_before_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(bench_pack, "SHARDS", 2)
    arguments = ("--records", "30", "--files", "30", "--workers", "1")
    assert run(monkeypatch, bench_pack, *arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["records", "3", "1"], ["records", "30", "1"], ["files", "3", "1"], ["files", "30", "1"]]
    assert all(float(row[-2]) > 10 for row in rows)  # MiB of the parent
    stored = bench_pack.stored
    monkeypatch.setattr(bench_pack, "stored", lambda out: list(stored(out))[1:])
    assert run(monkeypatch, bench_pack, *arguments) == 1
    assert "records_3: the packed set holds other images" in capsys.readouterr().err


def test_the_ablation_tells_mean_and_spread_over_seeds():
    outcomes = [ablation.Outcome("epl", seed, accuracy, 0.02, 600.0, "abc") for seed, accuracy in enumerate((0.86, 0.88, 0.9))]
    rows = ablation.table([*outcomes, ablation.Outcome("plain", 0, 0.8, 0.02, 720.0, "abc")]).splitlines()[2:]
    assert rows == [
        "| no stages: all class centers, 16 epochs | 80.00 % | one seed | 80.00 to 80.00 | 12.0 min |",
        "| early 12 epochs, then epl 4 | 88.00 % | 2.00 | 86.00 to 90.00 | 10.0 min |",
    ]


def test_an_ablation_branches_off_from_the_checkpoint_at_the_switch(tmp_path):
    for step, index, start in ((200, 0, 0), (300, 1, 300), (400, 1, 300)):
        folder = tmp_path / f"trunk/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"step": step, "run": {"stages": {"index": index, "start": start}}}))
    ablation.branch_off(tmp_path / "trunk", tmp_path / "branch/checkpoints")
    assert [path.name for path in (tmp_path / "branch/checkpoints").iterdir()] == ["step_00000300"]
    with pytest.raises(SystemExit, match="no checkpoint of the stage switch"):
        ablation.branch_off(tmp_path / "branch", tmp_path / "other/checkpoints")


def test_bench_embed_compares_the_engine_with_the_bare_model(monkeypatch, capsys):
    assert run(monkeypatch, bench_embed, "--model", "vit_xxt", "--images", "9", "--batch-size", "4", "--repeats", "1") == 0
    out = capsys.readouterr().out
    assert "pillow" in out
    assert "dali" in out


def test_bench_embed_fails_where_embeddings_differ(monkeypatch, capsys):
    monkeypatch.setattr(bench_embed, "embed", lambda *args, **options: np.zeros((9, 2, 512), np.float32))
    assert run(monkeypatch, bench_embed, "--model", "vit_xxt", "--images", "9") == 1
    assert "embeddings with pillow differ from the bare model's by 1.0e+00" in capsys.readouterr().err
