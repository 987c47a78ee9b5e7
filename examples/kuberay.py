"""What KubeRay is given, cluster/kubernetes/rayservice.yaml, brought up on this machine by Ray Serve, and asked.

`python examples/kuberay.py`, before `kubectl apply --filename cluster/kubernetes/rayservice.yaml` (docs/deploy.md says
what has to be there first). The manifest's own import path and settings make the application; what this machine does
not have (GPUs, zones, the model, pods that come and go) is taken out of them, and named.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
import yaml
from openai import AuthenticationError, OpenAI
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema

from ray_moe.models.byte_level import ByteModel, write_new

MANIFEST = Path(__file__).parents[1] / "cluster" / "kubernetes" / "rayservice.yaml"


def on_one_machine(settings: dict[str, Any], model: Path, keys: Path) -> dict[str, Any]:
    """The settings of the manifest, for two actors and one router without a GPU."""
    here = {
        "model": str(model),
        "experts": {"num_actors": 2, "num_cpus": 0.1, "num_gpus": 0, "label_selector": {}},
        "router": {"num_actors": 1, "max_actors": None, "num_cpus": 0.1, "num_threads": 1},
        "scaling": {"enabled": False},
        "balance": {"survive_nodes": 0},
        "ray": {"autoscaling": False},
        "server": {"keys_file": str(keys), "port": 0},
    }
    for section, changed in here.items():
        print(f"  {section}: {settings.get(section)} -> {changed}")
        settings[section] = {**settings.get(section, {}), **changed} if isinstance(changed, dict) else changed
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="of Serve's proxy; the manifest's is 8000")
    arguments = parser.parse_args()
    manifest = yaml.safe_load(MANIFEST.read_text())
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = deployed.applications
    module, _, function = application.import_path.partition(":")
    print(f"{manifest['kind']} {manifest['metadata']['name']} runs {application.import_path}, with these changes here:")
    with tempfile.TemporaryDirectory() as scratch:
        model, keys = Path(scratch, "model"), Path(scratch, "keys.json")
        write_new(model, ByteModel(hidden_size=64, num_layers=2, expert_width=64))
        create = ["keys", "create", "--file", str(keys), "--name", "me", "--role", "infer"]
        made = subprocess.run(
            [sys.executable, "-m", "ray_moe.cli.main", *create], check=True, capture_output=True, text=True
        )
        (key,) = re.findall(r"\brm_\S+", made.stdout)
        settings = on_one_machine(dict(application.args), model, keys)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options=HTTPOptions(host="127.0.0.1", port=arguments.port))
            serve.run(getattr(import_module(module), function)(settings), name=application.name)
            ask(f"http://127.0.0.1:{arguments.port}{application.route_prefix}v1", key)
        finally:
            serve.shutdown()
            ray.shutdown()


def ask(url: str, key: str) -> None:
    with OpenAI(base_url=url, api_key=key) as client:
        (model,) = client.models.list()
        answer = client.completions.create(model=model.id, prompt="def main(", max_tokens=24, temperature=0)
        print(f"{url}: {model.id} answers {answer.choices[0].text!r}")
    try:
        OpenAI(base_url=url, api_key="somebody else's").models.list()
    except AuthenticationError as error:
        print(f"without a key: {error.status_code}")


if __name__ == "__main__":
    main()
