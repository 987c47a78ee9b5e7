"""The one validated tree that a user writes, and how it is put together: flags > environment > file > defaults.

Every setting has a description, a unit where it has one, and a range. An unknown key or a wrong value is refused
before anything starts, in words that name the key, where it came from and what was expected. The command line
calls `load_config`; the composition root hands the sections down. Nothing below this floor reads a file or a variable.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ray_moe.errors import InvalidConfig

ENV_PREFIX = "RAY_MOE__"
_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


# --- Types of settings ---------------------------------------------------------------------------------------
def _parse_bytes(value: object) -> object:
    if not isinstance(value, str) or value.strip().isdecimal():
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError("should be a number of bytes, or a size such as 64KiB, 256MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _format_bytes(num_bytes: int) -> str | int:
    for unit in ("GiB", "MiB", "KiB"):
        size = _UNITS[unit.lower()]
        if num_bytes >= size and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return num_bytes


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("should be a whole number, or at most 1: Ray shares out one device, never one and a half")
    return value


def _address(value: str) -> str:
    if value in ("local", "auto") or re.fullmatch(r"(ray://)?[^\s:/]+:\d{1,5}", value):
        return value
    raise ValueError("should be 'local', 'auto' or the HOST:PORT of a running cluster")


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("should be 'auto', 'cpu', 'cuda' or 'cuda:N'")


_RESERVED = {
    "CPU": "set experts.num_cpus",
    "GPU": "set experts.num_gpus",
    "memory": "the service checks memory itself",
    "object_store_memory": "set ray.object_store_bytes",
}


def _custom_resources(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in _RESERVED or not name:
            raise ValueError(f"should name custom resources, not {name!r}: {_RESERVED.get(name, 'it is empty')}")
    return resources


_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"


def _label_selector(selector: dict[str, str]) -> dict[str, str]:
    """Ray's rules (those of Kubernetes), which Ray itself applies only when an actor is made."""
    for key, wanted in selector.items():
        prefix, _, name = key.rpartition("/")
        parts = prefix.split(".") if "/" in key else []
        if len(prefix) > 253 or not all(re.fullmatch(_LABEL, part) for part in (*parts, name)):
            raise ValueError(
                f"should have labels as keys, not {key!r}: up to 63 letters, digits, '-', '_' and '.', the first and "
                "the last a letter or digit, such as market-type or ray.io/node-group"
            )
        if wanted and not re.fullmatch(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))", wanted):
            raise ValueError(f"has {wanted!r} for {key}; should be a label's value, !value, in(a,b) or !in(a,b)")
    return selector


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


_Number = BeforeValidator(_not_bool)
Count = Annotated[int, Field(ge=1), _Number]
Bytes = Annotated[int, BeforeValidator(_parse_bytes), _Number]
Seconds = Annotated[float, Field(gt=0), _Number]
Devices = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one), _Number]


# --- The tree ------------------------------------------------------------------------------------------------
class Section(BaseModel):
    """A part of the tree: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RayConfig(Section):
    """The cluster."""

    address: Annotated[str, AfterValidator(_address)] = "local"
    """`local` starts a Ray on this machine, `auto` joins the one that runs here, HOST:PORT joins that one."""
    num_cpus: Count | None = None
    """CPUs a local Ray may give out; all there are when not set."""
    object_store_bytes: Annotated[Bytes, Field(ge=80 * 2**20)] | None = None
    """Shared memory of a local Ray's object store, 80 MiB or more; Ray's own choice when not set."""
    auth: Literal["token", "disabled"] = "token"
    """`token`: only processes that know the cluster's token may join it."""
    autoscaling: bool = False
    """Whether nodes come for actors that find no room: a start then waits for them instead of refusing."""


