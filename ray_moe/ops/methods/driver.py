"""The one object that a loop needs to train by methods: tell it each step before the step is made.

::

    methods = Methods(model, [ActiveExperts(Ramp(8, 2, steps=500)), FreezeGate(after=800)], optimizer)
    for step in range(1000):
        methods.apply(step)
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ray_moe.errors import InvalidConfig
from ray_moe.ops.methods.base import Method, Network
from ray_moe.ops.methods.sites import Site, as_answer, as_routing, find_sites, probe


class Methods:
    """Methods of training, applied to all MoE layers of a network."""

    def __init__(
        self, model: nn.Module, methods: Sequence[Method], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """
        Args:
            model: any network with `MoELayer`s, or a model of `transformers` with routers beside its experts.
            methods: in the order in which they are applied. An earlier `Methods` of this network goes on until its
                `remove`.
            optimizer: of its parameters, for methods that change them (`EvoMoE`, `Sparsify`, `Search`).

        Raises:
            InvalidConfig: the network has no MoE layer, or a method cannot work on it; nothing has been changed.
            UnsupportedModel: the same of a model of `transformers`.
        """
        for method in methods:
            if not isinstance(method, Method):
                raise InvalidConfig(f"{method!r} is no method of training; give some of ray_moe.ops.methods")
        self.methods = tuple(methods)
        self.network = Network(model, find_sites(model), optimizer)
        self._step: int | None = None
        if any(type(method).route is not Method.route for method in self.methods):
            for site in self.network.sites:
                if site.layer is None:
                    probe(site)
        done: list[Method] = []
        try:
            for method in self.methods:
                method.attach(self.network)
                done.append(method)
        except BaseException:
            for method in done:
                method.remove(self.network)
            raise
        self._hooks = [site.gate.register_forward_hook(_Route(self, site)) for site in self.network.sites]

    def apply(self, step: int) -> None:
        """Have the network be as the methods want it in `step`, which counts from 0.

        Call it before the step's forward passes; again for the same step changes nothing.

        Raises: `InvalidConfig` for a step below 0, or whatever a method refuses.
        """
        if step < 0:
            raise InvalidConfig(f"step is {step}; it must be 0 or more")
        for method in self.methods:
            method.apply(self.network, step)
        self._step = step

    def remove(self) -> None:
        """Leave the network as it is, without methods: its gates' choices are their own again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for method in reversed(self.methods):
            method.remove(self.network)

    def route(self, site: Site, output: Any) -> Any:
        """What becomes of the answer of a gate; the answer itself before the first `apply`."""
        if self._step is None:
            return output
        routing = first = as_routing(output, site.path)
        for method in self.methods:
            routing = method.route(site, self._step, routing)
        return output if routing is first else as_answer(routing, output)


class _Route:
    """A hook. Copies of the network share it: they go by the same methods, and own no second set of them."""

    def __init__(self, methods: Methods, site: Site) -> None:
        self.methods, self.site = methods, site

    def __call__(self, gate: nn.Module, given: Any, output: Any) -> Any:
        return self.methods.route(self.site, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Route:
        return self
