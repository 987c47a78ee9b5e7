"""The balancers of others, as their authors wrote them, imported from a folder beside the repository.

None of their code is here. A folder with these files serves `benchmarks/balance.py --originals DIR`:

- `DIR/eplb.py`: https://github.com/deepseek-ai/EPLB (eplb.py);
- `DIR/vllm/{abstract,default}.py`: https://github.com/vllm-project/vllm (vllm/distributed/eplb/policy);
- `DIR/vllm_ascend/{policy_abstract,policy_flashlb}.py`: https://github.com/vllm-project/vllm-ascend
  (vllm_ascend/eplb/core/policy), which needs numba; a package it needs may lie in `DIR/site`
  (pip install --target DIR/site numba).
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Homes = list[list[int]]
Planner = Callable[[npt.NDArray[np.float64], int, int], Homes]
"""(past batches [B, E], hosts, replicas in all) -> hosts of each expert; one may be named twice."""

SCALE = 1e6
"""Tokens of a window: some of these balancers round, or add one token to each expert."""


def load(folder: Path) -> tuple[dict[str, Planner], list[str]]:
    """Those that can be imported, by name, and for each of the others one line that says why not."""
    site = folder / "site"
    if site.is_dir():
        sys.path.append(str(site))
    found: dict[str, Planner] = {}
    missing = []
    for name, make in (("EPLB", _eplb), ("vLLM", _vllm), ("FlashTree", _flash_tree)):
        try:
            found[name] = make(folder)
        except (ImportError, OSError) as error:
            missing.append(f"{name}: {error} (where to get it: {Path(__file__).name})")
    return found, missing


def _eplb(folder: Path) -> Planner:
    import torch

    module = _import("eplb_original", folder / "eplb.py")

    def plan(batches: npt.NDArray[np.float64], num_hosts: int, num_replicas: int) -> Homes:
        weight = torch.tensor(_window(batches))[None]
        expert_of, _, _ = module.rebalance_experts(weight, num_replicas, 1, 1, num_hosts)
        return _homes(expert_of[0].numpy().reshape(num_hosts, -1), batches.shape[1])

    return plan


def _vllm(folder: Path) -> Planner:
    import torch

    _package("vllm_original", folder / "vllm")
    _import("vllm_original.abstract", folder / "vllm" / "abstract.py")
    module = _import("vllm_original.default", folder / "vllm" / "default.py")

    def plan(batches: npt.NDArray[np.float64], num_hosts: int, num_replicas: int) -> Homes:
        weight = torch.tensor(_window(batches))[None]
        placed = module.DefaultEplbPolicy.rebalance_experts(weight, num_replicas, 1, 1, num_hosts)
        expert_of = placed[0] if isinstance(placed, tuple) else placed
        return _homes(expert_of[0].numpy().reshape(num_hosts, -1), batches.shape[1])

    return plan


def _flash_tree(folder: Path) -> Planner:
    # What the file imports of its own project is not used by the search.
    _package("vllm", folder)
    _package("vllm.logger", folder).logger = logging.getLogger("originals")  # type: ignore[attr-defined]
    for name in ("vllm_ascend", "vllm_ascend.distributed", "vllm_ascend.distributed.parallel_state"):
        _package(name, folder / "vllm_ascend")
    sys.modules["vllm_ascend.distributed.parallel_state"].get_dynamic_eplb_group = None  # type: ignore[attr-defined]
    _import("vllm_ascend.policy_abstract", folder / "vllm_ascend" / "policy_abstract.py")
    module = _import("vllm_ascend.policy_flashlb", folder / "vllm_ascend" / "policy_flashlb.py")
    config = module.FlashLBConfig

    def plan(batches: npt.NDArray[np.float64], num_hosts: int, num_replicas: int) -> Homes:
        window = batches * (SCALE / batches.sum(-1, keepdims=True))
        tree = module.FlashTree(window, num_replicas, num_hosts, config.z_score, config.depth, config.width)
        expert_of, _, _ = tree.optimize_balanceness()
        return _homes(expert_of, batches.shape[1])

    return plan


def _window(batches: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = batches.sum(0) * (SCALE / batches.sum())
    return total


def _homes(expert_of: npt.NDArray[Any], num_experts: int) -> Homes:
    homes: Homes = [[] for _ in range(num_experts)]
    for host, experts in enumerate(expert_of):
        for expert in experts:
            homes[int(expert)].append(host)
    return homes


def _import(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise OSError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _package(name: str, folder: Path) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
    return module
