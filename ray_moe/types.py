"""The nouns of the service: hosts, layers, placements and the routing table.

Plain immutable values without torch, Ray or I/O; every other module may import them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

HostId = str
"""Name of a host, e.g. ``expert-3``. It outlives the process: a restarted actor keeps its host id."""

LayerPath = str
"""Module path of a layer's experts inside the model, e.g. ``model.layers.3.mlp.experts``.

Experts are keyed by path and not by layer number, because one decoder layer may hold two groups of experts.
"""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One group of routed experts of a model."""

    path: LayerPath
    num_experts: int
    hidden_size: int
    """D, the width of the tokens that go in."""
    output_size: int
    """Width of the rows that come out (D for every known family)."""
    dtype: str
    """Name of the torch dtype of the experts' weights, e.g. ``bfloat16``."""
    expert_bytes: int
    """Bytes of one expert's weights once loaded."""


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host listens, and which life of it this is."""

    host_id: HostId
    incarnation: str
    """Random name of this life of the process: a restarted host has another one."""
    node_id: str
    pid: int
    tcp: str
    """``ip:port``, reachable from other nodes."""
    unix: str
    """Name of the abstract Unix socket, for peers on the same node; empty where there are none."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which host holds which experts: ``hosts_of[layer][expert]`` lists the hosts of its replicas, best first.

    A host stands at most once in a list. An empty list is an expert that nobody holds. Where experts are cut into parts
    (`experts.tensor`) each part stands here as an expert would (`policy/parts.py`).
    """

    hosts_of: Mapping[LayerPath, tuple[tuple[HostId, ...], ...]]

    def experts_on(self, host_id: HostId) -> dict[LayerPath, list[int]]:
        """Ascending expert indices that `host_id` holds, for each layer where it holds any."""
        held: dict[LayerPath, list[int]] = {}
        for layer, experts in self.hosts_of.items():
            mine = [expert for expert, hosts in enumerate(experts) if host_id in hosts]
            if mine:
                held[layer] = mine
        return held


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """A placement as the routers use it. A later table has a higher epoch; a router never goes back.

    A host named by the placement but absent from `addresses` is on its way (starting or restarting).
    """

    epoch: int
    placement: Placement
    addresses: Mapping[HostId, HostAddress] = field(default_factory=dict)
    speeds: Mapping[HostId, float] = field(default_factory=dict)
    """How fast each host computes, relative to the others; absent is 1."""

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a replica that is there."""
        layers = self.placement.hosts_of.values()
        there = self.addresses.keys()
        return bool(layers) and all(not there.isdisjoint(hosts) for experts in layers for hosts in experts)


# --- What the service tells about itself ---------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class HostStatus:
    """One expert host, as the controller knows it and as the host reports itself."""

    host_id: HostId
    state: str
    """``starting``, ``loading``, ``ready``, ``draining``, ``standby`` or ``lost``."""
    node_id: str = ""
    pid: int = 0
    restarts: int = 0
    """Lives of this host before the present one."""
    rss_bytes: int = 0
    weight_bytes: int = 0
    """Bytes of expert weights it is to hold."""
    loaded_bytes: int = 0
    """Of those, loaded so far."""
    num_experts: int = 0
    """(layer, expert) pairs it is to hold; parts of experts, where these are cut (`experts.tensor`)."""
    num_calls: int = 0
    num_rows: int = 0
    """(token, expert) rows computed in this life."""
    utilisation: float = 0.0
    """Share of the last seconds in which it was computing, 0 to 1."""
    queued_rows: int = 0
    """Rows that wait for it."""


