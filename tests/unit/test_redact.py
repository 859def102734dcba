"""No secret of a recipe, an override or a DeepSpeed config reaches a file of the run, the log or an error message."""

import json
from types import SimpleNamespace

import pytest
import torch

from train.config import ConfigError, load_run_config
from train.dist import Ranks
from train.document import read_json, show
from train.ds_config import DeepSpeedSummary
from train.redact import redact
from train.report import announce

RECIPE = """\
output: {output}
data: {{path: "s3://AKIA:hunter2/x+y@bucket.example/faces?sig=hunter2&part=3"}}
stages: [{{name: a, steps: 1}}]
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:hunter2@host:8080/set", "https://***@host:8080/set"),
        ("s3:/user:hunter2@host/set", "s3:/***@host/set"),  # as pathlib writes it
        ("https://hunter2@host/set", "https://***@host/set"),
        ("s3://key:hun/ter@2@host/set", "s3://***@host/set"),
        ("git+ssh://u:hunter2@h/a: no such file, nor is https://u:hunter2@h/b", "git+ssh://***@h/a: no such file, nor is https://***@h/b"),
        ("https://h/a?X-Amz-Signature=hunter2&part=3", "https://h/a?X-Amz-Signature=***&part=3"),
        ("https://h/a?part=3&token=hunter2#top", "https://h/a?part=3&token=***#top"),
        ("https://h/a?sv=1&sig=hunter2%3D", "https://h/a?sv=1&sig=***"),
        ("https:/h/a?X-Amz-Credential=AKIA/2026/s3;AWSAccessKeyId=AKIA", "https:/h/a?X-Amz-Credential=***;AWSAccessKeyId=***"),
        ("https://h/a#access_token=hunter2", "https://h/a#access_token=***"),
        ("asked for '/mnt/a?api_key=hunter2'", "asked for '/mnt/a?api_key=***'"),
        ("--password=hunter2", "--password=***"),
    ],
)
def test_secrets_in_texts_are_hidden_and_the_rest_stays(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/data/faces@2x/train.rec",
        "metrics at http://127.0.0.1:9400/metrics, http://127.0.0.1:9401/metrics",
        "https://host/a/b?page=3&design=flat&monkey=1",
        "rank 1: user@host: no such file",
        "stage early: steps 1 to 4, unified m1 1 m2 0.3, sample_rate 0.5",
        "resume=auto; key=value",
    ],
)
def test_texts_without_secrets_stay_as_they_are(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "key", ["token", "HF_TOKEN", "secret", "clientSecret", "password", "passwd", "api_key", "apiKey", "api-key", "credentials"]
)
def test_values_under_keys_that_say_so_are_hidden_whatever_they_are(key):
    for value in ("hunter2", 1234, True, ["hunter2"], {"a": "hunter2"}):
        assert redact({"data": [{key: value, "path": "p"}]}) == {"data": [{key: "***", "path": "p"}]}
    assert redact({key: None}) == {key: None}


def test_what_is_given_is_not_changed():
    value = {"a": ["https://u:p@h"], "token": {"b": 1}}
    redact(value)
    assert value == {"a": ["https://u:p@h"], "token": {"b": 1}}


def test_values_are_shown_without_secrets():
    assert show("s3://u:hunter2@h/" + 60 * "a") == f'"s3://***@h/{45 * "a"}...'
    assert show({"password": "hunter2", "n": 1}) == '{"password": "***", "n": 1}'


@pytest.mark.parametrize(
    "override",
    [
        "seed=s3://u:hunter2@h/x",
        "seed={password: hunter2}",
        "head={token: hunter2}",
        "model.name=https://u:hunter2@h",
        "output.x.token=hunter2",
        "output.token.x.y=1",
        "eval.password=[hunter2 and hunter2",
        "data..token=hunter2 hunter2",
        "api_key=hunter2",
    ],
)
def test_errors_about_overrides_do_not_repeat_secrets(override, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(output="{token: {x: hunter2}}"))
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path / "recipe.yaml", [override])
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).count("***") >= 1


def test_errors_about_files_do_not_repeat_secrets(tmp_path):
    (tmp_path / "ds.json").write_text('["https://u:hunter2@h", {"secret": "hunter2"}]')
    with pytest.raises(ConfigError, match=r'got \["https://\*\*\*@h", \{"secret": "\*\*\*"\}\]'):
        read_json(tmp_path / "ds.json")


def test_a_run_writes_and_says_nothing_secret(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(output=tmp_path / "run"))
    cfg = load_run_config(tmp_path / "recipe.yaml")
    cfg.output.mkdir()
    ranks = Ranks(0, 0, 1, 1, torch.device("cpu"))
    stages = SimpleNamespace(stage=SimpleNamespace(images_per_step=8, steps_per_epoch=2), total_steps=1)
    run = SimpleNamespace(
        cfg=cfg,
        ranks=SimpleNamespace(is_first=True, world_size=1, device=ranks.device, say=ranks.say, gather=lambda port: [port]),
        batches=SimpleNamespace(num_images=16, num_classes=4),
        engine=SimpleNamespace(module=torch.nn.Linear(2, 2)),
        metrics=SimpleNamespace(port=9400),
        stages=stages,
    )
    announce(run, {"bf16": {"enabled": True}, "x": {"api_key": "hunter2"}, "url": "https://u:hunter2@h"}, DeepSpeedSummary(1, "bf16"))
    said = capsys.readouterr().out
    written = [(cfg.output / name).read_text() for name in ("recipe.yaml", "ds_config.json")]
    assert "16 images of 4 identities in s3:/***@bucket.example/faces?sig=***&part=3" in said
    assert "path: s3:/***@bucket.example/faces?sig=***&part=3\n" in written[0]
    assert json.loads(written[1]) == {"bf16": {"enabled": True}, "x": {"api_key": "***"}, "url": "https://***@h"}
    assert not [text for text in (said, *written) if "hunter2" in text or "AKIA" in text]
