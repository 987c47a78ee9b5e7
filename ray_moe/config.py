"""The one validated tree that a user writes.

Every setting has a description, a unit where it has one, and a range. Where the values come from is the business of
`config_sources.py`; the composition root hands the sections down.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ray_moe.config_train import TrainConfig, check_experts
from ray_moe.config_types import (
    Bytes,
    Count,
    Devices,
    File,
    Number,
    Seconds,
    Section,
    Source,
    check_address,
    check_custom_resources,
    check_device,
    check_endpoint,
    check_label_selector,
)

TraceDetail = Literal["requests", "steps", "experts"]


class RayConfig(Section):
    """The cluster."""

    address: Annotated[str, AfterValidator(check_address)] = "local"
    """`local` starts a Ray on this machine, `auto` joins the one that runs here, HOST:PORT joins that one."""
    num_cpus: Count | None = None
    """CPUs a local Ray may give out; all there are when not set."""
    object_store_bytes: Annotated[Bytes, Field(ge=80 * 2**20)] | None = None
    """Shared memory of a local Ray's object store, 80 MiB or more; Ray's own choice when not set."""
    auth: Literal["token", "disabled"] = "token"
    """`token`: only processes that know the cluster's token may join it."""
    autoscaling: bool = False
    """Whether nodes come for actors that find no room: a start then waits for them instead of refusing."""
    warm_start: bool | None = None
    """Whether actors without a GPU are forked from a process of their node that has made all imports: they start in a
    tenth of the time, and share in memory what they have imported. All nodes must have the same Python at the same
    place. When not set: where the service has started Ray."""


