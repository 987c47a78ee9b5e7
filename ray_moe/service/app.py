"""What Ray Serve is told to run: `ray_moe.service.app:build`."""

from __future__ import annotations

from collections.abc import Mapping

from ray.serve import Application

from ray_moe.config_sources import config_from
from ray_moe.service.deployment import application


def build(arguments: Mapping[str, object]) -> Application:
    """The application for Ray Serve: `serve run ray_moe.service.app:build model=... experts.num_actors=4`.

    Args:
        arguments: the configuration: sections as in a configuration file, or dotted keys with text as here.

    Raises: `InvalidConfig`.
    """
    return application(config_from(arguments))
