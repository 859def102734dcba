"""The recipe: what is read, what is refused, and how the error reads."""

import json
from pathlib import Path

import pytest

from train.config import ConfigError, RunConfig, load_run_config
from train.document import Document, read_yaml, write_yaml

RECIPE = """\
# a comment, so that line numbers start late
output: runs/demo
data:
  path: shards
head:
  margin: {m2: 0.5, m3: 0.0}
optimizer: {lr: 1e-4}
schedule: {warmup_epochs: 1}
stages:
  - name: early
    epochs: 2
    sample_rate: 0.3
  - name: stable
    epochs: 3
    centers: pco
    update_expectation: true
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the ConfigError, the folder of the file cut off."""
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    return [line.replace(f"{path.parent}/", "") for line in str(caught.value).splitlines()]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_recipe_is_read_and_defaults_are_filled(recipe):
    run = load_run_config(recipe)
    assert run.optimizer.lr == 1e-4  # PyYAML alone reads the text "1e-4"
    assert run.data.path == Path("shards")
    assert [stage.name for stage in run.stages] == ["early", "stable"]
    assert (run.head.margin.m1, run.head.margin.m2, run.head.margin.m3) == (1.0, 0.5, 0.0)
    assert run.optimizer.betas == (0.9, 0.999)
    assert run.eval is None


def test_overrides_replace_values_lists_and_list_items_and_the_last_one_wins(recipe):
    run = load_run_config(
        recipe,
        ["data.path=OUT", "batch.micro_batch_size=32", "batch.micro_batch_size=64", "stages.0.epochs=1", "optimizer.betas=[0.8, 0.95]",
         "data.augment.flip=0", "eval.images=i", "eval.pairs=p"],
    )  # fmt: skip
    assert run.data.path == Path("OUT")
    assert run.batch.images_per_step(world_size=2) == 128
    assert run.stages[0].epochs == 1
    assert run.optimizer.betas == (0.8, 0.95)
    assert run.data.augment.flip == 0.0
    assert run.eval.pairs == Path("p")


def test_an_override_of_the_kind_of_a_margin_forgets_the_keys_of_the_other_kind(recipe):
    run = load_run_config(recipe, ["head.margin.kind=adaface", "head.margin.m=0.3"])
    assert run.head.margin.text() == "adaface m 0.3 h 0.333"
    assert load_run_config(recipe, ["head.margin.kind=unified"]).head.margin.m2 == 0.0


def test_a_margin_is_what_it_says_and_nothing_more(recipe):
    run = load_run_config(recipe, ["head.margin={m2: 0.5}", "stages.1.margin={kind: magface, u_m: 0.9}"])
    assert run.head.margin.text() == "unified m1 1 m2 0.5 m3 0"
    assert run.stage_margin(1).text() == "magface l_a 10 u_a 110 l_m 0.45 u_m 0.9 lambda_g 35"
    assert run.stage_margin(0) is run.head.margin