class ExpertsConfig(Section):
    """The actors that hold the experts."""

    num_actors: Count | None = None
    """Actors to start. When this and `experts_per_actor` are not set: one for each expert index, or as many as the
    cluster can hold."""
    experts_per_actor: Count | None = None
    """Expert indices that share an actor (each over all layers); instead of `num_actors`."""
    tensor: Count = 1
    """Parts that each expert is cut into along its width, on different actors where there are as many (tensor
    parallelism): for experts that are too large for one. Actors, placements and plans count parts as experts. Any
    checkpoint goes on with another number."""
    num_cpus: Devices = 1
    """CPUs that Ray reserves for each actor; fractions up to 1 are allowed."""
    num_gpus: Devices = 0
    """GPUs that Ray reserves for each actor; fractions up to 1 are allowed."""
    resources: Annotated[dict[str, Annotated[Devices, Field(gt=0)]], AfterValidator(check_custom_resources)] = {}  # noqa: RUF012
    """Custom Ray resources that each actor takes, e.g. `{expert_slot: 1}`; fractions up to 1 are allowed."""
    label_selector: Annotated[dict[str, str], AfterValidator(check_label_selector)] = {}  # noqa: RUF012
    """Labels of the nodes that may hold experts, e.g. `{market-type: spot}`; also `!spot`, `in(a,b)`, `!in(a,b)`."""
    num_threads: Annotated[int, Field(ge=1, le=1024), Number] = 1
    """Threads each actor computes with. Those that share cores may each have as many as there are cores."""
    spare_slots: Annotated[int, Field(ge=0), Number] = 1
    """Experts of each layer that an actor may hold beyond its equal share: room for replicas of the hot ones, for those
    of a lost actor, and for moving."""
    max_bytes: Annotated[Bytes, Field(ge=1)] | None = None
    """Expert weights that each actor may hold, instead of `spare_slots`."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where the experts that an actor holds are while they are not among its hottest: `disk` reads one from the
    checkpoint's files when a call needs it, `cpu` copies it from pinned memory to the actor's GPU. Answers stay the
    same; a call that needs others than the hottest waits for them, one after the other. A checkpoint must stay where it
    is as long as it is served. Experts that are trained are not affected (`train.optimizer.offload`)."""
    resident_bytes: Annotated[Bytes, Field(ge=1)] = 2 * 2**30
    """With `offload`: size of the hottest experts, which each actor keeps in the memory that it computes in, its GPU's
    if it has one. Besides there is one expert at a time, the one that computes."""
    copy_from: Literal["node", "any", "none"] = "node"
    """Where an actor gets the weights of a replica: from an actor of its node that has them, from any that has them, or
    always from the checkpoint, which is also the way out when the others fail."""
    quantization: Literal["none", "int8", "int8_compute", "fp8"] = "none"
    """`int8` and `fp8` (e4m3) hold experts that serve in 8 bits, a scale for each output channel: a fourth of the bytes
    of float32 and half of those of bfloat16. Each is dequantised when it computes, so steps take longer, and answers
    are not those of the checkpoint to the bit. `int8_compute` is stored as `int8` and rounds what comes in to 8 bits,
    too, so that it multiplies integers: on CPUs with VNNI or AMX faster than float32. Experts that are trained are not
    affected."""
    standby_actors: Annotated[int, Field(ge=0), Number] = 0
    """Running actors without experts that take over from a lost one in tens of milliseconds, and serve first when more
    are wanted; others then start in their place."""
    standby_preload: bool = False
    """Whether a standby actor reads all experts into memory beforehand, and so takes over without loading."""
    max_restarts: Annotated[int, Field(ge=-1), Number] = -1
    """How often Ray may restart each actor; -1 is without limit."""
    start_timeout_s: Seconds = 300
    """Seconds in which all actors must have started and loaded their experts."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> ExpertsConfig:
        if self.num_actors is not None and self.experts_per_actor is not None:
            raise ValueError("num_actors and experts_per_actor are both set; set one of them")
        return self

    @model_validator(mode="after")
    def _somewhere_to_offload_to(self) -> ExpertsConfig:
        if self.offload == "cpu" and not self.num_gpus:
            raise ValueError("offload: cpu is for actors on GPUs; set num_gpus, or offload: disk")
        if self.offload == "disk" and self.max_bytes is not None:
            raise ValueError("with offload: disk memory has resident_bytes of experts, so leave max_bytes out")
        return self


class RouterConfig(Section):
    """The actors that hold the rest of the model, each all of it, and answer the clients."""

    num_actors: Count = 1
    """Routers. Clients are told of all, and go to another one when theirs is gone."""
    max_actors: Count | None = None
    """Under Ray Serve the number of routers follows the requests, from `num_actors` up to this many, when it is set."""
    target_requests: Annotated[float, Field(gt=0), Number] = 32
    """And so that each has about this many requests."""
    num_cpus: Devices = 1
    """CPUs that Ray reserves for each."""
    num_gpus: Devices = 0
    """GPUs that Ray reserves for each."""
    num_threads: Annotated[int, Field(ge=1, le=1024), Number] = 1
    """Threads each computes with."""
    device: Annotated[str, AfterValidator(check_device)] = "auto"
    """`auto` is a GPU when one is reserved (`num_gpus`), else the CPU."""
    max_concurrent_requests: Count = 64
    """Generations computed together; further ones wait."""
    max_queued_requests: Annotated[int, Field(ge=0), Number] = 256
    """Generations that may wait; further ones are refused as overloaded."""
    max_queued_tokens: Count = 2**20
    """Tokens that the prompts of those may have, all together."""
    max_step_tokens: Count = 512
    """Tokens computed at a time: a longer prompt is computed in parts, so that others go on in between. It is also the
    longest prompt of a model with an encoder, which reads it at once."""
    kv_cache_bytes: Annotated[Bytes, Field(ge=2**20)] = 2**30
    """Keys and values of all generations, and of ended ones that are kept for others that begin the same; 1 MiB or
    more."""
    reuse_prefixes: bool = True
    """Whether what prompts begin with is kept for others that begin the same."""
    overlap_min_tokens: Count | None = None
    """Steps of at least so many tokens are computed as two halves at once: while one is with the experts, the router
    computes what is between them for the other. It pays for large steps (a few hundred tokens and more; see also
    `max_step_tokens`) where routers and experts have cores of their own: experts' weights are read for each half."""
    expert_call_timeout_s: Seconds = 30
    """Seconds after which an unanswered call to an expert actor is sent again."""
    recovery_timeout_s: Seconds = 60
    """Seconds that a request waits for a lost expert to come back before it fails as unavailable."""
    expert_cache_bytes: Annotated[Bytes, Field(ge=0)] = 0
    """The hottest experts, up to this size, are also held by the router itself and computed there without any hop."""
    lifeboat_bytes: Annotated[Bytes, Field(ge=0)] = 2 * 2**30
    """Experts that no actor holds any more are read by the router and computed there until one does; the longest unused
    are given up beyond this size. 0 turns it off: requests then wait."""

    @model_validator(mode="after")
    def _ordered(self) -> RouterConfig:
        if self.max_actors is not None and self.num_actors > self.max_actors:
            raise ValueError(f"num_actors is {self.num_actors} and max_actors is {self.max_actors}; swap them")
        return self


