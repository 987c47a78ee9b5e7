"""A checkpoint as it comes from Hugging Face, served, and asked with OpenAI's own client: the text is `transformers`'.

`pip install openai`, then `python examples/serve_checkpoint.py [MODEL]`. MODEL is a folder or a name on the hub;
without it a tiny one with random weights is made, which takes no download and says nothing that can be read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_moe import Config, Service
from ray_moe.models.byte_level import ByteModel, write_new

PROMPTS = ("def main(", "import os", "The capital of France is")
NUM_TOKENS = 32


def served(model: str) -> list[str]:
    """What a service, with the experts in two actors, continues the prompts with."""
    config = Config.model_validate(
        {
            "model": model,
            "model_name": "mixture",  # what clients call it
            "experts": {"num_actors": 2, "num_cpus": 0.1},
            "router": {"num_cpus": 0.1},
            "server": {"port": 0, "http_port": 0},
        }
    )
    with Service(config) as service, OpenAI(base_url=f"{service.http_address}/v1", api_key="none") as client:
        print(f"models at {service.http_address}/v1: {[model.id for model in client.models.list()]}")
        return [
            client.completions.create(model="mixture", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0)
            .choices[0]
            .text
            for prompt in PROMPTS
        ]


def alone(model: str) -> list[str]:
    """What `transformers` continues them with, the whole model in this process."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = network.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return texts


def compare(served: Sequence[str], alone: Sequence[str]) -> None:
    for prompt, ours, theirs in zip(PROMPTS, served, alone, strict=True):
        print(f"{prompt!r} -> {ours!r}")
        if ours != theirs:
            raise SystemExit(f"transformers says {theirs!r}")
    print(f"{len(PROMPTS)} of {len(PROMPTS)} greedy texts are those of transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint: a folder, or a name on the hub")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or scratch
        if not arguments.model:
            write_new(Path(scratch), ByteModel(hidden_size=64, num_layers=2, expert_width=64))
        compare(served(model), alone(model))


if __name__ == "__main__":
    main()
