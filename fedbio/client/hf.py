"""`fedbio.client.huggingface` under the name that NVIDIA FLARE's module has: ``import fedbio.client.hf as flare``."""

from __future__ import annotations

from fedbio.client.huggingface import *  # noqa: F403
from fedbio.client.huggingface import __all__ as __all__
