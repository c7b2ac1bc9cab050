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
from helpers.common import F32, calibrator_of, channel_data, distributions, whole_state

from dynquant import Calibrator, ParameterError


def example(channels):
    rng = np.random.default_rng(0)
    return calibrator_of(
        [channel_data(rng, 50, channels or 20), channel_data(rng, 9, channels or 20)], channels
    )


def round_trip(calibrator, folder):
    calibrator.save(folder / "calibrator.npz")
    return Calibrator.load(folder / "calibrator.npz")


@pytest.mark.parametrize("channels", [None, 1, 20])
def test_round_trips(channels, tmp_path):
    for calibrator in (example(channels), Calibrator(channels)):
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
    calibrator_of([x], 2).save(tmp_path / "calibrator.npz")
    with np.load(tmp_path / "calibrator.npz", allow_pickle=False) as archive:
        assert archive["channel_amax"].tolist() == [1, 3]
        assert archive["counts"].sum() == 4
        assert archive["calibrator"].tolist() == [1, 4, 2]
        assert archive["channel_counts"].nbytes + archive["channel_amax"].nbytes == 2 * 364


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
            ("channel_counts", "<u4", (n, 90)),
        ):
            changed = {**raw, f"{name}.npy": header_of(dtype, shape) + bytes(64)}
            check_refused(zipped(changed.items()), tmp_path)
            header = header_of("<i8", (3,)) + np.array([1, 0, n]).astype("<i8").tobytes()
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
        "calibrator": np.array([1, 0, n]),
        "extremes": F32([np.inf, -np.inf]),
        "sums": np.zeros(4),
        "counts": np.zeros(1 << 16, np.int64),
        "channel_amax": np.zeros(n, F32),
        "channel_counts": np.zeros((n, 90), np.uint32),
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
    count, channels = m["calibrator"].tolist()[1:]
    yield from (("calibrator", 0, v) for v in (0, 2, -1))
    yield from (("calibrator", 1, v) for v in (0, -1, count + 1, count - 1, 2 * count, 2**63 - 1))
    yield from (("calibrator", 2, v) for v in (-1, channels + 1, 19, 2**62))
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
        bins = m["channel_counts"][0]
        yield from (("channel_counts", (0, 89), v) for v in (0, bins[89] + 1, 2**32 - 1))
        yield ("channel_counts", (0, [89, 88]), [0, bins[88] + bins[89]])
        yield ("channel_counts", slice(None), 0)


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


def test_inconsistent_contents_of_an_empty_calibrator(tmp_path):
    Calibrator(2).save(tmp_path / "empty.npz")
    members = members_of((tmp_path / "empty.npz").read_bytes())
    for name, index, value in (
        ("extremes", 0, 0.0),
        ("extremes", slice(None), 0.0),
        ("sums", 3, 1e-300),
        ("counts", 0, 1),
        ("channel_amax", 1, 1.0),
        ("channel_counts", (1, 89), 1),
    ):
        changed = members[name].copy()
        changed[index] = value
        check_refused(npz({**members, name: changed}), tmp_path)


@pytest.mark.slow
def test_every_valid_state_is_loaded(tmp_path):
    """The checks refuse no valid state, even where rounding is at its worst."""
    rng = np.random.default_rng(0)
    cases = [*distributions(5000, rng).values(), np.full(9, 3e38, F32), np.zeros(3, F32), F32([-1e-45])]
    cases += [rng.normal(mean, 1, 5000).astype(F32) for mean in (1e4, -1e7)]
    for x, channels in itertools.product(cases, (None, 1)):
        calibrator = calibrator_of([x[:, None], x[:2, None]], channels)
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
