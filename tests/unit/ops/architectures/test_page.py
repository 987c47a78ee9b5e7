"""What the page about architectures shows can be run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ray_moe.ops.architectures.fine_grained import ExpertSizes


def test_the_code_of_the_page_runs() -> None:
    page = (Path(__file__).parents[4] / "docs" / "methods" / "architectures.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["sizes"] == ExpertSizes(expert_size=32, num_experts=63, top_k=7, num_shared=1)
    tokens, sequences, images = torch.randn(3, 64), torch.randn(3, 5, 64), torch.randn(2, 3, 32, 32)
    for name, given in {"layer": tokens, "rows": tokens, "sequences": sequences, "images": images}.items():
        assert names[name](given).shape == given.shape
    assert [tuple(out.shape) for out in names["model"](tokens)] == [(3, 1), (3, 5)]
