"""The quantized tensor: its fields, sizes, construction, copies and arrays."""

import copy
import dataclasses
import pickle
import weakref

import numpy as np
import pytest
from helpers.common import F32, FORMATS, assert_same_bits

from dynquant import (
    DTypeError,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    LayoutError,
    MaxAbs,
    ParameterError,
    Percentile,
    QuantLinear,
    ShapeMismatchError,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    quantize_weights,
    w4a8_matmul,
    w4a8_matvec,
)


def tensor(fmt=DynQuantFormat.INT8_PER_ROW, shape=(3, 5)):
    return dynamic_quantize(np.random.default_rng(0).standard_normal(shape).astype(F32), fmt)


def with_minimums():
    """Codes of two rows in groups of 3, each with a minimum."""
    rng = np.random.default_rng(1)
    data, fmt = rng.integers(0, 256, (2, 4), dtype=np.uint8), DynQuantFormat.int4_per_group_packed(3)
    scales, minimums = (rng.standard_normal((2, 3)).astype(F32) for _ in range(2))
    return DynQuantTensor(data, scales, None, (2, 7), fmt, minimums)


each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


@pytest.mark.parametrize(
    "value, attribute",
    [
        (MaxAbs(), "p"),
        (Percentile(0.5), "p"),
        (DynQuantFormat.INT8_PER_ROW, "bits"),
        (tensor(), "data"),
        (tensor(), "scales"),
        (tensor(), "shape"),
        (tensor(), "format"),
        (tensor(), "zero_points"),
        (tensor(), "minimums"),
        (tensor(), "memory_bytes"),
    ],
)
def test_frozen(value, attribute):
    # A frozen class with slots raises TypeError where there is no such field.
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        setattr(value, attribute, 1)


