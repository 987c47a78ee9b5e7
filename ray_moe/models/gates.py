"""Putting another gate into a model of `transformers`, in place of the routers beside its experts.

Works on every family whose block calls its router with hidden states alone and takes (logits, weight, index) from it,
which is asked of each router before it goes. The gate takes the router's place and name, so a checkpoint of the model
has the gate's weights where the router's were. Loads nothing; called by who trains or studies a model.

The model's own auxiliary loss (`output_router_logits`) knows routers alone, and is 0 afterwards: add those of
`routings`. A router's own bias of its logits (gpt-oss) goes with it.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ray_moe.errors import UnsupportedModel
from ray_moe.models.experts import experts_modules
from ray_moe.ops.gates.base import GateSettings, Routing, TokenInfo, takes_info
from ray_moe.ops.gates.registry import GateChoice, make_gate
from ray_moe.ops.gates.routers import Answer, allow_no_expert, routers_beside
from ray_moe.types import LayerPath

SAME = {"weight": "weight", "bias": "e_score_correction_bias"}
"""What a router calls what a gate has."""

_ROUTINGS: WeakKeyDictionary[nn.Module, Routing] = WeakKeyDictionary()
"""Of the last call of each gate. Not in the gate, for a model to be copied after it was used: no history can be."""

_INFO, _HEARD = "_ray_moe_info", "_ray_moe_heard"


def replace_gates(model: nn.Module, settings: GateSettings | GateChoice | str, *, seed: int = 0) -> list[LayerPath]:
    """Give every MoE block of `model` a gate.

    Weights that the router has, too, are kept where shapes agree, so "topk" with the model's own options changes
    nothing; all others are drawn. Gates have the dtype and device of the routers.

    Args:
        model: of `transformers`, with its weights. It is changed.
        settings: of the gates; or a name or a choice, with the model's own K where the gate has an option `top_k`.
        seed: of the weights that are drawn.

    Returns: paths of the gates, in model order.

    Raises:
        UnsupportedModel: a router has another form; nothing has been changed.
        InvalidConfig: the options do not fit the model's experts; nothing has been changed.
    """
    generator = torch.Generator().manual_seed(seed)
    modules, found = experts_modules(model), find_routers(model)
    gates = [(path, _made(router, top_k, settings, generator)) for path, router, top_k in found]
    for path, gate in gates:
        model.set_submodule(path, gate)
    for experts in modules.values():
        allow_no_expert(experts)
    return [path for path, _ in gates]


def routings(model: nn.Module) -> dict[LayerPath, Routing]:
    """What the gates of `replace_gates` have decided in the last call, by path; with its history, for losses."""
    return {path: _ROUTINGS[module] for path, module in model.named_modules() if module in _ROUTINGS}


class RoutingRecorder:
    """What the routers of a model decide, its own or gates that have taken their place. Each thread hears of its own
    calls."""

    def __init__(self, model: nn.Module) -> None:
        """Raises: `UnsupportedModel` for a router of another form than (logits, weight, index)."""
        self.num_experts: dict[LayerPath, int] = {}
        """Of each, by its path, in model order."""
        self._here = threading.local()
        for experts_path in experts_modules(model):
            path, router, _ = _router(model, experts_path)
            self.num_experts[path] = int(model.get_submodule(experts_path).num_experts)  # type: ignore[arg-type]
            router.register_forward_hook(partial(self._hear, path))

    @contextmanager
    def recording(self) -> Iterator[dict[LayerPath, Routing]]:
        """The routings of the last call of each router inside, by path; with their history, for losses."""
        heard: dict[LayerPath, Routing] = {}
        self._here.heard = heard
        try:
            yield heard
        finally:
            self._here.heard = None

    def _hear(self, path: LayerPath, router: nn.Module, given: tuple[Any, ...], answer: tuple[Any, ...]) -> None:
        heard: dict[LayerPath, Routing] | None = getattr(self._here, "heard", None)
        if heard is not None:
            logits, weight, index = answer
            heard[path] = answer.routing if isinstance(answer, Answer) else Routing(index, weight, logits)


@contextmanager
def told(model: nn.Module, info: TokenInfo) -> Iterator[None]:
    """While inside, the gates of `replace_gates` hear of the tokens what `info` says: fields of [...] or [T]."""
    gates = [module for module in model.modules() if _INFO in module.__dict__]
    for gate in gates:
        gate.__dict__[_INFO] = info
    try:
        yield
    finally:
        for gate in gates:
            gate.__dict__[_INFO] = None


class _Heard(threading.local):
    """What each thread has last called a model with. A copy of the model has one of its own."""

    info: TokenInfo | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Heard:
        return _Heard()

    def __call__(self, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", given[0] if given else None)
        self.info = None if ids is None else TokenInfo(ids=ids)


def tell_ids(model: nn.Module) -> None:
    """From now on the gates of `replace_gates` hear in each call which tokens its `input_ids` are, if not `told`.

    Not for activations that are computed again going backward on a device whose history has threads of its own.
    """
    heard, gates = _Heard(), [module for module in model.modules() if _INFO in module.__dict__]
    for gate in gates:
        gate.__dict__[_HEARD] = heard
    if gates:
        model.register_forward_pre_hook(heard, with_kwargs=True)


def router_state(state: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    """The state of a model with gates of `replace_gates`, by the names that the model has with its own routers.

    Args: names: of that model. What has none of them is left out.
    """
    called = {name: name for name in names if name in state}
    for mine, theirs in SAME.items():
        for name in names:
            beside = f"{name.removesuffix(theirs)}{mine}"
            if name.endswith(f".{theirs}") and name not in called and beside in state:
                called[name] = beside
    return {name: state[there] for name, there in called.items()}


def find_routers(model: nn.Module) -> list[tuple[LayerPath, nn.Module, int]]:
    """Path and module of each router of a model, and its K, in model order.

    Raises: `UnsupportedModel` where there are none, or one has another form.
    """
    found = [_router(model, path) for path in experts_modules(model)]
    if not found:
        raise UnsupportedModel("the model has no experts of transformers' experts interface beside a router")
    return found


def _router(model: nn.Module, experts_path: LayerPath) -> tuple[LayerPath, nn.Module, int]:
    """The path and module of the router beside some experts, and its K. Raises: `UnsupportedModel`."""
    block_path, experts = experts_path.rpartition(".")[0], model.get_submodule(experts_path)
    block = model.get_submodule(block_path)
    number: Any = experts.num_experts
    tried = []
    for name, child in routers_beside(block, experts):
        top_k = _top_k(child)
        if top_k is not None:
            return f"{block_path}.{name}", child, top_k
        tried.append(f"{name} ({type(child).__name__})")
    raise UnsupportedModel(
        f"nothing beside {experts_path} answers hidden states with (logits, weight, index) of {number} experts, so "
        f"that a gate could take its place; tried {', '.join(tried) or 'nothing, for want of weights of that shape'}"
    )


@torch.no_grad()
def _top_k(router: Any) -> int | None:
    """K, if two tokens get logits [2, E], weights [2, K] and an index [2, K]; None if they get anything else."""
    weight: torch.Tensor = router.weight
    try:
        answer = router(weight.new_zeros(2, weight.shape[1]))
    except (TypeError, RuntimeError, ValueError):  # it wants more than hidden states, or in another shape
        return None
    if not isinstance(answer, tuple) or len(answer) != 3:
        return None
    logits, weights, index = answer
    is_index = index.dtype in (torch.int32, torch.int64) and index.ndim == 2 and weights.shape == index.shape
    return index.shape[1] if is_index and logits.shape == (2, len(weight)) else None


def _made(router: Any, top_k: int, settings: GateSettings | GateChoice | str, generator: torch.Generator) -> nn.Module:
    """A gate with what it shares with the router, that answers as the router did."""
    if isinstance(settings, str):
        settings = GateChoice(settings)
    if isinstance(settings, GateChoice):
        settings = settings.settings(top_k)
    num_experts, hidden_size = router.weight.shape
    gate: nn.Module = make_gate(settings, hidden_size, num_experts)
    gate.reset_parameters(generator)  # type: ignore[operator]
    mine, theirs = gate.state_dict(), router.state_dict()
    kept = {name: theirs[other] for name, other in SAME.items() if name in mine and other in theirs}
    gate.load_state_dict({name: kept[name] for name in kept if kept[name].shape == mine[name].shape}, strict=False)
    gate.to(router.weight.device, router.weight.dtype).train(router.training)
    if takes_info(gate):
        gate.__dict__[_INFO] = None
    gate.register_forward_pre_hook(_as_gate)
    gate.register_forward_hook(_as_router)
    return gate


def _as_gate(gate: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the gate expects, from what the block gives: some have hidden as [B, S, D]."""
    (hidden,) = given
    tokens = hidden.reshape(-1, hidden.shape[-1])
    if _INFO not in gate.__dict__:
        return (tokens,)
    info: TokenInfo | None = gate.__dict__[_INFO]
    if info is None and _HEARD in gate.__dict__:
        info = gate.__dict__[_HEARD].info
    return tokens, None if info is None else info.flat(len(tokens))


def _as_router(gate: nn.Module, given: Any, routing: Routing) -> Answer:
    """What the block expects, from what the gate says."""
    _ROUTINGS[gate] = routing
    return Answer(routing)
