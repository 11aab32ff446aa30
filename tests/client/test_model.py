"""What a script sends and gets back: kinds of arrays, nested dicts, numbers, weights."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedbio.client.model import FLModel, Form, ParamsType, from_script, to_script
from fedbio.federation import FLModel as Travelling


def there_and_back(params: object, form: Form | None = None) -> object:
    form = form or Form()
    return to_script(from_script(FLModel(params=params), form), form).params


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool],
)
def test_tensors_come_back_as_they_were(dtype: torch.dtype) -> None:
    sent = {"weight": torch.tensor([[0.0, 1.0], [2.0, 0.5]]).to(dtype), "count": torch.tensor(3).to(dtype)}
    back = there_and_back(sent)
    assert isinstance(back, dict)
    for name, value in sent.items():
        assert back[name].dtype == dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name].float(), value.float())


def test_bfloat16_travels_as_float32_with_the_same_values() -> None:
    tensor = torch.tensor([1.0, 3.1415926, 1e30], dtype=torch.bfloat16)
    travelling = from_script(FLModel(params={"w": tensor})).params["w"]
    assert travelling.dtype == np.float32
    assert travelling.tolist() == tensor.float().tolist()


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "i4", "u1", "?"])
def test_arrays_come_back_as_they_were(dtype: str) -> None:
    sent = {"a": np.arange(6).reshape(2, 3).astype(dtype), "zero": np.array(1, dtype), "none": np.empty((0, 4), dtype)}
    back = there_and_back(sent)
    assert isinstance(back, dict)
    for name, value in sent.items():
        assert isinstance(back[name], np.ndarray)
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


def test_dicts_and_lists_within_each_other_come_back() -> None:
    sent = {
        "encoder": {"weights": [np.ones(2), np.zeros(3)], "scale": 0.5},
        "head.bias": torch.ones(1),
        "classes": 7,
        "on": True,
    }
    travelling = from_script(FLModel(params=sent)).params
    assert list(travelling) == ["encoder.weights.0", "encoder.weights.1", "encoder.scale", "head.bias", "classes", "on"]
    back = there_and_back(sent)
    assert isinstance(back, dict)
    assert [each.tolist() for each in back["encoder"]["weights"]] == [[1, 1], [0, 0, 0]]
    assert back["encoder"]["scale"] == 0.5
    assert torch.equal(back["head.bias"], torch.ones(1))
    assert back["classes"] == 7
    assert back["on"] is True


def test_names_with_dots_that_were_sent_flat_stay_flat() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    back = there_and_back(state)
    assert isinstance(back, dict)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert back["1.num_batches_tracked"].dtype == torch.int64


def test_what_was_never_sent_comes_as_the_script_usually_has_it() -> None:
    model = Travelling(params={"a.b": np.ones(2, np.float32)})
    assert isinstance(to_script(model, Form(lambda: "torch")).params["a.b"], torch.Tensor)
    assert isinstance(to_script(model, Form(lambda: "numpy")).params["a.b"], np.ndarray)
    # torch is imported here
    assert isinstance(to_script(model, Form()).params["a.b"], torch.Tensor)


def test_arrays_are_passed_on_without_a_copy_where_they_may_be_written_to() -> None:
    tensor = torch.arange(4.0)
    array = from_script(FLModel(params={"w": tensor})).params["w"]
    assert array.ctypes.data == tensor.data_ptr()
    form = Form(lambda: "torch")
    received = to_script(Travelling(params={"w": array}), form).params["w"]
    assert received.data_ptr() == tensor.data_ptr()
    fixed = array.copy()
    fixed.flags.writeable = False
    copied = to_script(Travelling(params={"w": fixed}), form).params["w"]
    copied += 1
    assert fixed.tolist() == [0, 1, 2, 3]


def test_parameters_with_gradients_and_odd_strides_travel() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    found = from_script(FLModel(params={"p": parameter, "t": parameter.T, "s": torch.eye(2).to_sparse()})).params
    assert found["p"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["s"].tolist() == [[1, 0], [0, 1]]


def test_everything_else_of_a_model_travels() -> None:
    sent = FLModel(
        params_type="DIFF",
        params={"w": np.ones(1)},
        optimizer_params={"adam": {"m": np.zeros(2)}},
        metrics={"loss": np.float32(0.5), "accuracy": torch.tensor(0.25)},
        start_round=1,
        current_round=2,
        total_rounds=5,
        meta={"NUM_STEPS_CURRENT_ROUND": np.int64(40), "note": ["a", {"b": None}]},
    )
    form = Form()
    travelling = from_script(sent, form)
    assert travelling.params_type is ParamsType.DIFF
    assert travelling.metrics == {"loss": 0.5, "accuracy": 0.25}
    assert travelling.weight == 40
    back = to_script(travelling, form)
    assert back.optimizer_params["adam"]["m"].tolist() == [0, 0]
    assert (back.start_round, back.current_round, back.total_rounds) == (1, 2, 5)
    assert back.meta == {"NUM_STEPS_CURRENT_ROUND": 40, "weight": 40, "note": ["a", {"b": None}]}
    assert back.params_type == "DIFF"


def test_model_without_parameters_has_no_type() -> None:
    back = to_script(from_script(FLModel(metrics={"loss": 1})), Form())
    assert (back.params, back.params_type, back.metrics) == (None, None, {"loss": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": {"w": "text"}}, r"params\['w'\] is a str"),
        ({"params": {"w": np.array(["a"])}}, r"params\['w'\] has dtype <U1"),
        ({"params": {"w": np.array([object()])}}, "has dtype object"),
        ({"params": {"w": torch.zeros(1, dtype=torch.complex64)}}, "has dtype complex64"),
        ({"params": {"w": None}}, "is a NoneType"),
        ({"params": {1: np.ones(1)}}, "key 1 is a int; names must be text"),
        ({"params": np.ones(1)}, "params must be a dict"),
        ({"metrics": {"loss": "low"}}, r"metrics\['loss'\] is a str"),
        ({"meta": {"model": object()}}, "meta: a object cannot travel"),
    ],
)
def test_what_cannot_travel_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        from_script(FLModel(**arguments))  # type: ignore[arg-type]


TORCHS_OWN = {
    "state": {0: {"step": torch.ones(()), "exp_avg": torch.zeros(2)}},
    "param_groups": [{"lr": 0.1, "foreach": None, "params": [0]}],
}
"""What the state_dict of torch's optimizers is like."""


