"""An engine on a GPU, with graphs, is killed among thirty-two requests: the next one waits for the memory of the card."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.test_crash_with_tiny_model import Crowd, serving, under_fire

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_answers_are_the_same_after_a_death(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "--device", "cuda", "--gpu-memory-utilization", "0.5") as server:
        undisturbed = Crowd(server.url)
        undisturbed.run()
        under_fire(server, undisturbed, [5, 60] if number is signal.SIGKILL else [30], number)
