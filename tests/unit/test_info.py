"""What ``python -m data_pipeline info`` says of a set and of this node, against sizes taken from the files."""

import json

import pytest

from data_pipeline.__main__ import main
from data_pipeline.errors import DataError
from data_pipeline.info import NodeMemory, describe, node_memory, readable
from data_pipeline.quarantine import Unfit, write_quarantine
from data_pipeline.shard_set import open_set
from tests.unit.record_sets import field_records, write_records

MEMINFO = "MemTotal:       24684092 kB\nMemFree:        1000000 kB\nMemAvailable:   2000000 kB\n"
ROOMY = NodeMemory(available=1 << 40, cgroup_limit=None)


def node(root, meminfo=MEMINFO, cgroup="0::/\n", **limits):
    """A made-up /proc and /sys below ``root``; ``limits``: text of a control group's file by its path below sys/fs/cgroup."""
    files = {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{path}": text for path, text in limits.items()}}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return node_memory(root)


def test_sizes_are_those_of_the_files(packed_people):
    size = sum(file.stat().st_size for file in packed_people.glob("*.rec"))
    told = describe(open_set(packed_people), ROOMY)
    assert (told.images, told.identities, told.shards) == (29, 6, 3)
    assert told.bytes == told.bytes_per_epoch == size
    assert told.bytes_per_image == size / 29
    assert told.table_bytes == 29 * 24
    assert told.needed_memory == size + 29 * 24


def test_records_without_an_image_are_no_part_of_an_epoch(tmp_path):
    records = field_records([2, 0, 3])
    offsets = write_records(tmp_path / "train.rec", records)
    told = describe(open_set(tmp_path), ROOMY)
    assert told.bytes_per_epoch == offsets[6] - offsets[1]  # the header before, three records of identities after
    assert told.bytes == (tmp_path / "train.rec").stat().st_size
    assert (told.images, told.other_records, told.identities_without_image) == (5, 4, 1)


def test_what_lies_in_quarantine_is_counted_and_left_out_of_the_rest(packed_people, tmp_path):
    for file in packed_people.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = describe(open_set(tmp_path), ROOMY)
    shards = sorted(tmp_path.glob("*.rec"))
    write_quarantine(tmp_path, shards, [Unfit(shards[1].name, 0, 0, "made up")] * 2)
    lines = (tmp_path / "shards.idx").read_text().splitlines()
    offsets = sorted(int(line.split("\t")[1]) for line in lines)
    place = offsets.index(shards[0].stat().st_size)
    told = describe(open_set(tmp_path), ROOMY)
    assert (told.images, told.quarantined) == (28, 1)
    assert told.bytes_per_epoch == whole.bytes_per_epoch - (offsets[place + 1] - offsets[place])
    assert "quarantine           1 more record, left out" in told.lines()


def test_a_throughput_asks_each_node_for_its_share(packed_people):
    told = describe(open_set(packed_people), ROOMY, images_per_second=6000, nodes=4)
    assert told.reads_per_second_and_node == 1500
    assert told.bytes_per_second_and_node == 1500 * told.bytes_per_image
    by_default = describe(open_set(packed_people), ROOMY, nodes=3)
    assert (by_default.images_per_second, by_default.reads_per_second_and_node) == (30_000, 10_000)
    assert any("in 10,000 random reads/s, at 30,000 images/s over 3 nodes" in line for line in by_default.lines())


def test_the_page_cache_is_judged_by_the_smaller_of_memory_and_limit(packed_people):
    faces = open_set(packed_people)
    needed = describe(faces, ROOMY).needed_memory
    for memory, fits in (
        (NodeMemory(needed, None), True),
        (NodeMemory(needed - 1, None), False),
        (NodeMemory(1 << 40, needed - 1), False),
        (NodeMemory(needed - 1, 1 << 40), False),
        (NodeMemory(None, needed), True),
        (NodeMemory(None, None), None),
    ):
        assert describe(faces, memory).fits is fits
    assert describe(faces, NodeMemory(1 << 40, needed // 4)).lines()[-1].startswith("page cache           does not fit: ")
    assert "at best 25 % stay in memory" in describe(faces, NodeMemory(1 << 40, needed // 4)).lines()[-1]
    assert describe(faces, ROOMY).lines()[-1].startswith("page cache           fits: ")
    assert describe(faces, NodeMemory(None, None)).lines()[-1].startswith("page cache           not known")


def test_available_memory_is_read_in_bytes(tmp_path):
    assert node(tmp_path) == NodeMemory(2_000_000 * 1024, None)


def test_the_smallest_limit_of_the_control_groups_above_counts(tmp_path):
    limits = {"a/memory.max": "5000\n", "a/b/memory.max": "9000\n", "a/b/c/memory.max": "max\n", "other/memory.max": "7\n"}
    assert node(tmp_path, cgroup="0::/a/b/c\n", **limits).cgroup_limit == 5000


def test_limits_of_version_1_are_read_and_its_number_for_none_is_none(tmp_path):
    cgroup = "9:cpuset:/x\n4:cpu,memory:/jobs/7\n0::/\n"
    limits = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/jobs/7/memory.limit_in_bytes": "8000\n", "cpuset/x/y": "3\n"}
    assert node(tmp_path, cgroup=cgroup, **limits).cgroup_limit == 8000
    assert node(tmp_path, cgroup="4:memory:/\n", **limits).cgroup_limit is None


def test_in_a_container_the_limit_lies_at_the_top(tmp_path):
    """The path of the group is the host's."""
    assert node(tmp_path, cgroup="0::/docker/3f2a\n", **{"memory.max": "6000\n"}).cgroup_limit == 6000


def test_a_system_that_says_nothing_is_no_error(tmp_path):
    assert node_memory(tmp_path) == NodeMemory(None, None)


def test_sizes_are_written_with_three_digits():
    written = [readable(size) for size in (0, 999, 999.6, 1_084_564, 123_456_789, 1.5e12, 4e18)]
    assert written == ["0 bytes", "999 bytes", "1 kB", "1.08 MB", "123 MB", "1.5 TB", "4e+03 PB"]


def test_json_has_every_number_of_the_text(packed_people, capsys):
    assert main(["info", str(packed_people), "--json", "--nodes", "2", "--images-per-second", "500"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["seed"], told["reads_per_second_and_node"]) == (29, 0, 250)
    assert told["images_per_identity"] == {"min": 1, "median": 5, "max": 9}
    assert set(told["memory"]) == {"available", "cgroup_limit"}
    assert told["fits"] in (True, False, None)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"nodes": 0}, "--nodes 0: must be at least 1"),
        ({"images_per_second": 0}, "--images-per-second 0: must be a number above 0"),
        ({"images_per_second": float("nan")}, "--images-per-second nan: must be a number above 0"),
        ({"images_per_second": float("inf")}, "--images-per-second inf: must be a number above 0"),
    ],
)
def test_impossible_plans_are_refused(packed_people, wrong, complaint):
    with pytest.raises(DataError, match=complaint):
        describe(open_set(packed_people), ROOMY, **wrong)
