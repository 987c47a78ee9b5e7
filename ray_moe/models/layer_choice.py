"""Which layers of a dense model become MoE, as it is written on a command line. Called by `upcycle` and `merge`."""

from __future__ import annotations

import re

from ray_moe.errors import InvalidConfig

_FORMS = "all, every:N (the Nth, the 2Nth ...), last:M, or numbers from 0 on such as 1,3,8-15"


def chosen_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `text` names, ascending: ``all``, ``every:2``, ``last:8``, ``1,3,8-15``.

    ``every:N`` are those that `transformers`' `decoder_sparse_step` chooses: N-1, 2N-1, ...

    Raises:
        InvalidConfig: it is of none of these forms, or names no layer of the model.
    """
    layers = range(num_layers)
    if text == "all":
        return tuple(layers)
    if found := re.fullmatch(r"(every|last):([1-9]\d*)", text):
        number = int(found[2])
        chosen = layers[number - 1 :: number] if found[1] == "every" else layers[-number:]
        if len(chosen) == 0 or number > num_layers:
            raise InvalidConfig(f"layers is {text!r}, but the model has {num_layers}")
        return tuple(chosen)
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not found:
            raise InvalidConfig(f"layers is {text!r}; expected {_FORMS}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise InvalidConfig(f"layers is {text!r}; expected numbers from 0 to {num_layers - 1}, ranges ascending")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))