# Fields and sizes


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 4), (4, 0), (0, 4)])
def test_fields(fmt, shape):
    q = tensor(fmt, shape)
    n, per_row = int(np.prod(shape)), fmt.granularity == "per_row"
    rows, k = (n // shape[-1] if shape[-1] else int(np.prod(shape[:-1])), shape[-1]) if per_row else (1, n)
    assert q.shape == shape
    assert q.format == fmt
    assert q.zero_points is None
    assert q.element_count == n
    assert q.scales.dtype == F32
    assert q.scales.shape == (shape[:-1] if per_row else (1,))
    assert q.data.dtype == (np.uint8 if fmt.packed else np.int8)
    assert q.data.nbytes == rows * ((k + 1) // 2 if fmt.packed else k)
    assert q.memory_bytes == q.data.nbytes + 4 * rows
    assert q.compression_ratio == (4 * n / q.memory_bytes if n else 0.0)


def test_packed_shapes():
    x = np.ones((2, 3, 5), F32)
    assert dynamic_quantize(x, DynQuantFormat.INT4_PER_ROW, packed=True).data.shape == (2, 3, 3)
    assert dynamic_quantize_int4(x, packed=True).data.shape == (15,)


def test_packed_rows_start_at_a_byte():
    q = dynamic_quantize([[7.0, -1, 2], [-7, 3, 1]], DynQuantFormat.INT4_PER_ROW, packed=True)
    assert q.data.tolist() == [[0xF7, 0x02], [0x39, 0x01]]


@pytest.mark.parametrize("n, packed, size", [(8, False, 12), (8, True, 8), (9, True, 9), (1, True, 5)])
def test_memory_bytes(n, packed, size):
    assert dynamic_quantize_int4(np.ones(n, F32), packed=packed).memory_bytes == size


def test_repr_has_shape_and_format():
    text = repr(tensor(DynQuantFormat(4, "per_row", packed=True)))
    for part in ("DynQuantTensor", "(3, 5)", "int4", "per_row", "packed", "21 bytes"):
        assert part in text
    assert "packed" not in repr(tensor())


# Construction


def test_construction():
    data, scales = np.zeros((2, 3), np.int8), np.ones(2, F32)
    q = DynQuantTensor(data, scales, None, [2, 3], DynQuantFormat.INT8_PER_ROW)
    assert q.shape == (2, 3)
    assert q.data is data
    assert q.scales is scales
    by_name = DynQuantTensor(
        data=data, scales=scales, zero_points=None, shape=(2, 3), format=DynQuantFormat.INT8_PER_ROW
    )
    assert_same_bits(by_name.dequantize(), q.dequantize())


def test_fields_in_order():
    assert [field.name for field in dataclasses.fields(DynQuantTensor)] == [
        "data",
        "scales",
        "zero_points",
        "shape",
        "format",
        "minimums",
    ]


def test_data_is_the_array_passed_as_out():
    x, out = np.ones((2, 2), F32), np.zeros((2, 2), np.int8)
    assert dynamic_quantize(x, out=out).data is out


# Copies


@each_format
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_duplicates(duplicate, fmt):
    q = tensor(fmt)
    twin = duplicate(q)
    assert type(twin) is DynQuantTensor
    assert (twin.shape, twin.format, twin.zero_points) == (q.shape, q.format, None)
    assert_same_bits(twin.data, q.data)
    assert_same_bits(twin.scales, q.scales)
    assert_same_bits(twin.dequantize(), q.dequantize())
    with pytest.raises(dataclasses.FrozenInstanceError):
        twin.shape = ()


def test_deep_copy_does_not_share_memory():
    q = tensor()
    twin = copy.deepcopy(q)
    assert not np.shares_memory(q.data, twin.data)
    assert np.shares_memory(q.data, copy.copy(q).data)


def test_replacing_a_field_checks_it():
    q = dynamic_quantize_int8(np.ones(4, F32))
    assert dataclasses.replace(q, scales=np.full(1, 2, F32)).dequantize().tolist() == [254.0] * 4
    with pytest.raises(ValueError, match="scales"):
        dataclasses.replace(q, scales=np.ones(2, F32))


def test_tensors_compare_by_identity():
    q = tensor()
    assert q == q
    assert q != copy.copy(q)
    assert len({q, copy.copy(q)}) == 2


@pytest.mark.parametrize(
    ("shape", "fmt", "name"),
    [
        ((3,), "x", "format"),
        ((3,), None, "format"),
        (3, DynQuantFormat.INT8_PER_TENSOR, "shape"),
        (None, DynQuantFormat.INT8_PER_TENSOR, "shape"),
        ((3.0,), DynQuantFormat.INT8_PER_TENSOR, "shape"),
        ((-3,), DynQuantFormat.INT8_PER_TENSOR, "shape"),
        (b"\3", DynQuantFormat.INT8_PER_TENSOR, "shape"),
        ({3}, DynQuantFormat.INT8_PER_TENSOR, "shape"),
        (np.ones((1, 3), int), DynQuantFormat.INT8_PER_TENSOR, "shape"),
    ],
)
def test_wrong_shape_or_format(shape, fmt, name):
    with pytest.raises(ParameterError, match=name):
        DynQuantTensor(np.zeros(3, np.int8), np.zeros(1, np.float32), None, shape, fmt)


@pytest.mark.parametrize("kind", [list, np.array, lambda lengths: (np.int64(lengths[0]), lengths[1])])
def test_shape_becomes_a_tuple_of_ints(kind):
    q = tensor()
    shape = DynQuantTensor(q.data, q.scales, None, kind([3, 5]), q.format).shape
    assert shape == (3, 5)
    assert [type(length) for length in shape] == [int, int]


@pytest.mark.parametrize(
    ("shape", "codes"), [((1,) * 65, 1), ((1,) * 10_000, 1), ((0, 2**63), 0), ((0, 10**5000), 0)]
)
def test_shape_that_no_array_can_have(shape, codes):
    fmt = DynQuantFormat(4, "per_tensor", packed=True)
    with pytest.raises(ParameterError, match="shape: ") as caught:
        DynQuantTensor(np.zeros(codes, np.uint8), np.zeros(1, F32), None, shape, fmt)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("field", ["data", "scales", "zero_points", "minimums"])
def test_masked_fields(field):
    fmt = DynQuantFormat(4, "per_group", 4, True)
    fields = {
        "data": np.zeros((2, 4), np.uint8),
        "scales": np.ones((2, 2), F32),
        "zero_points": np.zeros((2, 2), np.uint8),
        "minimums": np.zeros((2, 2), F32),
    }
    fields["zero_points" if field == "minimums" else "minimums"] = None
    fields[field] = np.ma.masked_array(fields[field])
    with pytest.raises(DTypeError, match=f"{field}: expected an array without a mask"):
        DynQuantTensor(**fields, shape=(2, 8), format=fmt)


def test_arrays_changed_in_place_after_construction():
    """Products check the fields again, since the arrays belong to the caller."""
    x, fields = np.ones((1, 8), F32), {}

    def weight():
        fields.update(
            data=np.zeros((2, 4), np.uint8),
            scales=np.ones((2, 2), F32),
            zero_points=np.zeros((2, 2), np.uint8),
        )
        return DynQuantTensor(**fields, shape=(2, 8), format=DynQuantFormat(4, "per_group", 4, True))

    changes = {
        "data": lambda: fields["data"].resize((8,), refcheck=False),
        "scales": lambda: fields["scales"].resize((4, 1), refcheck=False),
        "zero_points": lambda: fields["zero_points"].fill(16),
    }
    for name, change in changes.items():
        for call in (lambda w: w4a8_matmul(w, x), lambda w: w4a8_matvec(w, x[0]), QuantLinear):
            tensor = weight()
            change()
            with pytest.raises(ValueError, match=name) as caught:
                call(tensor)
            assert isinstance(caught.value, DynQuantError)


def test_minimums():
    tensor = with_minimums()
    codes = np.stack([tensor.data & 15, tensor.data >> 4], axis=-1).reshape(2, 8)[:, :7]
    values = codes.astype(F32) * np.repeat(tensor.scales, 3, axis=1)[:, :7]
    values += np.repeat(tensor.minimums, 3, axis=1)[:, :7]
    assert_same_bits(tensor.dequantize(), values)
    assert_same_bits(tensor[1].dequantize(), values[1])
    assert_same_bits(tensor[[1, 0]].minimums, tensor.minimums[::-1])
    assert tensor.memory_bytes == 8 + 2 * 24
    assert "minimums" in repr(tensor)
    assert_same_bits(pickle.loads(pickle.dumps(tensor)).dequantize(), values)
    assert_same_bits(copy.deepcopy(tensor).minimums, tensor.minimums)
    out = np.zeros((2, 7), F32)
    shared = DynQuantTensor(*(getattr(tensor, n) for n in FIELDS[:5]), out.reshape(-1)[:6].reshape(2, 3))
    with pytest.raises(LayoutError, match="overlap"):
        shared.dequantize(out=out)


FIELDS = [field.name for field in dataclasses.fields(DynQuantTensor)]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"minimums": np.zeros((2, 2), F32)}, ShapeMismatchError, "minimums: expected shape"),
        ({"minimums": np.zeros((2, 3))}, DTypeError, "minimums: expected an ndarray of float32"),
        ({"zero_points": np.zeros((2, 3), np.uint8)}, ParameterError, "minimums: expected None beside"),
        (
            {"data": np.zeros((2, 7), np.int8), "format": DynQuantFormat.int8_per_group(3)},
            ParameterError,
            "minimums: expected None unless codes are packed",
        ),
    ],
)
def test_invalid_minimums(fields, error, message):
    given = {name: getattr(with_minimums(), name) for name in FIELDS}
    with pytest.raises(error, match=message):
        DynQuantTensor(**{**given, **fields})


