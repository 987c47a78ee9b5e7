"""`ray-moe inspect`: what it prints for people and for programs, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, NllbMoeConfig
from typer.testing import CliRunner, Result

from ray_moe.cli.commands import commands
from ray_moe.config_sources import load_config
from ray_moe.models.huggingface import Checkpoint
from tests import tiny_models
from tests.unit.models import gguf_files


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["inspect", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_models.save("deepseek_v3", tmp_path / "model")
    return tmp_path / "model"


def test_a_person_reads_what_it_is_and_why(model: Path) -> None:
    result = run(model, "--hosts", 4)
    assert result.exit_code == 0, result.output
    out = " ".join(result.stdout.split())
    assert "(deepseek_v3): hybrid (dense and Mixture-of-Experts layers)" in out
    assert "forward (decides) hybrid 1 layer run with 16 tokens: each token uses 3 of the experts" in out
    assert "experts 8 × 1" in out
    assert "k, experts per token 3 (measured: 3)" in out
    assert "shared experts 1" in out
    assert "layers of model.layers D M (M experts, D dense, . neither)" in out
    assert "note: measured on the checkpoint's own weights" in out
    assert "against it" not in out


def test_a_program_reads_the_same(model: Path) -> None:
    told = json.loads(run(model, "--json").stdout)
    checkpoint = Checkpoint.open(model)
    (layer,) = checkpoint.layers.values()
    assert (told["kind"], told["basis"], told["servable"]) == ("hybrid", "forward", True)
    assert told["anatomy"]["expert_params"] == layer.num_experts * layer.expert_bytes // 4
    assert told["anatomy"]["memory"]["num_hosts"] == 8
    assert told["anatomy"]["memory"]["expert_bytes"] == layer.expert_bytes
    parameters = tiny_models.build("deepseek_v3").named_parameters()
    backbone_bytes = sum(p.nbytes for name, p in parameters if not name.startswith(layer.path))
    assert told["anatomy"]["memory"]["router_bytes"] == backbone_bytes
    assert {one["source"] for one in told["evidence"]} == {"forward", "weights", "modules", "configuration"}


@pytest.mark.parametrize("hosts", [1, 3, 100])
def test_the_suggested_configuration_is_one(model: Path, tmp_path: Path, hosts: int) -> None:
    text = json.loads(run(model, "--json", "--hosts", hosts).stdout)["deployment"]
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml").config
    assert config.model == str(model)
    assert config.experts.num_actors == min(hosts, 8)
    assert config.router.kv_cache_bytes >= 2**30
    assert text in run(model, "--hosts", hosts).stdout


def test_it_can_be_told_not_to_measure(model: Path) -> None:
    told = json.loads(run(model, "--json", "--no-measure").stdout)
    assert (told["basis"], told["notes"]) == ("weights", ["not measured, as was asked for"])
    assert told["anatomy"]["groups"][0]["top_k"] == 3


def test_a_dense_model_has_no_configuration_to_serve(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=96).save_pretrained(tmp_path)
    result = run(tmp_path / "config.json")
    assert result.exit_code == 0
    assert "(llama): dense" in result.stdout
    assert "ray-moe serve" not in result.stdout
    assert json.loads(run(tmp_path, "--json").stdout)["deployment"] == ""


def test_what_is_not_served_has_no_configuration(tmp_path: Path) -> None:
    NllbMoeConfig(d_model=32, encoder_layers=4, decoder_layers=4, num_experts=4).save_pretrained(tmp_path)
    told = json.loads(run(tmp_path, "--json", "--no-measure").stdout)
    assert (told["kind"], told["servable"], told["deployment"]) == ("hybrid", False, "")
    assert "nllb-moe models cannot be served" in told["not_servable"]


def test_of_a_configuration_alone_the_folder_is_served(model: Path) -> None:
    (model / "model.safetensors").unlink()
    told = json.loads(run(model / "config.json", "--json", "--no-measure").stdout)
    assert told["servable"] is None
    assert told["deployment"].startswith(f'model: "{model}"\n')


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    out = " ".join(run(gguf_files.mixtral(tmp_path / "m.gguf")).stdout.split())
    assert "(llama): Mixture of Experts" in out
    assert "weights (decides) moe 14 tensors (GGUF): 2 groups of 8 routed experts" in out


def test_what_speaks_against_it_is_shown(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"n_routed_experts": 4, "n_group": 2}))
    out = " ".join(run(model).stdout.split())
    assert "against it: the configuration describes 1 group of 4 routed experts" in out
    assert "ray-moe does not serve it:" in out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nowhere", "there is no file or directory"),
        (lambda folder: folder, "is no model: it has neither config.json nor safetensors or GGUF files (it is empty)"),
        (lambda folder: "", "no model is named"),
    ],
)
def test_what_is_no_model_is_an_error_of_the_user(tmp_path: Path, make, said: str) -> None:
    result = run(make(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_a_broken_file_is_named(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run(model)
    assert result.exit_code == 2
    assert "model.safetensors is truncated" in result.stderr


def test_a_name_that_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("nobody/has-this-model")
    assert result.exit_code == 2
    assert "'nobody/has-this-model' is neither a directory nor a model that could be had" in result.stderr
