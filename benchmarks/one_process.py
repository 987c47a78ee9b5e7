"""The engine and its HTTP door in one process, with all experts in it: what `ray_moe` would be without any dispatch.

`python benchmarks/one_process.py MODEL --port PORT --threads N`, until SIGTERM. There is neither Ray nor a dispatcher:
the engine hands each layer's (hidden, index, weight) to `transformers`' own grouped experts module. Started by
`benchmarks/serving.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from ray_moe.config import ServerConfig
from ray_moe.models.huggingface import Checkpoint
from ray_moe.runtime.engine import Engine
from ray_moe.runtime.measures import Measures, measure, router_status
from ray_moe.service import doors
from ray_moe.service.backend import Backend
from ray_moe.transport.allocator import tune_malloc
from ray_moe.types import GenerateChunk, GenerateRequest, LayerPath


class LocalExperts:
    """In the place of a dispatcher: the experts are here, and compute at once."""

    def __init__(self, modules: Mapping[LayerPath, nn.Module]) -> None:
        self._modules = modules

    def forward(
        self,
        layer: LayerPath,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        version: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        out: torch.Tensor = self._modules[layer](hidden, index, weight)
        return out


class OneProcess:
    """As much of a `Backend` as completions need."""

    ready = True
    has_tokenizer = True

    def __init__(self, model: str) -> None:
        checkpoint = Checkpoint.open(model)
        every = {path: range(layer.num_experts) for path, layer in checkpoint.layers.items()}
        self.model_name = model
        self.backbone_bytes = checkpoint.backbone_bytes
        self.vocab_size, self.max_positions = checkpoint.vocab_size, checkpoint.max_positions
        self.engine = Engine(
            checkpoint.load_backbone(),
            checkpoint.load_tokenizer(),
            checkpoint.layers,
            LocalExperts(checkpoint.load_experts(every)),
            checkpoint.max_positions,
        )
        self.layers, self.layers_with_gate = self.engine.layers, self.engine.layers_with_gate

    async def tokenize(self, text: str) -> tuple[int, ...]:
        return await self.engine.texts.tokenize(text)

    def token_text(self, token_id: int) -> str:
        return self.engine.texts.token_text(token_id)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        return self.engine.generate(request)

    def measures(self) -> Measures:
        return measure(router_status("one", self.backbone_bytes, self.engine, None), self.engine, None)


async def serve(model: str, port: int) -> None:
    backend: Any = OneProcess(model)
    door = doors.open_all(cast(Backend, backend), ServerConfig(port=0, http_port=port))
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await door.start()
    await stopped.wait()
    await backend.engine.close()
    await door.stop(0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    tune_malloc()
    torch.set_num_threads(arguments.threads)
    asyncio.run(serve(arguments.model, arguments.port))


if __name__ == "__main__":
    main()
