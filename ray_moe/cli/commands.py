"""The commands of `ray-moe` and their options. What a command does is in the module of its name, imported when it runs:
`ray-moe --help` loads neither Ray nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import ray_moe
from ray_moe.actors.process import made_to_stay
from ray_moe.cli.canary import canary
from ray_moe.cli.keys import keys
from ray_moe.cli.target import Target, asks_a_service
from ray_moe.cli.terminal import Interrupts, told
from ray_moe.config_sources import ENV_PREFIX, LoadedConfig, load_config, show_config
from ray_moe.errors import InvalidConfig

commands = typer.Typer(
    name="ray-moe",
    help="Mixture-of-Experts models with every expert in its own Ray actor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
commands.add_typer(keys, name="keys")
commands.add_typer(canary, name="canary")

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings as YAML.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. server.port=9000; may be repeated."),
]
Timeout = Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="Give up after this.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


@commands.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(ray_moe.__version__)
        raise typer.Exit


@commands.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="Checkpoint: a directory, or a name on the hub.")] = None,
    config: ConfigFile = None,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster: local (a new one), auto (running here) or HOST:PORT.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on; 0 takes a free one.")] = None,
    actors: Annotated[int | None, typer.Option(help="Expert actors to start.")] = None,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM."""
    with told(debug):
        flags = {
            "model": (model, "MODEL"),
            "ray.address": (address, "--address"),
            "server.port": (port, "--port"),
            "experts.num_actors": (actors, "--actors"),
        }
        given = [(key, value, flag) for key, (value, flag) in flags.items() if value is not None]
        loaded = _load(config, settings, given)
        if not loaded.config.model:
            raise InvalidConfig("no model to serve: name a checkpoint, as in `ray-moe serve DIRECTORY`")
        with Interrupts() as interrupts:
            try:
                with made_to_stay():
                    from ray_moe.cli.serve import run

                run(loaded.config, interrupts)
            except KeyboardInterrupt:
                interrupts.ignore()  # how a service is meant to end, ready or not: exit code 0
            typer.echo("stopped")


@commands.command()
def train(
    config: Annotated[Path, typer.Argument(help="Settings as YAML; those of training are its section train.")],
    service: Annotated[
        str, typer.Option(metavar="NAME", help="Train on the actors of this running service (its service_name).")
    ] = "",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster: local (a new one), auto (running here) or HOST:PORT.")
    ] = None,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """Train a model on expert actors, from wherever its run is to its last step."""
    with told(debug):
        given = [] if address is None else [("ray.address", address, "--address")]
        loaded = _load(config, settings, given)
        if not loaded.config.model:
            raise InvalidConfig("no model to train: set model to a checkpoint")
        with Interrupts() as interrupts:
            with made_to_stay():
                from ray_moe.cli.train import run

            run(loaded.config, interrupts, service)


@commands.command()
@asks_a_service
def generate(
    to: Target,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Sample from tokens so much as likely as the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Prompt and output are token numbers.")] = False,
    timeout: Timeout = 300.0,
    debug: Debug = False,
) -> None:
    """Continue a text, written as it is made."""
    with told(debug):
        from ray_moe.cli.generate import run

        run(
            to,
            prompt,
            token_ids,
            timeout,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=stop or (),
        )


@commands.command()
@asks_a_service
def status(
    to: Target,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    timeout: Timeout = 10.0,
    debug: Debug = False,
) -> None:
    """Hosts, placement, tokens per expert, memory and restarts of a running service."""
    with told(debug):
        from ray_moe.cli.status import run

        run(to, as_json, timeout)


@commands.command()
@asks_a_service
def top(
    to: Target,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture and end, as where there is no terminal.")
    ] = False,
    timeout: Timeout = 10.0,
    debug: Debug = False,
) -> None:
    """What a running service does now: requests, tokens a second, hosts, hottest experts, events. Ctrl-C ends it."""
    with told(debug), Interrupts():
        from ray_moe.cli.top import run

        run(to, interval, once, timeout)


Wait = Annotated[bool, typer.Option(help="Return when it is done, or at once.")]


@commands.command()
@asks_a_service
def plan(
    to: Target,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    wait: Wait = True,
    timeout: Timeout = 300.0,
    debug: Debug = False,
) -> None:
    """Place the experts anew for the present load: moves, bytes, predicted balancedness and pause."""
    with told(debug):
        from ray_moe.cli.cluster import run_plan

        run_plan(to, dry_run, wait, timeout)