@dataclass(frozen=True, slots=True)
class RouterAddress:
    """Where clients reach a router of the service."""

    router_id: str
    grpc_address: str
    """``host:port``."""
    http_address: str = ""
    """``http://host:port`` or ``https://host:port``; empty when it speaks no HTTP by itself."""
    ready: bool = False


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """The router that answers."""

    pid: int
    rss_bytes: int
    backbone_bytes: int
    """Bytes of the weights it holds (everything but the routed experts)."""
    active_requests: int = 0
    queued_requests: int = 0
    generated_tokens: int = 0
    retried_calls: int = 0
    """Calls to hosts that were sent again after a host was lost or did not hold the expert."""
    failed_requests: int = 0
    """Generations and layer calls that ended with an error that was not the caller's."""
    hedged_calls: int = 0
    """Calls that were also sent to another host because the first was slow."""
    own_rows: int = 0
    """(token, expert) rows computed in the router itself: its cache and its lifeboat."""
    own_bytes: int = 0
    """Bytes of the experts it holds for that."""
    lifeboat_loads: int = 0
    """Experts that it has read because nobody held them."""
    balancedness: float = 1.0
    """Mean over the last batches of (mean / highest load of a host); 1 is perfect."""
    longest_pause_s: float = 0.0
    """Longest time between two tokens of a running generation, over the last minute."""
    router_id: str = ""


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something that happened to the cluster."""

    at_s: float
    """Unix time."""
    kind: str
    """``lost``, ``repaired``, ``planned``, ``replicated``, ``moved``, ``freed``, ``resizing``, ``resized``,
    ``aborted``, ``failed`` ..."""
    text: str


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version of the weights of a running service."""

    number: int
    """In the order of publishing; 0 is what the service was started with."""
    model: str
    """The checkpoint: a directory, or a name on the hub."""
    state: str
    """``current`` (new requests are computed with it), ``kept`` (it can be rolled back to), ``canary`` (it is tried
    out), ``ending`` (until the last request that uses it ends) or ``loading``."""
    drift: float = 0.0
    """Of a canary: how far the rows of its expert are from those of the current one, as the root of the sum of squared
    differences over that of squared rows."""
    num_rows: int = 0
    """Rows that were compared."""


@dataclass(frozen=True, slots=True)
class CanaryRequest:
    """Another version of one expert is to be tried out."""

    layer: LayerPath
    expert: int
    model: str
    """The checkpoint that has it: a directory, or a name on the hub."""
    share: float = 0.1
    """Of the requests (``traffic``), or of the expert's rows (``shadow``)."""
    mode: str = "shadow"
    """``shadow``: its rows are computed beside the others, and only compared. ``traffic``: requests are answered by
    it, each from its beginning to its end; their rows are compared as well."""
    max_drift: float = 0.1
    """Above this, after a few dozen rows, it is cancelled by itself."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Everything `ray-moe status` shows."""

    model: str
    model_type: str
    version: str
    state: str
    """``starting``, ``ready``, ``degraded`` (an expert has no live host, or the router is being replaced) or
    ``failed`` (an actor cannot start)."""
    uptime_s: float
    epoch: int
    router: RouterStatus
    hosts: tuple[HostStatus, ...]
    tokens_per_expert: Mapping[LayerPath, tuple[int, ...]]
    """Tokens routed to each expert since the router started."""
    changing: str = ""
    """The change of the cluster that is under way; empty when there is none."""
    events: tuple[ClusterEvent, ...] = ()
    """What happened last to the cluster, oldest first."""
    p_lossless: float = 1.0
    """Chance that every expert survives the loss of `balance.survive_nodes` nodes (of one, where that is 0)."""
    routers: tuple[RouterAddress, ...] = ()
    """All there are, the one that answers among them."""
    versions: tuple[VersionStatus, ...] = ()
    """Of the weights, the oldest first."""


# --- Changing the cluster ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PlannedMove:
    """What a plan does with one expert."""

    layer: LayerPath
    expert: int
    added: tuple[HostId, ...]
    """Hosts that get a replica."""
    removed: tuple[HostId, ...]
    """Hosts that give theirs up."""


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A better placement: what it takes, and what it brings."""

    moves: tuple[PlannedMove, ...]
    copied_bytes: int
    """Weights that hosts load for it."""
    num_steps: int
    """Each is loaded whole, then routed to at once: make before break."""
    balancedness_before: float
    """Predicted (mean / highest load of a host, averaged over the layers, at the present load)."""
    balancedness_after: float
    pause_s: float
    """How long requests are predicted to stand still: 0, unless an expert has no living replica now."""
    duration_s: float
    """How long the copying is predicted to take, beside the requests."""


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """A fault on purpose."""

    kind: str
    """``kill``, ``hang``, ``slow``, ``corrupt`` or ``partition``."""
    target: str = "random"
    """A host, ``node:ID``, ``controller``, or ``random``: a host drawn by `seed`."""
    at_s: float = 0.0
    """Seconds from now."""
    duration_s: float = 5.0
    """How long it lasts; a kill is for ever."""
    factor: float = 10.0
    """For ``slow``: how many times longer everything takes."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """What a fault did, seen from the router."""

    kind: str
    targets: tuple[str, ...]
    stall_s: float
    """Longest time between two tokens of a running generation, from the fault until it was repaired."""
    failed_requests: int
    repaired_s: float
    """Until every expert had its replicas and every host was back; negative when that was given up."""
    balancedness_before: float
    balancedness_after: float
    retried_calls: int
    hedged_calls: int
    lifeboat_loads: int


# --- Training ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some sequences of a step. Letters in shapes: B sequences, S tokens."""

    micro_id: str
    """Of the client's own; what has come under an id counts once."""
    input_ids: NDArray[np.int64]
    """[B, S]"""
    labels: NDArray[np.int64]
    """[B, S] the token that belongs at each position, -100 where it does not count."""
    weight: float = 1.0
    """Of its loss in the mean over the step."""


