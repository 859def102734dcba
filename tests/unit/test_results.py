"""Results read back: bad ones are named by file and key, models by names that differ; what is compared was measured on the same pairs."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from eval.__main__ import main
from eval.curves import score_curves
from eval.errors import EvalError
from eval.report import sections
from eval.results import read_results


def pairs_result(model="m/a.onnx", sha="a" * 64, **changes) -> dict:
    rng = np.random.default_rng(0)
    curves = asdict(score_curves(rng.normal(3, 1, 50), rng.normal(0, 1, 60)))
    bounds = {"low": 0.9, "high": 0.97}
    result = {
        "protocol": "pairs",
        "model": model,
        "model_sha256": sha,
        "source": "pairs.txt",
        "num_pairs": 110,
        "num_images": 200,
        "accuracy": {"mean": 0.95, "std": 0.01, "accuracies": [], "thresholds": []},
        "accuracy_exact": {"mean": 0.955, "std": 0.01},
        "tar_at_far": [{"far_target": 0.1, "tar": 0.94, "far": 0.1, "threshold": 1.0, "genuine": 50, "impostor": 60}],
        "unresolved_far": [0.01, 0.001],
        "intervals": {
            **{"confidence": 0.95, "replicates": 1000, "seed": 0, "identities": 30, "identities_inferred": True},
            **{"accuracy": bounds, "accuracy_exact": None, "tar_at_far": [bounds]},
        },
        "curves": curves,
    }
    return {**result, **changes}


def ijb_result(**changes) -> dict:
    points = [{"far": far, "tar": tar, "threshold": 0.3, "reached_far": far} for far, tar in ((1e-5, 0.9725), (1e-4, 0.9806))]
    lower = [{**point, "tar": point["tar"] - 0.01} for point in points]
    modes = {name: {"strict": lower, "nearest": points, "search": None} for name in ("N1D1F1", "N0D0F0")}
    base = {"protocol": "ijb", "target": "IJBC", "model": "m/a.onnx", "model_sha256": "a" * 64, "modes": modes}
    return {**base, "genuine": 50, "impostor": 60, "unresolved_far": [1e-6], "curves": None, **changes}


def mfr_result(**changes) -> dict:
    point = {"far_target": 1e-4, "tar": 0.8, "far": 1e-4, "threshold": 0.4, "genuine": 10, "impostor": 20_000}
    sets = {"mask": point, "children": None, "mr_all": {**point, "far_target": 1e-6, "tar": 0.7}}
    return {"protocol": "mfr", "model": "m/a.onnx", "model_sha256": "a" * 64, "sets": sets, **changes}


@pytest.fixture
def write(tmp_path):
    def write(**results) -> list:
        for name, result in results.items():
            (tmp_path / f"{name}.json").write_text(result if isinstance(result, str) else json.dumps(result))
        return [tmp_path / f"{name}.json" for name in results]

    return write


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ([], "protocol: expected pairs, ijb, mfr, found None"),
        ({"protocol": ["pairs"]}, r"protocol: expected pairs, ijb, mfr, found \['pairs'\]"),
        (pairs_result(accuracy={"mean": 1.5, "std": 0}), "accuracy.mean: input should be less than or equal to 1, found 1.5"),
        (pairs_result(accuracy={"mean": float("nan"), "std": 0}), "accuracy.mean: input should be"),
        ({key: value for key, value in pairs_result().items() if key != "num_pairs"}, "num_pairs: field required"),
        (pairs_result(curves={**pairs_result()["curves"], "tar": [1.0]}), "curves: far and tar must be equally long"),
        (pairs_result(curves={**pairs_result()["curves"], "genuine": 51}), "curves: the counts of the histograms must add up"),
        (pairs_result(tar_at_far=[]), "intervals.tar_at_far must have one entry for each of tar_at_far"),
        (pairs_result(tar_at_far=2 * pairs_result()["tar_at_far"], intervals=None), "tar_at_far must name each far_target once"),
        (pairs_result(unresolved_far=[0]), "unresolved_far.0: input should be greater than 0, found 0"),
        (ijb_result(modes={}), "modes: dictionary should have at least 1 item"),
        (ijb_result(modes={"N1D1F1": {"strict": [{"far": 1e-4}]}}), "modes.N1D1F1.strict.0.tar: field required"),
        (mfr_result(sets={"masks": None}), r"sets.masks.*: input should be 'mask'"),
        (mfr_result(sets={"mask": {"tar": 0.5}}), "sets.mask.far_target: field required"),
    ],
)
def test_a_bad_result_is_named_by_file_and_key_in_one_line(write, result, message):
    (file,) = write(bad=result)
    with pytest.raises(EvalError, match=f"^{re.escape(str(file))}: .*{message}") as caught:
        read_results([file])
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_given_twice_are_refused(write, tmp_path):
    files = write(a=pairs_result())
    with pytest.raises(EvalError, match=r"a\.json: given twice"):
        read_results(files * 2)
    with pytest.raises(EvalError, match=r"b\.json: not a readable file: No such file"):
        read_results([tmp_path / "b.json"])


def test_models_are_called_by_the_shortest_name_that_is_their_own(write):
    models = {
        "a": ("runs/one/checkpoints/step_10/backbone.safetensors", "a" * 64),
        "b": ("runs/one/checkpoints/step_10/backbone_ema.safetensors", "b" * 64),
        "c": ("x/m.onnx", "c" * 64),
        "d": ("y/m.onnx", "d" * 64),
        "e": ("z/other.onnx", "e" * 64),
        "f": ("same/n.onnx", "f" * 64),
        "g": ("same/n.onnx", "1" * 64),
        "h": ("moved/other.onnx", "e" * 64),  # by its digest the model of e
    }
    entries = read_results(write(**{name: pairs_result(*model) for name, model in models.items()}))
    assert [entry.label for entry in entries] == [
        *("one/step_10", "one/step_10/backbone_ema.safetensors", "x/m.onnx", "y/m.onnx", "other.onnx"),
        *("same/n.onnx ffffffff", "same/n.onnx 11111111", "other.onnx"),
    ]


def test_only_results_of_the_same_pairs_are_compared(write):
    files = write(
        a=pairs_result(),
        b=pairs_result("m/b.onnx", "b" * 64),
        c=pairs_result(source="other.txt"),
        d=pairs_result(num_pairs=111),
        e=ijb_result(),
        f=ijb_result(target="IJBB"),
        g=mfr_result(),
    )
    found = sections(read_results(files))
    assert [[row[0].text for row in section.rows] for section in found[:3]] == [["a.onnx", "b.onnx"], ["a.onnx"], ["a.onnx"]]
    assert [section.protocol for section in found] == ["pairs", "pairs", "pairs", "ijb", "ijb", "mfr"]
    assert [len(section.models) for section in found] == [2, 1, 1, 0, 0, 0]


def test_the_table_holds_numbers_intervals_and_what_was_not_resolved(write):
    pairs, ijb, mfr = sections(read_results(write(a=pairs_result(), e=ijb_result(), g=mfr_result())))
    assert pairs.columns == ["model", "accuracy", "with exact thresholds", "TAR@FAR=1e-01", "TAR@FAR=1e-02", "TAR@FAR=1e-03"]
    assert [(cell.text, cell.note) for cell in pairs.rows[0]] == [
        *(("a.onnx", ""), ("95.00", "std 1.00; 90.00 to 97.00"), ("95.50", "std 1.00"), ("94.00", "90.00 to 97.00")),
        *(("not resolved", "needs 100 impostor pairs"), ("not resolved", "needs 1,000 impostor pairs")),
    ]
    assert "30 identities, inferred from the genuine pairs" in pairs.notes[0]
    assert [[cell.text for cell in row] for row in ijb.rows[:2]] == [
        ["a.onnx", "N1D1F1", "nearest", "not resolved", "97.25", "98.06"],
        ["a.onnx", "N1D1F1", "strict", "not resolved", "96.25", "97.06"],
    ]
    assert (mfr.columns, [cell.text for cell in mfr.rows[0]]) == (["model", "Mask @1e-04", "MR-All @1e-06"], ["a.onnx", "80.00", "70.00"])


def test_a_result_of_1_to_n_alone_has_one_row_a_mode(write):
    found = {"galleries": [], "mean_ranks": {"1": 0.96, "10": 0.98}, "mean_tpir": {"0.01": 0.93}}
    modes = {"N1D1F1": {"strict": [], "nearest": [], "search": found}}
    (section,) = sections(read_results(write(a=ijb_result(modes=modes, genuine=0, impostor=0, unresolved_far=[]))))
    assert section.columns == ["model", "mode", "reading", "rank-1", "rank-10", "TPIR@FPIR=1e-02"]
    assert [[cell.text for cell in row] for row in section.rows] == [["a.onnx", "N1D1F1", "-", "96.00", "98.00", "93.00"]]


def test_a_model_that_was_measured_twice_gets_its_files_names(write):
    (section,) = sections(read_results(write(a=pairs_result(), b=pairs_result())))
    assert [re.sub(r"\(.*/", "(", row[0].text) for row in section.rows] == ["a.onnx (a.json)", "a.onnx (b.json)"]


def test_results_of_before_intervals_and_curves_are_read_and_said_to_lack_them(write):
    old = {key: value for key, value in pairs_result("m/old.onnx", "b" * 64).items() if key not in ("intervals", "curves")}
    old["tar_at_far"] = [{**old["tar_at_far"][0], "genuine": 50, "impostor": 60}]
    (section,) = sections(read_results(write(a=pairs_result(), old=old)))
    assert [model.label for model in section.models] == ["a.onnx"]
    assert section.notes[1:] == ["Without intervals: old.onnx.", "Not in the pictures, because their results hold no curves: old.onnx."]


def test_the_report_is_one_page_with_its_pictures_and_escapes_names(write, tmp_path, capsys):
    hostile = "m/_$a^{<script>alert(1)</script>.onnx"
    files = list(map(str, write(a=pairs_result(), b=pairs_result(hostile, "b" * 64), e=ijb_result())))
    out = tmp_path / "report"
    assert main(["report", *files, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}/index.html\n"
    names = [f"1-pairs-{name}.png" for name in ("det", "histogram-1", "histogram-2", "roc")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "index.html"]
    assert {Image.open(out / name).size for name in names} == {(972, 540)}
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 4
    assert not re.search(r"(src|srcset|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert "&lt;/script&gt;" in page

    assert main(["report", *files, "--out", str(out)]) == 2
    assert "exists already; give --force to replace it" in capsys.readouterr().err
    assert main(["report", files[2], "--out", str(out), "--force"]) == 0
    assert [path.name for path in out.iterdir()] == ["index.html"]  # nothing of the old one is left


def test_a_report_of_a_bad_result_leaves_nothing(write, tmp_path, capsys):
    (bad,) = write(bad="{}")
    assert main(["report", str(bad), "--out", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == (f"error: {bad}: protocol: expected pairs, ijb, mfr, found None; give what these wrote with --json\n")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]
