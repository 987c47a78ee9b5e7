"""Where the shipped files are, and what of them several tests look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ray_moe.config import Config

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
DEPLOY = (ROOT / "docs/deploy.md").read_text()
BASH = re.findall(r"```bash\n(.*?)```", DEPLOY, re.DOTALL)
"""The blocks of commands in docs/deploy.md."""

LABEL = "app.kubernetes.io/part-of"
"""Of all pods, by which the network policy knows them."""


def load(name: str) -> Any:
    """A file of `cluster/` that is one document."""
    return yaml.safe_load((CLUSTER / name).read_text())


def load_all(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def version_of(package: str) -> str:
    """The version of a package that every commit is tested with."""
    (version,) = re.findall(
        rf"^{re.escape(package)}==(.*)$", (ROOT / "constraints/tested.txt").read_text(), re.MULTILINE
    )
    return version


def has_labels(config: Config, labels: dict[str, str]) -> bool:
    """Whether expert actors may be on a node with `labels` (plain values only, as the shipped files have them)."""
    return config.experts.label_selector.items() <= labels.items()