class ExpertsConfig(Section):
    """The actors that hold the experts."""

    num_actors: Count | None = None
    """Actors to start. When this and `experts_per_actor` are not set: one for each expert index, or as many as the
    cluster can hold."""
    experts_per_actor: Count | None = None
    """Expert indices that share an actor (each over all layers); instead of `num_actors`."""
    num_cpus: Devices = 1
    """CPUs that Ray reserves for each actor; fractions up to 1 are allowed."""
    num_gpus: Devices = 0
    """GPUs that Ray reserves for each actor; fractions up to 1 are allowed."""
    resources: Annotated[dict[str, Annotated[Devices, Field(gt=0)]], AfterValidator(_custom_resources)] = {}
    """Custom Ray resources that each actor takes, e.g. `{expert_slot: 1}`; fractions up to 1 are allowed."""
    label_selector: Annotated[dict[str, str], AfterValidator(_label_selector)] = {}
    """Labels of the nodes that may hold experts, e.g. `{market-type: spot}`; also `!spot`, `in(a,b)`, `!in(a,b)`."""
    num_threads: Annotated[int, Field(ge=1, le=1024), _Number] = 1
    """Threads each actor computes with."""
    spare_slots: Annotated[int, Field(ge=0), _Number] = 1
    """Experts of each layer that an actor may hold beyond its equal share: room for replicas of the hot ones, for those
    of a lost actor, and for moving."""
    max_bytes: Annotated[Bytes, Field(ge=1)] | None = None
    """Expert weights that each actor may hold, instead of `spare_slots`."""
    copy_from: Literal["node", "any", "none"] = "node"
    """Where an actor gets the weights of a replica: from an actor of its node that has them, from any that has them, or
    always from the checkpoint, which is also the way out when the others fail."""
    standby_actors: Annotated[int, Field(ge=0), _Number] = 0
    """Running actors without experts that take over from a lost one in tens of milliseconds."""
    standby_preload: bool = False
    """Whether a standby actor reads all experts into memory beforehand, and so takes over without loading."""
    max_restarts: Annotated[int, Field(ge=-1), _Number] = -1
    """How often Ray may restart each actor; -1 is without limit."""
    start_timeout_s: Seconds = 300
    """Seconds in which all actors must have started and loaded their experts."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> ExpertsConfig:
        if self.num_actors is not None and self.experts_per_actor is not None:
            raise ValueError("num_actors and experts_per_actor are both set; set one of them")
        return self


class RouterConfig(Section):
    """The actor that holds the rest of the model and answers the clients."""

    num_cpus: Devices = 1
    """CPUs that Ray reserves for the router."""
    num_gpus: Devices = 0
    """GPUs that Ray reserves for the router."""
    num_threads: Annotated[int, Field(ge=1, le=1024), _Number] = 1
    """Threads the router computes with."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """`auto` is a GPU when one is reserved (`num_gpus`), else the CPU."""
    max_concurrent_requests: Count = 64
    """Generations computed together; further ones wait."""
    max_queued_requests: Annotated[int, Field(ge=0), _Number] = 256
    """Generations that may wait; further ones are refused as overloaded."""
    max_queued_tokens: Count = 2**20
    """Tokens that the prompts of those may have, all together."""
    max_step_tokens: Count = 512
    """Tokens computed at a time: a longer prompt is computed in parts, so that others go on in between."""
    kv_cache_bytes: Annotated[Bytes, Field(ge=2**20)] = 2**30
    """Keys and values of all generations, and of ended ones that are kept for others that begin the same; 1 MiB or
    more."""
    reuse_prefixes: bool = True
    """Whether what prompts begin with is kept for others that begin the same."""
    expert_call_timeout_s: Seconds = 30
    """Seconds after which an unanswered call to an expert actor is sent again."""
    recovery_timeout_s: Seconds = 60
    """Seconds that a request waits for a lost expert to come back before it fails as unavailable."""
    expert_cache_bytes: Annotated[Bytes, Field(ge=0)] = 0
    """The hottest experts, up to this size, are also held by the router itself and computed there without any hop."""
    lifeboat_bytes: Annotated[Bytes, Field(ge=0)] = 2 * 2**30
    """Experts that no actor holds any more are read by the router and computed there until one does; the longest unused
    are given up beyond this size. 0 turns it off: requests then wait."""


class DispatchConfig(Section):
    """Tokens out to the experts, and back."""

    combine: Literal["router", "host"] = "router"
    """Who adds up the experts' outputs: `router` in the order of transformers (bit-equal in bfloat16), `host` sends
    one weighted sum for each token instead of one row for each expert (less traffic)."""
    hedge: bool = True
    """Whether rows that an actor is unusually slow to answer are also sent to another one; the first answer counts."""
    hedge_factor: Annotated[float, Field(ge=1), _Number] = 4
    """Unusually slow is this many times what the actor's own history makes likely."""
    hedge_min_s: Seconds = 0.05
    """And at least this many seconds."""
    check_finite: bool = True
    """Whether rows with NaN or infinity are computed a second time elsewhere before they are believed."""


