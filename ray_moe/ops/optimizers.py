"""Stepping named parameters, which may come and go: the backbone of a worker, or the experts of a host.

The mathematics is that of `torch.optim` (and of bitsandbytes for 8-bit state). What is added: master weights in higher
precision, on the CPU or a disk if told so, and the state of one parameter as plain tensors, so that an expert can move
to another host or into a checkpoint by itself. Knows nothing of hosts, steps of other parameters, or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, get_args

import torch

from ray_moe.errors import InvalidConfig

OptimizerKind = Literal["adamw", "sgd", "adamw8bit"]
MasterDtype = Literal["float32", "weights"]
Offload = Literal["none", "cpu", "disk"]

DECAYED, NOT_DECAYED = 0, 1
"""Numbers of the two groups of the optimizer underneath."""

STATE_KEYS_8BIT = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_scale",
    "absmax2": "exp_avg_sq_scale",
}
"""What bitsandbytes calls what `Optimizer.state_of` returns."""


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What steps the weights. Raises `InvalidConfig` where a number is out of range or belongs to another kind."""

    kind: OptimizerKind = "adamw"
    """`adamw8bit` keeps both moments of parameters of 4,096 elements or more in 8 bits (a fourth of the memory)."""
    lr: float = 1e-3
    """Peak learning rate; `Optimizer.step` is told that of each step."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    """For `sgd`."""
    nesterov: bool = False
    """For `sgd` with momentum."""
    no_decay: tuple[str, ...] = ()
    """Patterns (`*norm*`, `*bias`) of whole names of parameters that have no weight decay."""
    master_dtype: MasterDtype = "float32"
    """Weights in lower precision than `float32` are stepped in a copy in float32 and rounded from it; `weights` steps
    them as they are."""
    offload: Offload = "none"
    """`cpu` keeps master weights and state on the CPU, and steps there, while the weights are on another device. `disk`
    keeps them in files, wherever the weights are: one parameter's are in memory while it is stepped."""
    offload_folder: str = ""
    """For `disk`: where the files are; empty is the system's folder for temporary files."""
    fused: bool = False
    """One kernel for the whole update: on a CPU four times as fast, and different in the last bit."""

    def __post_init__(self) -> None:
        for holds, said in (
            (self.kind in get_args(OptimizerKind), f"kind is one of {', '.join(get_args(OptimizerKind))}"),
            (_not_negative(self.lr), "lr is finite and 0 or more"),
            (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "betas are two numbers in [0, 1)"),
            (_not_negative(self.eps), "eps is finite and 0 or more"),
            (_not_negative(self.weight_decay), "weight_decay is finite and 0 or more"),
            (_not_negative(self.momentum), "momentum is finite and 0 or more"),
            (self.kind == "sgd" or not (self.momentum or self.nesterov), "momentum and nesterov are for sgd"),
            (self.momentum > 0 or not self.nesterov, "nesterov needs momentum"),
            (not isinstance(self.no_decay, str), "no_decay is a list of patterns"),
            (self.master_dtype in get_args(MasterDtype), f"master_dtype is one of {', '.join(get_args(MasterDtype))}"),
            (self.kind != "adamw8bit" or not self.fused, "fused is for adamw and sgd"),
            (self.offload in get_args(Offload), f"offload is one of {', '.join(get_args(Offload))}"),
        ):
            if not holds:
                raise InvalidConfig(f"optimizer: {said}; got {self}")

    def decays(self, name: str) -> bool:
        """Whether the parameter of this name has weight decay."""
        return not any(fnmatchcase(name, pattern) for pattern in self.no_decay)


