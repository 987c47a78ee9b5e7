"""What `inspect` says of the configurations of many families, against counts by hand and against real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_moe.models.inspect import inspect
from ray_moe.models.inspect_build import class_of
from tests import tiny_models
from tests.unit.models.inspect_cases import DENSE, MOE, Case

torch.set_num_threads(1)


def written(case: Case, folder: Path) -> Path:
    """A folder with nothing but the configuration."""
    case.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", MOE, ids=str)
def test_a_mixture_is_told_from_its_configuration(case: Case, tmp_path: Path) -> None:
    found = inspect(written(case, tmp_path))
    anatomy = found.anatomy
    assert found.kind == case.kind
    assert len(anatomy.groups) == case.num_groups
    assert {group.num_experts for group in anatomy.groups} == {case.num_experts}
    assert anatomy.top_k == case.top_k
    model = class_of(case.config)(case.config)
    total = sum(p.numel() for p in model.parameters())
    assert anatomy.total_params == total
    if case.expert_params:
        idle = case.num_groups * (case.num_experts - case.top_k) * case.expert_params
        assert anatomy.active_params == total - idle
        assert anatomy.expert_params == case.num_groups * case.num_experts * case.expert_params


@pytest.mark.parametrize("case", MOE, ids=str)
def test_a_mixture_is_measured_on_its_weights(case: Case) -> None:
    """Every family's own forward, with weights that differ: as many experts as its gate says, whichever they are."""
    torch.manual_seed(0)
    model = class_of(case.config)(case.config).eval()
    tiny_models.randomize(model)
    found = inspect(model)
    assert found.kind == case.kind
    assert found.basis == "forward", found.notes
    assert {k for tokens in found.k_per_token.values() for k in tokens} == {case.top_k}


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_a_dense_model_is_told(case: Case, tmp_path: Path) -> None:
    found = inspect(written(case, tmp_path))
    model = class_of(case.config)(case.config)
    total = sum(p.numel() for p in model.parameters())
    assert (found.kind, found.anatomy.groups) == ("dense", ())
    assert found.anatomy.total_params == found.anatomy.active_params == total
    assert inspect(model).kind == "dense"


def test_jetmoe_has_experts_of_feed_forward_and_of_attention() -> None:
    case = next(case for case in MOE if case.family == "jetmoe")
    anatomy = inspect(class_of(case.config)(case.config)).anatomy
    by_layer = [group.expert_params for group in anatomy.groups]
    attention = 2 * 32 * 8 * 4  # in and out: D x kv_channels x key-value heads
    assert by_layer == [3 * 32 * 48, attention] * 2 or by_layer == [attention, 3 * 32 * 48] * 2


def test_experts_that_compute_nothing_make_a_model_dynamic() -> None:
    """LongCat's gate also chooses among identities (arXiv:2509.01322); their rows in the tensors are never used."""
    case = next(case for case in MOE if case.family == "longcat_flash")
    config = replace(case, arguments=case.arguments | {"zero_expert_num": 4}).config
    torch.manual_seed(0)
    model = class_of(config)(config).eval()
    tiny_models.randomize(model)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.zero_()  # else it would choose the same for all
    found = inspect(model)
    counts = [k for tokens in found.k_per_token.values() for k in tokens]
    assert found.kind == "dynamic_moe"
    assert min(counts) < max(counts) <= 3
    unused = 2 * 4 * 2 * 24 * 32  # layers x identities x rows of a gated projection
    idle = sum((8 - sum(tokens) / len(tokens)) * 3 * 32 * 24 for tokens in found.k_per_token.values())
    assert found.anatomy.active_params == round(found.anatomy.total_params - unused - idle)


@pytest.mark.parametrize(
    ("family", "shared"), [("deepseek_v3", 3 * 32 * 24), ("qwen2_moe", 3 * 32 * 40), ("llama4_text", 3 * 32 * 48)]
)
def test_shared_experts_are_counted(family: str, shared: int) -> None:
    groups = inspect(tiny_models.build(family), measure=False).anatomy.groups
    assert [(group.num_shared, group.shared_params) for group in groups] == [(1, shared)] * len(groups)


def test_layers_are_told_apart() -> None:
    stacks = inspect(tiny_models.build("jamba"), measure=False).anatomy.stacks
    assert [(stack.path, stack.pattern) for stack in stacks] == [("model.layers", "DMDM")]


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "jamba", "llama4_text", "gemma4_text", "qwen3_moe"]
)
@torch.no_grad()
def test_what_generation_keeps_is_what_the_cache_grows_by(family: str) -> None:
    model = tiny_models.build(family)
    ids = torch.arange(3, 6)[None]

    def kept(length: int) -> int:
        layers = model(ids[:, :length], use_cache=True).past_key_values.layers
        both = [
            (layer.keys, layer.values) for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)
        ]
        return sum(part.nbytes for pair in both for part in pair)

    assert inspect(model, measure=False).anatomy.kv_bytes_per_token == kept(3) - kept(2)


@torch.no_grad()
def test_arithmetic_is_what_torch_counts() -> None:
    """Of a dense model; what it does not count are norms."""
    case = next(case for case in DENSE if case.family == "llama")
    model = class_of(case.config)._from_config(case.config, attn_implementation="eager").eval()
    norms = 2 * sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[3]]))
    assert inspect(model).anatomy.flops_per_token(1) == counter.get_total_flops() + norms


def test_a_quantised_model_is_counted_as_it_is_once_loaded(tmp_path: Path) -> None:
    config = tiny_models.config("deepseek_v3")
    config.save_pretrained(tmp_path / "plain")
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    config.save_pretrained(tmp_path / "fp8")
    plain, fp8 = (inspect(tmp_path / name) for name in ("plain", "fp8"))
    assert (fp8.kind, fp8.basis, fp8.anatomy) == (plain.kind, plain.basis, plain.anatomy)


def test_a_network_is_left_as_it_was() -> None:
    model = tiny_models.build("mixtral").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    inspect(model)
    assert model.training
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_checkpoint_is_measured_on_its_own_weights(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path)
    found = inspect(tmp_path)
    assert (found.kind, found.basis, found.servable, found.contradictions) == ("moe", "forward", True, ())
    assert [one.source for one in found.evidence] == ["configuration", "modules", "forward", "weights"]
    assert all(one.says == "moe" for one in found.evidence)
    assert found.notes == ("measured on the checkpoint's own weights",)


def test_the_name_at_the_root_is_this_function() -> None:
    import ray_moe

    assert ray_moe.inspect is inspect
