"""The paper's table: its own figures, and results in the columns where they belong, with what they are not comparable in."""

import json

import pytest

from eval.__main__ import main
from tests.unit.test_results import ijb_result, mfr_result, pairs_result


@pytest.fixture
def table(tmp_path, capsys):
    """A function that writes results and returns exit code, cells of the table's rows by their first two, the other lines, and errors."""

    def table(*options, **results):
        for name, result in results.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        code = main(["table", *(str(tmp_path / f"{name}.json") for name in results), "--markdown", *options])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return code, {tuple(row[:2]): row[2:] for row in rows}, [line for line in lines if not line.startswith("|")], captured.err

    return table


def test_without_results_the_table_is_the_published_one(table, capsys):
    code, rows, notes, _ = table()
    assert code == 0
    columns = ["MFR Mask", "MFR Children", "MFR African", "MFR Caucasian", "MFR South Asian", "MFR East Asian", "MFR MR-All"]
    assert rows["model", "IJB reading"] == [*columns, "IJB-C @1e-05", "IJB-C @1e-04"]
    assert rows["LVFace-L", "nearest"] == ["93.56", "94.31", "98.79", "99.26", "99.26", "91.02", "98.49", "97.25", "98.06"]
    ablation = [row[6] for name, row in rows.items() if name[0].startswith("stages: ")]
    assert ablation == ["97.27", "97.52", "98.22", "98.49"]
    assert "LVFace, arXiv:2501.13420, trained on WebFace42M; its ablation of the stages" in notes[1]
    assert main(["table"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["LVFace-L", "nearest", "93.56"]


def test_results_of_one_model_share_its_rows_and_say_how_they_were_read(table):
    other = ijb_result(model="b.onnx", model_sha256="b" * 64)
    _, rows, notes, _ = table(i=ijb_result(), m=mfr_result(model="moved/c.onnx"), other=other)
    assert rows["a.onnx", "nearest"] == ["80.00*", "-", "-", "-", "-", "-", "70.00*", "97.25", "98.06"]
    assert rows["a.onnx", "strict"] == ["80.00*", "-", "-", "-", "-", "-", "70.00*", "96.25", "97.06"]
    assert rows["b.onnx", "strict"] == ["-"] * 7 + ["96.25", "97.06"]
    assert ("c.onnx", "-") not in rows
    assert any(note.startswith("* on local sets, which are not those of the MFR-Ongoing server") for note in notes)


def test_a_far_that_was_not_resolved_or_is_another_one_is_not_passed_off_as_the_papers(table):
    points = {"strict": [{"far": 1e-4, "tar": 0.9}], "nearest": [{"far": 1e-4, "tar": 0.91}]}
    sets = {"mask": {**mfr_result()["sets"]["mask"], "far_target": 1e-3}}
    _, rows, notes, _ = table(i=ijb_result(modes={"N1D1F1": points}, unresolved_far=[1e-5]), m=mfr_result(sets=sets))
    assert rows["a.onnx", "nearest"] == ["80.00* !1e-03", *["-"] * 7, "91.00"]
    assert any("! at another FAR" in note for note in notes)


def test_what_has_no_column_is_named(table):
    results = {"p": pairs_result(), "b": ijb_result(target="IJBB"), "n": ijb_result(modes={"N0D1F1": ijb_result()["modes"]["N0D0F0"]})}
    _, rows, notes, _ = table(**results)
    assert len(rows) == 7  # head, rule, the published five
    assert [note.split("/")[-1].split(",")[0] for note in notes if note.startswith("Not in the table")] == ["p.json", "b.json", "n.json"]


def test_two_results_for_the_same_cells_are_refused(table):
    code, _, _, error = table(i=ijb_result(), j=ijb_result())
    assert code == 2
    assert "j.json: both give IJB-C of a.onnx; give one of them" in error
    assert error.count("\n") == 1


def test_results_of_1_1_and_of_1_n_of_one_model_go_together(table):
    search = {"mean_ranks": {1: 0.9}, "mean_tpir": {0.1: 0.8}}
    only_search = ijb_result(modes={"N1D1F1": {"search": search}}, genuine=0, impostor=0, unresolved_far=[])
    _, rows, notes, _ = table(i=ijb_result(), s=only_search)
    assert rows["a.onnx", "nearest"][-2:] == ["97.25", "98.06"]
    assert any(note.startswith("Not in the table: ") and "s.json" in note for note in notes)


def test_a_bar_in_a_label_is_no_column(tmp_path, capsys):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(mfr_result(model="a|b.onnx")))
    assert main(["table", "--markdown", str(path)]) == 0
    assert r"| a\|b.onnx " in capsys.readouterr().out
    assert main(["table", str(path)]) == 0
    assert "a|b.onnx " in capsys.readouterr().out