def test_the_global_batch_counts_accumulation_and_ranks(recipe):
    run = load_run_config(recipe, ["batch.micro_batch_size=8", "batch.grad_accum_steps=3"])
    assert run.batch.images_per_step(world_size=5) == 120


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("head.scale=-1", "head.scale: must lie in (0, 128], got -1 (command line)"),
        ("stages.0.sample_rate=2", "stages.0.sample_rate: must lie in (0, 1], got 2 (command line)"),
        ("model.mask_ratio=1", "model.mask_ratio: must lie in [0, 1), got 1 (command line)"),
        ("head.sclae=64", "head.sclae: unknown key; did you mean scale? (command line)"),
        ("optimizer.impl=aepx", 'optimizer.impl: must be one of torch, deepspeed, apex, got "aepx"; did you mean apex? (command line)'),
        ("seed=1.5", "seed: must be an integer, got 1.5 (command line)"),
        ('seed="1"', 'seed: must be an integer, got "1" (command line)'),
        ("optimizer.lr=true", "optimizer.lr: must be a number, got true (command line)"),
        ("optimizer.lr=.nan", "optimizer.lr: must be a finite number, got NaN (command line)"),
        ("stages.1.update_expectation=yes", 'stages.1.update_expectation: must be true or false, got "yes" (command line)'),
        ("output=2024", "output: must be text (in quotes where it looks like a number), got 2024 (command line)"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: required, but not given (command line)"),
        ("optimizer.betas=[0.9, 1, 0]", "optimizer.betas: must have 2 entries, got 3 (command line)"),
        ("stages=[]", "stages: must have at least 1 entry, got 0 (command line)"),
        ("head=3", "head: must be a section with keys such as margin, scale, margin_gradient, got 3 (command line)"),
        ("stages.0.name=a b", 'stages.0.name: must be made of letters, digits, - and _, got "a b" (command line)'),
        ("data.path", "data.path: an override must read key=value, such as data.path=OUT (command line)"),
        ("data..path=x", "data..path=x: an override must read key=value, such as data.path=OUT (command line)"),
        ("stages.2.epochs=1", "stages.2.epochs: stages has items 0 to 1, not '2' (command line)"),
        ("output.x=1", 'output.x: output is "runs/demo", which has no keys (command line)'),
        ("head={scale: 1, scale: 2}", "head={scale: 1, scale: 2}: scale: repeated, first given at command line (command line)"),
        ("seed=[1", "seed=[1: not YAML: expected ',' or ']', but got '<stream end>' (command line)"),
        ("eval.pairs=p", "eval.images: required beside eval.pairs, but not given (command line)"),
    ],
)
def test_a_bad_override_is_one_line_that_names_key_and_finding(recipe, override, expected):
    assert problems(recipe, override) == [expected]


