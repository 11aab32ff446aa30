from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedbio.errors import FormatError, ProtocolError
from fedbio.tensors import average_files, manifest, open_file, weighted_mean, write_file
from fedbio.tensors.source import RUN_VALUES

F = np.float32
SIZE = RUN_VALUES + 1_000


def model(seed: int) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    return {
        "w": dice.standard_normal((SIZE // 8, 8)).astype(F),
        "wide": dice.standard_normal(5),
        "count": np.array(seed, np.int64),
        "empty": np.zeros((0, 2), F),
        "half": dice.standard_normal(SIZE).astype(np.float16),
    }


def stored(folder: Path, models: dict[str, dict[str, np.ndarray]]) -> dict[str, Path]:
    for name, tensors in models.items():
        write_file(folder / name, tensors)
    return {name: folder / name for name in models}


def test_files_average_to_the_bits_of_models_in_memory(tmp_path: Path) -> None:
    models = {f"site-{n}": model(n) for n in (3, 1, 2)}
    weights = {"site-1": 10, "site-2": 0, "site-3": 7}
    paths = stored(tmp_path, models)
    average_files([(name, paths[name], weights[name]) for name in models], tmp_path / "mean")
    mean = open_file(tmp_path / "mean")
    expected = weighted_mean([(name, tensors, weights[name]) for name, tensors in models.items()])
    assert list(mean) == list(expected)
    assert manifest(mean) == manifest(expected)
    for name, tensor in expected.items():
        assert mean[name].tobytes() == tensor.tobytes()


def test_tensors_that_no_part_has_stay_as_in_the_base(tmp_path: Path) -> None:
    base, parts = model(0), {name: {"w": model(n)["w"]} for n, name in enumerate("ab")}
    paths = stored(tmp_path, {"base": base, **parts})
    average_files([(name, paths[name], 1) for name in parts], tmp_path / "new", base=paths["base"])
    new = open_file(tmp_path / "new")
    assert list(new) == list(base)
    mean = weighted_mean([(name, tensors, 1) for name, tensors in parts.items()])
    for name, tensor in {**base, **mean}.items():
        assert new[name].dtype == tensor.dtype
        assert new[name].tobytes() == tensor.tobytes()


def test_differences_are_added_to_the_base(tmp_path: Path) -> None:
    base, parts = model(0), {name: {key: model(n)[key] for key in ("w", "wide")} for n, name in enumerate("ab")}
    paths = stored(tmp_path, {"base": base, **parts})
    average_files([(name, paths[name], 1) for name in parts], tmp_path / "new", base=paths["base"], differences=True)
    new = open_file(tmp_path / "new")
    for name, change in weighted_mean([(name, tensors, 1) for name, tensors in parts.items()]).items():
        np.testing.assert_array_equal(new[name], base[name] + change)
        assert new[name].dtype == base[name].dtype


def changed(**tensors: np.ndarray) -> dict[str, np.ndarray]:
    return {**model(2), **tensors}


def spoiled(value: float) -> np.ndarray:
    tensor = model(2)["w"]
    tensor.reshape(-1)[RUN_VALUES + 1] = value
    return tensor


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (changed(w=spoiled(np.nan)), f"site-2: tensor 'w': value {RUN_VALUES + 1} is not finite"),
        (changed(w=spoiled(-np.inf)), f"site-2: tensor 'w': value {RUN_VALUES + 1} is not finite"),
        (changed(w=np.ones(3, F)), rf"site-2: tensor 'w': float32 \[3\], expected float32 \[{SIZE // 8}, 8\]"),
        (changed(more=np.ones(3, F)), r"site-2: 1 tensor\(s\) unexpected: 'more'"),
        (changed(wide=np.full(5, 1e300)), "tensor 'wide': the mean is too large for float32"),
    ],
)
def test_part_that_cannot_count_is_named_and_nothing_is_written(tmp_path: Path, tensors: dict, text: str) -> None:
    paths = stored(tmp_path, {"site-1": model(1), "site-2": tensors})
    with pytest.raises(ProtocolError, match=text):
        average_files([(name, path, 1) for name, path in paths.items()], tmp_path / "mean")
    assert {each.name for each in tmp_path.iterdir()} == {"site-1", "site-2"}


def test_parts_are_held_against_what_is_expected(tmp_path: Path) -> None:
    paths = stored(tmp_path, {"site-1": model(1)})
    with pytest.raises(ProtocolError, match="site-1: 4 tensor"):
        average_files([("site-1", paths["site-1"], 1)], tmp_path / "mean", expected=manifest({"w": model(1)["w"]}))


def test_parts_that_do_not_belong_to_the_base_are_refused(tmp_path: Path) -> None:
    paths = stored(tmp_path, {"base": {"w": np.ones(2, F)}, "a": {"w": np.ones(3, F)}, "b": {"x": np.ones(2, F)}})
    for name, text in (("a", r"'w' of shape \[3\] is \[2\] in the model"), ("b", "'x' .* is not in the model")):
        with pytest.raises(ProtocolError, match=text):
            average_files([(name, paths[name], 1)], tmp_path / "mean", base=paths["base"])


def test_malformed_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"not a model")
    with pytest.raises(FormatError, match="/a: not a sound safetensors file"):
        average_files([("a", tmp_path / "a", 1)], tmp_path / "mean")


GROWTH = """
import sys
import numpy as np
from fedbio.tensors import average_files, check_file, manifest

def peak():
    # not ru_maxrss, which counts what the parent held
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10

small, large = ([(name, f"{sys.argv[1]}/{size}-{name}", 1) for name in "ab"] for size in ("small", "large"))
average_files(small, sys.argv[1] + "/mean")
before = peak()
average_files(large, sys.argv[1] + "/mean", base=large[0][1])
check_file(large[0][1], {"w": ((48 << 20,), np.dtype("f4"))})
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    for size, count in (("small", 1 << 20), ("large", 48 << 20)):
        for name in "ab":
            write_file(tmp_path / f"{size}-{name}", {"w": np.broadcast_to(np.ones((), F), count)})
    ran = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True)
    # two models of 192 MiB and their mean
    assert int(ran.stdout) < 8 << 20
