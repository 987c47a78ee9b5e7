"""Cases in which names, configurations or shapes mislead, and networks that nobody has seen before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_moe import MoELayer
from ray_moe.errors import InvalidCheckpoint, InvalidRequest, NotFound
from ray_moe.models.inspect import inspect
from tests import tiny_models

torch.set_num_threads(1)
D, F, E = 16, 24, 6


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))


class Routed(nn.Module):
    """Somebody's own mixture, a list of experts and a gate, under names that say nothing."""

    def __init__(self, top_k: int = 2, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(expert() for _ in range(E))
        self.chooser = gate or nn.Linear(D, E, bias=False)
        self.how_many = top_k

    def weights(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, E], zero where an expert is not chosen."""
        logits = self.chooser(hidden)
        top, index = logits.topk(self.how_many)
        return torch.zeros_like(logits).scatter(-1, index, top.softmax(-1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self.weights(hidden)
        return sum(weights[..., e, None] * branch(hidden) for e, branch in enumerate(self.branches))


class TopP(Routed):
    """As many experts as it takes to reach a probability: more for some tokens than for others."""

    def weights(self, hidden: torch.Tensor) -> torch.Tensor:
        probabilities = (4 * self.chooser(hidden)).softmax(-1)
        ordered, index = probabilities.sort(-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < 0.7
        return torch.zeros_like(probabilities).scatter(-1, index, ordered * kept)


class ExpertChoice(Routed):
    """Each expert takes two tokens of the batch (arXiv:2202.09368)."""

    def weights(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.chooser(hidden).softmax(-1)
        top, index = scores.topk(2, dim=-2)
        return torch.zeros_like(scores).scatter(-2, index, top)


class Network(nn.Module):
    """A block between layers of a language model."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.block = block
        self.head = nn.Linear(D, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_somebodys_own_mixture_is_measured(whole: bool, top_k: int) -> None:
    torch.manual_seed(0)
    block = Routed(top_k)
    found = inspect(Network(block) if whole else block, torch.randint(50, (1, 16)) if whole else torch.randn(16, D))
    assert (found.kind, found.basis) == ("moe", "forward")
    (group,) = found.anatomy.groups
    assert (group.num_experts, group.top_k, group.hidden_size) == (E, top_k, D)
    assert group.expert_params == sum(p.numel() for p in expert().parameters())
    assert found.anatomy.active_params == found.anatomy.total_params - (E - top_k) * group.expert_params


def test_a_gate_of_another_shape_is_no_hindrance() -> None:
    """Nothing but the measurement tells that these are experts."""
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, E))
    found = inspect(Routed(2, gate), torch.randn(16, D))
    assert (found.kind, found.anatomy.groups[0].top_k) == ("moe", 2)


@pytest.mark.parametrize("block", [TopP, ExpertChoice])
def test_a_number_of_experts_that_varies_is_dynamic(block: type[Routed]) -> None:
    torch.manual_seed(0)
    found = inspect(block(), torch.randn(16, D))
    assert found.kind == "dynamic_moe"
    counts = found.k_per_token["branches"]
    assert len(set(counts)) > 1
    assert found.anatomy.top_k == sum(counts) / len(counts)


def test_a_layer_of_our_own() -> None:
    found = inspect(MoELayer(D, F, E, 2, seed=0))
    assert (found.kind, found.basis, found.anatomy.num_experts, found.anatomy.top_k) == ("moe", "forward", E, 2)


def test_a_mixture_with_one_expert_is_one_and_costs_what_a_dense_model_does(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path, num_local_experts=1, num_experts_per_tok=1)
    found = inspect(tmp_path)
    assert (found.kind, found.anatomy.num_experts, found.anatomy.top_k) == ("moe", 1, 1)
    assert found.anatomy.active_params == found.anatomy.total_params
    assert any("every token uses its one expert" in text for text in found.contradictions)