class BalanceConfig(Section):
    """Which experts are replicated, and where they are: changed while requests flow."""

    enabled: bool = True
    """Whether the placement follows the load by itself; `ray-moe plan` changes it on request in any case."""
    every_s: Seconds = 1
    """Seconds between two looks at the load."""
    half_life_s: Seconds = 5
    """After this many seconds the load of the past counts half."""
    min_gain: Annotated[float, Field(ge=0, le=1), _Number] = 0.02
    """Balancedness (mean load of an actor / highest, 1 is perfect) that a change must bring to a layer."""
    cost_per_move: Annotated[float, Field(ge=0, le=1), _Number] = 0.008
    """And this much more for each replica it copies, divided by the number of actors: they load side by side."""
    min_replicas: Count = 1
    """Replicas that every expert has, where there is room."""
    survive_nodes: Annotated[int, Field(ge=0), _Number] = 0
    """Place replicas so that all experts most likely survive the loss of so many nodes, whichever; then balance."""
    domain_label: str = ""
    """Label of the nodes that names their failure domain, over which replicas are spread: ray.io/availability-zone."""
    drain_s: Seconds = 1
    """Seconds that an actor keeps an expert after no routing table names it there any more."""
    return_s: Seconds = 60
    """Seconds that a lost actor is expected back before plans are made without it."""


class ScalingConfig(Section):
    """How many expert actors there are: changed while requests flow. With an autoscaling cluster, nodes follow."""

    enabled: bool = False
    """Whether the number of actors follows the load by itself; `ray-moe resize` changes it on request in any case."""
    min_actors: Annotated[int, Field(ge=0), _Number] = 1
    """Fewest."""
    max_actors: Count = 8
    """Most."""
    target_utilisation: Annotated[float, Field(gt=0, le=1), _Number] = 0.6
    """Share of the time that actors should be computing."""
    max_queue_age_s: Seconds = 1
    """A request that waits longer for its turn calls for more actors."""
    up_after_s: Annotated[float, Field(ge=0), _Number] = 3
    """Seconds that more must have been wanted."""
    down_after_s: Annotated[float, Field(ge=0), _Number] = 60
    """Seconds that fewer must have been wanted."""
    cool_down_s: Annotated[float, Field(ge=0), _Number] = 15
    """Seconds without a change after each change."""
    zero_after_s: Seconds | None = None
    """After so many seconds without a request no actor is kept; the router's lifeboat answers the next one, and actors
    start again. Never, when not set."""
    start_timeout_s: Seconds = 300
    """Seconds in which new actors must have started, or the change is rolled back."""

    @model_validator(mode="after")
    def _ordered(self) -> ScalingConfig:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors is {self.min_actors} and max_actors is {self.max_actors}; swap them")
        return self


class ChaosConfig(Section):
    """Faults on purpose, with `ray-moe chaos`."""

    enabled: bool = False
    """Whether the service may be told to hurt itself."""


class TransportConfig(Section):
    """How tokens travel between the router and the expert actors."""

    kind: Literal["auto", "grpc", "object_store"] = "auto"
    """`auto` is gRPC, and Ray's object store where an actor's port cannot be reached."""
    shared_memory: bool = True
    """Whether payloads between processes of one node go through shared memory."""
    arena_bytes: Annotated[Bytes, Field(ge=2**20)] = 256 * 2**20
    """Shared memory for each router-actor pair, 1 MiB or more; what does not fit travels inline."""
    inline_bytes: Annotated[Bytes, Field(ge=0)] = 64 * 2**10
    """Payloads below this size travel inside the message even on one node."""
    chunk_bytes: Annotated[Bytes, Field(ge=4096, le=2**30)] = 2**20
    """Longer messages are sent in pieces of this size; 4 KiB to 1 GiB."""
    connect_timeout_s: Seconds = 5
    """Seconds in which a connection to an actor must stand."""
    ping_interval_s: Seconds = 10
    """Seconds of silence after which the peer is asked whether it is still there."""
    ping_timeout_s: Seconds = 5
    """Seconds in which it must answer, or it counts as lost."""


