"""configs/kubernetes.yaml: by Kubernetes' schema where that is installed, and what must fit together in any case."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.access import OPEN_PATHS
from server.config import ServerConfig, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
TEXT = (CONFIGS / "kubernetes.yaml").read_text()
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all(TEXT))
BY_KIND = {each["kind"]: each for each in OBJECTS}
POD: dict[str, Any] = BY_KIND["Deployment"]["spec"]["template"]
CONTAINER: dict[str, Any] = POD["spec"]["containers"][0]
MONITOR: dict[str, Any] = yaml.safe_load((CONFIGS / "kubernetes-servicemonitor.yaml").read_text())
USER = 10001


def environ() -> dict[str, str]:
    return {each["name"]: each["value"] for each in CONTAINER["env"] if "value" in each}


@pytest.mark.parametrize("index", range(len(OBJECTS)), ids=[f"{each['kind']}-{each['metadata']['name']}" for each in OBJECTS])
def test_by_the_schema_of_kubernetes(index: int) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, 110 MB of schemas, is not installed")
    validate.validate(OBJECTS[index], "1.31", strict=True)


def test_the_probes() -> None:
    probes = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert set(paths.values()) <= OPEN_PATHS  # probes bring no key
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    # Readiness tries a step for a second where none has completed lately.
    assert all(probe["timeoutSeconds"] > 1 for probe in probes.values())
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 1800


def test_the_end_of_a_pod() -> None:
    config = load_config([], {**environ(), "OCTAVO_DEVICE": "cpu"})
    readiness = CONTAINER["readinessProbe"]
    noticed_s = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert config.drain_delay_s > noticed_s
    assert POD["spec"]["terminationGracePeriodSeconds"] >= config.drain_delay_s + config.shutdown_timeout_s + 15


def test_one_gpu_and_no_rights() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    of_pod, of_container = POD["spec"]["securityContext"], CONTAINER["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert (of_pod["runAsUser"], of_pod["runAsGroup"], of_pod["fsGroup"]) == (USER, USER, USER)
    assert f"USER {USER}:{USER}" in (CONFIGS.parent / "Dockerfile").read_text()
    assert of_container["allowPrivilegeEscalation"] is False and of_container["capabilities"] == {"drop": ["ALL"]}


def test_what_a_read_only_root_leaves_to_write() -> None:
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    dockerfile = (CONFIGS.parent / "Dockerfile").read_text()
    volumes = re.search(r"^VOLUME \[(.*)\]$", dockerfile, re.M)
    assert volumes is not None
    assert {each["mountPath"] for each in CONTAINER["volumeMounts"]} == {*re.findall(r'"(.*?)"', volumes[1]), "/tmp"}
    assert {each["name"] for each in CONTAINER["volumeMounts"]} == {each["name"] for each in POD["spec"]["volumes"]}
    claims = {each["metadata"]["name"] for each in OBJECTS if each["kind"] == "PersistentVolumeClaim"}
    claimed = {each["persistentVolumeClaim"]["claimName"] for each in POD["spec"]["volumes"] if "persistentVolumeClaim" in each}
    assert claimed == claims


def test_no_variables_of_services_are_taken_for_settings() -> None:
    assert POD["spec"]["enableServiceLinks"] is False
    names = {each["name"].removeprefix("OCTAVO_").lower() for each in CONTAINER["env"] if each["name"].startswith("OCTAVO_")}
    assert names <= set(ServerConfig.model_fields)


def test_the_secret_s_keys_are_those_of_the_command_above_it() -> None:
    made = set(re.findall(r"--from-literal=([\w-]+)=", TEXT))
    used = {each["valueFrom"]["secretKeyRef"]["key"] for each in CONTAINER["env"] if "valueFrom" in each}
    monitored = MONITOR["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert used | {monitored["key"]} == made and monitored["name"] == "octavo"
    keys = re.search(r'api-keys="(.*)"', TEXT)
    assert keys is not None
    given = keys[1].replace("$(openssl rand -hex 32)", "one").replace("$metrics", "two")
    ring = load_config([], {"OCTAVO_API_KEY": given, "OCTAVO_DEVICE": "cpu"}).read_keys()
    one, two = ring.find(b"one"), ring.find(b"two")
    assert one is not None and one.may("api") and not one.may("metrics")
    assert two is not None and two.may("metrics") and not two.may("api")


def test_labels_and_ports_fit() -> None:
    labels = POD["metadata"]["labels"]
    assert BY_KIND["Deployment"]["spec"]["selector"]["matchLabels"] == labels == BY_KIND["Service"]["spec"]["selector"]
    assert MONITOR["spec"]["selector"]["matchLabels"].items() <= BY_KIND["Service"]["metadata"]["labels"].items()
    (port,) = BY_KIND["Service"]["spec"]["ports"]
    assert port["targetPort"] == CONTAINER["ports"][0]["name"] and port["name"] == MONITOR["spec"]["endpoints"][0]["port"]