def test_every_problem_of_a_file_is_reported_with_its_line(tmp_path):
    path = write(
        tmp_path / "bad.yaml",
        "output: x\nhead:\n  scale: 0\n  sampel_rate: 1\ndata: {augment: {flip: 2}}\nstages:\n  - {name: a, epochs: 0}\noutptu: y\n",
    )
    assert problems(path, "seed=-1") == [
        "seed: must be at least 0, got -1 (command line)",
        "head.scale: must lie in (0, 128], got 0 (bad.yaml, line 3)",
        "head.sampel_rate: unknown key (bad.yaml, line 4)",
        "data.path: required, but not given (bad.yaml, line 5)",
        "data.augment.flip: must lie in [0, 1], got 2 (bad.yaml, line 5)",
        "stages.0.epochs: must be greater than 0, got 0 (bad.yaml, line 7)",
        "outptu: unknown key; did you mean output? (bad.yaml, line 8)",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epochs=6"], "epochs: is 6, but the stages' epochs add up to 5 (early 2 + stable 3) (command line)"),
        (
            ["epochs=5", "stages.0.epochs=null", "stages.0.steps=9"],
            "epochs: cannot be checked, because a stage is given in steps; remove it (command line)",
        ),
        (["schedule.warmup_epochs=5.5"], "schedule.warmup_epochs: is 5.5, longer than the whole run of 5 epochs (command line)"),
        (["schedule.warmup_steps=7"], "schedule.warmup_steps: is 7 while warmup_epochs is 1; give one of the two (command line)"),
        (["schedule.final_lr=1"], "schedule.final_lr: must not exceed optimizer.lr = 0.0001, got 1 (command line)"),
        (["stages.1.name=early"], "stages.1.name: 'early' is taken by an earlier stage (command line)"),
        (["stages.0.steps=3"], "stages.0: stage 'early' needs exactly one of epochs and steps, got both (recipe.yaml, line 10)"),
        (["stages.0.epochs=null"], "stages.0: stage 'early' needs exactly one of epochs and steps, got neither (recipe.yaml, line 10)"),
        (
            ["stages.1.update_expectation=false"],
            "stages.1.centers: pco needs expectations: set update_expectation: true in this stage or an earlier one (recipe.yaml, line 15)",
        ),
        (["model.name=vit_x"], "model.name: must be one of "),
        (["stages.0.margin={kind: arc}"], 'stages.0.margin: kind must be one of unified, adaface, magface, got "arc" (command line)'),
        (["head.margin={kind: magface, u_a: 5}"], "head.margin.u_a: must be above l_a = 10, got 5 (command line)"),
        (
            ["watchdog.step_s=300"],
            "watchdog.step_s: must be above data_s = 300, got 300: in a step others wait for a rank without data (command line)",
        ),
        (["head.loss=uniface"], "stages.1.centers: pco joins two softmax terms; with head.loss: uniface use learned, replace or vpl"),
        (
            ["head.margin.curricular=true", "head.loss=uniface", "stages.1.centers=vpl"],
            "head.margin.curricular: changes the negatives of a",
        ),
        (["stages.1.until={target_cosine_square: 0.2}"], "stages.1.until: the last stage has no next one to hand its rest to"),
        (
            ["stages.0.until={target_cosine_square: 0.2}", "stages.1.schedule={lr: 1}"],
            "stages.0.until: hands images on to a stage on another",
        ),
        (["stages.0.schedule={lr: 0.1, final_lr: 1}"], "stages.0.schedule.final_lr: must not exceed stages.0.schedule.lr = 0.1, got 1"),
        (
            ["batch.grad_accum_steps=2", "batch.global_batch_size=64"],
            "batch.grad_accum_steps: is 2 while global_batch_size is 64; give one",
        ),
        (
            ["batch.global_batch_size=64", "stages.1.batch={micro_batch_size: 2}"],
            "stages.1.batch.micro_batch_size: the run's batch fixes a global batch of 64, and this section, which is taken whole",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(recipe, overrides, expected):
    (line,) = problems(recipe, *overrides)
    assert line.startswith(expected)


def test_an_expectation_kept_from_an_earlier_stage_serves_a_frozen_pco_stage(recipe):
    run = load_run_config(recipe, ["stages.0.update_expectation=true", "stages.1.update_expectation=false"])
    assert run.stages[1].centers == "pco"


def test_epochs_that_add_up_are_accepted(recipe):
    assert load_run_config(recipe, ["epochs=5"]).epochs == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "output: x\nseed: 1\nseed: 2\noutput: y\n",
            ["seed: repeated, first given at line 2 (f.yaml, line 3)", "output: repeated, first given at line 1 (f.yaml, line 4)"],
        ),
        ("head: {scale: 1, scale: 2}\n", ["head.scale: repeated, first given at line 1 (f.yaml, line 1)"]),
        ("a: [1\nb: 2\n", ["not YAML: expected ',' or ']', but got ':' (f.yaml, line 2)"]),
        ("- 1\n", ["expected keys and values at the top, got [1] (f.yaml)"]),
        ("head: &x\n  margin: *x\n", ["head.margin: refers to itself (f.yaml, line 1)"]),
        (
            "output: !!python/object:os.system x\n",
            ["not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system' (f.yaml, line 1)"],
        ),
        ("output: !!binary aGk=\n", ["output: must be text, a number, true, false or null, got tag:yaml.org,2002:binary (f.yaml, line 1)"]),
        ("{1: 2}: 3\n", ["a key must be plain text (f.yaml, line 1)"]),
        ("", [f"{key}: required, but not given (f.yaml)" for key in ("output", "data", "stages")]),
    ],
)
def test_yaml_traps_are_refused_with_file_and_line(tmp_path, text, expected):
    assert problems(write(tmp_path / "f.yaml", text)) == expected


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert problems(tmp_path / "none.yaml") == ["no such file: none.yaml"]
    (tmp_path / "latin.yaml").write_bytes(b"output: \xe9\n")
    assert problems(tmp_path / "latin.yaml") == ["not UTF-8 text: byte 8 of latin.yaml"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        ("010", 10),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path, text, value):
    read = read_yaml(write(tmp_path / "f.yaml", f"key: {text}\n")).data["key"]
    assert read == value
    assert type(read) is type(value)


def test_written_yaml_reads_back_as_it_was(tmp_path):
    data = {"a": ["on", "1e-4", "010", "null", "", "true", "é: #"], "b": {"c": 1e-8, "d": None, "e": True, "f": 3}}
    assert read_yaml(write(tmp_path / "f.yaml", write_yaml(data))).data == data