class DispatchConfig(Section):
    """Tokens out to the experts, and back."""

    combine: Literal["router", "host"] = "router"
    """Who adds up the experts' outputs: `router` in the order of transformers (bit-equal in bfloat16), `host` sends
    one weighted sum for each token instead of one row for each expert (less traffic)."""
    hedge: bool = True
    """Whether rows that an actor is unusually slow to answer are also sent to another one; the first answer counts."""
    hedge_factor: Annotated[float, Field(ge=1), Number] = 4
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
    min_gain: Annotated[float, Field(ge=0, le=1), Number] = 0.02
    """Balancedness (mean load of an actor / highest, 1 is perfect) that a change must bring to a layer."""
    cost_per_move: Annotated[float, Field(ge=0, le=1), Number] = 0.008
    """And this much more for each replica it copies, divided by the number of actors: they load side by side."""
    min_replicas: Count = 1
    """Replicas that every expert has, where there is room."""
    survive_nodes: Annotated[int, Field(ge=0), Number] = 0
    """Place replicas so that all experts most likely survive the loss of so many nodes, whichever; then balance."""
    domain_label: str = ""
    """Label of the nodes that names their failure domain, over which replicas are spread: ray.io/availability-zone."""
    drain_s: Seconds = 0.5
    """Seconds that an actor keeps an expert after no routing table names it there any more."""
    return_s: Seconds = 60
    """Seconds that a lost actor is expected back before plans are made without it."""

    @property
    def replicas_wanted(self) -> int:
        """Of every expert, where there is room: what both settings ask for together."""
        return max(self.min_replicas, self.survive_nodes + 1)


class ScalingConfig(Section):
    """How many expert actors there are: changed while requests flow. With an autoscaling cluster, nodes follow."""

    enabled: bool = False
    """Whether the number of actors follows the load by itself; `ray-moe resize` changes it on request in any case."""
    min_actors: Annotated[int, Field(ge=0), Number] = 1
    """Fewest."""
    max_actors: Count = 8
    """Most."""
    target_utilisation: Annotated[float, Field(gt=0, le=1), Number] = 0.6
    """Share of the time that actors should be computing."""
    max_queue_age_s: Seconds = 1
    """A request that waits longer for its turn calls for more actors."""
    up_after_s: Annotated[float, Field(ge=0), Number] = 3
    """Seconds that more must have been wanted."""
    down_after_s: Annotated[float, Field(ge=0), Number] = 60
    """Seconds that fewer must have been wanted."""
    cool_down_s: Annotated[float, Field(ge=0), Number] = 15
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


class VersionsConfig(Section):
    """Versions of the weights: a running service is given others by `ray-moe publish`."""

    keep: Count = 2
    """Versions that are held at the same time: the current one and those before it, which `ray-moe rollback` returns
    to. Actors and routers need memory for each of them, and for one more while one is being published."""
    load_timeout_s: Seconds = 300
    """Seconds in which all actors and routers must have loaded a version, or it is not published."""


class ChaosConfig(Section):
    """Faults on purpose, with `ray-moe chaos`."""

    enabled: bool = False
    """Whether the service may be told to hurt itself."""


