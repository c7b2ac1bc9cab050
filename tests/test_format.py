"""Scale modes and formats: their fields, and that they behave as values."""

import dataclasses
import pickle

import numpy as np
import pytest
from helpers.common import F32, FORMATS, assert_same_bits

import dynquant
from dynquant import (
    DynamicScaleMode,
    DynQuantFormat,
    MaxAbs,
    ParameterError,
    Percentile,
    dynamic_quantize,
    dynamic_quantize_int4,
    quantize_weights,
)

NAMED = {
    "INT8_PER_TENSOR": (8, "per_tensor", None, False),
    "INT8_PER_ROW": (8, "per_row", None, False),
    "INT4_PER_TENSOR": (4, "per_tensor", None, False),
    "INT4_PER_ROW": (4, "per_row", None, False),
    "INT4_PER_TENSOR_PACKED": (4, "per_tensor", None, True),
    "INT4_PER_ROW_PACKED": (4, "per_row", None, True),
}

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())

# Modes


def test_modes_are_values():
    assert MaxAbs() == MaxAbs()
    assert Percentile(0.5) == Percentile(0.5) != Percentile(0.6)
    assert {MaxAbs(), MaxAbs(), Percentile(0.5), Percentile(0.5)} == {MaxAbs(), Percentile(0.5)}
    assert MaxAbs() != Percentile(1.0)
    assert isinstance(MaxAbs(), DynamicScaleMode)
    assert isinstance(Percentile(1), DynamicScaleMode)
    assert repr(Percentile(0.25)) == "Percentile(p=0.25)"


@pytest.mark.parametrize("p", [5e-324, 0.5, 1, np.float32(0.99), np.float64(1.0)])
def test_valid_percentiles(p):
    assert Percentile(p).p == p


@pytest.mark.parametrize("p", [0.5 + 0j, np.complex128(0.5), "0.5", np.str_("0.5"), np.array([0.5]), None])
def test_percentile_must_be_a_real_number(p):
    with pytest.raises(dynquant.InvalidPercentileError):
        dynquant.Percentile(p)


# Formats


@pytest.mark.parametrize("name", NAMED)
def test_named_formats(name):
    fmt = getattr(DynQuantFormat, name)
    assert (fmt.bits, fmt.granularity, fmt.group_size, fmt.packed) == NAMED[name]
    assert fmt == DynQuantFormat(*NAMED[name])
    assert hash(fmt) == hash(DynQuantFormat(*NAMED[name]))


def test_formats_differ():
    assert len(set(FORMATS.values())) == len(FORMATS)


def test_format_has_exactly_four_fields():
    fmt = DynQuantFormat(4, "per_row", packed=True)
    assert [field.name for field in dataclasses.fields(fmt)] == [
        "bits",
        "granularity",
        "group_size",
        "packed",
    ]
    assert DynQuantFormat(**dataclasses.asdict(fmt)) == fmt


def test_numpy_numbers_and_flags():
    fmt = DynQuantFormat(np.int64(4), "per_group", np.uint8(32), np.True_)
    assert repr(fmt) == repr(DynQuantFormat(4, "per_group", 32, True))
    assert quantize_weights(np.eye(2, dtype=F32), bits=np.int64(4)).format == DynQuantFormat(
        4, "per_row", packed=True
    )


@pytest.mark.parametrize(
    ("args", "name"),
    [((8.0, "per_row"), "bits"), ((True, "per_row"), "bits"), ((4, "per_row", None, "yes"), "packed")],
)
def test_fields_of_the_wrong_type(args, name):
    with pytest.raises(ParameterError, match=name):
        DynQuantFormat(*args)


@pytest.mark.parametrize("packed", ["no", 1, None, np.array([1, 0])])
def test_packed_must_be_a_bool(packed):
    with pytest.raises(ParameterError, match="packed"):
        dynamic_quantize_int4([1.0], packed=packed)


def test_formats_per_group_are_values():
    formats = {
        DynQuantFormat(bits, "per_group", size, packed)
        for bits, packed in ((8, False), (4, False), (4, True))
        for size in (1, 32, 33)
    }
    assert len(formats) == 9
    assert DynQuantFormat.int8_per_group(32) in formats
    assert DynQuantFormat.int4_per_group(np.int64(33)) in formats
    assert type(DynQuantFormat.int4_per_group(np.int64(33)).group_size) is int
    assert DynQuantFormat.int8_per_group(32) != DynQuantFormat.INT8_PER_ROW


@pytest.mark.parametrize("value", [MaxAbs(), Percentile(0.75), *FORMATS.values()], ids=repr)
def test_modes_and_formats_pickle(value):
    twin = pickle.loads(pickle.dumps(value))
    assert twin == value
    assert hash(twin) == hash(value)


def test_pickled_format_still_quantizes():
    fmt = pickle.loads(pickle.dumps(DynQuantFormat.INT4_PER_TENSOR))
    assert_same_bits(dynamic_quantize([7.0, 3.5], fmt).data, np.array([7, 4], np.int8))


def test_the_format_of_4_bit_weights_has_a_name():
    weights = quantize_weights(np.ones((2, 8), F32), bits=4, group_size=4)
    assert weights.format == DynQuantFormat.int4_per_group_packed(4)