def test_the_resolved_recipe_reads_back_as_an_equal_object(recipe, tmp_path):
    run = load_run_config(recipe, ["output='1e-4'", "eval={images: i, pairs: p}", "stages.0.name=on"])
    assert load_run_config(write(tmp_path / "resolved.yaml", run.to_yaml())) == run


SAME = ["output=elsewhere", "resume=never", "metrics.port=0", "checkpoint.every_steps=5", "data.path=moved", "data.num_threads=7",
        "model.activation_checkpointing=true", "eval={images: i, pairs: p}", "guard.spike_factor=3", "data.num_images=5",
        "watchdog.data_s=9", "model.init_from=given.safetensors"]  # fmt: skip
OTHER = ["seed=1", "optimizer.lr=1e-3", "batch.micro_batch_size=3", "stages.0.epochs=1", "head.margin.m2=0.4", "data.augment.flip=0",
         "model.mask_ratio=0.1", "model.compile=true", "schedule.decay=polynomial", "data.min_images_per_identity=2",
         "head.init_centers=class_means", "stages.0.freeze_backbone=true"]  # fmt: skip


def test_the_mathematics_ignore_where_and_how_a_run_is_watched(recipe):
    plain = load_run_config(recipe).mathematics()
    assert all(load_run_config(recipe, [override]).mathematics() == plain for override in SAME)
    assert load_run_config(recipe, SAME).mathematics() == plain


def test_the_mathematics_see_every_change_of_what_is_computed(recipe):
    seen = [load_run_config(recipe, overrides).mathematics() for overrides in ([], *([override] for override in OTHER))]
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


def test_the_mathematics_without_defaults_are_what_was_chosen(recipe):
    full, chosen = (load_run_config(recipe, OTHER).mathematics(defaults=defaults) for defaults in (True, False))
    assert (full["head"]["init_centers"], chosen["head"]["init_centers"]) == ("class_means", "class_means")
    assert (full["head"]["loss"], "loss" in chosen["head"]) == ("softmax", False)
    assert {"seed", "data", "stages"} <= chosen.keys() <= full.keys()
    assert chosen["stages"][0].keys() < full["stages"][0].keys()


def test_ranks_must_share_everything_but_the_places_of_things(recipe):
    local = ["output=elsewhere", "metrics.port=0", "metrics.host=0.0.0.0", "data.path=moved", "data.num_threads=7"]
    shared = [
        "metrics.log_every=3",
        "checkpoint.every_steps=5",
        "guard.max_skipped=9",
        "watchdog.data_s=9",
        "seed=1",
        "resume=never",
        "model.init_from=x",
    ]
    plain = load_run_config(recipe).shared_values()
    assert load_run_config(recipe, local).shared_values() == plain
    assert all(load_run_config(recipe, [override]).shared_values() != plain for override in shared)


def test_a_config_is_immutable(recipe):
    run = load_run_config(recipe)
    with pytest.raises(ValueError, match="frozen"):
        run.head.scale = 1.0


def test_a_config_built_in_code_is_checked_as_well():
    with pytest.raises(ValueError, match=r"stages\.1\.name: 'a' is taken"):
        RunConfig.model_validate({"output": "o", "data": {"path": "d"}, "stages": [{"name": "a", "steps": 1}, {"name": "a", "steps": 1}]})


def test_an_override_of_a_section_forgets_the_lines_of_the_section_it_replaces():
    document = Document("f", {"a": {"b": 1}}, {("a",): "f, line 1", ("a", "b"): "f, line 2"})
    document.override("a={b: 2, c: 3}")
    assert document.place(("a", "b")) == document.place(("a", "c")) == "command line"
    assert json.dumps(document.data) == '{"a": {"b": 2, "c": 3}}'


@pytest.fixture
def family(tmp_path) -> Path:
    """The recipe as ``base/recipe.yaml``, and ``child.yaml`` on top of it."""
    (tmp_path / "base").mkdir()
    write(tmp_path / "base/recipe.yaml", RECIPE)
    return write(tmp_path / "child.yaml", "base: base/recipe.yaml\noptimizer:\n  weight_decay: 0.05\ndata: {num_threads: 3}\n")


