"""The recipes that ship: each loads, says where its numbers come from, and is the recipe that it is named after."""

import re
from pathlib import Path

import pytest

from train.config import load_run_config
from train.document import Key, read_yaml

FOLDER = Path(__file__).resolve().parents[2] / "train/recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
LARGE = [name for name in RECIPES if not name.startswith(("demo", "lfw_tiny"))]
# A paper, a file of the field's code, or our own choice with its reason.
SOURCE = re.compile(r"#.*(arXiv:\d{4}\.\d{5}|arcface_torch/[\w/]+\.(py|md)|ours: \w+)")


def recipe(name: str, *overrides: str):
    return load_run_config(FOLDER / f"{name}.yaml", overrides)


def numbers(value: object, key: Key = ()) -> list[Key]:
    """The keys of all numbers in what a file says."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for name, item in items for found in numbers(item, (*key, name))]
    return [key] if isinstance(value, int | float) and not isinstance(value, bool) else []


def without_a_source(path: Path) -> list[str]:
    """The lines of a recipe that have a number and do not say where it comes from."""
    document, lines = read_yaml(path), path.read_text().splitlines()
    numbered = {int(document.place(key).rpartition(" ")[2]) for key in numbers(document.data)}
    return [lines[number - 1] for number in sorted(numbered) if not SOURCE.search(lines[number - 1])]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_as_it_is_and_says_where_each_number_comes_from(name):
    load_run_config(FOLDER / name)
    assert without_a_source(FOLDER / name) == []


def test_a_number_without_a_source_is_found_wherever_it_stands(tmp_path):
    (tmp_path / "r.yaml").write_text("a: 1  # ours: any\nb: {c: 2}  # two\nd:\n  - [x1, 3.5]\n  - e  # 7\nf: true\n")
    assert without_a_source(tmp_path / "r.yaml") == ["b: {c: 2}  # two", "  - [x1, 3.5]"]


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_is_complete_at_any_world_size(name):
    run = load_run_config(FOLDER / name)
    assert run.data.num_images
    assert run.data.num_classes
    assert run.epochs
    for ranks in (1, 8):
        assert [run.stage_batch(i).images_per_step(ranks) for i in range(len(run.stages))] == [
            run.stage_batch(i).global_batch_size for i in range(len(run.stages))
        ]
    assert (run.output, run.data.path) == (Path("runs", name.removesuffix(".yaml")), Path("runs", name.removesuffix(".yaml"), "shards"))


def stages(run, *fields: str) -> list[tuple]:
    return [tuple(getattr(stage, field) for field in fields) for stage in run.stages]


def batches(run, world_size: int) -> list[tuple[int, int]]:
    """(images per rank and forward pass, forward passes per step) of each stage."""
    found = [run.stage_batch(index) for index in range(len(run.stages))]
    return [(batch.micro_batch_size, batch.accumulation(world_size)) for batch in found]


def adamw(run) -> tuple:
    """Learning rate, weight decay, betas, warm-up in epochs, final learning rate, clipping."""
    optimizer, schedule = run.optimizer, run.schedule
    return optimizer.lr, optimizer.weight_decay, optimizer.betas, schedule.warmup_epochs, schedule.final_lr, optimizer.clip_grad_norm


PAPER = (1e-3, 0.1, (0.9, 0.999), 4, 0.0, 5.0)


@pytest.mark.parametrize(("name", "model"), [("lvface_v1", "vit_l"), ("lvface_v1_vit_b", "vit_b")])
def test_lvface_v1_is_the_first_version_of_the_paper(name, model):
    run = recipe(name)
    assert stages(run, "name", "epochs", "sample_rate", "centers", "update_expectation") == [
        ("early", 40, 0.3, "learned", True),
        ("stable", 60, 1.0, "pco", True),
    ]
    assert stages(run, "until", "margin") == [(None, None)] * 2
    assert run.head.margin.model_dump() == {"kind": "unified", "m1": 1.0, "m2": 0.5, "m3": 0.0, "curricular": False}
    assert (run.model.name, run.head.scale, run.schedule.decay) == (model, 64.0, "linear")
    assert adamw(run) == PAPER
    assert batches(run, 64) == [(384, 1)] * 2
    assert (run.data.num_images, run.data.num_classes) == (42_474_557, 2_059_906)


@pytest.mark.parametrize(("name", "model"), [("lvface_pco", "vit_l"), ("lvface_pco_vit_b", "vit_b")])
def test_lvface_pco_is_the_third_version_of_the_paper(name, model):
    run = recipe(name)
    assert stages(run, "name", "sample_rate", "centers", "update_expectation") == [
        ("alignment", 0.1, "learned", True),
        ("stabilization", 0.1, "pco", True),
        ("refinement", 1.0, "pco", False),
    ]
    assert [stage.until and stage.until.target_cosine_square for stage in run.stages] == [0.2, 0.35, None]
    assert run.head.margin.model_dump() == {"kind": "unified", "m1": 1.0, "m2": 0.0, "m3": 0.4, "curricular": False}
    assert (run.model.name, run.head.scale, run.schedule.decay) == (model, 64.0, "polynomial")
    assert stages(run, "schedule") == [(None,)] * 3  # one decay over the whole run
    assert adamw(run) == PAPER
    assert batches(run, 64) == [(384, 1), (384, 1), (128, 1)]
    epochs = [stage.epochs for stage in run.stages]
    assert (sum(epochs[:2]), epochs[2]) == (60, 60)
    assert (run.data.num_images, run.data.num_classes) == (42_474_557, 2_059_906)


def test_partial_fc_is_the_field_s_baseline():
    run = recipe("partial_fc")
    assert stages(run, "epochs", "sample_rate", "centers", "update_expectation") == [(40, 0.3, "learned", False)]
    assert (run.head.margin.m1, run.head.margin.m2, run.head.margin.m3, run.head.scale) == (1.0, 0.0, 0.4, 64.0)
    assert (run.head.optimizer, run.head.margin_gradient, run.optimizer.decay_all) == ("dense", "straight_through", True)
    assert (run.model.name, run.model.mask_ratio, run.schedule.decay) == ("vit_l", 0.1, "linear")
    assert adamw(run) == PAPER
    assert batches(run, 64) == [(384, 1)]
    assert (run.data.num_images, run.data.num_classes) == (42_474_557, 2_059_906)


@pytest.mark.parametrize(
    ("name", "sizes", "margin", "epochs", "warmup_epochs"),
    [
        ("partial_fc_glint360k", (17_091_657, 360_232), (0.0, 0.4), [20], 2),
        ("partial_fc_ms1mv3", (5_179_510, 93_431), (0.5, 0.0), [25], 2),
        ("lvface_v1_glint360k", (17_091_657, 360_232), (0.5, 0.0), [40, 60], 4),
        ("lvface_v1_ms1mv3", (5_179_510, 93_431), (0.5, 0.0), [40, 60], 4),
    ],
)
def test_a_smaller_set_changes_the_data_and_scales_the_learning_rate_with_the_batch(name, sizes, margin, epochs, warmup_epochs):
    run = recipe(name)
    assert (run.data.num_images, run.data.num_classes) == sizes
    assert (run.head.margin.m2, run.head.margin.m3) == margin
    assert [stage.epochs for stage in run.stages] == epochs
    assert run.schedule.warmup_epochs == warmup_epochs
    assert set(batches(run, 8)) == {(384, 1)}
    assert run.optimizer.lr == pytest.approx(1e-3 * (3072 / 24576) ** 0.5, rel=0.02)  # two digits are written


def test_the_variants_of_lfw_tiny_differ_in_their_stages_alone():
    tiny = recipe("lfw_tiny")
    expected = {
        "lfw_tiny": [("early", 12, 0.5, "learned"), ("stable", 4, 1.0, "pco")],
        "lfw_tiny_plain": [("plain", 16, 1.0, "learned")],
        "lfw_tiny_early": [("early", 12, 0.5, "learned"), ("stable", 4, 0.5, "learned")],
        "lfw_tiny_epl": [("early", 12, 0.5, "learned"), ("stable", 4, 1.0, "epl")],
        "lfw_tiny_replace": [("early", 12, 0.5, "learned"), ("stable", 4, 1.0, "replace")],
    }
    assert {path.stem for path in FOLDER.glob("lfw_tiny*")} == {*expected, "lfw_tiny_finetune"}
    for name, table in expected.items():
        run = recipe(name)
        assert stages(run, "name", "epochs", "sample_rate", "centers") == table
        assert run.model_copy(update={"stages": tiny.stages, "output": tiny.output}) == tiny


def test_lfw_tiny_finetune_warms_up_the_head_before_it_trains_the_whole_slowly():
    tiny, run = recipe("lfw_tiny"), recipe("lfw_tiny_finetune", "model.init_from=given.safetensors")
    assert stages(run, "name", "freeze_backbone", "sample_rate", "centers") == [
        ("head", True, 1.0, "learned"),
        ("whole", False, 1.0, "learned"),
    ]
    assert (run.head.init_centers, str(run.model.init_from)) == ("class_means", "given.safetensors")
    assert recipe("lfw_tiny_finetune").model.init_from is None  # which weights is said on the command line
    assert run.optimizer.lr == tiny.optimizer.lr / 5
    assert run.stages[0].schedule.warmup_steps == 0  # the run's warm-up begins with the backbone's first step
    assert (run.data, run.batch, run.head.margin) == (tiny.data, tiny.batch, tiny.head.margin)