class ServerConfig(Section):
    """The gRPC front door."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface, and there is no encryption yet."""
    port: Annotated[int, Field(ge=0, le=65535), _Number] = 8476
    """TCP port to listen on; 0 takes a free one."""
    max_request_bytes: Annotated[Bytes, Field(ge=2**12, le=2**31 - 1)] = 512 * 2**20
    """Size of the largest message a client may send; at most 2 GiB, which is gRPC's limit."""
    max_in_flight_bytes: Annotated[Bytes, Field(ge=2**12)] = 4 * 2**30
    """Size of all requests that are held at the same time; further ones are refused as overloaded, though one alone
    never is. Computing takes a few times as much memory."""
    max_forward_tokens: Count = 131_072
    """Tokens that one Forward call may bring."""
    max_prompt_bytes: Annotated[Bytes, Field(ge=1)] = 2**20
    """Size of a prompt given as text, in UTF-8; a longer one is refused before it is split into tokens."""
    grace_s: Annotated[float, Field(ge=0), _Number] = 5
    """Seconds that requests in flight may go on when the service stops."""


class Config(Section):
    """Everything a user can set."""

    model: str = ""
    """Directory of a Hugging Face checkpoint, or its name on the hub."""
    service_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "ray-moe"
    """Prefix of the actors' names, so that one cluster can hold several services: letters, digits, '.', '_', '-'."""
    ray: RayConfig = RayConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    dispatch: DispatchConfig = DispatchConfig()
    balance: BalanceConfig = BalanceConfig()
    scaling: ScalingConfig = ScalingConfig()
    chaos: ChaosConfig = ChaosConfig()
    transport: TransportConfig = TransportConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _sleep_needs_a_lifeboat(self) -> Config:
        if self.scaling.zero_after_s is not None and not self.router.lifeboat_bytes:
            raise ValueError("scaling.zero_after_s needs router.lifeboat_bytes: nobody else could answer while asleep")
        return self


# --- Putting it together -------------------------------------------------------------------------------------
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """A value somebody gave, and where: `config.yaml`, `environment variable RAY_MOE__...`, `flag --port`."""

    value: object
    source: str


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The tree in force, and the source of each setting that is not left at its default."""

    config: Config
    sources: Mapping[Key, str]


def load_config(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Sequence[tuple[str, object, str]] = ()
) -> LoadedConfig:
    """The tree from a YAML file, the environment and flags, each overriding the one before.

    Args:
        file: YAML with the tree's own shape; keys that are left out keep their defaults.
        environ: variables such as ``RAY_MOE__SERVER__PORT=9000``; others are passed over.
        flags: (dotted key, value, name of the flag), e.g. ``("server.port", 9000, "--port")``, the last one wins.

    Raises: `InvalidConfig` for a file that cannot be read, an unknown key or a wrong value.
    """
    given: dict[Key, Setting] = {}
    if file is not None:
        for key, value in _flatten(_read_yaml(file), Config, str(file)):
            given[key] = Setting(value, str(file))
    for name, text in sorted((environ or {}).items()):
        if name.startswith(ENV_PREFIX):
            dotted = ".".join(name.removeprefix(ENV_PREFIX).lower().split("__"))
            _set(given, dotted, text, f"environment variable {name}")
    for dotted, value, flag in flags:
        _set(given, dotted, value, f"flag {flag}")
    tree: dict[str, Any] = {}
    for key, setting in given.items():
        section = tree
        for name in key[:-1]:
            section = section.setdefault(name, {})
        section[key[-1]] = setting.value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise InvalidConfig(_explain(error, given)) from None
    return LoadedConfig(config, {key: setting.source for key, setting in given.items()})


def show_config(loaded: LoadedConfig) -> str:
    """The tree in force as YAML that can be loaded again, with the source of each given value as a comment."""
    lines: list[str] = []
    for key in _keys(Config):
        value: Any = loaded.config
        for name in key:
            value = getattr(value, name)
        if len(key) > 1 and not any(line.startswith(f"{key[0]}:") for line in lines):
            lines.append(f"{key[0]}:")
        if key[-1].endswith("_bytes") and value is not None:
            value = _format_bytes(value)
        text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()[1:-1]
        source = f"  # {loaded.sources[key]}" if key in loaded.sources else ""
        lines.append(f"{'  ' * (len(key) - 1)}{key[-1]}: {text}{source}")
    return "\n".join(lines) + "\n"


def _read_yaml(file: Path) -> Mapping[str, object]:
    try:
        tree = _parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise InvalidConfig(f"cannot read the configuration {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{file} is not YAML: it is not UTF-8 text") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InvalidConfig(f"{file} should hold settings such as 'server: {{port: 8476}}', not a {_kind(tree)}")
    return tree


def _parse_yaml(text: str, source: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def _flatten(
    tree: Mapping[str, object], section: type[Section], source: str, above: Key = ()
) -> Iterator[tuple[Key, object]]:
    """(key, value) of each setting in a nested mapping; refuses keys that do not exist."""
    for name, value in tree.items():
        key = (*above, str(name))
        inner = _section(key)
        if inner is None:
            yield _known(key, source), value
        elif isinstance(value, dict):
            yield from _flatten(value, inner, source, key)
        elif value is not None:
            raise InvalidConfig(f"{source}: {_section_hint(key, inner)}, not a {_kind(value)}")


def _set(given: dict[Key, Setting], dotted: str, value: object, source: str) -> None:
    """Put one setting given by a dotted key; text becomes what the setting's type asks for."""
    names = tuple(dotted.split("."))
    inner = _section(names)
    if inner is not None:
        raise InvalidConfig(f"{source}: {_section_hint(names, inner)}; set one of them")
    mapping_key = next((names[:depth] for depth in (1, 2) if _field_is_mapping(names[:depth])), None)
    if mapping_key is not None and len(names) > len(mapping_key):  # experts.resources.NAME=1; NAME may have dots
        before = given.get(mapping_key)
        entries = dict(before.value) if before is not None and isinstance(before.value, Mapping) else {}
        given[mapping_key] = Setting({**entries, ".".join(names[len(mapping_key) :]): value}, source)
        return
    key = _known(names, source)
    if isinstance(value, str):
        if mapping_key is not None:
            value = _parse_yaml(value, source)
        elif value.lower() in ("null", "none", "") and type(None) in get_args(_field(key).annotation):
            value = None
    given.pop(key, None)
    given[key] = Setting(value, source)


