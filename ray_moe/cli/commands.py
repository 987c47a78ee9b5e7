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
from ray_moe.cli.bench import bench
from ray_moe.cli.canary import canary
from ray_moe.cli.keys import keys
from ray_moe.cli.model_commands import model_commands
from ray_moe.cli.target import Target, asks_a_service
from ray_moe.cli.terminal import Debug, Interrupts, told
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
commands.add_typer(bench, name="bench")
commands.add_typer(model_commands)

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings as YAML.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. server.port=9000; may be repeated."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there; - is standard output.")
]
Timeout = Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="Give up after this.")]


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
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Append the numbers of each report there, a line of JSON for each."
        ),
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

            run(loaded.config, interrupts, service, json_file)


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
    json_file: JsonFile = None,
    timeout: Timeout = 300.0,
    debug: Debug = False,
) -> None:
    """Hurt a service that allows it (chaos.enabled), and report how it recovered."""
    with told(debug):
        from ray_moe.cli.cluster import run_chaos
        from ray_moe.types import ChaosRequest

        run_chaos(to, ChaosRequest(kind, target, at, duration, factor, seed), timeout, json_file)


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
    json_file: JsonFile = None,
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
def report(
    files: Annotated[
        list[Path],
        typer.Argument(help="What train, chaos or simulate have written with --json, or benchmarks/results/*.json."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    debug: Debug = False,
) -> None:
    """Make one HTML page of runs, with figures, that needs nothing beside it."""
    with told(debug):
        from ray_moe.cli.report import run

        run(files, output)


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