def test_frozen_and_weakly_referenceable():
    tensor = dynamic_quantize_int4([1.0, 2.0])
    assert weakref.ref(tensor)() is tensor
    for name in ("data", "shape", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(tensor, name, 1)


EVERY_KIND = [
    *(dynamic_quantize(np.arange(14, dtype=F32).reshape(2, 7), fmt) for fmt in FORMATS.values()),
    dynamic_quantize(np.zeros((0, 3), F32)),
    dynamic_quantize(F32(5), DynQuantFormat.INT8_PER_TENSOR),
    quantize_weights(np.arange(14, dtype=F32).reshape(2, 7), bits=4, group_size=3),
    with_minimums(),
]


@pytest.mark.parametrize("tensor", EVERY_KIND, ids=repr)
def test_arrays_round_trip_through_a_file(tensor, tmp_path):
    np.savez(tmp_path / "tensor.npz", **tensor.to_arrays())
    with np.load(tmp_path / "tensor.npz", allow_pickle=False) as file:
        loaded = DynQuantTensor.from_arrays(file)
    assert (loaded.shape, loaded.format) == (tensor.shape, tensor.format)
    assert_same_bits(loaded.dequantize(), tensor.dequantize())
    for name in ("data", "scales", "zero_points", "minimums"):
        assert (getattr(loaded, name) is None) == (getattr(tensor, name) is None)
        if getattr(tensor, name) is not None:
            assert_same_bits(getattr(loaded, name), getattr(tensor, name))


def test_arrays_are_not_copied(tmp_path):
    """So that the arrays of a large tensor may stay memory-mapped."""
    tensor = dynamic_quantize(np.ones((3, 5), F32))
    np.save(tmp_path / "data.npy", tensor.data)
    mapped = np.load(tmp_path / "data.npy", mmap_mode="r")
    assert DynQuantTensor.from_arrays({**tensor.to_arrays(), "data": mapped}).data is mapped
    assert tensor.to_arrays()["data"] is tensor.data


@pytest.mark.parametrize("tensor", EVERY_KIND, ids=repr)
def test_arrays_in_the_other_byte_order(tensor):
    arrays = {name: array.astype(array.dtype.newbyteorder()) for name, array in tensor.to_arrays().items()}
    loaded = DynQuantTensor.from_arrays(arrays)
    assert (loaded.shape, loaded.format) == (tensor.shape, tensor.format)
    assert_same_bits(loaded.dequantize(), tensor.dequantize())
    with pytest.raises(DTypeError, match="scales: expected an ndarray of float32"):
        DynQuantTensor.from_arrays({**arrays, "scales": tensor.scales.astype(np.dtype("f8").newbyteorder())})


ARRAYS = quantize_weights(np.ones((2, 7), F32), bits=4, group_size=3).to_arrays()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": None}, DTypeError, "data: expected an ndarray of uint8, got NoneType"),
        ({"packed": np.array(False)}, DTypeError, "data: expected an ndarray of int8, got dtype uint8"),
        ({"bits": np.array(5)}, ParameterError, "bits: expected 4 or 8, got"),
        ({"granularity": np.array("per_cell")}, ParameterError, "granularity: expected .* 'per_cell'"),
        ({"group_size": np.array(0)}, ParameterError, "group_size: expected an int >= 1, got"),
        ({"shape": np.array([2.0, 7.0])}, ParameterError, "shape: expected a tuple of ints"),
        ({"shape": np.array([2, 9])}, ValueError, "data: expected shape"),
        ({"name": np.array(1)}, ParameterError, r"unknown \['name'\]"),
    ],
)
def test_invalid_arrays(change, error, message):
    with pytest.raises(error, match=message) as caught:
        DynQuantTensor.from_arrays({**ARRAYS, **change})
    assert isinstance(caught.value, DynQuantError)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_missing_arrays(name):
    others = {key: array for key, array in ARRAYS.items() if key != name}
    if name == "zero_points":  # without them the codes are symmetric
        assert DynQuantTensor.from_arrays(others).zero_points is None
        return
    with pytest.raises(ParameterError, match=rf"missing \['{name}'\]|group_size: expected"):
        DynQuantTensor.from_arrays(others)
    with pytest.raises(ParameterError, match="arrays: expected a mapping"):
        DynQuantTensor.from_arrays(list(others))


