"""QuantSpec: wrong values are refused when it is made, and what is undecided says so."""

import dataclasses
import json
from typing import Any

import pytest

from lsquant import QuantSpec, reference
from lsquant._util.errors import UsageError


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 0},
        {"bits": -4},
        {"bits": 32},
        {"bits": 4.0},
        {"bits": "4"},
        {"bits": True},
        {"bits": None},
        {"bits": 4, "signed": False, "narrow": True},
        {"bits": 4, "signed": "yes"},
        {"bits": 4, "signed": 2},
        {"bits": 4, "granularity": "row"},
        {"bits": 4, "granularity": None},
        {"bits": 4, "granularity": "group"},
        {"bits": 4, "granularity": "group", "group_size": 0},
        {"bits": 4, "granularity": "group", "group_size": -8},
        {"bits": 4, "granularity": "group", "group_size": 2.5},
        {"bits": 4, "granularity": "group", "group_size": True},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "granularity": "channel", "group_size": 32},
    ],
    ids=str,
)
def test_wrong_values_are_refused_on_construction(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 the message is tested below
        QuantSpec(**wrong)


@pytest.mark.parametrize(
    "wrong,says",
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4, "signed": False, "narrow": True}, "narrow"),
        ({"bits": 4, "granularity": "group"}, "group_size"),
        ({"bits": 4, "granularity": "row"}, "channel"),  # lists the right ones
    ],
)
def test_the_error_names_the_value(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        QuantSpec(**wrong)


def test_fields_of_earlier_versions_are_read_with_the_value_they_always_had() -> None:
    old = {"bits": 3, "narrow": True, "step_dtype": "float32", "dynamic": False}
    assert QuantSpec.from_dict(old) == QuantSpec(3, narrow=True)
    for other in ({"dynamic": True}, {"step_dtype": "float64"}, {"step_dtype": None}):
        with pytest.raises(UsageError, match=next(iter(other))):
            QuantSpec.from_dict({"bits": 4, **other})


def test_unknown_arguments_are_refused() -> None:
    for unknown in ("sign", "dynamic"):
        with pytest.raises(TypeError):
            QuantSpec(4, **{unknown: True})  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "bits,signed,narrow,q_min,q_max",
    [
        (2, True, False, -2, 1),
        (2, True, True, -1, 1),
        (2, False, False, 0, 3),
        (3, True, False, -4, 3),
        (3, True, True, -3, 3),
        (3, False, False, 0, 7),
        (4, True, False, -8, 7),
        (4, False, False, 0, 15),
        (5, True, False, -16, 15),
        (5, False, False, 0, 31),
        (6, True, True, -31, 31),
        (6, False, False, 0, 63),
        (7, True, False, -64, 63),
        (7, False, False, 0, 127),
        (8, True, False, -128, 127),
        (8, True, True, -127, 127),
        (8, False, False, 0, 255),
    ],
)
def test_bounds(bits: int, signed: bool, narrow: bool, q_min: int, q_max: int) -> None:
    spec = QuantSpec(bits, signed=signed, narrow=narrow)
    assert (spec.q_min, spec.q_max) == (q_min, q_max)
    assert reference.bounds(bits, signed, narrow) == (q_min, q_max)


@pytest.mark.parametrize("bits,signed,narrow", [(1, True, False), (9, False, False), (4, False, True)])
def test_bounds_refuse_what_the_spec_refuses(bits: int, signed: bool, narrow: bool) -> None:
    with pytest.raises(ValueError, match=r"bits|narrow"):
        reference.bounds(bits, signed, narrow)


@pytest.mark.parametrize("bound", ["q_min", "q_max"])
def test_undecided_bounds_raise(bound: str) -> None:
    with pytest.raises(ValueError, match="undecided"):
        getattr(QuantSpec(4), bound)


@pytest.mark.parametrize("signed", [True, False])
def test_decide(signed: bool) -> None:
    spec = QuantSpec(4, granularity="channel")
    decided = spec.decide(signed)
    assert decided == QuantSpec(4, signed=signed, granularity="channel")
    assert spec.signed is None
    assert (decided.q_min, decided.q_max) == ((-8, 7) if signed else (0, 15))


def test_narrow_means_signed() -> None:
    assert (QuantSpec(4, narrow=True).q_min, QuantSpec(4, narrow=True).q_max) == (-7, 7)
    assert QuantSpec(4, narrow=True) == QuantSpec(4, narrow=True, signed=True)


def test_offset_means_unsigned_unless_signed() -> None:
    assert (QuantSpec(4, offset=True).q_min, QuantSpec(4, offset=True).q_max) == (0, 15)
    assert QuantSpec(4, offset=True, signed=True).q_min == -8


SPECS = [
    QuantSpec(4),
    QuantSpec(2, signed=True, narrow=True),
    QuantSpec(8, signed=False),
    QuantSpec(4, granularity="channel"),
    QuantSpec(4, signed=True, granularity="group", group_size=32),
    QuantSpec(3, signed=True, offset=True),
    QuantSpec(3, offset=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip_through_a_dict_and_json(spec: QuantSpec) -> None:
    again = QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert len({*SPECS, again}) == len(SPECS)


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="bitz"):
        QuantSpec.from_dict({"bits": 4, "bitz": 4})
    with pytest.raises(ValueError, match="bits"):
        QuantSpec.from_dict({"bits": 1})
    with pytest.raises((ValueError, TypeError), match="bits"):
        QuantSpec.from_dict({"signed": True})


def test_frozen() -> None:
    spec = QuantSpec(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 5  # type: ignore[misc]


def test_defaults_are_those_of_the_design() -> None:
    spec = QuantSpec(4)
    expected = (4, None, False, "tensor", None, False, "float32", "uint8")
    names = ("bits", "signed", "narrow", "granularity", "group_size", "offset", "step_dtype", "container")
    assert tuple(getattr(spec, name) for name in names) == expected
    assert {f.name for f in dataclasses.fields(spec)} == set(names)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_str_names_the_bits(bits: int) -> None:
    assert str(bits) in str(QuantSpec(bits))
