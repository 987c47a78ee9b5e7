"""The Kubernetes files: their published schemas, Ray's own reading of them, and what the service's settings ask for.

Pods, config maps, policies and ingresses are checked against Kubernetes' schemas. KubeRay's are in no registry, so of
its resources the names of the fields that are used are compared with those of its release 1.7; Ray's autoscaler, which
reads the same resources, derives and validates its configuration from them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

import ray_moe
from ray_moe.config import Config
from ray_moe.config_sources import config_from
from tests.unit.cluster.files import CLUSTER, LABEL, has_labels, load, load_all, version_of

VERSION = "1.35"
"""Of Kubernetes: the first whose pods know the zone of their node."""

CLUSTER_FIELDS = {
    "rayVersion", "authOptions", "tlsOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
    "workerGroupSpecs",
}  # fmt: skip
AUTOSCALER_FIELDS = {"version", "upscalingMode", "idleTimeoutSeconds", "resources", "securityContext"}
HEAD_FIELDS = {"rayStartParams", "labels", "template"}
WORKER_FIELDS = HEAD_FIELDS | {"groupName", "minReplicas", "maxReplicas", "priority"}
SERVICE_FIELDS = {"excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"}


def ray_service() -> dict[str, Any]:
    service: dict[str, Any] = load("kubernetes/rayservice.yaml")
    return service


def ray_cluster() -> dict[str, Any]:
    (cluster,) = [document for document in load_all("kubernetes/raycluster.yaml") if document["kind"] == "RayCluster"]
    assert isinstance(cluster, dict)
    return cluster


def clusters() -> dict[str, dict[str, Any]]:
    """The clusters of both files."""
    return {"rayservice": ray_service()["spec"]["rayClusterConfig"], "raycluster": ray_cluster()["spec"]}


def settings() -> dict[str, Config]:
    """What the service of each is told."""
    (config_map,) = [document for document in load_all("kubernetes/raycluster.yaml") if document["kind"] == "ConfigMap"]
    return {
        "rayservice": config_from(_serve_config().applications[0].args),
        "raycluster": config_from(yaml.safe_load(config_map["data"]["service.yaml"])),
    }


def _serve_config() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(ray_service()["spec"]["serveConfigV2"]))


def groups(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


PODS = [(name, group) for name, spec in clusters().items() for group, _ in groups(spec)]


def pod(name: str, group: str) -> dict[str, Any]:
    """The pod that KubeRay makes of a group's template."""
    template = dict(groups(clusters()[name]))[group]["template"]
    metadata = {"name": f"{name}-{group}", **template["metadata"]}
    return copy.deepcopy({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


# --- Schemas -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", sorted((CLUSTER / "kubernetes").glob("*.yaml")), ids=lambda path: path.stem)
def test_kubernetes_own_resources_are_valid(file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text()):
        if not document.get("apiVersion", "ray.io").startswith("ray.io"):
            kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize(("name", "group"), PODS)
def test_pods_are_valid(name: str, group: str) -> None:
    kubernetes_validate.validate(pod(name, group), VERSION, strict=True)


def test_an_unknown_field_of_a_pod_is_found() -> None:
    wrong = pod("raycluster", "head")
    wrong["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_kuberay_has_all_fields_that_are_used() -> None:
    assert set(ray_service()["spec"]) == SERVICE_FIELDS
    for spec in clusters().values():
        assert set(spec) == CLUSTER_FIELDS
        assert set(spec["autoscalerOptions"]) == AUTOSCALER_FIELDS
        assert set(spec["headGroupSpec"]) == HEAD_FIELDS
        for group in spec["workerGroupSpecs"]:
            assert WORKER_FIELDS - {"priority"} <= set(group) <= WORKER_FIELDS
    assert ray_service()["apiVersion"] == ray_cluster()["apiVersion"] == "ray.io/v1"


# --- As Ray reads them ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["rayservice", "raycluster"])
def test_rays_autoscaler_reads_it(name: str) -> None:
    service, spec = settings()[name], clusters()[name]
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "ray-moe", "namespace": "moe"}, "spec": copy.deepcopy(spec)}
    )
    assert config["idle_timeout_minutes"] == 10
    types = config["available_node_types"]
    experts = {kind: node for kind, node in types.items() if has_labels(service, node["labels"])}
    assert set(experts) == {"experts-on-demand", "experts-spot"}
    assert all(node["resources"]["GPU"] == service.experts.num_gpus for node in experts.values())
    assert sum(node["max_workers"] for node in experts.values()) >= service.scaling.max_actors
    assert experts["experts-spot"]["priority"] > experts["experts-on-demand"].get("priority", 0)
    roomy = [kind for kind, node in types.items() if node["resources"].get("CPU", 0) >= service.router.num_cpus]
    if name == "rayservice":  # routers go where Serve finds CPUs, and these are nowhere else
        assert roomy == ["routers"]
        assert types["headgroup"]["resources"].get("CPU", 0) == 0
        assert types["routers"]["max_workers"] == service.router.max_actors
        assert types["routers"]["min_workers"] == service.router.num_actors
    else:  # the driver's node has the routers, since they listen on its loopback
        assert "headgroup" in roomy and service.server.is_local