@dataclass(frozen=True, slots=True)
class MicroBatchReport:
    """What came of a micro-batch, which is now in the open step."""

    micro_id: str
    step: int
    """It is in."""
    loss: float
    """Mean over the labels that count."""
    num_tokens: int
    tokens_per_expert: dict[LayerPath, tuple[int, ...]]
    """Rows of each expert in this micro-batch."""

    @property
    def balancedness(self) -> dict[LayerPath, float]:
        """Mean / highest number of rows of an expert in this micro-batch, by layer; 1 is perfect."""
        return {
            layer: sum(tokens) / len(tokens) / max(tokens) if any(tokens) else 1.0
            for layer, tokens in self.tokens_per_expert.items()
        }


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is to be made."""

    op_id: str
    """Of the client's own; what was made under an id is not made again."""
    step: int | None = None
    """The step to be made; None is whichever is next."""
    lr: float | None = None
    """Learning rate; None is that of the configuration."""
    clip_norm: float | None = None
    """Largest global norm of the gradient, infinity for none; None is that of the configuration."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step of training that was made."""

    step: int
    """From 1."""
    loss: float
    """Weighted mean over its micro-batches."""
    grad_norm: float
    """Global norm over backbone and experts, before clipping."""
    lr: float
    num_micro_batches: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SavedState:
    """A checkpoint of training."""

    step: int
    folder: str
    """On the service's nodes."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """How far training is."""

    run_id: str
    step: int
    """The last one that was made; 0 for none."""
    micro_batches: tuple[str, ...] = ()
    """Ids of what is in the open step."""
    history: tuple[StepResult, ...] = ()
    """The last steps that were made, the oldest first, as far as the trainer remembers them."""
    saved_steps: tuple[int, ...] = ()
    """Of which there is a checkpoint, the oldest first."""


# --- Generation ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue. Exactly one of `prompt` and `token_ids` is set."""

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    top_p: float = 1.0
    """Nucleus sampling keeps the smallest set of tokens whose probability reaches this (Holtzman et al., 2020)."""
    seed: int | None = None
    ignore_eos: bool = False
    """Go on to `max_new_tokens` whatever is generated."""
    top_k: int = 0
    """Sampling among so many of the likeliest tokens; 0 is among all."""
    min_p: float = 0.0
    """Sampling among tokens at least this much as likely as the likeliest (Nguyen et al., 2024)."""
    repetition_penalty: float | None = None
    """Logits of tokens that have occurred, the prompt included unless an encoder reads it, are divided by it, or
    multiplied where negative (Keskar et al., 2019); None is what the checkpoint asks for, which is usually 1."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that have been generated."""
    frequency_penalty: float = 0.0
    """Taken off them once for each time."""
    stop: tuple[str, ...] = ()
    """Texts before which the generation ends. They are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens with which it ends."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told for each, beside its own log-probability; None: not even that."""
    timeout_s: float | None = None
    """Seconds after which nobody waits for it any more."""
    caller: str = ""
    """Whom it is for: callers take turns."""
    version: int | None = None
    """Of the weights that are to compute it; None: the current one."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, before temperature, penalties and the choice among the likeliest."""

    token_id: int
    logprob: float
    """Natural logarithm."""
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens, best first."""


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """A piece of a generation, in order. The last one has a `finish_reason`."""

    token_ids: tuple[int, ...]
    text: str
    """Text these tokens complete (a multi-token character waits for its last token); empty without tokenizer."""
    finish_reason: str = ""
    """Empty while it goes on; ``stop`` at an end-of-sequence token or a stop, ``length`` at `max_new_tokens`."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Tokens of the prompt that did not have to be computed: another one had begun with them."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, if they were asked for."""
    version: int = 0
    """Of the weights that computed it, the same in all pieces."""