@commands.command()
@asks_a_service
def resize(
    to: Target,
    actors: Annotated[int, typer.Argument(help="Expert actors wanted.")],
    wait: Wait = True,
    timeout: Timeout = 300.0,
    debug: Debug = False,
) -> None:
    """Change the number of expert actors while requests go on."""
    with told(debug):
        from ray_moe.cli.cluster import run_resize

        run_resize(to, actors, wait, timeout)


@commands.command()
@asks_a_service
def drain(
    to: Target,
    target: Annotated[str, typer.Argument(help="An expert actor, or the id of a node (its beginning is enough).")],
    replace: Annotated[bool, typer.Option("--replace", help="Start as many others in their place.")] = False,
    wait: Wait = True,
    timeout: Timeout = 300.0,
    debug: Debug = False,
) -> None:
    """Empty an expert actor, or those of a node, and end them while requests go on."""
    with told(debug):
        from ray_moe.cli.cluster import run_drain

        run_drain(to, target, replace, wait, timeout)


@commands.command()
@asks_a_service
def publish(
    to: Target,
    model: Annotated[
        str,
        typer.Argument(help="Checkpoint of the same architecture: a directory of the service's nodes, or of the hub."),
    ],
    timeout: Timeout = 600.0,
    debug: Debug = False,
) -> None:
    """Give a running service other weights: new requests use them, those under way end with what they began with."""
    with told(debug):
        from ray_moe.cli.versions import run_publish

        run_publish(to, model, timeout)


@commands.command()
@asks_a_service
def rollback(
    to: Target,
    version: Annotated[
        int | None, typer.Option("--to", help="A version that is held; the newest before the current one.")
    ] = None,
    timeout: Timeout = 60.0,
    debug: Debug = False,
) -> None:
    """Return to an older version of the weights, which is still held."""
    with told(debug):
        from ray_moe.cli.versions import run_rollback

        run_rollback(to, version, timeout)


@commands.command()
@asks_a_service
def chaos(
    to: Target,
    kind: Annotated[str, typer.Argument(help="kill, hang, slow, corrupt or partition.")],
    target: Annotated[str, typer.Option(help="An expert actor, node:ID, controller, or random.")] = "random",
    at: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="From now.")] = 0.0,
    duration: Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="How long; a kill is for ever.")] = 5.0,
    factor: Annotated[float, typer.Option(min=1, help="For slow: how many times longer everything takes.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Chooses the target when it is random.")] = 0,
    timeout: Timeout = 300.0,
    debug: Debug = False,
) -> None:
    """Hurt a service that allows it (chaos.enabled), and report how it recovered."""
    with told(debug):
        from ray_moe.cli.cluster import run_chaos
        from ray_moe.types import ChaosRequest

        run_chaos(to, ChaosRequest(kind, target, at, duration, factor, seed), timeout)