@pytest.mark.parametrize("state", [TORCHS_OWN, {"m": "x"}, {"m": None}, np.ones(1), {"a": {"b": 1}, "a.b": 2}])
def test_optimizer_state_that_is_no_arrays_by_name_is_left_out_and_told_once(
    state: object, caplog: pytest.LogCaptureFixture
) -> None:
    form = Form()
    for _ in range(2):
        travelling = from_script(FLModel(params={"w": 1}, optimizer_params=state), form)
        assert (set(travelling.params), travelling.optimizer_params) == ({"w"}, {})
    (record,) = caplog.records
    assert "optimizer_params stay in the script" in record.getMessage()


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two entries are called 'a\.b'"):
        from_script(FLModel(params={"a": {"b": 1}, "a.b": 2}))


@pytest.mark.parametrize("weight", [-1, float("nan"), "many", float("inf")])
def test_weight_that_is_none_is_refused(weight: object) -> None:
    with pytest.raises(ValueError, match="the weight in meta"):
        from_script(FLModel(params={"w": 1}, meta={"NUM_STEPS_CURRENT_ROUND": weight}))


def test_models_are_checked_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="params_type is FULL, but there are no params"):
        FLModel(params_type=ParamsType.FULL)
    with pytest.raises(ValueError, match="WHOLE"):
        FLModel(params_type="WHOLE", params={})
    with pytest.raises(TypeError, match="metrics must be a dict, not float"):
        FLModel(metrics=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="current_round is -1"):
        FLModel(current_round=-1)
    assert FLModel(params={"w": 1}).params_type is ParamsType.FULL


def test_client_api_imports_no_torch() -> None:
    program = "import sys, fedbio.client, fedbio.client.host; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
