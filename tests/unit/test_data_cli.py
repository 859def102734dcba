import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from tests.unit.record_sets import field_records, image_folder, jpeg, write_records

ROOT = Path(__file__).resolve().parents[2]


def test_pack_verify_info_on_the_command_line(tmp_path, capsys):
    image_folder(tmp_path / "src", {"Ann": 4, "Bo": 2, "Cy": 5})
    (tmp_path / "split.json").write_text(json.dumps({"train": ["Ann", "Cy"]}))
    split = ["--identities", str(tmp_path / "split.json"), "--split", "train"]
    assert main(["pack", str(tmp_path / "src"), str(tmp_path / "set"), "--shards", "2", "--seed", "7", *split]) == 0
    assert main(["verify", str(tmp_path / "set")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "set")]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "set").glob("*.rec"))
    told = {line[:21].strip(): line[21:] for line in capsys.readouterr().out.splitlines()}
    assert (
        told.items()
        >= {
            "layout": "packed (sidecar with CRC32s)",
            "images": "9",
            "identities": "2",
            "images per identity": "min 4, median 4.5, max 5",
            "shards": "2",
            "bytes": str(size),
            "seed": "7",
            "quarantine": "none",
        }.items()
    )
    assert set(told) > {"an epoch reads", "a node reads", "table of records", "memory of this node", "page cache"}


def test_pack_says_what_it_found_and_where_all_of_it_is_named(tmp_path, capsys):
    source = image_folder(tmp_path / "src", {"Ann": 8, "Bo": 2})
    for k in range(4):
        (source / "Ann" / f"{k}.jpg").write_bytes(jpeg(side=100, mark=k))
    (source / "Bo" / "1.jpg").write_bytes((source / "Ann" / "7.jpg").read_bytes())
    (source / "Bo" / "x.jpg").write_text("hello")
    command = ["pack", str(source), str(tmp_path / "set"), "--shards", "2", "--workers", "1"]
    policies = ["--wrong-size", "drop", "--unreadable", "drop", "--duplicates", "drop"]
    assert main([*command, *policies]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "4 images: wrong size, dropped, such as" in told
    assert len([line for line in told if line.startswith("  ") and line.endswith(".jpg, 100x100")]) == 3
    assert f"  {source}/Bo/x.jpg, cannot be read as an image: its format is not known" in told
    assert f"  {source}/Bo/1.jpg, {source}/Ann/7.jpg" in told
    assert told[-2] == f"all of them: {tmp_path / 'set' / 'findings.jsonl'}"
    assert told[-1].startswith(f"{tmp_path / 'set'}: 4 images of 2 identities in 2 shards, ")
    assert len((tmp_path / "set/findings.jsonl").read_text().splitlines()) == 7
    assert main([*command, "--force"]) == 2
    assert "--wrong-size drop or resize" in capsys.readouterr().err
    assert main([*command, "--force", "--unreadable", "drop", "--wrong-size", "resize"]) == 0
    assert "4 images: wrong size, resized, such as" in capsys.readouterr().out


def test_several_sources_are_merged_and_unpacked(tmp_path, capsys):
    image_folder(tmp_path / "a", {"Ann": 2, "Bo": 1})
    (tmp_path / "b").mkdir()
    write_records(tmp_path / "b" / "train.rec", field_records([1, 0, 2]))
    assert main(["pack", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "set"), "--shards", "2", "--workers", "1"]) == 0
    assert "6 images of 5 identities in 2 shards" in capsys.readouterr().out.splitlines()[-1]
    assert main(["unpack", str(tmp_path / "set"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "left out: 1 identities without an image; if the folder is packed, labels close that gap",
        f"{tmp_path / 'out'}: 6 images of 4 identities",
    ]
    assert sorted(f"{path.parent.name} {len(list(path.parent.iterdir()))}" for path in (tmp_path / "out").glob("*/*")) == sorted(
        ["s0_Ann 2", "s0_Ann 2", "s0_Bo 1", "s1_0 1", "s1_2 2", "s1_2 2"]
    )


def test_info_on_a_field_set_counts_images_alone(tmp_path, capsys):
    write_records(tmp_path / "train.rec", field_records([2, 0, 3]))
    assert main(["info", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "4 records without an image" in told
    assert re.search(r"^images +5$", told, re.MULTILINE)
    assert "3 (1 without an image)" in told


def test_exit_codes_tell_findings_from_bad_input(tmp_path, capsys):
    image_folder(tmp_path / "src", {"Ann": 3})
    main(["pack", str(tmp_path / "src"), str(tmp_path / "set"), "--shards", "1"])
    shard = tmp_path / "set" / "shard_00000.rec"
    body = bytearray(shard.read_bytes())
    body[200] ^= 255
    shard.write_bytes(body)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "set")]) == 1
    assert f"{shard}: record at offset 0 (key 0): CRC32" in capsys.readouterr().out
    for command in (
        "verify gone",
        "info gone",
        "pack src x --shards 9",
        "pack src set --shards 1",
        "pack gone x --shards 1",
        "unpack gone x",
    ):
        words = command.split()
        assert main([str(tmp_path / word) if word in ("gone", "src", "x", "set") else word for word in words]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_synthetic_faces_and_pairs_on_the_command_line(tmp_path, capsys):
    arguments = ["--identities", "6", "--images", "3", "--first-identity", "4", "--pairs", str(tmp_path / "p.txt"), "--folds", "2"]
    assert main(["synthetic", str(tmp_path / "faces"), *arguments, "--pairs-per-fold", "4"]) == 0
    assert len(list((tmp_path / "faces").glob("id_*/id_*_000[123].jpg"))) == 18
    for line in (tmp_path / "p.txt").read_text().splitlines()[1:]:
        name, i = line.split("\t")[:2]
        assert (tmp_path / "faces" / name / f"{name}_{int(i):04d}.jpg").is_file()
    pairs = (tmp_path / "p.txt").read_bytes()
    assert main(["synthetic", str(tmp_path / "faces"), *arguments, "--pairs-per-fold", "3"]) == 2
    assert "exists already; give --force" in capsys.readouterr().err
    assert (tmp_path / "p.txt").read_bytes() == pairs
    assert main(["synthetic", str(tmp_path / "faces"), "--identities", "1", "--images", "2", "--force"]) == 0
    assert len(list((tmp_path / "faces").iterdir())) == 1


def test_pairs_inside_the_faces_are_refused(tmp_path, capsys):
    assert main(["synthetic", str(tmp_path / "faces"), "--pairs", str(tmp_path / "faces" / "p.txt")]) == 2
    assert "must lie outside" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")])
def test_a_stopped_command_exits_with_its_code_and_leaves_nothing(tmp_path, number, code, line):
    command = [sys.executable, "-m", "data_pipeline", "synthetic", str(tmp_path / "faces"), "--identities", "5000"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background job, as this suite may be, ignores SIGINT
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".faces.new-*/id_00001")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(line)
    assert not list(tmp_path.iterdir())
