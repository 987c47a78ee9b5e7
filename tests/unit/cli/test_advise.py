"""`ray-moe advise`: numbers with their rules, a configuration that is valid, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from ray_moe.cli.commands import commands
from ray_moe.config_sources import load_config
from tests import tiny_models
from tests.unit.models import gguf_files


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["advise", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_models.config("mixtral").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_each_number_has_its_rule(model: Path) -> None:
    result = run(model, "--hosts", 3, "--memory", "2GiB", "--price", 1.5, "--requests", 2)
    assert result.exit_code == 0, result.output
    out = " ".join(result.stdout.split())
    for name in ("experts per actor", "replicas", "top-k", "capacity factor", "balance-loss weight", "cost"):
        assert name in out
    assert "1.50 per hour" in out


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_configuration_is_valid_and_says_the_same(model: Path, tmp_path: Path, device: str) -> None:
    result = run(model, "--hosts", 3, "--memory", "2GiB", "--device", device, "--flops", 1e6, "--skew", 1.5, "--json")
    told = json.loads(result.stdout)
    (tmp_path / "config.yaml").write_text(told["deployment"])
    config = load_config(tmp_path / "config.yaml").config
    assert told["num_actors"] == config.experts.num_actors == 3
    assert config.experts.spare_slots == told["spare_slots"]
    assert config.router.kv_cache_bytes >= told["kv_cache_bytes"]
    assert bool(config.experts.num_gpus) == (device == "gpu")
    assert told["replicas"][0] > told["replicas"][-1]
    assert len(told["rules"]) == 13
    assert "this traffic needs about" in told["warnings"][0]


def test_k_is_asked_for_where_the_file_does_not_tell_it(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path)
    (tmp_path / "config.json").unlink()
    assert "say it with --top-k" in run(tmp_path).stderr
    assert json.loads(run(tmp_path, "--top-k", 2, "--json").stdout)["top_k"] == 2


def test_a_gguf_file_is_advised_on(tmp_path: Path) -> None:
    assert json.loads(run(gguf_files.mixtral(tmp_path / "m.gguf"), "--json").stdout)["experts_per_actor"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "much"], "--memory is 'much'; expected a size such as 16GiB"),
        (["--bandwidth", "1 furlong"], "--bandwidth is '1 furlong'"),
        (["--device", "tpu"], "--device is 'tpu'; expected one of cpu, gpu"),
        (["--hosts", "0"], "the number of hosts is 0"),
        (["--memory", "100MiB"], "the router needs"),
        (["--top-k", "7"], "top-k is 7; with 6 experts it can be 1 to 6"),
    ],
)
def test_what_cannot_be_is_refused(model: Path, options: list[str], said: str) -> None:
    result = run(model, *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=96).save_pretrained(tmp_path)
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "this model is dense" in result.stderr


def test_a_model_that_is_not_there() -> None:
    result = run("/nowhere/at/all")
    assert result.exit_code == 2
    assert "there is no file or directory" in result.stderr
