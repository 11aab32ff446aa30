from __future__ import annotations

import math

import pytest

from fedbio.networks import Attention, NetworkShape, input_problem, parse_network


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("256-128-64", NetworkShape((256, 128, 64))),
        ("la9-32", NetworkShape((32,), Attention(9))),
        ("la1x64-128-32", NetworkShape((128, 32), Attention(1, 64))),
        ("la31x65536-1", NetworkShape((1,), Attention(31, 65_536))),
    ],
)
def test_a_name_says_the_shape_and_the_shape_its_name(name: str, shape: NetworkShape) -> None:
    assert parse_network(name) == shape
    assert shape.name == name


@pytest.mark.parametrize(
    "wrong",
    ["la", "la9", "la8-32", "la33-32", "la0-32", "la09-32", "la9x-32", "la9x0-32", "la9x65537-32", "la-32", "La9-32"],
)
def test_names_of_no_network_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"expected light attention as la, an odd kernel up to 31|one to eight layer"):
        parse_network(wrong)


@pytest.mark.parametrize("wrong", ["la9-", "la9-32-", "la9-32\n", "la9-0", "la9-la9-32", "la9-" + "-".join("9" * 9)])
def test_light_attention_needs_hidden_layers_after_it(wrong: str) -> None:
    with pytest.raises(ValueError, match="expected one to eight layer widths"):
        parse_network(wrong)


def test_tensors_of_light_attention_and_of_an_mlp() -> None:
    assert parse_network("la9x4-8").tensors(16, 3) == {
        "attention.values.weight": (4, 16, 9),
        "attention.values.bias": (4,),
        "attention.scores.weight": (4, 16, 9),
        "layers.0.weight": (8, 8),
        "layers.0.bias": (8,),
        "layers.1.weight": (3, 8),
        "layers.1.bias": (3,),
    }
    # the paper's light attention: as many filters as an embedding is wide, and twice as many features
    paper = parse_network("la9-32").tensors(1024, 10)
    assert paper["attention.scores.weight"] == (1024, 1024, 9)
    assert paper["layers.0.weight"] == (32, 2048)
    mlp = parse_network("8-4").tensors(16, 3)
    assert sum(map(math.prod, mlp.values())) == 17 * 8 + 9 * 4 + 5 * 3


def test_what_a_classifier_cannot_read_is_said_with_a_remedy() -> None:
    assert input_problem(["32", "8-4"], "mean") is None
    assert input_problem(["la9-32"], "residues") is None
    pooled, residues = input_problem(["la9-32"], "max"), input_problem(["32"], "residues")
    assert pooled is not None
    assert "light attention (la9-32) reads one embedding per residue" in pooled
    assert "pooled by 'max'; embed with pooling residues, or choose an MLP" in pooled
    assert residues is not None
    assert "the MLP 32 reads one embedding per protein" in residues
    assert "embed with another pooling such as mean" in residues