def test_conversion_to_an_array_is_refused(tmp_path):
    """NumPy would wrap it in an object array, and save a file that cannot be loaded."""
    tensor = dynamic_quantize(np.ones((3, 5), F32))
    with pytest.raises(DTypeError, match="dequantize"):
        np.asarray(tensor)
    assert tensor in [F32(1), tensor]
    assert (tensor == tensor.data) is False
    assert tensor != F32(1)
    with pytest.raises(DTypeError, match="to_arrays"):
        np.savez(tmp_path / "tensor.npz", tensor=tensor)
    with pytest.raises(DTypeError, match=r"x: expected a float array, got DynQuantTensor .*dequantize"):
        dynamic_quantize(tensor)


# Rows

TABLES = {
    "int8 rows": DynQuantFormat.INT8_PER_ROW,
    "int4 rows": DynQuantFormat.INT4_PER_ROW,
    "int4 packed rows": DynQuantFormat.INT4_PER_ROW_PACKED,
    "int8 groups": DynQuantFormat.int8_per_group(3),
    "int4 packed groups": DynQuantFormat.int4_per_group_packed(3),
}
INDICES = {
    "first": 0,
    "last": np.int64(-1),
    "slice": slice(1, 5, 2),
    "backwards": slice(None, None, -1),
    "list": [3, 0, 3],
    "none": [],
    "array": np.array([[1, 2], [0, 5]], np.int32),
    "mask": np.array([1, 0, 1, 0, 0, 1], bool),
    "mask of python's": [True, False, False, True, True, False],
}
each_table = pytest.mark.parametrize("fmt", TABLES.values(), ids=TABLES.keys())