def test_ray_serve_reads_its_configuration() -> None:
    config, shipped = _serve_config(), ServeDeploySchema.model_validate(load("serve.yaml"))
    assert config.http_options.host == "0.0.0.0"  # a pod's, behind the network policy
    assert config.grpc_options == shipped.grpc_options
    assert [app.import_path for app in config.applications] == [shipped.applications[0].import_path]
    ports = {port["name"]: port["containerPort"] for port in _containers("rayservice", "routers")[0]["ports"]}
    assert ports == {"serve": config.http_options.port, "serve-grpc": config.grpc_options.port}


# --- What is in the pods -------------------------------------------------------------------------------------
def _containers(name: str, group: str) -> list[Any]:
    containers: list[Any] = pod(name, group)["spec"]["containers"]
    return containers


@pytest.mark.parametrize(("name", "group"), PODS)
def test_pods_have_the_image_no_rights_and_their_files(name: str, group: str) -> None:
    spec, service = pod(name, group)["spec"], settings()[name]
    (container,) = spec["containers"]
    assert container["image"].endswith(f"/ray-moe:{ray_moe.__version__}")
    assert spec["securityContext"]["runAsNonRoot"]
    assert f"\nUSER {spec['securityContext']['runAsUser']}\n" in (CLUSTER / "Dockerfile").read_text()
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == clusters()[name]["autoscalerOptions"]["securityContext"] == confined
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "hostPort" not in yaml.safe_dump(spec) and "hostNetwork" not in spec
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(mounts.values()) == set(volumes)
    if group == "routers" or (name == "raycluster" and group == "head"):
        folder = str(Path(service.server.keys_file).parent)
        assert volumes[mounts[folder]]["secret"]["secretName"] == "ray-moe-keys"
        assert "/models" in mounts


@pytest.mark.parametrize(("name", "group"), [pair for pair in PODS if pair[1].startswith("experts")])
def test_experts_leave_a_pod_before_it_ends(name: str, group: str) -> None:
    spec = pod(name, group)["spec"]
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["spot.sh", "pod"]
    (grace_s,) = re.findall(r"SPOT_GRACE_S:-(\d+)", (CLUSTER / "spot.sh").read_text())
    assert spec["terminationGracePeriodSeconds"] > int(grace_s) + 30


@pytest.mark.parametrize("name", ["rayservice", "raycluster"])
def test_ray_in_the_image_is_the_one_that_is_named(name: str) -> None:
    assert clusters()[name]["rayVersion"] == version_of("ray")


# --- The way in ----------------------------------------------------------------------------------------------
def test_only_the_ingress_and_the_operator_come_in() -> None:
    policy = load("kubernetes/network-policy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    labels = policy["podSelector"]["matchLabels"]
    assert labels == {LABEL: "ray-moe"}
    for name, group in PODS:
        assert labels.items() <= pod(name, group)["metadata"]["labels"].items()
    ours, operator, ingress = policy["ingress"]
    assert ours == {"from": [{"podSelector": {"matchLabels": labels}}]}
    config = _serve_config()
    proxies = {config.http_options.port, config.grpc_options.port}
    assert {port["port"] for port in ingress["ports"]} == proxies
    assert {port["port"] for port in operator["ports"]} == {8265, config.http_options.port}


def test_the_ingress_is_encrypted_and_leads_to_serves_proxies() -> None:
    config = _serve_config()
    backends = set()
    for ingress in load_all("kubernetes/ingress.yaml"):
        hosts = [host for tls in ingress["spec"]["tls"] for host in tls["hosts"]]
        assert hosts == [rule["host"] for rule in ingress["spec"]["rules"]]
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                backends.add((backend["name"], backend["port"]["number"]))
    # KubeRay names the service of the proxies after the RayService.
    service = f"{ray_service()['metadata']['name']}-serve-svc"
    assert backends == {(service, config.http_options.port), (service, config.grpc_options.port)}
