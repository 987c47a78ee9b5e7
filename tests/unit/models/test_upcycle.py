"""Upcycling: what comes out is a model of `transformers` that begins where the dense one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ray_moe
from ray_moe.errors import InvalidCheckpoint, InvalidConfig, NotFound, UnsupportedModel
from ray_moe.models.ffn import FFN, gate_rows, noisy, reinitialised, scaled, seeded
from ray_moe.models.huggingface import Checkpoint
from ray_moe.models.layer_choice import chosen_layers
from ray_moe.models.sharded import ShardWriter
from ray_moe.models.upcycle import UpcycleSettings, upcycle
from tests import tiny_dense, tiny_models
from tests.tiny_dense import logits

COPIES: dict[str, Any] = {"num_experts": 4, "top_k": 1}
PARTS: dict[str, Any] = {"num_experts": 8, "parts": 4, "top_k": 4}
"""Two copies of four parts each."""


def made(dense: Path, out: Path, **settings: Any) -> Any:
    """Upcycle, and load what came out by `transformers` alone."""
    upcycle(dense, out, UpcycleSettings(**settings))
    return tiny_dense.load(out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# --- The function of the dense model ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "becomes", "settings"),
    [
        *((family, becomes, settings) for family, becomes in [
            ("llama", "mixtral"),
            ("mistral", "mixtral"),
            ("qwen2", "qwen2_moe"),
            ("qwen3", "qwen3_moe"),
            ("olmo2", "flex_olmo"),
        ] for settings in (COPIES, {"num_experts": 4, "top_k": 3}, PARTS, {**PARTS, "top_k": 8})),
        ("llama", "qwen2_moe", {**COPIES, "shared": True, "layers": "1"}),
        ("qwen2", "qwen2_moe", {**PARTS, "shared": True, "layers": "every:2"}),
        ("qwen3", "qwen3_moe", {**COPIES, "layers": "0,2"}),
        ("qwen3", "glm4_moe", {**PARTS, "shared": True, "layers": "last:2"}),
    ],
)  # fmt: skip
def test_the_logits_are_those_of_the_dense_model(family, becomes, settings, tmp_path: Path) -> None:
    dense = tiny_dense.save(family, tmp_path / "dense")
    moe = made(tmp_path / "dense", tmp_path / "moe", **settings)
    assert moe.config.model_type == becomes
    # Float32: products of other shapes are summed in another order, and k weights sum to 1 within an ulp.
    torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=5e-6)
    assert logits(dense).abs().max() > 1  # the model says something


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_in_float64_only_the_order_of_sums_is_left(family: str, tmp_path: Path) -> None:
    dense = tiny_dense.save(family, tmp_path / "dense").double()
    moe = made(tmp_path / "dense", tmp_path / "moe", **COPIES).double()
    moe.set_experts_implementation("eager")
    torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=1e-13)


def test_one_chosen_copy_gives_the_same_bits_in_bfloat16(tmp_path: Path) -> None:
    dense = tiny_dense.save("mistral", tmp_path / "dense", torch.bfloat16)
    moe = made(tmp_path / "dense", tmp_path / "moe", **COPIES)
    assert moe.dtype == torch.bfloat16
    assert torch.equal(logits(moe), logits(dense))


def test_generation_goes_on_as_the_dense_model_does(tmp_path: Path) -> None:
    dense = tiny_dense.save("mistral", tmp_path / "dense")
    moe = made(tmp_path / "dense", tmp_path / "moe", **COPIES)
    tokens = [
        model.generate(tiny_dense.PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
        for model in (dense, moe)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),  # used by no layer
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
        ("qwen3", {"attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
        ("qwen2", {"head_dim": 16}),
        ("llama", {"hidden_act": "gelu"}),
    ],
)
def test_settings_are_carried_over(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_dense.save(family, tmp_path / "dense", **changes)
    torch.testing.assert_close(logits(made(tmp_path / "dense", tmp_path / "moe")), logits(dense), rtol=0, atol=5e-6)


def test_ray_moe_opens_it_and_counts_what_the_model_has(tmp_path: Path) -> None:
    tiny_dense.save("qwen3", tmp_path / "dense")
    result = upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**PARTS, layers="last:2"))
    checkpoint = Checkpoint.open(tmp_path / "moe")
    assert {path: spec.num_experts for path, spec in checkpoint.layers.items()} == {
        f"model.layers.{layer}.mlp.experts": 8 for layer in (1, 2)
    }
    dense, moe = (sum(p.numel() for p in tiny_dense.load(tmp_path / n).parameters()) for n in ("dense", "moe"))
    assert (result.before.total, result.before.active, result.after.total) == (dense, dense, moe)
    # A token meets half of the experts of both layers: each is a quarter of a network of 3 · 32 · 64 weights.
    assert result.after.total - result.after.active == 2 * 4 * (3 * 32 * 64 // 4)


# --- Methods ---------------------------------------------------------------------------------------------------------
def small(width: int = 40, hidden: int = 6) -> FFN:
    return FFN(*(torch.randn(size) for size in ((width, hidden), (width, hidden), (hidden, width))))


def run(ffn: FFN, x: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)) @ ffn.down.T


def test_reinitialised_neurons_are_the_same_in_all_matrices_and_have_their_statistics() -> None:
    ffn = FFN(torch.randn(400, 50) + 3, torch.randn(400, 50) * 0.1, torch.randn(50, 400) * 2 - 1)
    new = reinitialised(ffn, 0.25, seeded(0))
    changed = [(a != b).any(1) for a, b in ((ffn.gate, new.gate), (ffn.up, new.up), (ffn.down.T, new.down.T))]
    assert changed[0].sum() == 100
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    dropped = changed[0]
    for old, fresh in ((ffn.gate[dropped], new.gate[dropped]), (ffn.down[:, dropped], new.down[:, dropped])):
        assert not (old == fresh).any()
        assert abs(fresh.mean() - old.mean()) < 0.1
        assert abs(fresh.std() / old.std() - 1) < 0.05
    assert reinitialised(ffn, 0.0, seeded(0)) is ffn


def test_noise_is_relative_to_each_matrix() -> None:
    ffn = FFN(torch.randn(64, 64), 100 * torch.randn(64, 64), torch.randn(64, 64))
    new = noisy(ffn, 0.01, seeded(0))
    assert abs((new.gate - ffn.gate).std() - 0.01) < 0.001
    assert abs((new.up - ffn.up).std() - 1) < 0.1
    assert noisy(ffn, 0.0, seeded(0)) is ffn


def test_a_factor_is_on_the_output() -> None:
    ffn, x = small(), torch.randn(5, 6)
    torch.testing.assert_close(run(scaled(ffn, 4.0), x), 4 * run(ffn, x))


def test_rows_of_a_virtual_group_are_one_row() -> None:
    rows = gate_rows(6, 3, 8, 0.5, seeded(1))
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[3], rows[5])
    assert not torch.equal(rows[0], rows[3])


def test_parts_are_chosen_together_and_copies_are_not(tmp_path: Path) -> None:
    tiny_dense.save("mistral", tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**PARTS))
    upcycle(tmp_path / "dense", tmp_path / "some", UpcycleSettings(**{**PARTS, "top_k": 3}))
    name = "model.layers.0.block_sparse_moe.gate.weight"
    rows = weights(tmp_path / "moe")[name]
    assert len(rows.unique(dim=0)) == 2
    assert len(weights(tmp_path / "some")[name].unique(dim=0)) == 8  # three of four parts: each for itself
    assert abs(rows.std() - 0.02) < 0.01
    held = weights(tmp_path / "moe")
    down = weights(tmp_path / "dense")["model.layers.1.mlp.down_proj.weight"]
    for number in range(8):
        part = held[f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight"]
        assert torch.equal(part, 4 * down[:, 16 * (number % 4) : 16 * (number % 4 + 1)])


@pytest.mark.parametrize("method", [{"noise": 0.02}, {"reinit": 0.5}])
def test_experts_differ_from_each_other_and_from_the_dense_network(method: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_dense.save("qwen3", tmp_path / "dense")
    result = upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**COPIES, **method))
    assert not result.same_function
    held, original = weights(tmp_path / "moe"), weights(tmp_path / "dense")["model.layers.0.mlp.up_proj.weight"]
    experts = [held[f"model.layers.0.mlp.experts.{number}.up_proj.weight"] for number in range(4)]
    assert all(not torch.equal(a, b) for a, b in zip(experts, [*experts[1:], original], strict=True))
    distance = (logits(tiny_dense.load(tmp_path / "moe")) - logits(dense)).abs().mean()
    assert 1e-3 < distance < 1


def test_an_idle_shared_expert_stays_idle_in_training(tmp_path: Path) -> None:
    tiny_dense.save("qwen2", tmp_path / "dense")
    moe = made(tmp_path / "dense", tmp_path / "moe")
    moe(tiny_dense.PROMPT, labels=tiny_dense.PROMPT).loss.backward()
    idle = {name: p for name, p in moe.named_parameters() if ".shared_expert" in name}
    assert len(idle) == 3 * 4
    assert all(not p.any() and not p.grad.any() for p in idle.values())
    assert all(p.grad.any() for name, p in moe.named_parameters() if ".experts." in name)


def test_shared_and_routed_experts_each_give_half(tmp_path: Path) -> None:
    tiny_dense.save("qwen3", tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**COPIES, shared=True))
    held, dense = weights(tmp_path / "moe"), weights(tmp_path / "dense")
    down = dense["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(held["model.layers.0.mlp.experts.3.down_proj.weight"], down / 2)
    assert torch.equal(held["model.layers.0.mlp.shared_experts.down_proj.weight"], down / 2)


# --- Files -----------------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    tiny_dense.save("llama", tmp_path / "dense")
    files = []
    for number, seed in enumerate((1, 1, 2)):
        upcycle(tmp_path / "dense", tmp_path / str(number), UpcycleSettings(reinit=0.5, noise=0.1, seed=seed))
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_shards_a_dtype_and_what_is_copied(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_dense.save("mistral", dense, torch.bfloat16)
    tiny_models.save_tokenizer(dense, chat_template="{{ messages }}")
    (dense / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    told: list[tuple[int, int]] = []
    result = upcycle(
        dense,
        tmp_path / "moe",
        UpcycleSettings(dtype=torch.float32),
        max_file_bytes=100_000,
        on_progress=lambda done, total: told.append((done, total)),
    )
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert all(file.stat().st_size < 120_000 for file in files)
    assert index["weight_map"].keys() == weights(tmp_path / "moe").keys()
    assert {tensor.dtype for tensor in weights(tmp_path / "moe").values()} == {torch.float32}
    assert tiny_dense.load(tmp_path / "moe").dtype == torch.float32
    assert told[-1] == (result.num_bytes, result.num_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()


def test_one_expert_after_the_other_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_dense.save("mistral", tmp_path / "dense", vocab_size=8)
    sizes: list[int] = []
    put = ShardWriter.put

    def watched(self: Any, tensors: dict[str, torch.Tensor]) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        put(self, tensors)

    monkeypatch.setattr(ShardWriter, "put", watched)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**PARTS))
    assert max(sizes) == 3 * 32 * 16 * 4


def test_a_folder_that_is_taken_stays_as_it_is(tmp_path: Path) -> None:
    tiny_dense.save("mistral", tmp_path / "dense")
    before = (tmp_path / "dense" / "model.safetensors").read_bytes()
    with pytest.raises(InvalidConfig, match="holds the checkpoint that the model comes from"):
        upcycle(tmp_path / "dense", tmp_path / "dense", overwrite=True)
    upcycle(tmp_path / "dense", tmp_path / "moe")
    with pytest.raises(InvalidConfig, match=r"there is a checkpoint in .*--force"):
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(seed=1))
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(num_experts=2, top_k=1), overwrite=True)
    assert tiny_dense.load(tmp_path / "moe").config.num_local_experts == 2
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == before


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    tiny_dense.save("mistral", tmp_path / "dense")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(tmp_path / "dense", tmp_path / "moe", on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# --- Refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes", "settings", "said"),
    [
        ("llama", {"attention_bias": True}, {}, "mixtral has no place for attention_bias = True"),
        ("llama", {"mlp_bias": True}, {}, "mixtral has no place for mlp_bias = True"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, {}, "no sliding window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {}, "same sliding window"),
        ("mistral", {}, {"shared": True}, "mixtral has no shared expert"),
        ("olmo2", {}, {"layers": "last:1"}, "in flex_olmo every layer is MoE"),
        ("qwen3", {}, {"shared": True, "layers": "0"}, "only the first layers can stay dense"),
        ("olmo", {"rms_norm_eps": 1e-5}, {}, r"no MoE family .* block of olmo models: OLMo's norms have no weights"),
        (
            "gemma",
            {"head_dim": 16},
            {},
            r"no MoE family .* block of gemma models: dense families that become MoE are llama",
        ),
        ("gpt2", {"n_layer": 1, "n_embd": 32, "n_head": 2}, {}, "block of gpt2 models"),
        ("mixtral", {}, {}, "block of mixtral models"),
        ("mistral", {}, {"num_experts": 9, "parts": 3}, r"64, cut into 3 parts leaves a remainder"),
        ("mistral", {}, {"num_experts": 32, "parts": 32}, r"rows of 8 bytes; .* multiple of 16"),
    ],
)
def test_what_would_compute_something_else_is_refused(family, changes, settings, said, tmp_path: Path) -> None:
    tiny_dense.save(family, tmp_path / "dense", **changes)
    with pytest.raises((UnsupportedModel, InvalidConfig), match=said):
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleSettings(**settings))
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_experts": 1}, "num_experts is 1; expected 2 or more"),
        ({"top_k": 0}, "top_k is 0; expected 1 to 8"),
        ({"top_k": 9}, "top_k is 9; expected 1 to 8"),
        ({"parts": 3}, "parts is 3; expected a divisor of num_experts, 8"),
        ({"parts": 0}, "parts is 0"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"reinit": 1.5}, "reinit is 1.5"),
        ({"gate_std": -1.0}, "gate_std is -1.0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        UpcycleSettings(**settings)


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        upcycle(tmp_path / "nowhere", tmp_path / "moe")
    tiny_dense.save("mistral", tmp_path / "dense")
    file, held = tmp_path / "dense" / "model.safetensors", weights(tmp_path / "dense")

    def with_tensors(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file, metadata={"format": "pt"})

    up = "model.layers.2.mlp.up_proj.weight"
    with_tensors({name: tensor for name, tensor in held.items() if name != up})
    with pytest.raises(InvalidCheckpoint, match=f"lacks 1 tensors of the model: {up}"):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    with_tensors({**held, up: held[up][:-1].contiguous()})
    with pytest.raises(InvalidCheckpoint, match=f"{up} .* has shape .63, 32."):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    with_tensors({**held, "model.layers.0.self_attn.sinks": torch.zeros(4)})
    with pytest.raises(UnsupportedModel, match="sinks"):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    with_tensors({**held, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    upcycle(tmp_path / "dense", tmp_path / "moe")  # what early versions wrote, and nobody reads
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"is quantised; .*dequantize"):
        upcycle(tmp_path / "dense", tmp_path / "other")


# --- Which layers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("every:2", (1, 3, 5)),
        ("every:4", (3,)),
        ("last:2", (4, 5)),
        ("last:6", (0, 1, 2, 3, 4, 5)),
        ("3", (3,)),
        ("4, 0-2,1", (0, 1, 2, 4)),
    ],
)
def test_layers_by_name(text: str, layers: tuple[int, ...]) -> None:
    assert chosen_layers(text, 6) == layers


@pytest.mark.parametrize(
    "text", ["", "none", "every:0", "every:7", "last:7", "6", "3-9", "4-2", "-1", "every:x", "1,,2"]
)
def test_layers_that_are_not_there(text: str) -> None:
    with pytest.raises(InvalidConfig, match="layers is"):
        chosen_layers(text, 6)


def test_it_is_at_the_root() -> None:
    assert ray_moe.upcycle is upcycle
    assert ray_moe.UpcycleSettings is UpcycleSettings
