"""The compose files, resolved: how many servers each variant starts, on which device, and who can reach them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema
import pytest
from check_jsonschema.builtin_schemas import get_builtin_schema

from server.config import ServerConfig, load_config
from tests.compose import CPU, GPU, REPLICAS, ROOT, docker_resolves, gpus, interpolate, mounts, published, resolve

Resolver = Callable[[Sequence[str], Mapping[str, str]], dict[str, Any]]
PATH = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "/")}
KEY = {"OCTAVO_API_KEY": "sesame"}
VARIANTS = pytest.mark.parametrize("files", [GPU, CPU, REPLICAS], ids=["gpu", "cpu", "replicas"])


@pytest.fixture(params=["ours", "docker compose"])
def config(request: pytest.FixtureRequest) -> Resolver:
    """The resolved file: by our own reading, and by Docker Compose where it is installed."""
    if request.param == "ours":
        return resolve
    if docker_resolves(GPU, PATH) is None:
        pytest.skip("Docker Compose is not installed")

    def found(files: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
        resolved = docker_resolves(files, PATH | dict(environ))
        assert resolved is not None
        return resolved

    return found


def servers_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {name: service for name, service in resolved["services"].items() if service["image"].startswith("octavo:")}


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found, duration
    return 60 * int(found[1] or 0) + int(found[2] or 0)


def test_plain_is_one_server_on_the_gpu(config: Resolver) -> None:
    resolved = config(GPU, {})
    (server,) = servers_of(resolved).values()
    assert gpus(server) == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert (server["image"], server["build"]["args"]) == ("octavo:gpu", {"VARIANT": "gpu"})
    assert set(resolved["services"]) == {"octavo", "prometheus", "grafana"}


def test_the_cpu_variant_is_one_server_without_a_gpu(config: Resolver) -> None:
    resolved = config(CPU, {})
    (server,) = servers_of(resolved).values()
    assert gpus(server) is None
    assert (server["image"], server["build"]["args"]) == ("octavo:cpu", {"VARIANT": "cpu"})
    assert set(resolved["services"]) == {"octavo", "prometheus", "grafana"}


def test_replicas_have_a_gpu_each_and_a_proxy(config: Resolver) -> None:
    resolved = config(REPLICAS, {})
    servers = servers_of(resolved)
    reserved = [gpus(server) for server in servers.values()]
    assert [found and found["device_ids"] for found in reserved] == [["0"], ["1"]]
    assert not any(found and "count" in found for found in reserved)
    # All that reaches them from outside goes through the proxy, which knows them all, and so does Prometheus.
    assert [published(server) for server in servers.values()] == [[], []]
    proxy = resolved["services"]["proxy"]
    assert published(proxy) == [("127.0.0.1", 8000)]
    proxied = (ROOT / mounts(proxy)["/usr/local/etc/haproxy/haproxy.cfg"]).read_text()
    assert re.findall(r"^    server (\S+) (\S+):8000$", proxied, re.M) == [(name, name) for name in servers]
    targets = mounts(resolved["services"]["prometheus"])["/etc/prometheus/prometheus-targets.yml"]
    assert re.findall(r'"(\S+):8000"', (ROOT / targets).read_text()) == list(servers)


@VARIANTS
def test_others_get_in_only_with_a_key(config: Resolver, files: Sequence[str]) -> None:
    def addresses(**environ: str) -> set[str]:
        services = config(files, environ)["services"].values()
        return {address for service in services for address, port in published(service) if port == 8000}

    assert addresses() == addresses(OCTAVO_API_KEY="", PUBLISH_ADDRESS="0.0.0.0") == {"127.0.0.1"}
    assert addresses(**KEY) == {"0.0.0.0"}
    assert addresses(**KEY, PUBLISH_ADDRESS="192.0.2.10") == {"192.0.2.10"}


@VARIANTS
def test_only_this_machine_reaches_the_rest(config: Resolver, files: Sequence[str]) -> None:
    services = config(files, KEY)["services"]
    assert published(services["prometheus"]) == [("127.0.0.1", 9090)]
    assert published(services["grafana"]) == [("127.0.0.1", 3000)]


@VARIANTS
def test_a_server_in_a_container(config: Resolver, files: Sequence[str]) -> None:
    given = {"OCTAVO_MODEL": "some/model", "HF_TOKEN": "token", "HF_HUB_OFFLINE": "1", **KEY}
    for server in servers_of(config(files, given)).values():
        assert server["init"] is True and server["restart"] == "unless-stopped"
        assert mounts(server) == {"/models": "models", "/home/octavo/.cache": "cache"}
        environ = {name: given.get(name) if value is None else value for name, value in server["environment"].items()}
        assert (environ["HF_TOKEN"], environ["HF_HUB_OFFLINE"]) == ("token", "1")
        settings = load_config([], {**environ, "OCTAVO_DEVICE": "cpu"})
        assert (settings.model, settings.host, settings.port) == ("some/model", "0.0.0.0", 8000)
        # Docker kills after the grace period, which the server, once its open work is done or ended, needs a little of too.
        open_work_s = settings.drain_delay_s + settings.shutdown_timeout_s
        assert seconds(server["stop_grace_period"]) >= open_work_s + 15


def test_a_replica_takes_new_work_until_the_proxy_has_heard_of_its_end(config: Resolver) -> None:
    for server in servers_of(config(REPLICAS, {})).values():
        assert int(server["environment"]["OCTAVO_DRAIN_DELAY_S"]) == 5
    assert "check inter 1s fastinter 250ms fall 2" in (ROOT / "configs" / "haproxy.cfg").read_text()


@VARIANTS
def test_prometheus_and_grafana_get_our_files(config: Resolver, files: Sequence[str]) -> None:
    services = config(files, {})["services"]
    found = mounts(services["prometheus"]) | mounts(services["grafana"])
    of_ours = {target: source for target, source in found.items() if "/" in source}
    assert set(of_ours) == {
        *(f"/etc/prometheus/{name}.yml" for name in ("prometheus", "prometheus-targets", "alerts")),
        "/etc/grafana/provisioning/datasources",
        "/etc/grafana/provisioning/dashboards",
        "/etc/grafana/dashboards",
    }
    assert [source for source in of_ours.values() if not (ROOT / source).exists()] == []


@pytest.mark.parametrize(
    ("environ", "content", "scopes"),
    [
        ({}, "none", {}),
        (KEY, "sesame", {b"sesame": {"api", "metrics"}}),
        (KEY | {"PROMETHEUS_API_KEY": "other"}, "other", {b"sesame": {"api"}, b"other": {"metrics"}}),
    ],
    ids=["no key", "the server's", "one of its own"],
)
def test_the_keys(config: Resolver, environ: dict[str, str], content: str, scopes: dict[bytes, set[str]]) -> None:
    """Prometheus shows one that the server takes for /metrics."""
    resolved = config(GPU, environ)
    (name,) = resolved["configs"]
    assert resolved["configs"][name]["content"] == content
    assert resolved["services"]["prometheus"]["configs"] == [{"source": name, "target": "/etc/prometheus/octavo-api-key"}]
    given = resolved["services"]["octavo"]["environment"]["OCTAVO_API_KEY"]
    ring = load_config([], {"OCTAVO_API_KEY": given, "OCTAVO_DEVICE": "cpu"}).read_keys()
    found = {key: ring.find(key) for key in scopes}
    assert {key: known and known.scopes for key, known in found.items()} == scopes
    assert bool(ring) == bool(scopes)


@VARIANTS
def test_by_the_compose_specification(config: Resolver, files: Sequence[str]) -> None:
    jsonschema.validate(config(files, KEY), get_builtin_schema("vendor.compose-spec"))


@VARIANTS
def test_ours_reads_as_docker_does(files: Sequence[str]) -> None:
    theirs = docker_resolves(files, PATH | KEY)
    if theirs is None:
        pytest.skip("Docker Compose is not installed")
    ours = resolve(files, KEY)
    assert set(ours["services"]) == set(theirs["services"])
    for name, service in ours["services"].items():
        other = theirs["services"][name]
        assert (published(service), gpus(service), mounts(service)) == (published(other), gpus(other), mounts(other))
        assert service.get("environment", {}).keys() == other.get("environment", {}).keys()


def test_images_of_others_have_a_version_which_the_page_names_too() -> None:
    images = {service["image"] for service in resolve(REPLICAS, {})["services"].values() if "build" not in service}
    assert len(images) == 3 and all(re.search(r":v?\d+\.\d+", image) for image in images)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\b(?:prom|grafana)/\w+:[\w.]+", page)) == {image for image in images if "/" in image}


def test_the_example_names_settings() -> None:
    text = (ROOT / ".env.example").read_text()
    lines = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", text, re.M))
    assert {"OCTAVO_MODEL", "OCTAVO_API_KEY", "HF_TOKEN", "HF_HUB_OFFLINE"} <= set(lines)
    settings = {name.removeprefix("OCTAVO_").lower() for name in lines if name.startswith("OCTAVO_")}
    assert settings <= set(ServerConfig.model_fields)
    compose = "".join((ROOT / name).read_text() for name in REPLICAS)
    compose += "".join(path.read_text() for path in (ROOT / "configs" / "compose").iterdir())
    assert [name for name in lines if name not in compose] == []
    # As it is, it starts the demo model for this machine alone.
    assert load_config([], {**{name: lines[name] for name in ("OCTAVO_MODEL", "OCTAVO_API_KEY")}, "OCTAVO_DEVICE": "cpu"}).model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a${SET:-x}b", "a1b"),
        ("${SET}${UNSET}", "1"),
        ("${UNSET:-x}", "x"),
        ("${SET:+y}", "y"),
        ("f${UNSET:+y}.yml", "f.yml"),
        ("${UNSET:-${SET:+z}}:8000", "z:8000"),
        ("${UNSET:-${EMPTY:-none}}", "none"),
    ],
)
def test_interpolation(text: str, expected: str) -> None:
    assert interpolate(text, {"SET": "1", "EMPTY": ""}) == expected


def test_interpolation_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="none of"):
        interpolate("${NAME:?no}", {})
