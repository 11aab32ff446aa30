from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import DataError, ProtocolError
from fedbio.federation import FLModel, Task
from fedbio.federation.model import decode, encode
from fedbio.federation.model_file import ModelFile, ModelFilePayload, UpdateSink
from fedbio.tensors import SCHEMES, chunks, manifest, open_file, parse, write_file
from fedbio.transport import TensorPayload

F = np.float32
MODEL = {"w": np.arange(700_001, dtype=F), "b": np.ones(3, F)}
SHARED = {"mean": np.arange(5.0), "empty": np.zeros(0, F)}


def named(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return encode(Task(name="train", model=FLModel(params=tensors)))[1]


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    write_file(tmp_path / "model", MODEL)
    return ModelFile.open(tmp_path / "model")


def test_model_in_a_file_is_sent_as_if_it_were_in_memory(model: ModelFile) -> None:
    payload = ModelFilePayload(named(SHARED), model)
    pieces = [bytes(chunk) for chunk in payload.chunks()]
    whole = b"".join(pieces)
    assert whole == b"".join(TensorPayload(named({**SHARED, **MODEL})).chunks())
    assert len(whole) == payload.size
    assert {len(piece) for piece in pieces[:-1]} == {1 << 20}
    body, _ = encode(Task(name="train", model=FLModel()))
    received = decode(Task, body, parse(whole)).model.params
    for name, tensor in {**SHARED, **MODEL}.items():
        np.testing.assert_array_equal(received[name], tensor)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_sending_goes_on_at_any_chunk(model: ModelFile, start: int) -> None:
    payload = ModelFilePayload(named({"table": np.zeros(300_000, F)}), model)
    every = [bytes(chunk) for chunk in payload.chunks()]
    assert [bytes(chunk) for chunk in payload.chunks(start)] == every[start:]


def test_file_that_shrinks_while_it_is_sent_is_an_error(model: ModelFile) -> None:
    payload = ModelFilePayload({}, model)
    Path(model.path).write_bytes(Path(model.path).read_bytes()[:-1])
    with pytest.raises(DataError, match="shorter than when sending began"):
        list(payload.chunks())


def test_name_in_memory_and_in_the_file_is_a_bug(model: ModelFile) -> None:
    with pytest.raises(ValueError, match=r"in memory and in the file: params/w"):
        ModelFilePayload(named({"w": np.zeros(1)}), model)


def taken(folder: Path, payload: TensorPayload, **options: Any) -> tuple[ModelFile | None, list[str]]:
    """Put a payload into a sink; return what came of it, and what the server was told."""
    told: list[str] = []
    sink = UpdateSink(folder, manifest(MODEL), told.append, **options)
    try:
        for chunk in payload.chunks():
            sink.write(chunk)
        return sink.finish(), told
    except ProtocolError:
        sink.abort()
        return None, told


def test_update_lies_in_a_nameless_file_under_its_plain_names(tmp_path: Path) -> None:
    update, told = taken(tmp_path / "spool", TensorPayload(named(MODEL)))
    assert update is not None
    assert (told, [*(tmp_path / "spool").iterdir()]) == ([], [])
    assert update.manifest == manifest(MODEL)
    found = open_file(update.path)
    for name, tensor in MODEL.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_quantized_update_lies_in_its_own_precision(tmp_path: Path) -> None:
    exact = {**MODEL, "w": np.arange(700_001, dtype=F) % 2048}
    update, _ = taken(tmp_path, TensorPayload(named(exact), "float16"), schemes=("float16",))
    assert update is not None
    np.testing.assert_array_equal(open_file(update.path)["w"], exact["w"])


def spoiled(value: float) -> dict[str, np.ndarray]:
    tensor = MODEL["w"].copy()
    tensor[600_000] = value
    return {**MODEL, "w": tensor}


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (TensorPayload(named(spoiled(np.nan))), "tensor 'params/w': value 600000 is not finite"),
        (TensorPayload(named({**MODEL, "b": np.ones(4, F)})), "tensor 'params/b': float32 [4], expected float32 [3]"),
        (TensorPayload(MODEL), "2 tensor(s) missing: 'params/b', 'params/w'"),
        (TensorPayload(named(MODEL), "nf4"), "quantized as 'nf4'; accepted here: float16"),
    ],
)
def test_update_that_may_not_count_is_refused_on_its_way(tmp_path: Path, payload: TensorPayload, text: str) -> None:
    update, told = taken(tmp_path, payload, schemes=("float16",))
    assert update is None
    assert len(told) == 1
    assert text in told[0]


def test_update_that_ends_early_is_refused(tmp_path: Path) -> None:
    told: list[str] = []
    sink = UpdateSink(tmp_path, manifest(MODEL), told.append, schemes=tuple(SCHEMES))
    sink.write(next(chunks(named(MODEL))))
    with pytest.raises(ProtocolError, match="the data are cut short"):
        sink.finish()
    assert len(told) == 1