class TransportConfig(Section):
    """How tokens travel between the routers and the expert actors."""

    kind: Literal["auto", "grpc", "object_store"] = "auto"
    """`auto` is a Unix socket to actors on the router's own node, gRPC to all others, and Ray's object store where an
    actor's port cannot be reached. `grpc` is gRPC to all of them."""
    shared_memory: bool = True
    """Whether payloads between processes of one node go through shared memory."""
    arena_bytes: Annotated[Bytes, Field(ge=2**20)] = 256 * 2**20
    """Shared memory for each router-actor pair, 1 MiB or more; what does not fit travels inline."""
    gpu_arena_bytes: Annotated[Bytes, Field(ge=0)] = 256 * 2**20
    """Memory of the GPU that a router shares with the actors that compute on it, where hidden states then stay; 0 for
    none. It is taken at once. What does not fit goes by way of the CPU."""
    inline_bytes: Annotated[Bytes, Field(ge=0)] = 64 * 2**10
    """Payloads below this size travel inside the message even on one node."""
    chunk_bytes: Annotated[Bytes, Field(ge=4096, le=2**30)] = 2**20
    """Longer messages are sent in pieces of this size; 4 KiB to 1 GiB."""
    connect_timeout_s: Seconds = 5
    """Seconds in which a connection to an actor must stand."""
    ping_interval_s: Seconds = 10
    """Seconds of silence after which the peer is asked whether it is still there, or, at a Unix socket, the kernel
    whether it has been stopped."""
    ping_timeout_s: Seconds = 5
    """Seconds in which it must answer, or go on, or it counts as lost."""
    tls: bool = False
    """Encrypt what goes from node to node, with certificates of both ends: made at each start by an authority of the
    service's own, unless there are files. What stays on a node (Unix sockets, shared memory) stays as it is. What Ray
    itself carries is encrypted by Ray alone (RAY_USE_TLS=1 on every node). Where it is not, tokens never take its
    object store (`kind`), and weights come from the checkpoint (`experts.copy_from`)."""
    tls_cert_file: File = ""
    """Certificate of all routers and expert actors in PEM, followed by those up to the root. It needs a DNS name (any),
    and must be valid for servers and clients. These files are read once, where the service is started."""
    tls_key_file: File = ""
    """Its private key in PEM, not encrypted."""
    tls_ca_file: File = ""
    """Roots in PEM. Whoever has a certificate of theirs may be a member: they should sign for this cluster alone."""

    @model_validator(mode="after")
    def _whole_identity(self) -> TransportConfig:
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        if any(files) and not all(files):
            raise ValueError("tls_cert_file, tls_key_file and tls_ca_file go together; set all of them, or none")
        if any(files) and not self.tls:
            raise ValueError("tls_cert_file, tls_key_file and tls_ca_file are for tls: true")
        return self


class ServerConfig(Section):
    """The front doors: gRPC and HTTP."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface. Others than this machine's own need `keys_file` and
    `tls_cert_file`."""
    port: Annotated[int, Field(ge=0, le=65535), Number] = 8476
    """TCP port for gRPC; 0 takes a free one. Of several routers, the second takes two more, the third four, and so on,
    for HTTP as well."""
    http_port: Annotated[int, Field(ge=0, le=65535), Number] | None = 8477
    """TCP port for HTTP, which speaks OpenAI's interface; 0 takes a free one, null opens none."""
    keys_file: File = ""
    """File of API keys (`ray-moe keys`), followed when it changes; empty lets everybody on this machine in, who
    must call HTTP by localhost or an IP address."""
    allow_anonymous: bool = False
    """Listen beyond this machine also without keys: then everybody who reaches a port may do everything, draining and
    resizing included."""
    tls_cert_file: File = ""
    """Certificate in PEM, followed by those up to the root; read again when it changes. Empty: no encryption."""
    tls_key_file: File = ""
    """Its private key in PEM, not encrypted."""
    tls_client_ca_file: File = ""
    """Roots of clients' certificates; when set, clients without one are refused."""
    max_request_bytes: Annotated[Bytes, Field(ge=2**12, le=2**31 - 1)] = 512 * 2**20
    """Size of the largest message a client may send; at most 2 GiB, which is gRPC's limit."""
    max_in_flight_bytes: Annotated[Bytes, Field(ge=2**12)] = 4 * 2**30
    """Size of all requests that are held at the same time; further ones are refused as overloaded, though one alone
    never is. Computing takes a few times as much memory."""
    max_forward_tokens: Count = 131_072
    """Tokens that one Forward call may bring, or one micro-batch of training."""
    max_prompt_bytes: Annotated[Bytes, Field(ge=1)] = 2**20
    """Size of a prompt given as text, in UTF-8; a longer one is refused before it is split into tokens."""
    read_timeout_s: Annotated[float, Field(gt=0, le=86_400), Number] = 60
    """Seconds in which an HTTP request must have come, from its first byte; then the client is hung up on."""
    max_metric_experts: Annotated[int, Field(ge=0, le=100_000), Number] = 32
    """Experts, the hottest of all layers, that have a series of their own in `GET /metrics`; the others of each layer
    are one series together."""
    grace_s: Annotated[float, Field(ge=0), Number] = 5
    """Seconds that requests in flight may go on when the service stops."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @model_validator(mode="after")
    def _certificate_and_key(self) -> ServerConfig:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file go together; set both, or neither")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        if self.keys_file and not self.tls_cert_file and not self.is_local:
            raise ValueError("keys would travel unencrypted: set tls_cert_file and tls_key_file, or host to 127.0.0.1")
        if not self.keys_file and not self.is_local and not self.allow_anonymous:
            raise ValueError(
                f"without keys everybody who reaches {self.host} could do everything: set keys_file (`ray-moe keys`), "
                "tls_cert_file and tls_key_file, or host to 127.0.0.1, or, if all of them may, allow_anonymous to true"
            )
        return self


class LogsConfig(Section):
    """What the service's processes write to standard error; Ray keeps that of the actors in its session's logs."""

    format: Literal["text", "json"] = "text"
    """`json`: one object for each line, with `ts`, `level`, `logger`, `message`, `actor`, `pid`, and where a request is
    being answered its `request_id` and `caller`."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least that is written of this package; at `info` one line for each request. Of libraries: warnings and worse."""
    to_driver: bool = False
    """Whether what the actors write is also written where the service was started, with each actor's name before it."""


