"""The commands of `ray-moe` that read and write checkpoints and ask no service; as `commands.py`, which has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_moe.cli.terminal import Debug, Interrupts, told

model_commands = typer.Typer()


@model_commands.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint's folder, a config.json, safetensors or GGUF file, or a name on the hub."),
    ],
    hosts: Annotated[int | None, typer.Option(min=1, help="Expert hosts whose memory to tell.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Run it, or a small model of its configuration, and see what each token uses.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    debug: Debug = False,
) -> None:
    """Whether a model is dense, a Mixture of Experts, a dynamic one or a hybrid: evidence, sizes, a configuration."""
    with told(debug):
        from ray_moe.cli.inspect import run

        run(model, hosts, measure, as_json)


@model_commands.command()
def advise(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint's folder, a config.json, safetensors or GGUF file, or a name on the hub."),
    ],
    hosts: Annotated[int, typer.Option(help="Machines there are.")] = 4,
    memory: Annotated[str, typer.Option(help="Memory of each that weights may take (of its GPU).")] = "64GiB",
    device: Annotated[str, typer.Option(help="What they compute with: cpu or gpu.")] = "cpu",
    bandwidth: Annotated[str, typer.Option(help="Bytes a second between two machines.")] = "1250MB",
    flops: Annotated[float | None, typer.Option(help="FLOP/s that a machine reaches, where you know it.")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="Bytes a second that it reads of its memory.")] = None,
    price: Annotated[float, typer.Option(help="Of one machine for an hour.")] = 0.0,
    requests: Annotated[float, typer.Option(help="Requests a second.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    skew: Annotated[float, typer.Option(help="Zipf exponent of the experts' popularity; 0 is even.")] = 0.5,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch of training, for the capacity factor.")] = 4096,
    top_k: Annotated[float | None, typer.Option(help="Experts per token, where the model does not tell.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    debug: Debug = False,
) -> None:
    """How to run a model on these machines for this traffic: actors, replicas, memory, cost, and the rules behind."""
    with told(debug):
        from ray_moe.cli.advise import run
        from ray_moe.policy.advice import Traffic

        machines = {
            "num_hosts": hosts,
            "host_bytes": memory,
            "device": device,
            "bandwidth": bandwidth,
            "flops": flops,
            "memory_bandwidth": memory_bandwidth,
            "price_per_hour": price,
        }
        run(model, machines, Traffic(requests, prompt_tokens, output_tokens, skew, batch_tokens), top_k, as_json)


@model_commands.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint of training (step-NNNNNNNN), or the folder of which to take the latest."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="What the training began with; when not set, where it was then.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; the model's when not set.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is in OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Make of a checkpoint of training one that `ray-moe serve` and transformers load."""
    with told(debug), Interrupts():
        from ray_moe.cli.export import run

        run(checkpoint, out, model, dtype, force)


@model_commands.command()
def upcycle(
    dense: Annotated[str, typer.Argument(help="Dense checkpoint: a directory, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    experts: Annotated[int, typer.Option(help="Experts in each MoE layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts for each token.")] = 2,
    parts: Annotated[int, typer.Option(help="Cut each network into so many experts, along its width.")] = 1,
    noise: Annotated[float, typer.Option(help="Noise on experts' weights, as a multiple of their deviation.")] = 0.0,
    reinit: Annotated[float, typer.Option(help="Share of each expert's neurons to draw anew.")] = 0.0,
    shared: Annotated[bool, typer.Option("--shared", help="Add a shared expert that every token meets.")] = False,
    layers: Annotated[
        str, typer.Option(help="Which become MoE: all, every:N, last:M, or numbers such as 1,3,8-15.")
    ] = "all",
    gate_std: Annotated[
        float | None, typer.Option(help="Deviation of the gates' weights; the model's initializer_range when not set.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; the model's when not set.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is in OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Make a Mixture-of-Experts checkpoint of a dense one: its networks become experts."""
    with told(debug), Interrupts():
        from ray_moe.cli.upcycle import dtype_of, run
        from ray_moe.models.upcycle import UpcycleSettings

        settings = UpcycleSettings(
            num_experts=experts,
            top_k=top_k,
            parts=parts,
            noise=noise,
            reinit=reinit,
            shared=shared,
            layers=layers,
            gate_std=gate_std,
            seed=seed,
            dtype=dtype_of(dtype),
        )
        run(dense, out, settings, force)


@model_commands.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="Dense checkpoints of one architecture; the first one leads.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    top_k: Annotated[int, typer.Option(help="Experts for each token.")] = 2,
    backbone: Annotated[str, typer.Option(help="All but the experts: average (of the models) or first.")] = "average",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Prompts that make the gates, one a line; once for each model, in order."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Which become MoE: all, every:N, last:M, or numbers such as 1,3,8-15.")
    ] = "all",
    gate_std: Annotated[
        float | None, typer.Option(help="Deviation of random gates; the model's initializer_range when not set.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; the first's when not set.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is in OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Make a Mixture-of-Experts checkpoint of several dense ones: an expert for each."""
    with told(debug), Interrupts():
        from ray_moe.cli.upcycle import dtype_of, prompts_in, run_merge
        from ray_moe.models.merge import MergeSettings

        settings = MergeSettings(
            top_k=top_k,
            backbone=backbone,
            prompts=prompts_in(prompts or []),
            layers=layers,
            gate_std=gate_std,
            seed=seed,
            dtype=dtype_of(dtype),
        )
        run_merge(models, out, settings, force)


@model_commands.command()
def compare_dense(
    active: Annotated[float, typer.Option(help="Weights a token meets, as a multiple of the dense model's.")] = 0.54,
    total: Annotated[float, typer.Option(help="All weights, as a multiple of the dense model's.")] = 4.3,
    shape: Annotated[float, typer.Option(min=0.1, help="Layers and width, as multiples of the dense model's.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts for each token.")] = 2,
    hidden_size: Annotated[int, typer.Option(min=32, help="Width of the dense model.")] = 640,
    num_layers: Annotated[int, typer.Option(min=1, help="Layers of the dense model.")] = 5,
    dense_width: Annotated[int, typer.Option(min=32, help="Width of the dense model's networks.")] = 2560,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a training step.")] = 32,
    window: Annotated[int, typer.Option(min=2, max=1024, help="Tokens of a window.")] = 256,
    steps: Annotated[int, typer.Option(min=0, help="Training steps of each model that are timed; 0 for none.")] = 3,
    answers: Annotated[int, typer.Option(min=0, help="Answers of each model that are timed; 0 for none.")] = 5,
    prompt: Annotated[int, typer.Option(min=1, max=512, help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens of an answer after the first.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the first weights and the batches.")] = 0,
    debug: Debug = False,
) -> None:
    """Train and ask a dense and an MoE model side by side: what sparse weights buy on this machine.

    After 100 steps or more it also tells the loss of each after the same time.
    """
    with told(debug), Interrupts():
        from ray_moe.cli.compare import run
        from ray_moe.models.compare import CompareSettings

        settings = CompareSettings(
            active=active,
            total=total,
            shape=shape,
            top_k=top_k,
            hidden_size=hidden_size,
            num_layers=num_layers,
            dense_width=dense_width,
            batch=batch,
            window=window,
            steps=steps,
            answers=answers,
            prompt=prompt,
            new_tokens=new_tokens,
            seed=seed,
        )
        run(settings)
