"""What several rooms' tests need: a small encoder, free ports."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from fedbio.weights import EncoderConfig, inference_shapes, write_weights

# a busy machine is no fault of what is tested
hypothesis.settings.register_profile("fedbio", deadline=None)
hypothesis.settings.load_profile("fedbio")

# a shell starts background jobs with Ctrl-C ignored, and processes inherit that; those that tests start must hear it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a one-layer encoder of width 32, fast enough for whole runs in tests."""
    config = EncoderConfig(name="small", trained=True, layers=1, heads=2, width=32, ffn=64, max_tokens=130)
    random = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in inference_shapes(config).items()
    }
    folder = tmp_path_factory.mktemp("encoder") / "small"
    write_weights(folder, config, weights)
    return folder


@pytest.fixture
def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
