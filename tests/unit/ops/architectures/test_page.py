"""What the page about architectures shows gives networks that compute."""

from __future__ import annotations

import torch

from ray_moe.ops.architectures.fine_grained import ExpertSizes
from tests import pages


def test_the_networks_of_the_page_compute() -> None:
    page = pages.ROOT / "docs" / "methods" / "architectures.md"
    assert len(pages.blocks(page)) == 8
    names = pages.run(page, {})
    assert names["sizes"] == ExpertSizes(expert_size=32, num_experts=63, top_k=7, num_shared=1)
    tokens, sequences, images = torch.randn(3, 64), torch.randn(3, 5, 64), torch.randn(2, 3, 32, 32)
    for name, given in {"layer": tokens, "rows": tokens, "sequences": sequences, "images": images}.items():
        assert names[name](given).shape == given.shape
    assert [tuple(out.shape) for out in names["model"](tokens)] == [(3, 1), (3, 5)]
