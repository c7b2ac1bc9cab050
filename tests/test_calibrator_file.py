"""Copies of a Calibrator, and its files: round trips, and damaged or hostile files that are refused."""

import copy
import io
import itertools
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, calibrator_of, channel_data, distributions, whole_state

from dynquant import Calibrator, ParameterError


def batches(channels):
    rng = np.random.default_rng(0)
    return [channel_data(rng, 50, channels or 20), channel_data(rng, 9, channels or 20)]


def example(channels):
    return calibrator_of(batches(channels), channels, channels and 7)


def round_trip(calibrator, folder):
    calibrator.save(folder / "calibrator.npz")
    return Calibrator.load(folder / "calibrator.npz")


@pytest.mark.parametrize("channels", [None, 1, 20])
def test_round_trips(channels, tmp_path):
    for calibrator in (example(channels), Calibrator(channels, rows=channels and 7)):
        before = whole_state(calibrator)
        twins = [
            round_trip(calibrator, tmp_path),
            *(pickle.loads(pickle.dumps(calibrator, protocol)) for protocol in range(2, 6)),
            copy.copy(calibrator),
            copy.deepcopy(calibrator),
        ]
        for twin in twins:
            assert whole_state(twin) == before
            assert type(twin) is Calibrator
            twin.update(np.ones((2, channels or 20), F32))
            twin.merge(calibrator)
            assert twin.count == 2 * calibrator.count + 2 * (channels or 20)
        assert whole_state(calibrator) == before


def test_unpickled_from_read_only_buffers():
    buffers = []
    data = pickle.dumps(example(20), 5, buffer_callback=buffers.append)
    twin = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
    twin.update(np.ones((1, 20), F32))
    assert twin.count == example(20).count + 20


def test_paths(tmp_path):
    calibrator = example(None)
    for path in (tmp_path / "no ending", str(tmp_path / "ü.bin")):
        calibrator.save(path)
        assert whole_state(Calibrator.load(path)) == whole_state(calibrator)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no ending", "ü.bin"]
    calibrator_of([[1.0]]).save(tmp_path / "no ending")
    assert Calibrator.load(tmp_path / "no ending").count == 1
    with pytest.raises(FileNotFoundError):
        Calibrator.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        calibrator.save(tmp_path / "nothing" / "calibrator")
    with pytest.raises(IsADirectoryError):
        Calibrator.load(tmp_path)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "calibrator.npz"
    example(20).save(path)
    before = path.read_bytes()

    def fails(file, **members):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        Calibrator().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_numpy_reads_the_file(tmp_path):
    x = np.array([[1.0, -2.0], [0.5, 3.0]], F32)
    calibrator_of([x], 2, 5).save(tmp_path / "calibrator.npz")
    with np.load(tmp_path / "calibrator.npz", allow_pickle=False) as archive:
        assert archive["channel_amax"].tolist() == [1, 3]
        assert archive["counts"].sum() == 4
        # Version, elements, channels, rows to keep, octaves, rows kept.
        assert archive["calibrator"].tolist() == [2, 4, 2, 5, 3, 2]
        assert archive["octaves"].tolist() == [126, 127, 128]
        assert archive["channel_counts"].sum(axis=(1, 2)).tolist() == [1, 1, 2]
        assert sorted(archive["sample"].tolist()) == [[0.5, 3.0], [1.0, -2.0]]


class Refusing:
    """Context whose body must raise ParameterError within 2 s, using less than the file's size plus 4 MiB."""

    def __init__(self, n_bytes):
        self.limit = n_bytes + (4 << 20)

    def __enter__(self):
        self.start = time.perf_counter()
        tracemalloc.start()

    def __exit__(self, kind, error, traceback):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kind is ParameterError, error
        assert str(error).startswith("path: expected ")
        assert peak < self.limit
        assert time.perf_counter() - self.start < 2
        return True


def check_refused(data, folder):
    path = folder / "bad.npz"
    path.write_bytes(data)
    with Refusing(len(data)):
        Calibrator.load(path)


@pytest.fixture(scope="module", params=[None, 20])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "calibrator.npz"
    example(request.param).save(path)
    return path.read_bytes()