class Shelf(Protocol):
    """Keeps tensors in files that are mapped into memory: `training/shelf.py`."""

    def takes(self, num_bytes: int) -> bool:
        """Whether a tensor of this size is worth a file."""
        ...

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Zeros on the CPU in a file of their own. Raises: `InsufficientResources` when the disk is full."""
        ...

    def let_go(self, tensors: Iterable[torch.Tensor]) -> None:
        """Have memory no longer hold what is in their files; whoever reads them next gets it back."""
        ...


class Store(Protocol):
    """Keeps weights in another form than they are stepped in: `ops/quantized_training.py: Rounded`."""

    def read(self) -> torch.Tensor:
        """The weights to step, in memory of their own."""
        ...

    def write(self, exact: torch.Tensor) -> None:
        """Keep what they have become."""
        ...


def blank(shape: torch.Size, device: torch.device | str = "cpu") -> torch.Tensor:
    """Something of this shape, in float32, that takes no memory: a parameter whose weights are in a `Store`."""
    return torch.zeros((), device=device).expand(shape)


def is_blank(tensor: torch.Tensor) -> bool:
    """Whether it is one of those."""
    return tensor.numel() > 1 and not any(tensor.stride())


@dataclass(frozen=True, slots=True)
class _Slot:
    parameter: torch.Tensor
    master: torch.Tensor
    """What is stepped: the parameter itself where that is good enough."""
    group: int
    store: Store | None = None
    """Where the weights are between steps; `master` is `blank` then."""

    def take_gradient(self, scale: float, missing_as_zero: bool) -> None:
        """Move the parameter's gradient to the master, times `scale`."""
        grad = self.parameter.grad
        self.parameter.grad = None
        if grad is None and missing_as_zero:
            grad = torch.zeros_like(self.master)
        elif grad is not None:
            grad = grad.to(self.master)
            if scale != 1:
                grad.mul_(scale)
        self.master.grad = grad

    def give_back(self) -> None:
        """Have the parameter be what the master has become."""
        if self.master.grad is not None:
            self.master.grad = None
            if self.master is not self.parameter:
                self.parameter.copy_(self.master)