@commands.command()
def config(
    show: Annotated[bool, typer.Option("--show", help="Print the settings in force (the default).")] = True,
    file: ConfigFile = None,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """The settings in force as YAML; a comment tells where each given one came from."""
    with told(debug):
        typer.echo(show_config(_load(file, settings)), nl=False)


@commands.command()
@asks_a_service
def simulate(
    to: Target,
    trace: Annotated[
        str, typer.Option(help="Traffic: zipf:SHAPE, lognormal:SHAPE, uniform, or a FILE written with --save.")
    ] = "zipf:1.0",
    seconds: Annotated[
        float | None, typer.Option(help="Virtual time; 60, or all of a recorded trace, when not set.")
    ] = None,
    hosts: Annotated[int | None, typer.Option(help="Expert hosts at the beginning; 8 when not set.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of a synthetic trace; 16 when not set.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of each layer; 64 when not set.")] = None,
    top_k: Annotated[int, typer.Option(help="Experts that each token chooses in a layer.")] = 8,
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens of a batch.")] = 1024,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Traffic of a synthetic trace; 10 batches a second when not set.")
    ] = None,
    drift: Annotated[
        float | None, typer.Option(help="Random walk of each expert's popularity: its logarithm's sigma in a second.")
    ] = None,
    flash_crowd: Annotated[
        str | None, typer.Option(metavar="AT:FACTOR", help="One expert of each layer becomes so much hotter.")
    ] = None,
    surge: Annotated[str | None, typer.Option(metavar="AT:FACTOR", help="Traffic becomes so much more.")] = None,
    batches_per_step: Annotated[
        int, typer.Option(help="Batches that are measured in each second (or step of a recorded trace).")
    ] = 2,
    batch_noise: Annotated[
        float, typer.Option(help="How batches differ: sigma of the logarithm of an expert's share.")
    ] = 0.3,
    hosts_per_node: Annotated[int, typer.Option(help="Hosts that share a machine and are lost together.")] = 1,
    spare_slots: Annotated[int | None, typer.Option(help="experts.spare_slots: room for replicas.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="balance.min_replicas: of every expert.")] = None,
    no_balance: Annotated[
        bool, typer.Option("--no-balance", help="Change the placement only for hosts that come or go.")
    ] = False,
    expert_bytes: Annotated[str, typer.Option(help="Weights of one expert.")] = "16MiB",
    bandwidth: Annotated[str, typer.Option(help="Weights that a host loads in a second.")] = "1GB",
    host_speed: Annotated[
        float | None, typer.Option(help="Rows a second; when not set, what has the first hosts on target.")
    ] = None,
    start_seconds: Annotated[float, typer.Option(help="Until a new host is up.")] = 30.0,
    planning_seconds: Annotated[float, typer.Option(help="What a plan takes, in virtual time.")] = 0.5,
    spot_losses: Annotated[float, typer.Option(help="How often each node is lost in an hour, in the mean.")] = 0.0,
    notice: Annotated[float, typer.Option(help="Seconds before a loss in which it is known; 0: never.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Everything that is drawn follows from it.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there; - is standard output.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Simulate nothing: record the traffic of a running service.")
    ] = None,
    config: ConfigFile = None,
    settings: Set = None,
    timeout: Timeout = 10.0,
    debug: Debug = False,
) -> None:
    """What the policies would do with a cluster, a load and losses like these: replayed on a virtual clock."""
    with told(debug):
        from ray_moe.cli import simulate as command

        if save is not None:
            command.record(to, save, seconds, timeout)
            return
        flags = {
            "experts.num_actors": (hosts, "--hosts"),
            "experts.spare_slots": (spare_slots, "--spare-slots"),
            "balance.min_replicas": (min_replicas, "--min-replicas"),
            "balance.enabled": (False if no_balance else None, "--no-balance"),
        }
        given = [(key, value, flag) for key, (value, flag) in flags.items() if value is not None]
        asked = command.Asked(
            trace=trace,
            seconds=seconds,
            num_layers=layers,
            num_experts=experts,
            tokens_per_s=tokens_per_second,
            drift=drift,
            flash_crowd=flash_crowd,
            surge=surge,
            top_k=top_k,
            tokens_per_batch=tokens_per_batch,
            batches_per_step=batches_per_step,
            batch_noise=batch_noise,
            hosts_per_node=hosts_per_node,
            expert_bytes=expert_bytes,
            bandwidth=bandwidth,
            host_speed=host_speed,
            start_s=start_seconds,
            planning_s=planning_seconds,
            spot_losses=spot_losses,
            notice_s=notice,
            seed=seed,
        )
        command.run(asked, _load(config, settings, given).config, json_file)


@commands.command()
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


@commands.command()
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


@commands.command()
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


@commands.command()
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


@commands.command()
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


@commands.command()
def compare_dense(
    active: Annotated[float, typer.Option(help="Weights a token meets, as a multiple of the dense model's.")] = 0.54,
    total: Annotated[float, typer.Option(help="All weights, as a multiple of the dense model's.")] = 4.3,
    top_k: Annotated[int, typer.Option(min=1, help="Experts for each token.")] = 2,
    hidden_size: Annotated[int, typer.Option(min=32, help="Width of the models.")] = 512,
    num_layers: Annotated[int, typer.Option(min=1, help="Layers of the models.")] = 2,
    dense_width: Annotated[int, typer.Option(min=32, help="Width of the dense model's networks.")] = 8192,
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


@commands.command()
def demo(
    train_seconds: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long to train the model.")] = 115,
    cache_dir: Annotated[Path | None, typer.Option(help="Where the trained model is kept.")] = None,
    debug: Debug = False,
) -> None:
    """Train a small model, serve it with its experts in actors, kill one of them, and check every token."""
    with told(debug), Interrupts() as interrupts:
        from ray_moe.cli.demo import run

        if not run(train_seconds, cache_dir, interrupts):
            raise typer.Exit(1)


def _load(file: Path | None, settings: list[str] | None, flags: Sequence[tuple[str, object, str]] = ()) -> LoadedConfig:
    pairs = []
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidConfig(f"--set takes KEY=VALUE, such as server.port=9000, not {setting!r}")
        pairs.append((key.strip(), value.strip(), "--set"))
    environ = {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)}
    return load_config(file, environ, [*pairs, *flags])