class TracingConfig(Section):
    """Traces of requests, from the front door to the experts, by OpenTelemetry (`pip install 'ray-moe[otel]'`)."""

    endpoint: Annotated[str, AfterValidator(check_endpoint)] = ""
    """OTLP collector to send spans to over HTTP, such as http://localhost:4318; empty: nothing is traced. Headers that
    it wants are taken from the nodes' environment (OTEL_EXPORTER_OTLP_HEADERS)."""
    sample_ratio: Annotated[float, Field(ge=0, le=1), Number] = 0.01
    """Share of the requests that are traced, where the client does not say so itself in `traceparent`."""
    detail: TraceDetail = "experts"
    """`requests`: each request with its queue, prefill and decode; `steps`: also each step of the model; `experts`:
    also each MoE layer of each step, and what each actor computes for it. A token then makes up to
    1 + layers x (1 + actors) spans, an answer of a large model many thousands: sample few."""


class Config(Section):
    """Everything a user can set."""

    model: Source = ""
    """Directory of a Hugging Face checkpoint, or its name on the hub."""
    model_name: str = ""
    """What clients call the model; empty is the last part of `model`."""
    service_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "ray-moe"
    """Prefix of the actors' names, so that one cluster can hold several services: letters, digits, '.', '_', '-'."""
    ray: RayConfig = RayConfig()
    experts: ExpertsConfig = ExpertsConfig()
    router: RouterConfig = RouterConfig()
    dispatch: DispatchConfig = DispatchConfig()
    balance: BalanceConfig = BalanceConfig()
    scaling: ScalingConfig = ScalingConfig()
    versions: VersionsConfig = VersionsConfig()
    chaos: ChaosConfig = ChaosConfig()
    transport: TransportConfig = TransportConfig()
    server: ServerConfig = ServerConfig()
    logs: LogsConfig = LogsConfig()
    tracing: TracingConfig = TracingConfig()
    train: TrainConfig = TrainConfig()

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or self.model.rstrip("/").rpartition("/")[2]

    @model_validator(mode="after")
    def _sleep_needs_a_lifeboat(self) -> Config:
        if self.scaling.zero_after_s is not None and not self.router.lifeboat_bytes:
            raise ValueError("scaling.zero_after_s needs router.lifeboat_bytes: nobody else could answer while asleep")
        return self

    @model_validator(mode="after")
    def _experts_are_trained_as_they_can_be(self) -> Config:
        check_experts(self.train, self.train.parallel.tensor or self.experts.tensor)
        return self