class Optimizer:
    """Steps named parameters by their `.grad`. Not safe for use by several threads at once."""

    def __init__(
        self,
        settings: OptimizerSettings,
        parameters: Mapping[str, torch.Tensor] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """Takes leaf tensors of a floating dtype (see `add`).

        Args: shelf: where `offload: disk` keeps what it keeps.

        Raises:
            InvalidConfig: the kind needs a library that is not installed, or `offload: disk` a shelf.
        """
        if (settings.offload == "disk") != (shelf is not None):
            raise InvalidConfig(f"optimizer: a shelf is for offload: disk, and needed there; got {settings.offload}")
        self.settings = settings
        self._shelf = shelf
        self._slots: dict[str, _Slot] = {}
        self._shelved: dict[str, dict[str, torch.Tensor]] = {}
        """Of each parameter: what is, or with its first step will be, in a file; by key of the state, and `master`."""
        self._optimizer = _build(settings)
        for name, parameter in (parameters or {}).items():
            self.add(name, parameter)

    @property
    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._slots)

    @torch.no_grad()
    def add(self, name: str, parameter: torch.Tensor, store: Store | None = None) -> None:
        """Step this parameter too, from its present value and without state; `load_state` gives it that.

        Args: store: where its weights are; the parameter itself is `blank` then, but while it is stepped.

        Raises:
            InvalidConfig: the name is taken, or the optimizer cannot step the dtype.
            InsufficientResources: the disk is full.
        """
        if name in self._slots:
            raise InvalidConfig(f"two parameters are named {name!r}: names are unique; remove the first one")
        dtype = parameter.dtype
        if self.settings.kind == "adamw8bit" and dtype == torch.float64:
            raise InvalidConfig(f"{name!r} is float64, which adamw8bit cannot step: use float32 weights, or adamw")
        if self.settings.master_dtype == "float32" and torch.finfo(dtype).bits < 32:
            dtype = torch.float32
        master = parameter.to(parameter.device if self.settings.offload == "none" else torch.device("cpu"), dtype)
        if self._shelf is not None and master is not parameter and self._shelf.takes(master.nbytes):
            self._shelved[name] = {"master": self._shelf.empty_like(master)}
            master = self._shelved[name]["master"].copy_(master)
        group = DECAYED if self.settings.decays(name) else NOT_DECAYED
        self._slots[name] = _Slot(parameter, master, group, store)
        self._optimizer.param_groups[group]["params"].append(master)
        self.let_go(name)

    def remove(self, name: str) -> None:
        """Forget a parameter and its state.

        Raises:
            InvalidConfig: no parameter has this name.
        """
        slot = self._slot(name)
        del self._slots[name]
        self._shelved.pop(name, None)
        params = self._optimizer.param_groups[slot.group]["params"]
        del params[next(i for i, param in enumerate(params) if param is slot.master)]
        self._optimizer.state.pop(slot.master, None)

    @torch.no_grad()
    def step(self, lr: float | None = None, *, grads_scale: float = 1.0, missing_as_zero: bool = False) -> None:
        """Change all weights by their gradients, which it uses up: afterwards every `.grad` is None.

        Args:
            lr: of this step; None: that of the settings.
            grads_scale: what gradients are multiplied by (in the precision of the master), e.g. for clipping.
            missing_as_zero: a parameter without gradient is stepped with zeros (it decays, and its moments fade), as a
                row of a stack of experts is that no token went to. False: it stays as it is.

        Raises:
            InvalidConfig: `lr` or `grads_scale` is negative or not finite; nothing has changed.
            InsufficientResources: as `prepare`; nothing has changed.
        """
        lr = self.settings.lr if lr is None else lr
        if not (_not_negative(lr) and _not_negative(grads_scale)):
            raise InvalidConfig(f"lr {lr} and grads_scale {grads_scale} must be finite and 0 or more")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._shelf is not None or any(slot.store is not None for slot in self._slots.values()):
            self.prepare(missing_as_zero=missing_as_zero)
            self._step_one_by_one(grads_scale, missing_as_zero)
            return
        for slot in self._slots.values():
            slot.take_gradient(grads_scale, missing_as_zero)
        self._optimizer.step()
        for slot in self._slots.values():
            slot.give_back()

    def prepare(self, *, missing_as_zero: bool = False) -> None:
        """Have room on the disk for the state that the next step makes; `step` then needs no more.

        Raises: `InsufficientResources` when the disk is full; nothing has changed.
        """
        if self._shelf is None:
            return
        made = {}
        for name, slot in self._slots.items():
            if slot.master not in self._optimizer.state and (missing_as_zero or slot.parameter.grad is not None):
                made[name] = self._room(name, self._empty_state(slot))
        for name, shelved in made.items():
            self._shelved.setdefault(name, {}).update(shelved)

    def _room(self, name: str, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A file for what of `state` belongs into one and has none."""
        shelf, there = self._shelf, self._shelved.get(name, {})
        if shelf is None:
            return {}
        return {
            key: shelf.empty_like(value)
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
            if key not in there and shelf.takes(value.nbytes)
        }

    def _step_one_by_one(self, grads_scale: float, missing_as_zero: bool) -> None:
        """The same step, with the state of one parameter in memory at a time, and its weights as they are stepped."""
        groups = self._optimizer.param_groups
        everything = [group["params"] for group in groups]
        try:
            for name, slot in self._slots.items():
                if slot.store is not None:
                    slot.master.data = slot.store.read()
                slot.take_gradient(grads_scale, missing_as_zero)
                for number, group in enumerate(groups):
                    group["params"] = [slot.master] if number == slot.group else []
                self._optimizer.step()
                slot.give_back()
                if slot.store is not None:
                    slot.store.write(slot.master.detach())
                    slot.master.data = blank(slot.master.shape, slot.master.device)
                self._shelve(name, self._optimizer.state.get(slot.master, {}))
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params

    def _shelve(self, name: str, state: dict[str, Any]) -> None:
        """Have what is in memory of a parameter's state in its files."""
        for key, place in self._shelved.get(name, {}).items():
            if key in state and state[key] is not place:
                state[key] = place.copy_(state[key])
        self.let_go(name)

    def let_go(self, name: str) -> None:
        """Have memory hold nothing of what is in files of a parameter, which `state_of` may have brought back."""
        if self._shelf is not None and name in self._shelved:
            self._shelf.let_go(self._shelved[name].values())

    def in_memory(self, name: str) -> list[torch.Tensor]:
        """What of `state_of` is not in files."""
        shelved = {tensor.data_ptr() for tensor in self._shelved.get(name, {}).values()}
        return [tensor for tensor in self.state_of(name).values() if tensor.data_ptr() not in shelved]

    def state_of(self, name: str) -> dict[str, torch.Tensor]:
        """All that a parameter is in training.

        Returns: `master`, the weights as they are stepped, and once it has been stepped: for `adamw` `exp_avg`,
        `exp_avg_sq` (shaped like the weights) and `step`; for `adamw8bit` the same with uint8 codes, and
        `exp_avg_scale`, `exp_avg_sq_scale` (float32, one for each 256 codes); for `sgd` with momentum
        `momentum_buffer`. They are the tensors in use: copy what must outlive the next step, and then, with
        `offload: disk`, `let_go`.

        Raises:
            InvalidConfig: no parameter has this name.
        """
        slot = self._slot(name)
        state: dict[str, torch.Tensor] = {"master": slot.master.detach()}
        for key, value in self._optimizer.state.get(slot.master, {}).items():
            if key == "step":
                state[key] = torch.as_tensor(value, dtype=torch.float32)
            elif value is not None and not key.startswith("qmap"):  # the same for all, and part of the library
                state[STATE_KEYS_8BIT.get(key, key)] = value
        return state

    @torch.no_grad()
    def load_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `state_of` returned, here or elsewhere; the tensors are copied. A pending gradient is dropped.

        Without `master` the weights stay as they are; with nothing else, the parameter is as if never stepped.

        Raises:
            InvalidConfig: no parameter has this name, or the state is of another kind of optimizer or another shape;
                nothing has changed.
            InsufficientResources: the disk is full; nothing has changed.
        """
        slot = self._slot(name)
        given = {key: tensor for key, tensor in tensors.items() if key != "master"}
        state = self._empty_state(slot) if given else {}
        own = {STATE_KEYS_8BIT.get(key, key): value for key, value in state.items() if not key.startswith("qmap")}
        wanted = {"master": slot.master, **own}
        if given.keys() != own.keys():
            raise InvalidConfig(
                f"the state of {name!r} has {sorted(given) or 'nothing'}, but {self.settings.kind} with these settings "
                f"keeps {sorted(own) or 'nothing'}: load it with the settings that it was trained with"
            )
        for key, tensor in tensors.items():
            if tensor.shape != wanted[key].shape or tensor.is_floating_point() != wanted[key].is_floating_point():
                raise InvalidConfig(
                    f"{key} of {name!r} is {tensor.dtype}{list(tensor.shape)}, expected "
                    f"{wanted[key].dtype}{list(wanted[key].shape)}: it belongs to another parameter or optimizer"
                )
        self._shelved.setdefault(name, {}).update(self._room(name, state))
        state.update({key: place for key, place in self._shelved[name].items() if key in state})
        wanted.update({STATE_KEYS_8BIT.get(key, key): value for key, value in state.items()})
        for key, tensor in tensors.items():
            wanted[key].copy_(tensor)
        if self.settings.kind == "adamw8bit" and state:
            state["step"] = int(state["step"])
        self._optimizer.state.pop(slot.master, None)
        if state:
            self._optimizer.state[slot.master] = state
        slot.master.grad = slot.parameter.grad = None
        if slot.master is not slot.parameter:
            slot.parameter.copy_(slot.master)
        self.let_go(name)

    def _slot(self, name: str) -> _Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise InvalidConfig(f"no parameter is named {name!r}; there are {len(self._slots)}") from None

    def _empty_state(self, slot: _Slot) -> dict[str, Any]:
        """State of a parameter as after no step, as the optimizer underneath lays it out."""
        master = slot.master
        if self.settings.kind == "sgd":
            return {"momentum_buffer": torch.zeros_like(master)} if self.settings.momentum else {}
        step = torch.zeros((), device=master.device if self.settings.fused else None)
        if self.settings.kind == "adamw":
            return {"step": step, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        optimizer: Any = self._optimizer
        params = optimizer.param_groups[slot.group]["params"]
        index = next(i for i, param in enumerate(params) if param is master)
        kept = optimizer.state.pop(master, None)
        optimizer.init_state(optimizer.param_groups[slot.group], master, slot.group, index)
        state: dict[str, Any] = {**optimizer.state.pop(master), "step": step}
        if kept is not None:
            optimizer.state[master] = kept
        return state


def _build(settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer underneath, with its two groups still empty."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (settings.weight_decay, 0.0)]
    if settings.kind == "sgd":
        return torch.optim.SGD(
            groups, settings.lr, settings.momentum, nesterov=settings.nesterov, fused=settings.fused or None
        )
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, fused=settings.fused or None)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InvalidConfig(
            f"optimizer kind adamw8bit needs bitsandbytes ({error}): pip install 'ray-moe[train8bit]', or use adamw"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, settings.lr, settings.betas, settings.eps)
    return optimizer


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0