def test_a_recipe_changes_single_keys_of_its_base_and_overrides_come_after(family):
    base, run = load_run_config(family.parent / "base/recipe.yaml"), load_run_config(family, ["optimizer.eps=1e-6"])
    changed = {"optimizer.weight_decay": 0.05, "data.num_threads": 3, "optimizer.eps": 1e-6}
    assert run == load_run_config(family.parent / "base/recipe.yaml", [f"{key}={value}" for key, value in changed.items()])
    assert run != base
    assert "base" not in run.to_yaml()


def test_every_key_keeps_the_file_and_line_where_it_was_written(family):
    write(family.parent / "base/recipe.yaml", RECIPE.replace("m2: 0.5", "m2: 5").replace("epochs: 2", "epochs: -2"))
    write(family, "base: base/recipe.yaml\noptimizer:\n  weight_decay: -1\nhead: {scale: 0}\n")
    assert problems(family) == [
        "head.margin.m2: must lie in [0, 3.14159), got 5 (base/recipe.yaml, line 6)",
        "head.scale: must lie in (0, 128], got 0 (child.yaml, line 4)",
        "optimizer.weight_decay: must be at least 0, got -1 (child.yaml, line 3)",
        "stages.0.epochs: must be greater than 0, got -2 (base/recipe.yaml, line 11)",
    ]


def test_bases_form_a_chain_and_the_nearest_file_wins(family):
    grandchild = write(family.parent / "base/grandchild.yaml", "base: ../child.yaml\ndata: {num_threads: 4}\n")
    run = load_run_config(grandchild)
    assert (run.data.num_threads, run.optimizer.weight_decay, run.optimizer.lr) == (4, 0.05, 1e-4)


def test_a_list_replaces_the_base_s_as_a_whole(family):
    write(family, "base: base/recipe.yaml\nstages:\n  - {name: only, epochs: 1}\noptimizer: {betas: [0.8, 0.9]}\n")
    run = load_run_config(family)
    assert [(stage.name, stage.sample_rate) for stage in run.stages] == [("only", 1.0)]
    assert run.optimizer.betas == (0.8, 0.9)
    assert problems(family, "stages.1.epochs=3") == ["stages.1.epochs: stages has items 0 to 0, not '1' (command line)"]
    write(family, "base: base/recipe.yaml\nstages:\n  - {epochs: 1}\n")  # the base's line of stages.0.name is forgotten with it
    assert problems(family) == ["stages.0.name: required, but not given (child.yaml, line 3)"]


def test_a_section_that_says_its_kind_replaces_the_base_s_and_another_one_adds_to_it(family):
    write(family, "base: base/recipe.yaml\nhead: {margin: {kind: adaface, h: 0.5}}\n")
    assert load_run_config(family).head.margin.model_dump() == {"kind": "adaface", "m": 0.4, "h": 0.5}
    write(family, "base: base/recipe.yaml\nhead: {margin: {m3: 0.1}}\n")
    margin = load_run_config(family).head.margin
    assert (margin.m2, margin.m3) == (0.5, 0.1)


def test_a_circle_of_bases_is_one_error_that_names_the_way(family):
    write(family.parent / "base/recipe.yaml", "# round\nbase: ../child.yaml\n")
    way = "child.yaml -> base/recipe.yaml -> base/../child.yaml"
    assert problems(family) == [f"base: leads back to a file that it was read for: {way} (base/recipe.yaml, line 2)"]
    assert len(problems(write(family, "base: child.yaml\n"))) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nbase: none.yaml\n", "base: no such file: none.yaml (child.yaml, line 2)"),
        ("base: base\n", "base: no such file: base (child.yaml, line 1)"),
        ("base: [base/recipe.yaml]\n", "base: must be the path of a recipe, relative to this file's folder, got "),
        ("base:\n", "base: must be the path of a recipe, relative to this file's folder, got null (child.yaml, line 1)"),
    ],
)
def test_a_base_that_is_no_file_is_named_where_it_was_written(family, text, expected):
    (line,) = problems(write(family, text))
    assert line.startswith(expected)
