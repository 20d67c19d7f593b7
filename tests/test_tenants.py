"""`octavo serve` with a tiny model and several keys: computed prompt beginnings stay with the key that had them computed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny_models

START_TIMEOUT_S = 240
PROMPT = list(range(10, 170))  # ten pages; the last one is always computed, so that there are logits
KEYS = ["ann-key ann", "ann-new-key ann", "bob-key bob", "ops-key ops admin metrics"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


@contextmanager
def served(folder: Path, log: Path, *flags: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    command = [sys.executable, "-m", "server.cli", "serve", str(folder), "--port", "0", "--device", "cpu", "--dtype", "float32"]
    command += ["--num-threads", "1", "--no-cpu-kernels", "--num-kv-blocks", "200", "--api-key", *KEYS, *flags]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not (found := re.search(r"Octavo serves \S+ at (http://\S+?:\d+)", log.read_text())):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            with httpx.Client(base_url=found[1], timeout=120) as http:
                yield http, process
        finally:
            process.kill()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def cached(http: httpx.Client, key: str, path: str = "/v1/completions", **body: Any) -> int:
    """How many of the prompt's tokens were not computed for this request."""
    more: dict[str, Any] = (
        {"input": PROMPT} if "embeddings" in path else {"prompt": PROMPT, "max_tokens": 1, "ignore_eos": True}
    )
    response = http.post(path, json={**more, "explain": True, **body}, headers=bearer(key))
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["octavo"]["cached_tokens"])


def test_prefixes_of_others_are_not_found_and_an_owner_may_have_all_forgotten(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path / "log") as (http, process):
        assert cached(http, "ann-key") == 0
        assert cached(http, "ann-key") > 0
        assert cached(http, "ann-new-key") > 0  # another key of the same id
        assert cached(http, "bob-key") == 0
        assert cached(http, "bob-key") > 0
        assert cached(http, "ann-key", cache_salt="x") == 0
        for salt in ("ann/", "ann", "../ann", ""):  # nor by writing the other's id into the salt
            assert cached(http, "bob-key", cache_salt=salt) == (0 if salt else cached(http, "bob-key"))
        assert http.post("/admin/reset_prefix_cache", headers=bearer("bob-key")).status_code == 403
        assert cached(http, "ann-key") > 0
        assert http.post("/admin/reset_prefix_cache", headers=bearer("ops-key")).status_code == 200
        assert cached(http, "ann-key") == cached(http, "bob-key") == 0
        assert cached(http, "ann-key") > 0
        metrics = http.get("/metrics", headers=bearer("ops-key")).text
        assert 'api_key_id="bob"' in metrics and "bob-key" not in metrics
        assert http.post("/admin/drain", headers=bearer("ops-key")).status_code == 202
        assert process.wait(60) == 0
    assert "bob-key" not in (tmp_path / "log").read_text()


def test_they_are_shared_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path / "log", "--shared-prefix-cache") as (http, process):
        assert cached(http, "ann-key") == 0
        assert cached(http, "bob-key") > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
