"""Blocks of the pages: all are sound, and those that need no service run."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_moe import MoELayer
from ray_moe.ops.gates.base import TokenInfo
from ray_moe.ops.optimizers import OptimizerSettings
from tests import pages, tiny_models
from tests.pages import DOCS, README, ROOT

WITH_A_SERVICE = {"tutorial.md", "how-to/autoscale.md", "how-to/train.md", "how-to/upgrade.md"}
"""Pages that tests/ray/test_pages.py runs."""
OF_OTHER_MACHINES = {"deploy.md"}
"""Pages whose commands are for clouds and for root; tests/unit/cluster/test_page.py reads them."""

PAGES = {page.relative_to(ROOT / "docs").as_posix(): page for page in DOCS}


class Network(nn.Module):
    """Two MoE layers of eight experts, of what the pages about methods show parts."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(nn.ModuleDict({"moe": MoELayer(64, 16, 8, **options)}) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = hidden + block["moe"](hidden)
        return hidden


def loss_of(network: Any, hidden: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = network if isinstance(network, torch.Tensor) else network(hidden)
    return out.square().mean()


def of_gates() -> dict[str, Any]:
    """Two models of `transformers`, and tokens."""
    ids = torch.arange(3, 12)[None]
    return {
        "model": tiny_models.build("mixtral"),
        "other": tiny_models.build("mixtral"),
        "ids": ids,
        "TokenInfo": TokenInfo,
    }


def of_balance() -> dict[str, Any]:
    spare = [nn.Parameter(torch.zeros(1))]
    return {"hidden": torch.randn(80, 64), "loss_of": loss_of, "optimizer": torch.optim.SGD(spare)}


def of_training() -> dict[str, Any]:
    """A network, its loop, and the classes that the page names without importing them."""
    model = Network(auxiliary={"load_balancing": 0.01})
    model(torch.randn(4, 64))
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loss_of": loss_of,
        "batch": lambda step: torch.randn(4, 64),
        "validation_loss": lambda: loss_of(model, torch.ones(4, 64)),
        "hidden": torch.randn(4, 64),
        "torch": torch,
        "range": lambda steps: range(3),  # of a thousand
    }
    modules = (
        "methods.evomoe",
        "methods.sparsify",
        "methods.search",
        "gates.dense_to_sparse",
        "gates.hard_concrete",
        "losses",
        "layer",
    )
    for module in modules:
        names |= {name: value for name, value in vars(import_module(f"ray_moe.ops.{module}")).items() if name[0] != "_"}
    return names


def of_quantization() -> dict[str, Any]:
    model = Network()
    return {"model": model, "OptimizerSettings": OptimizerSettings, "torch": torch, "loss": LossOf(model)}


class LossOf:
    """A loss that is computed when it is asked to go backward: the page asks the experts for theirs just before."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def backward(self) -> None:
        loss_of(self._network, torch.randn(4, 64)).backward()


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "methods/gates.md": of_gates,
    "methods/balance.md": of_balance,
    "methods/training.md": of_training,
    "methods/quantization.md": of_quantization,
}
"""Names that a page takes for granted."""


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_is_sound(page: Path, tmp_path: Path) -> None:
    for block in pages.blocks(page):
        pages.check(block, tmp_path)


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_block_is_overlooked(page: Path) -> None:
    assert len(pages.blocks(page)) == len(re.findall(r"^```\w+", page.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", sorted(PAGES.keys() - WITH_A_SERVICE - OF_OTHER_MACHINES))
def test_pages_without_a_service_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    pages.run(PAGES[name], GIVEN.get(name, dict)())