@each_table
@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 7)])
@pytest.mark.parametrize("rows", INDICES.values(), ids=INDICES.keys())
def test_rows_of_a_tensor(fmt, shape, rows):
    table = tensor(fmt, shape)
    index = np.array(rows, np.intp) if isinstance(rows, list) and not rows else rows
    part = table[rows]
    assert part.format == fmt
    assert_same_bits(part.dequantize(), table.dequantize()[index])
    if isinstance(rows, slice):
        assert np.shares_memory(part.data, table.data)


def test_rows_of_weights_with_zero_points():
    weights = quantize_weights(np.random.default_rng(0).standard_normal((6, 10)), bits=4, group_size=4)
    assert_same_bits(weights[[5, 1]].dequantize(), weights.dequantize()[[5, 1]])


def test_a_tensor_of_rows_is_a_sequence_of_them():
    table = tensor(shape=(4, 5))
    assert len(table) == 4
    assert np.array_equal([row.dequantize() for row in table], table.dequantize())


@pytest.mark.parametrize(
    "rows", [np.ones((3, 5), bool), 1.0, (0, 1), "0", None, True, [1.5], np.zeros(2, complex), ...]
)
def test_what_is_no_index_of_rows(rows):
    with pytest.raises(ParameterError, match=r"rows: expected an int, a slice, an array of ints or a mask"):
        tensor()[rows]


@pytest.mark.parametrize("rows", [slice("a", 3), slice(None, None, 0), slice(0.5)])
def test_slices_that_are_none(rows):
    with pytest.raises(ParameterError, match=r"rows: expected a slice of ints"):
        tensor()[rows]


@pytest.mark.parametrize("rows", [3, -4, 10**30, -(10**30), [0, 3], np.ones(4, bool)])
def test_rows_that_do_not_exist(rows):
    with pytest.raises(IndexError):
        tensor(shape=(3, 5))[rows]


@pytest.mark.parametrize("fmt, shape", [("INT8_PER_TENSOR", (3, 5)), ("INT4_PER_TENSOR", (5,))])
def test_one_scale_has_no_rows(fmt, shape):
    with pytest.raises(ParameterError, match=r"rows: expected a tensor of rows with scales of their own"):
        tensor(getattr(DynQuantFormat, fmt), shape)[0]


@each_format
def test_arrays_are_numbers(fmt):
    arrays = tensor(fmt).to_arrays()
    assert {a.dtype.kind for a in arrays.values()} <= set("iufb")
    assert DynQuantTensor.from_arrays(arrays).format == fmt


def test_arrays_of_version_0_1():
    table = tensor()
    arrays = table.to_arrays() | {"granularity": np.array("per_row")}
    assert_same_bits(DynQuantTensor.from_arrays(arrays).dequantize(), table.dequantize())


@pytest.mark.parametrize("granularity", [3, -1, 1.0, "per_column"])
def test_a_granularity_that_there_is_not(granularity):
    with pytest.raises(ParameterError, match="granularity"):
        DynQuantTensor.from_arrays(tensor().to_arrays() | {"granularity": np.array(granularity)})
