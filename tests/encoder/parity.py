"""What tests of parity with other tools share: proteins, random weights that matter, and our own forward pass."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.cpu import CpuEncoder
from fedbio.encoder.network import Encoder
from fedbio.weights import EncoderConfig, Weights

SEQUENCES = ["MKVLAAGIVGLCAKAYWTPQDENRHFSUOBZXMKTAYIAKQR", "ACDEFGHIKL", "LMNPQRSTVW", "M"]
"""Two of one length, and all letters that both alphabets have."""


def randomize(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Give every parameter, norms and biases too, a value that matters."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2 + 0.05)
    return model.eval()


def hidden_and_logits(
    config: EncoderConfig, weights: Weights, sequences: list[str] = SEQUENCES, *, on_cpu: bool = False
) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Our hidden states (L, D) and, with a head, logits (L, V) of each protein, start and end tokens included.

    All proteins are in one pack, the longest first. They go through the plain network, or through that of CPUs.
    """
    alphabet = ALPHABETS[config.alphabet]
    head = "lm_head.bias" in weights
    network = Encoder(config, head=head).eval()
    network.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in weights.items()})
    rows = [[alphabet.start, *alphabet.encode(sequence).tolist(), alphabet.end] for sequence in sequences]
    lengths = [len(row) for row in rows]
    encode = CpuEncoder(network, torch.float32) if on_cpu else network
    with torch.no_grad():
        hidden = encode(torch.tensor([token for row in rows for token in row]), [(1, length) for length in lengths])
        logits = network.logits(hidden) if head else None
    parts = [part.float().numpy() for part in hidden.split(lengths)]
    if logits is None:
        return [(part, None) for part in parts]
    return list(zip(parts, [part.float().numpy() for part in logits.split(lengths)], strict=True))


def assert_close(ours: NDArray[np.float32] | None, theirs: NDArray[np.float32], limit: float = 1e-5) -> None:
    """Fail unless the largest difference is below the limit, and there was something to differ in."""
    assert ours is not None
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < limit