# --- The shape of the tree -----------------------------------------------------------------------------------
def _keys(section: type[Section], above: Key = ()) -> Iterator[Key]:
    """Every setting of the tree, in the order in which it is written."""
    for name in section.model_fields:
        key = (*above, name)
        inner = _section(key)
        if inner is None:
            yield key
        else:
            yield from _keys(inner, key)


def _section(key: Key) -> type[Section] | None:
    """The class of the section that `key` names; None for anything else."""
    section: type[Section] = Config
    for name in key:
        field = section.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return None
        section = field.annotation
    return section


def _field(key: Key) -> Any:
    section = _section(key[:-1])
    return None if section is None else section.model_fields.get(key[-1])


def _field_is_mapping(key: Key) -> bool:
    field = _field(key)
    return field is not None and getattr(field.annotation, "__origin__", None) is dict


def _known(key: Key, source: str) -> Key:
    """`key` itself if the tree has it, or `InvalidConfig` with its nearest neighbour."""
    if _field(key) is not None:
        return key
    dotted = ".".join(key)
    section = _section(key[:-1])
    every = [".".join(known) for known in _keys(Config)]
    near = [known for known in every if known.split(".")[-1] == key[-1]]
    beside = difflib.get_close_matches(key[-1], section.model_fields, n=1) if section else []
    near = near or [".".join((*key[:-1], name)) for name in beside]
    near = near or ([] if section else difflib.get_close_matches(dotted, every, n=1))
    hint = f"did you mean '{near[0]}'?" if near else "`ray-moe config --show` lists all there are"
    raise InvalidConfig(f"{source}: there is no setting '{dotted}'; {hint}")


def _section_hint(key: Key, section: type[Section]) -> str:
    return f"'{'.'.join(key)}' is a section with the settings {', '.join(section.model_fields)}"


def _explain(error: ValidationError, given: Mapping[Key, Setting]) -> str:
    """One line for each wrong value: key, value, source, what was expected, and what the setting means."""
    lines = []
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"])
        key = next((location[:depth] for depth in (2, 1) if _field(location[:depth]) is not None), location)
        said = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        setting = given.get(key)
        if setting is None or _section(key) is not None:  # a contradiction between settings of one section
            sources = sorted({given[k].source for k in given if k[: len(key)] == key})
            lines.append(f"{'.'.join(key)}: {said} ({', '.join(sources)})")
            continue
        meaning = " ".join((_field(key).description or "").split())
        lines.append(f"{'.'.join(location)} = {problem['input']!r} ({setting.source}): {said}. It is: {meaning}")
    return "\n".join(lines)


def _kind(value: object) -> str:
    return {"str": "text", "int": "number", "float": "number", "bool": "truth value"}.get(
        type(value).__name__, type(value).__name__
    )
