"""DeepSpeed's JSON: what is filled in, what is refused, and that every shipped file loads."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.config import ConfigError, RunConfig
from train.ds_config import REFUSED, DeepSpeedSummary, load_ds_config

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
OWNED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
ZERO_1 = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}


def recipe(**optimizer) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": "o",
            "data": {"path": "d"},
            "batch": {"micro_batch_size": 4, "grad_accum_steps": 3},
            "optimizer": optimizer,
            "stages": [{"name": "only", "steps": 1}],
        }
    )


def load(path: Path, content: dict | str, device_type: str = "cuda", run: RunConfig | None = None):
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return load_ds_config(path, run or recipe(), 2, device_type)


@pytest.fixture
def refusal(tmp_path):
    """The lines of the ConfigError that a JSON raises, the folder cut off."""

    def lines(content: dict | str, **kwargs) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "x.json", content, **kwargs)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return lines


def test_every_shipped_config_is_in_the_table_of_the_readme():
    readme = (CONFIGS[0].parent / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+\.json)` \|", readme, flags=re.MULTILINE)
    assert sorted(listed) == [path.name for path in CONFIGS]


def keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


def test_the_readme_explains_every_key_of_the_shipped_configs_and_every_refused_one():
    readme = (CONFIGS[0].parent / "README.md").read_text()
    shipped = {key for path in CONFIGS for key in keys(json.loads(path.read_text()))} - set(OWNED) - {"enabled", "zero_optimization"}
    explained = "".join(re.findall(r"^\| (`.*?) \|", readme, flags=re.MULTILINE))
    assert [key for key in sorted({*shipped, *REFUSED}) if f"`{key}" not in explained and f".{key}`" not in explained] == []
    assert [key for key in OWNED if f"`{key}`" not in readme] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_as_its_name_says_on_the_devices_the_readme_names(path):
    stage, precision = re.fullmatch(r"zero(\d)_(\w+)", path.stem).groups()
    row = next(line for line in (path.parent / "README.md").read_text().splitlines() if line.startswith(f"| `{path.name}`"))
    config, summary = load_ds_config(path, recipe(clip_grad_norm=2.5), 2, "cuda")
    assert summary == DeepSpeedSummary(int(stage), precision)
    assert [config[key] for key in OWNED] == [4, 3, 24, 2.5]
    assert "auto" not in json.dumps(config)
    if "CPU" in row:
        assert load_ds_config(path, recipe(clip_grad_norm=2.5), 2, "cpu") == (config, summary)
    else:
        with pytest.raises(ConfigError, match="needs a GPU"):
            load_ds_config(path, recipe(), 2, "cpu")


def test_what_the_recipe_owns_is_written_even_where_the_file_says_nothing(tmp_path):
    config, _ = load(tmp_path / "x.json", ZERO_1, run=recipe(clip_grad_norm=0.0))
    assert [config[key] for key in OWNED] == [4, 3, 24, 0.0]  # DeepSpeed would clip at 1.0


def test_deepspeed_reads_the_filled_config_as_meant(tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    config, _ = load(tmp_path / "x.json", {**ZERO_1, **BF16, "train_batch_size": "auto"})
    read = DeepSpeedConfig({**config, "train_batch_size": 12})  # one process here: world_size 1
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps, read.gradient_clipping) == (4, 3, 5.0)
    assert (read.zero_optimization_stage, read.bfloat16_config.enabled) == (1, True)
    assert not read.timers_config.enabled


def test_agreeing_numbers_are_accepted(tmp_path):
    config, _ = load(tmp_path / "x.json", {**ZERO_1, "train_batch_size": 24, "gradient_clipping": 5})
    assert config["train_batch_size"] == 24


def test_a_contradiction_names_both_owners(refusal):
    assert refusal({**ZERO_1, "gradient_clipping": 1.0, "train_batch_size": 100, "gradient_accumulation_steps": True}) == [
        "gradient_accumulation_steps: true contradicts batch.grad_accum_steps: 3 in the recipe, "
        'which owns it; write "auto" (x.json, line 7)',
        "train_batch_size: 100 contradicts batch.micro_batch_size x grad_accum_steps x world_size = 4 x 3 x 2 = 24 in the recipe, "
        'which owns it; write "auto" (x.json, line 6)',
        'gradient_clipping: 1.0 contradicts optimizer.clip_grad_norm: 5.0 in the recipe, which owns it; write "auto" (x.json, line 5)',
    ]


def test_misspelt_keys_are_refused_at_every_level(refusal):
    top = {"zero_optimisation": {"stage": 2}, "timers": {"throughptu": {}}, "data_types": {"grad_acum_dtype": "fp32"}}
    assert refusal(top) == [
        "zero_optimisation: unknown or unsupported key (DeepSpeed may ignore it without a word); "
        "did you mean zero_optimization? (x.json, line 2)",
        "timers.throughptu: unknown or unsupported key; did you mean throughput? (x.json, line 6)",
        "data_types.grad_acum_dtype: unknown or unsupported key; did you mean grad_accum_dtype? (x.json, line 9)",
    ]
    inner = {"zero_optimization": {"stagee": 1, "offload_optimizer": {"devcie": "cpu"}}, "fp16": {"enabld": True}}
    assert refusal(inner) == [
        "zero_optimization.offload_optimizer.devcie: unknown key; did you mean device? (x.json, line 5)",
        "zero_optimization.stagee: unknown key; did you mean stage? (x.json, line 3)",
        "fp16.enabld: unknown key; did you mean enabled? (x.json, line 9)",
    ]
    assert refusal({"zero_optimization": {"stage": 1, "strict": True}}) == ["zero_optimization.strict: unknown key (x.json, line 4)"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage: must be one of 0, 1, 2, 3, got 5 (x.json, line 3)"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size: must be greater than 0, got 0",
        ),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale: must be >= 0"),
        ({"bf16": True}, "bf16: must be an object of keys and values, got true (x.json, line 2)"),
        ({"wall_clock_breakdown": "false"}, 'wall_clock_breakdown: must be true or false, got "false" (x.json, line 2)'),
        ({"communication_data_type": "fp23"}, 'communication_data_type: must be one of fp32, bf16, fp16, got "fp23"; did you mean fp32?'),
        ({"zero_optimization": {"stage": "auto"}}, f'zero_optimization.stage: only {", ".join(OWNED)} can be "auto"'),
        (
            {"optimizer": {"type": "Adam"}},
            "optimizer: refused: the recipe owns it: set optimizer.impl, lr, weight_decay, betas and eps there",
        ),
        ({"scheduler": {}}, "scheduler: refused: the recipe owns it: set schedule.* and optimizer.lr there (x.json, line 2)"),
        ({"amp": {"enabled": True}}, "amp: refused: DeepSpeed has removed it"),
        ({"bfloat16": {"enabled": True}}, "bfloat16: unknown or unsupported key"),
    ],
)
def test_bad_values_and_owned_keys_are_refused_with_the_reason(refusal, content, expected):
    (line,) = refusal(content)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"bf16": {},\n "fp16": }', "not JSON: Expecting value (x.json, line 2)"),
        ('{\n\t"fp16": {},\n\t"fp16": {}\n}', "fp16: repeated, first given at line 2 (x.json, line 3)"),
        ('{"fp16": {"a": 1,\n"a": 2}}', "fp16.a: repeated, first given at line 1 (x.json, line 2)"),
        ('{"gradient_clipping": NaN}', "NaN is not JSON (x.json)"),
        ("[1]", "expected keys and values at the top, got [1] (x.json)"),
    ],
)
def test_text_that_is_no_json_object_is_refused_with_its_line(refusal, content, expected):
    assert refusal(content) == [expected]


FP16 = {"fp16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "zero_optimization.stage: ZeRO 0 with fp32 has no guard against NaN"),
        (BF16, "zero_optimization.stage: ZeRO 0 with bf16 makes a hidden first step"),
        (FP16, "zero_optimization.stage: ZeRO 0 with fp16 unscales a loss that was never scaled"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "zero_optimization.stage: ZeRO 0 with bf16_autocast has no guard"),
        ({**ZERO_1, **BF16, **FP16}, "fp16.enabled: bf16 is enabled too"),
        ({**ZERO_1, **AUTOCAST}, "torch_autocast.dtype: float16 is broken"),
        ({**ZERO_1, "torch_autocast": {"enabled": True}}, "torch_autocast.dtype: required"),
        ({**ZERO_1, **BF16, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled: cannot be combined"),
        ({**ZERO_1, "bf16": {"enabled": True, "check_grad_overflow": False}}, "bf16.check_grad_overflow: false removes the only guard"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "zero_optimization.compute_grad_norm: false removes the guard"),
        (
            {**ZERO_1, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads: updates smaller",
        ),
        (
            {**ZERO_1, **BF16, "data_types": {"grad_accum_dtype": "fp16"}},
            "data_types.grad_accum_dtype: must be fp32 or the precision (bf16)",
        ),
        (
            {**ZERO_1, **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
            "data_types.grad_accum_dtype: fp32 with bf16 and ZeRO 1 makes DeepSpeed exchange ZeRO's optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device: nvme needs an op",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights: needs an op"),
    ],
)
def test_combinations_that_train_badly_are_refused_with_the_reason(refusal, content, expected):
    (line,) = refusal(content)
    assert line.startswith(expected)


@pytest.mark.parametrize("content", [{**ZERO_1, **FP16}, {"zero_optimization": {"stage": 2}, **BF16}, ZERO_1])
def test_gradients_may_be_accumulated_in_float32_elsewhere(tmp_path, content):
    load(tmp_path / "x.json", {**content, "data_types": {"grad_accum_dtype": "fp32"}})


def test_fp16_is_refused_on_a_cpu(refusal):
    (line,) = refusal({**ZERO_1, **FP16}, device_type="cpu")
    assert line == "fp16.enabled: fp16 needs a GPU; on a CPU use a bf16 or fp32 config (x.json, line 6)"


def test_optimizer_offload_runs_the_recipes_torch_optimizer_and_no_other(tmp_path, refusal):
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config, _ = load(tmp_path / "x.json", offload)
    assert config["zero_force_ds_cpu_optimizer"] is False
    (line,) = refusal(offload, run=recipe(impl="apex"))
    assert line.startswith("zero_optimization.offload_optimizer: needs optimizer.impl: torch in the recipe")


def test_a_compiled_backbone_is_refused_under_zero_3_alone(tmp_path, refusal):
    run = recipe()
    run = run.model_copy(update={"model": run.model.model_copy(update={"compile": True})})
    (line,) = refusal({"zero_optimization": {"stage": 3}}, run=run)
    assert line.startswith("zero_optimization.stage: 3 gathers each layer's weights in a hook, where torch.compile breaks its graph")
    assert "model.compile=false" in line
    for stage in (1, 2):
        load(tmp_path / "x.json", {"zero_optimization": {"stage": stage}}, run=run)


def test_bfloat16_autocast_is_a_precision_of_its_own(tmp_path):
    _, summary = load(tmp_path / "x.json", {**ZERO_1, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    assert summary == DeepSpeedSummary(1, "bf16_autocast")


def test_the_throughput_timer_that_synchronises_every_step_is_off_unless_asked_for(tmp_path):
    config, _ = load(tmp_path / "x.json", ZERO_1)
    assert config["timers"] == {"throughput": {"enabled": False}}
    config, _ = load(tmp_path / "x.json", {**ZERO_1, "timers": {"throughput": {"enabled": True}}})
    assert config["timers"] == {"throughput": {"enabled": True}}
