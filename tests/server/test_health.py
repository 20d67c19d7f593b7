"""/health, /version, /v1/models and the page at / tell the truth about the engine."""

from __future__ import annotations

from engine.errors import EngineUnavailable
from engine.messages import LoadProgress
from tests.server.conftest import Api


def test_health_follows_the_engine(api: Api) -> None:
    assert api.get("/health").json()["status"] == "ready"
    assert api.request("HEAD", "/health").status_code == 200
    api.client.state, api.client.progress = "starting", LoadProgress("warm-up", "", 0.5)
    response = api.get("/health")
    assert response.status_code == 503
    body = response.json()
    assert body["status"] == "starting" and "warm-up, 50%" in body["detail"] and body["progress"]["fraction"] == 0.5
    api.client.state, api.client.failure = "failed", EngineUnavailable("it died")
    assert api.get("/health").status_code == 503 and "it died" in api.get("/health").json()["detail"]
    api.client.state = "stopping"
    assert api.get("/health").json()["status"] == "stopping"


def test_liveness_falls_only_where_a_restart_from_outside_helps(api: Api) -> None:
    for state, live, ready in (
        ("starting", 200, 503),
        ("ready", 200, 200),
        ("recovering", 200, 503),
        ("stopping", 200, 503),
        ("failed", 503, 503),
    ):
        api.client.state = state
        assert api.get("/health/live").status_code == live and api.request("HEAD", "/health/live").status_code == live
        assert api.get("/health/ready").status_code == api.get("/health").status_code == ready
        assert api.get("/health/live").json()["status"] == state


def test_an_engine_that_completes_no_step_is_not_ready(api: Api) -> None:
    api.client.steps_complete = False
    response = api.get("/health/ready")
    assert response.status_code == 503 and "no step" in response.json()["detail"]
    assert api.get("/health/live").status_code == 200


def test_models_list_every_name(api: Api) -> None:
    api.config = api.config.model_copy(update={"served_model_name": ["a", "b/c"]})
    body = api.get("/v1/models").json()
    assert body["object"] == "list" and [card["id"] for card in body["data"]] == ["a", "b/c"]
    assert body["data"][0]["max_model_len"] == 64 and body["data"][0]["root"] == "tiny"
    assert api.get("/v1/models/b/c").json()["id"] == "b/c"
    api.client.ready = None
    assert api.get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_the_page(api: Api) -> None:
    api.config = api.config.model_copy(update={"served_model_name": ["<b>x"]})
    text = api.get("/").text
    assert "<b>x" not in text and "&lt;b&gt;x" in text
    assert "curl http://test/v1/chat/completions" in text and "refresh" not in text and "context 64 tokens" in text
    api.client.state, api.client.ready = "starting", None
    assert 'http-equiv="refresh"' in api.get("/").text


def test_version_and_docs(api: Api) -> None:
    assert set(api.get("/version").json()) == {"version"}
    assert api.get("/docs").status_code == 200
    schema = api.get("/openapi.json").json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"ChatRequest", "ChatMessage", "CompletionRequest", "StreamOptions"} <= set(schema["components"]["schemas"])