class NamedExpert(nn.Module):
    """Dense, though its names speak of experts: all of them run, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.experts = nn.ModuleList(expert() for _ in range(E))
        self.expert_norm = nn.LayerNorm(D)
        self.expert_gate = nn.Linear(D, E)  # as a gate would be: here it only classifies

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for each in self.experts:
            hidden = hidden + each(hidden)
        return self.expert_gate(self.expert_norm(hidden))


def test_names_make_no_experts() -> None:
    torch.manual_seed(0)
    found = inspect(NamedExpert())
    assert (found.kind, found.basis) == ("dense", "forward")
    assert any("every token uses all of them" in text for text in found.contradictions)
    assert found.anatomy.active_params == found.anatomy.total_params


def test_names_on_disk_make_no_experts(tmp_path: Path) -> None:
    names = ["embed.weight", "expert_attention.weight", "experts.0.weight", "experts.1.weight"]
    save_file({name: torch.zeros(D, D) for name in names}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert found.kind == "dense"
    assert "3 tensors have the word expert in their names, but no gate" in found.evidence[0].text


class Mixer(nn.Module):
    """An MLP-Mixer (arXiv:2105.01601) with as many blocks as classes: its head has the shape of a gate."""

    def __init__(self, blocks: int = 4, patches: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, D, 8, 8)
        self.blocks = nn.ModuleList(MixerBlock(patches) for _ in range(blocks))
        self.head = nn.Linear(D, blocks)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


class MixerBlock(nn.Module):
    def __init__(self, patches: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(patches, F), nn.ReLU(), nn.Linear(F, patches))
        self.channels = nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.tokens(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.channels(hidden)


@pytest.mark.parametrize("patches", [16, 64])
def test_a_mixer_mixes_tokens_not_experts(patches: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixer(patches=patches)
    found = inspect(model, torch.randn(4, 3, *(32, 32) if patches == 16 else (64, 64)))
    assert (found.kind, found.anatomy.groups) == ("dense", ())
    assert inspect(model).kind == "dense"  # with an input that was guessed
    if patches == 64:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        assert inspect(tmp_path).kind == "dense"


class Heads(nn.Module):
    """Some outputs, each a module of its own and silent for about half of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(D, 1) for _ in range(E))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(hidden).relu() for head in self.heads], -1)


@pytest.mark.parametrize("block", [Heads(), nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))])
def test_relu_makes_no_experts_of_neurons(block: nn.Module) -> None:
    torch.manual_seed(0)
    found = inspect(block, torch.randn(16, D))
    assert (found.kind, found.anatomy.groups) == ("dense", ())


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_weights_count_where_the_configuration_lies(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path)
    rewrite(tmp_path, num_local_experts=8)
    found = inspect(tmp_path)
    assert (found.kind, found.basis, found.anatomy.num_experts) == ("moe", "weights", 6)
    assert any("2 groups of 8" in text and "2 groups of 6" in text for text in found.contradictions)
    assert found.servable is False
    assert found.anatomy.total_params == sum(p.numel() for p in tiny_models.build("mixtral").parameters())


def test_a_mixture_that_says_it_is_dense(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path)
    config = tiny_models.TINY["mixtral"]
    (tmp_path / "config.json").write_text(
        json.dumps({**{k: v for k, v in config.items() if "experts" not in k}, "model_type": "llama"})
    )
    found = inspect(tmp_path)
    assert (found.kind, found.basis, found.anatomy.num_experts) == ("moe", "weights", 6)
    assert any(text.startswith("the configuration by itself says dense") for text in found.contradictions)


def test_a_dense_model_that_says_it_is_a_mixture(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    dense = {k: v for k, v in tiny_models.TINY["mixtral"].items() if "experts" not in k}
    AutoModelForCausalLM.from_config(LlamaConfig(**dense)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**tiny_models.TINY["mixtral"], "model_type": "mixtral"}))
    found = inspect(tmp_path)
    assert (found.kind, found.basis) == ("dense", "weights")
    assert any("the weights count" in text for text in found.contradictions)


def test_words_left_over_in_a_configuration_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**tiny_models.TINY["qwen2_moe"], "mlp_only_layers": [0, 1, 2], "model_type": "qwen2_moe"})
    )
    found = inspect(tmp_path)
    assert found.kind == "dense"
    assert any("configuration by itself says Mixture of Experts" in text for text in found.contradictions)


def test_a_family_that_nobody_knows_is_told_by_its_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "novel", "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3})
    )
    found = inspect(tmp_path / "config.json")
    assert (found.kind, found.basis, found.anatomy.num_experts, found.anatomy.top_k) == ("moe", "configuration", 8, 2)
    assert any("parameters and memory are not known" in note for note in found.notes)


def test_on_the_meta_device_only_shapes_are_seen() -> None:
    with torch.device("meta"):
        found = inspect(Routed())
    assert (found.kind, found.basis) == ("moe", "modules")
    assert found.notes == ("not measured: its weights are on the meta device",)


def test_inputs_that_do_not_fit_are_said() -> None:
    found = inspect(Routed(), torch.randn(3, D + 1))
    assert found.kind == "moe"
    assert "not measured" in found.notes[0]
    assert "give inputs that it takes" in found.notes[0]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="a int is no model"):
        inspect(3)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="there is no file or directory"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(NotFound, match="no model is named"):
        inspect(" ")
    with pytest.raises(InvalidCheckpoint, match="is empty"):
        inspect(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidCheckpoint, match=r"it has notes\.txt"):
        inspect(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="no file that tells"):
        inspect(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match="says nothing of a model"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="not readable JSON"):
        inspect(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(InvalidCheckpoint, match="not a whole safetensors file"):
        inspect(tmp_path / "model.safetensors")
