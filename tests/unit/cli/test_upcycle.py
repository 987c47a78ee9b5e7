"""`ray-moe upcycle` and `ray-moe merge`: from dense checkpoints to one that transformers and ray-moe load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ray_moe.cli.commands import commands
from ray_moe.cli.upcycle import format_count
from ray_moe.models.huggingface import Checkpoint
from tests import tiny_dense, tiny_models
from tests.tiny_dense import logits


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, list(map(str, arguments)))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_dense.save("llama", tmp_path / "dense", vocab_size=260)
    tiny_models.save_tokenizer(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_dense_model_becomes_experts(dense: Path, tmp_path: Path) -> None:
    result = run("upcycle", dense, tmp_path / "moe", "--experts", 4, "--top-k", 1)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'moe'}: mixtral, ")
    assert lines[1].split() == "experts 4 of width 64 in 3 of 3 layers, 1 for each token".split()
    assert lines[2].split() == "parameters 45.4 k before, 101.1 k (45.8 k active) after".split()
    assert lines[3].split() == "computes as the dense model, but for rounding".split()
    assert "writing: " in result.stderr
    torch.testing.assert_close(
        logits(tiny_dense.load(tmp_path / "moe")), logits(tiny_dense.load(dense)), rtol=0, atol=5e-6
    )
    assert Checkpoint.open(tmp_path / "moe").load_tokenizer() is not None


def test_every_option_reaches_the_model(dense: Path, tmp_path: Path) -> None:
    options = "--experts 8 --top-k 4 --parts 2 --noise 0.01 --reinit 0.5 --shared --layers last:1 --gate-std 0.5"
    result = run("upcycle", dense, tmp_path / "moe", *options.split(), "--seed", 3, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    assert "8 of width 32 and a shared one of width 64 in 1 of 3 layers, 4 for each token" in result.stdout
    assert "something new: train it" in result.stdout
    model = tiny_dense.load(tmp_path / "moe")
    assert model.dtype == torch.bfloat16
    assert model.config.mlp_only_layers == [0, 1]
    gate = model.model.layers[2].mlp.gate.weight
    assert 0.3 < gate.std() < 0.7
    assert len(gate.unique(dim=0)) == 4
    again = run("upcycle", dense, tmp_path / "again", *options.split(), "--seed", 4, "--dtype", "bfloat16")
    assert again.exit_code == 0
    assert not torch.equal(tiny_dense.load(tmp_path / "again").model.layers[2].mlp.gate.weight, gate)


def test_wrong_input_is_one_line_and_writes_nothing(dense: Path, tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path / "sparse")
    wrong = [
        ((tmp_path / "nowhere",), "there is no directory"),
        ((tmp_path / "sparse",), "no MoE family of transformers is known to have the block of mixtral models"),
        ((dense, "--experts", "1"), "num_experts is 1; expected 2 or more"),
        ((dense, "--layers", "odd"), "layers is 'odd'; expected all, every:N"),
        ((dense, "--dtype", "int4"), "--dtype is 'int4'; expected one of float32, bfloat16, float16"),
    ]
    for (model, *options), said in wrong:
        result = run("upcycle", model, tmp_path / "moe", *options)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_a_checkpoint_is_replaced_only_by_force(dense: Path, tmp_path: Path) -> None:
    assert run("upcycle", dense, tmp_path / "moe").exit_code == 0
    result = run("upcycle", dense, tmp_path / "moe", "--experts", 4)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "have it replaced (--force)" in result.stderr
    assert run("upcycle", dense, tmp_path / "moe", "--experts", 4, "--force").exit_code == 0
    assert Checkpoint.open(tmp_path / "moe").num_experts == 4


def test_dense_models_become_the_experts_of_one(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_dense.save("llama", other, seed=1, vocab_size=260)
    for name in ("code", "law"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nmore of {name}\n")
    files = [tmp_path / "code.txt", tmp_path / "law.txt"]
    options = ["--top-k", 1, "--backbone", "first", "--prompts", files[0], "--prompts", files[1], "--dtype", "float16"]
    result = run("merge", dense, other, "--out", tmp_path / "moe", *options)
    assert result.exit_code == 0, result.stderr
    assert "experts     2 of width 64 in 3 of 3 layers, 1 for each token" in result.stdout
    model = tiny_dense.load(tmp_path / "moe")
    assert model.dtype == torch.float16
    assert torch.allclose(model.model.layers[1].mlp.gate.weight.float().norm(dim=1), torch.ones(2), atol=1e-2)
    random = run("merge", dense, other, "--out", tmp_path / "random", "--gate-std", "0.5", "--seed", 1)
    assert random.exit_code == 0, random.stderr
    assert 0.3 < tiny_dense.load(tmp_path / "random").model.layers[1].mlp.gate.weight.std() < 0.7


def test_models_that_do_not_go_together_are_one_line(dense: Path, tmp_path: Path) -> None:
    tiny_dense.save("llama", tmp_path / "deeper", num_hidden_layers=4, vocab_size=260)
    wrong = [
        ((dense,), "1 models were named; expected 2 or more to merge"),
        ((dense, tmp_path / "deeper"), "is of another architecture"),
        ((dense, dense, "--top-k", 3), "top_k is 3; expected 1 to 2"),
        ((dense, dense, "--prompts", tmp_path / "nowhere.txt"), "prompts cannot be read"),
    ]
    for arguments, said in wrong:
        result = run("merge", *arguments, "--out", tmp_path / "moe")
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert said in line
    assert not (tmp_path / "moe").exists()


def test_counts_are_short() -> None:
    assert [format_count(n) for n in (12, 40_160, 7_240_000_000, 2.5e12)] == ["12", "40.2 k", "7.2 B", "2.5 T"]