def test_truncated_files(saved, tmp_path):
    lengths = {0, 1, 4, 21, 22, 41, 42, 43, 100, 128, 300, 1000, len(saved) - 22, len(saved) - 1}
    lengths |= set(np.linspace(0, len(saved) - 1, 60, dtype=int).tolist())
    lengths |= set(range(len(saved) - 700, len(saved), 13))
    for length in lengths:
        check_refused(saved[:length], tmp_path)
    check_refused(saved + b"\0", tmp_path)
    check_refused(saved[1:], tmp_path)


@pytest.mark.slow
def test_flipped_bytes(saved, tmp_path):
    """Refused, unless the bit has no meaning, as in the date of a member."""
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.npz"
    path.write_bytes(saved)
    expected = whole_state(Calibrator.load(path))
    refused = 0
    # The first member, the directory, and random offsets.
    offsets = [*range(400), *range(len(saved) - 700, len(saved)), *rng.integers(0, len(saved), 300)]
    for offset in offsets:
        data = bytearray(saved)
        data[offset] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            assert whole_state(Calibrator.load(path)) == expected
        except ParameterError:
            refused += 1
    assert refused > 300 + 300


def members_of(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return dict(archive)


def npz(members, save=np.savez, **options):
    file = io.BytesIO()
    save(file, **members, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_foreign_archives(saved, tmp_path):
    members = members_of(saved)
    check_refused(b"", tmp_path)
    check_refused(b"PK\x05\x06" + bytes(18), tmp_path)
    check_refused(pickle.dumps(members), tmp_path)
    check_refused(npz({"x": np.arange(10)}), tmp_path)
    check_refused(npz({}), tmp_path)
    check_refused(npz(members, np.savez_compressed), tmp_path)
    for name in members:
        check_refused(npz({k: v for k, v in members.items() if k != name}), tmp_path)
        check_refused(npz({f"{k}_" if k == name else k: v for k, v in members.items()}), tmp_path)
    check_refused(npz({**members, "more": np.zeros(1)}), tmp_path)
    check_refused(npy(members["counts"]), tmp_path)


def test_wrong_dtypes_and_shapes(saved, tmp_path):
    members = members_of(saved)
    for name, array in members.items():
        others = [
            array.astype(object),
            array.astype(array.dtype.newbyteorder(">")),
            array.astype(bool),
            array.view(f"V{array.itemsize}"),
            array.view(f"{'u' if array.dtype.kind == 'i' else 'i'}{array.itemsize}"),
            array[:-1],
            array[None],
            np.concatenate([array, array]),
            np.zeros((), array.dtype),
        ]
        if array.ndim == 2 and array.size:
            others += [np.asfortranarray(array), array.T, array.ravel()]
        for other in others:
            # For an array without elements some of these change nothing.
            if npy(other) != npy(array):
                check_refused(npz({**members, name: other}), tmp_path)


def header_of(dtype, shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def raw_members(saved):
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_entry(data, at, format, *values, name="counts.npy"):
    """The archive with one field changed in a member's entry of the directory."""
    data = bytearray(data)
    # The last occurrence of the name is in the directory, 46 bytes into the entry.
    start = data.rindex(b"\0" + name.encode()) + 1 - 46
    assert data[start : start + 4] == b"PK\x01\x02"
    struct.pack_into(format, data, start + at, *values)
    return data


def test_sizes_larger_than_the_file(saved, tmp_path):
    raw = raw_members(saved)
    assert zipped(raw.items())
    path = tmp_path / "same.npz"
    path.write_bytes(zipped(raw.items()))
    Calibrator.load(path)  # so what follows is refused for what is changed in it
    for n in (10**7, 10**12, 2**63 - 1):
        for name, dtype, shape in (
            ("counts", "<i8", (n,)),
            ("channel_amax", "<f4", (n,)),
            ("channel_counts", "<u4", (n, 20, 8)),
            ("octaves", "|u1", (n,)),
            ("sample", "<f4", (n, 20)),
        ):
            changed = {**raw, f"{name}.npy": header_of(dtype, shape) + bytes(64)}
            check_refused(zipped(changed.items()), tmp_path)
            for sizes in ([2, 0, n, 0, 0, 0], [2, 0, 20, 0, n, 0], [2, 0, 20, n, 0, n]):
                header = header_of("<i8", (6,)) + np.array(sizes).astype("<i8").tobytes()
                check_refused(zipped({**changed, "calibrator.npy": header}.items()), tmp_path)
    # Sizes in the directory itself, which are read first.
    for size in (10**9, 2**32 - 2):
        check_refused(with_entry(saved, 20, "<2L", size, size), tmp_path)


@pytest.mark.slow
def test_zip_bombs(saved, tmp_path):
    raw = raw_members(saved)
    zeros = header_of("<i8", (1 << 16,)) + bytes(64 << 20)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        data = zipped({**raw, "counts.npy": zeros}.items(), method)
        assert len(data) < 2 << 20
        check_refused(data, tmp_path)
        # With the right size in the directory, in a larger file; and marked as stored.
        small = with_entry(data, 24, "<L", len(raw["counts.npy"]))
        check_refused(bytes(1 << 20) + small, tmp_path)
        check_refused(with_entry(data, 10, "<H", 0), tmp_path)
    # Valid but for its size.
    n = 1 << 20
    large = {
        "calibrator": np.array([2, 0, n, 0, 0, 0]),
        "extremes": F32([np.inf, -np.inf]),
        "sums": np.zeros(4),
        "counts": np.zeros(1 << 16, np.int64),
        "channel_amax": np.zeros(n, F32),
        "octaves": np.zeros(0, np.uint8),
        "channel_counts": np.zeros((0, n, 8), np.uint32),
        "sample": np.zeros((0, n), F32),
    }
    check_refused(npz(large, np.savez_compressed), tmp_path)


def test_invalid_zip_directories(saved, tmp_path):
    raw = list(raw_members(saved).items())
    with pytest.warns(UserWarning, match="Duplicate name"):
        check_refused(zipped([*raw, raw[0]]), tmp_path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        check_refused(zipped([*raw[:-1], raw[0]]), tmp_path)
    check_refused(zipped([(f"{i}.npy", b"") for i in range(50_000)]), tmp_path)
    check_refused(zipped([(name.upper(), data) for name, data in raw]), tmp_path)
    check_refused(zipped([(f"../{name}", data) for name, data in raw]), tmp_path)
    # The same directory with 64-bit sizes, and before a comment.
    end = saved[-22:]
    check_refused(saved[:-2] + b"\x04\0note", tmp_path)
    check_refused(saved[:-22] + b"PK\x06\x07" + bytes(16) + end, tmp_path)
    for at, format, value in ((8, "<H", 65_535), (10, "<H", 65_535), (12, "<L", 2**31), (16, "<L", 2**31)):
        data = bytearray(saved)
        struct.pack_into(format, data, len(data) - 22 + at, value)
        check_refused(data, tmp_path)


def inconsistent_changes(m):
    """Changes to the members of a valid file, one at a time: (name, index, value)."""
    top = int(m["counts"].nonzero()[0][-1])
    low = int(m["counts"].nonzero()[0][0])
    count, channels, rows, octaves, sampled = m["calibrator"].tolist()[1:]
    yield from (("calibrator", 0, v) for v in (0, 1, 3, -1))
    yield from (("calibrator", 1, v) for v in (0, -1, count + 1, count - 1, 2 * count, 2**63 - 1))
    yield from (("calibrator", 2, v) for v in (-1, channels + 1, 19, 2**62))
    yield from (("calibrator", 3, v) for v in (-1, rows - 1))
    yield from (("calibrator", 4, v) for v in (-1, octaves + 1, octaves - 1, 256, 2**62))
    yield from (("calibrator", 5, v) for v in (-1, sampled + 1, sampled - 1, 2**62))
    yield from (("extremes", 0, v) for v in (np.nan, np.inf, -np.inf, 2 * m["extremes"][1], -3e38))
    yield from (("extremes", 1, v) for v in (np.nan, np.inf, -np.inf, 3e38, 2 * m["extremes"][0]))
    yield from (("extremes", slice(None), v) for v in ([1, -1], [0, 0], [np.inf, -np.inf], [-1, 1]))
    yield from (("sums", i, v) for i in range(4) for v in (np.nan, np.inf, -np.inf, 1e308, -1e308))
    yield from (("sums", i, v) for i in (0, 2) for v in (-1e60, 1e90))
    yield from (("sums", slice(None), v) for v in (0, m["sums"] * 2, m["sums"] / 2))
    yield ("sums", 2, 0)
    yield from (("counts", low, v) for v in (-1, m["counts"][low] + 1, 2**63 - 1, -(2**63)))
    yield ("counts", [low, low + 1], [-1, m["counts"][low] + m["counts"][low + 1] + 1])
    yield ("counts", [low, 65_535], [m["counts"][low] - 1, 1])
    yield ("counts", [top, top - 1], [0, m["counts"][top] + m["counts"][top - 1]])
    yield ("counts", slice(None), 0)
    yield ("counts", slice(None), 2**48)
    if channels:
        yield from (("channel_amax", 0, v) for v in (np.nan, np.inf, -1.0, -0.0, 3.4e38))
        yield ("channel_amax", slice(None), 0)
        yield from (("channel_amax", 0, v) for v in (m["channel_amax"][0] / 2, m["channel_amax"][0] * 2))
        octave, bin = np.argwhere(m["channel_counts"][:, 0])[-1]
        top = m["channel_counts"][octave, 0, bin]
        yield from (("channel_counts", (octave, 0, bin), v) for v in (0, top + 1, 2**32 - 1))
        yield ("channel_counts", slice(None), 0)
        yield ("octaves", -1, 255)
        yield ("octaves", -1, m["octaves"][-2])
        yield ("octaves", [0, 1], m["octaves"][[1, 0]])
        yield from (("sample", (0, 0), v) for v in (np.nan, np.inf, 3e38))
        yield ("sample", [0, 1], m["sample"][[1, 0]])
        yield ("sample", 0, m["sample"][1])
    else:
        yield ("calibrator", 3, 1)


def test_inconsistent_contents(saved, tmp_path):
    members = members_of(saved)
    tried = 0
    for name, index, value in inconsistent_changes(members):
        changed = members[name].copy()
        changed[index] = value
        if changed.tobytes() != members[name].tobytes():
            check_refused(npz({**members, name: changed}), tmp_path)
            tried += 1
    assert tried > 40


def test_an_octave_that_nothing_is_in(saved, tmp_path):
    members = members_of(saved)
    if members["calibrator"][2]:
        nothing = np.zeros_like(members["channel_counts"][:1])
        members["channel_counts"] = np.concatenate([members["channel_counts"], nothing])
        members["octaves"] = np.append(members["octaves"], np.uint8(254))
    else:
        members["channel_counts"], members["octaves"] = np.zeros((1, 0, 8), np.uint32), np.zeros(1, np.uint8)
    members["calibrator"][4] += 1
    check_refused(npz(members), tmp_path)


def test_inconsistent_contents_of_an_empty_calibrator(tmp_path):
    Calibrator(2).save(tmp_path / "empty.npz")
    members = members_of((tmp_path / "empty.npz").read_bytes())
    for name, index, value in (
        ("extremes", 0, 0.0),
        ("extremes", slice(None), 0.0),
        ("sums", 3, 1e-300),
        ("counts", 0, 1),
        ("channel_amax", 1, 1.0),
    ):
        changed = members[name].copy()
        changed[index] = value
        check_refused(npz({**members, name: changed}), tmp_path)


def version_1(x, channels):
    """The members of the file that version 0.1 wrote of a calibrator that has seen `x`."""
    calibrator = calibrator_of([x], channels)
    calibrator_arrays = calibrator.__reduce__()[1]
    amax = calibrator_arrays[6]
    windows = np.zeros((channels or 0, 90), np.uint32)
    if channels:
        bins = np.abs(x).astype(F32).view(np.int32) >> 20
        for j in range(channels):
            cells = np.maximum(bins[:, j] - (int(amax[j].view(np.int32)) >> 20) + 89, 0)
            np.add.at(windows[j], cells, 1)
    return {
        "calibrator": np.array([1, x.size, channels or 0]),
        "extremes": calibrator_arrays[3],
        "sums": calibrator_arrays[4],
        "counts": calibrator_arrays[5],
        "channel_amax": amax,
        "channel_counts": windows,
    }


@pytest.mark.parametrize("channels", [None, 20])
def test_files_of_version_0_1(channels, tmp_path):
    """They are loaded, merged with new ones, and answer as well as they did."""
    rng = np.random.default_rng(3)
    x = np.concatenate([channel_data(rng, 500, 20), np.zeros((3, 20), F32)])
    path = tmp_path / "old.npz"
    path.write_bytes(npz(version_1(x, channels)))
    old, new = Calibrator.load(path), calibrator_of([x], channels)
    assert (old.channels, old.rows, old.count) == (channels, None, x.size)
    assert old.stats() == new.stats()
    if channels:
        amax = np.abs(x).max(axis=0)
        assert old.channel_amax().tolist() == amax.tolist()
        for p in (0.2, 0.5, 0.9, 0.999):
            exact = np.sort(np.abs(x), axis=0)[reference.rank(p, len(x))].astype(np.float64)
            bound = np.where(exact < 2**-11 * amax, 2**-11 * amax, 2**-4 * exact) + 2**-129
            assert (np.abs(old.channel_percentile(p) - exact) <= bound).all()
    old.merge(new)
    assert whole_state(round_trip(old, tmp_path)) == whole_state(old)
    assert old.count == 2 * x.size
    empty = npz(version_1(np.empty((0, 20), F32), channels))
    path.write_bytes(empty)
    assert whole_state(Calibrator.load(path)) == whole_state(Calibrator(channels))


def test_damaged_files_of_version_0_1(tmp_path):
    members = version_1(channel_data(np.random.default_rng(3), 50, 20), 20)
    cells = members["channel_counts"]
    for name, index, value in (
        ("calibrator", 0, 2),
        ("calibrator", 2, 19),
        ("calibrator", 1, -1),
        ("channel_amax", 1, np.nan),
        ("channel_amax", 1, np.inf),
        ("channel_amax", 1, -1.0),
        ("channel_amax", np.argmax(members["channel_amax"]), 1.0),
        ("channel_counts", (1, 89), 0),
        ("channel_counts", (1, 89), 2**32 - 1),
        ("channel_counts", (1, [89, 88]), [0, cells[1, 88] + cells[1, 89]]),
        ("sums", 0, np.nan),
        ("extremes", 1, 3e38),
    ):
        changed = members[name].copy()
        changed[index] = value
        assert changed.tobytes() != members[name].tobytes()
        check_refused(npz({**members, name: changed}), tmp_path)
    for name in members:
        check_refused(npz({k: v for k, v in members.items() if k != name}), tmp_path)


@pytest.mark.slow
def test_every_valid_state_is_loaded(tmp_path):
    """The checks refuse no valid state, even where rounding is at its worst."""
    rng = np.random.default_rng(0)
    cases = [*distributions(5000, rng).values(), np.full(9, 3e38, F32), np.zeros(3, F32), F32([-1e-45])]
    cases += [rng.normal(mean, 1, 5000).astype(F32) for mean in (1e4, -1e7)]
    for x, channels in itertools.product(cases, (None, 1)):
        calibrator = calibrator_of([x[:, None], x[:2, None]], channels, channels and 100)
        for _ in range(8):
            assert whole_state(round_trip(calibrator, tmp_path)) == whole_state(calibrator)
            calibrator.merge(calibrator)


@pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")
def test_links_and_file_modes_are_kept(tmp_path):
    path, link = tmp_path / "file.npz", tmp_path / "link.npz"
    calibrator_of([[1.0]]).save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    calibrator_of([[2.0]]).save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert Calibrator.load(path).stats().max == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.npz", "link.npz"]


def test_a_long_name(tmp_path):
    path = tmp_path / ("a" * 255)
    calibrator_of([[1.0]]).save(path)
    assert Calibrator.load(path).count == 1


@pytest.mark.skipif(os.name == "nt", reason="links and errors of POSIX")
@pytest.mark.parametrize("name", ["none/file", "none/../file", "new/", "there/", "loop", ".", "a" * 256])
def test_errors_name_the_path(name, tmp_path):
    calibrator_of([[1.0]]).save(tmp_path / "there")
    (tmp_path / "loop").symlink_to("loop")
    path = f"{tmp_path}/{name}"
    with pytest.raises(OSError, match=r"Errno") as caught:
        Calibrator().save(path)
    assert caught.value.filename == path
    assert sorted(os.listdir(tmp_path)) == ["loop", "there"]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibrator_of([[1.0]]).save("file")
    assert os.listdir(tmp_path) == ["file"]


def test_saving_leaves_other_files_alone(tmp_path):
    other = tmp_path / "c.npz.partial"
    other.write_text("precious")
    Calibrator().save(tmp_path / "c.npz")
    assert other.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "c.npz.partial"]
