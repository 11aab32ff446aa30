"""Tests of the memory of `fedbio embed`: it does not grow with the sequences, and its bound is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedbio.encoder.memory import check_memory, fitting_budget, fitting_lanes, needed_bytes
from fedbio.errors import MachineError
from fedbio.proteins.demo import generate
from fedbio.weights import EncoderConfig, Weights, write_weights

from .conftest import TINY

LENGTH = 6_000
ESM = EncoderConfig(name="esm", trained=True, layers=6, heads=12, width=768, ffn=3072, max_tokens=512)
ESM_BYTES = 4 * 43_000_000


# what the kernel tells of a child that has ended counts what its parent held when it began
PEAK = """
from pathlib import Path
from fedbio.cli import main
code = main()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
raise SystemExit(code)
"""


def peak_of(*arguments: object) -> int:
    """Run ``fedbio`` in a process of its own, and return its peak resident memory."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout
    return int(told.splitlines()[-1]) * 1024


def peak_bytes(folder: Path, proteins: int) -> int:
    """Embed so many proteins of `LENGTH` residues in a process of its own, and return its peak resident memory."""
    source, output = folder / f"{proteins}.fasta", folder / f"{proteins}.h5"
    random, letters = np.random.default_rng(0), np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
    with open(source, "wb") as file:
        for number in range(proteins):
            file.write(b">p%d\n%s\n" % (number, letters[random.integers(0, 20, LENGTH)].tobytes()))
    options = ["--encoder", folder / "tiny", "--long", "cut", "--threads", "1", "--dtype", "float32"]
    return peak_of("embed", source, "-o", output, *options)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sequences(tiny_weights: Weights, tmp_path: Path) -> None:
    write_weights(tmp_path / "tiny", TINY, tiny_weights)
    few, many = peak_bytes(tmp_path, 500), peak_bytes(tmp_path, 20_000)
    residues = 19_500 * LENGTH
    assert residues > 110 * 2**20
    assert many - few < 40 * 2**20


@pytest.mark.slow
def test_what_memory_allows_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "proteins.fasta"
    generated = generate(600, seed=2)
    source.write_text("".join(f">{number}\n{protein.sequence}\n" for number, protein in enumerate(generated)))
    assert peak_of("embed", source, "-o", tmp_path / "out.h5", "--threads", "2", "--memory", "520M") < 520 * 2**20


def test_packs_become_smaller_until_they_fit() -> None:
    def budget(memory: int | None) -> int:
        return fitting_budget(ESM, ESM_BYTES, default=4096, memory=memory, on_cpu=True)

    assert budget(None) == budget(8 * 2**30) == 4096
    tight = needed_bytes(ESM, ESM_BYTES, budget=1024, on_cpu=True)
    assert budget(tight) == 1024
    assert budget(tight - 1) == 512
    # the memory of a GPU is another one
    assert fitting_budget(ESM, ESM_BYTES, default=65_536, memory=tight, on_cpu=False) == 65_536
    with pytest.raises(MachineError, match=r"memory of 500 MiB: esm takes about [0-9,]+ MiB with the smallest packs"):
        budget(500 * 2**20)


def test_fewer_threads_compute_at_once_until_they_fit() -> None:
    def lanes(memory: int | None, on_cpu: bool = True) -> int:
        return fitting_lanes(ESM, ESM_BYTES, threads=64, budget=2048, memory=memory, on_cpu=on_cpu)

    def needed(lanes: int) -> int:
        return needed_bytes(ESM, ESM_BYTES, budget=2048, on_cpu=True, lanes=lanes)

    # a pack is cut into parts: four threads have one between them, and beside it what each of them multiplies
    steps = [needed(lanes + 1) - needed(lanes) for lanes in range(1, 5)]
    assert 0 < steps[0] == steps[1] == steps[2] < steps[3]
    assert lanes(None) == lanes(needed(64)) == 64
    assert lanes(needed(64) - 1) == 63
    assert lanes(needed(5)) == 5
    assert lanes(needed(1) - 1) == 1
    assert lanes(needed(1), on_cpu=False) == 64
    # the numbers of a layer alone, in float32, for each token of each thread
    assert needed(64) - needed(4) > 60 * 512 * 4 * (8 * 768 + 2 * 3072)


def test_wider_rows_take_memory_on_their_way() -> None:
    def needed(row_width: int, on_cpu: bool = True) -> int:
        return needed_bytes(ESM, ESM_BYTES, budget=2048 if on_cpu else 65_536, on_cpu=on_cpu, row_width=row_width)

    assert needed(768) == needed_bytes(ESM, ESM_BYTES, budget=2048, on_cpu=True)
    wider = 4 * (3840 - 768)  # bytes of a row
    assert 1_000 * wider < needed(3840) - needed(768) < 2_000 * wider
    # a pack of a GPU holds thousands of peptides
    assert 8_000 * wider < needed(3840, on_cpu=False) - needed(768, on_cpu=False) < 16_000 * wider


def test_proteins_beyond_the_memory_are_refused() -> None:
    check_memory(1_000_000, 10**9, None)
    check_memory(1_000_000, 10**9, 1_200_000_000)
    expected = (
        r"memory of 1,144 MiB: 10,000,000 proteins take about 2,3\d\d MiB; allow that much \(--memory\), or divide"
    )
    with pytest.raises(MachineError, match=expected):
        check_memory(10_000_000, 10**9, 1_200_000_000)
