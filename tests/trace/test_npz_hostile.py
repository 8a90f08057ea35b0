"""Archives that lie, and archives that attack."""

import io
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace import read_trace

IDS = np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]]], np.uint8)
MEMORY_LIMIT = 1 << 29


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def npy(header, data=b"", version=(1, 0)):
    """A .npy with any header text, true or not."""
    text = header.encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def header(shape="(2, 2, 2)", dtype="'|u1'", order="False"):
    return f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}}}\n"


def write(path, *members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def plain(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["experts", "weights", "meta", "counts", "other"])
def test_nothing_is_unpickled(tmp_path, name):
    touched = tmp_path / "touched"
    bomb = np.array([Payload(touched)], object)
    path = tmp_path / "pickled.npz"
    arrays = {"experts": IDS} | {name: bomb}
    np.savez(path, **arrays)
    with pytest.raises(InvalidTraceError, match=f"{name}.npy holds pickled objects"):
        read_trace(path)
    assert not touched.exists()
    # The payload is live: reading it the careless way does touch the file.
    with np.load(path, allow_pickle=True) as archive:
        archive[name]
    assert touched.exists()


def test_objects_hidden_in_a_record_are_refused(tmp_path):
    member = npy(header("(1,)", "[('a', '|O')]"), b"cos\nsystem\n")
    with pytest.raises(InvalidTraceError, match="holds pickled objects"):
        read_trace(write(tmp_path / "a.npz", ("experts.npy", member)))


BYTES = IDS.tobytes()
HEADERS = [
    (npy(header("(3, 2, 2)"), BYTES), "experts.npy declares 12 bytes, has 8"),
    (npy(header("(1, 2, 2)"), BYTES), "experts.npy declares 4 bytes, has 8"),
    (npy(header("(2, 2, 2)", "'<i8'"), BYTES), "declares 64 bytes, has 8"),
    (npy(header("(4294967296, 4294967296)"), BYTES), "declares 18446744073709551616"),
    (npy(header("(-2, 2, -2)"), BYTES), "declares the shape [-2, 2, -2]"),
    (npy(header("(-1, 2, 2)"), BYTES), "declares the shape [-1, 2, 2]"),
    (npy(header("2"), BYTES), "damaged archive"),
    (npy(header("(2, 2.0, 2)"), BYTES), "damaged archive"),
    (npy(header(order="3"), BYTES), "damaged archive"),
    (npy(header(dtype="()"), BYTES), "damaged archive"),
    (npy(header(dtype="'no such'"), BYTES), "damaged archive"),
    (npy(header(dtype="(" * 3000 + ")" * 3000), BYTES), "damaged archive"),
    (npy("-" * 9000, BYTES), "damaged archive"),
    (npy("{1: 2, 'descr': 3}", BYTES), "damaged archive"),
    (npy("{[]: 1}", BYTES), "damaged archive"),
    (npy("__import__('os').abort()", BYTES), "damaged archive"),
    (npy(" " * 60000, BYTES), "damaged archive"),
    (npy(" " * 200000, BYTES, (2, 0)), "damaged archive"),
    (npy(header(), BYTES, (9, 0)), "damaged archive"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "damaged archive"),
    (b"", "damaged archive"),
    (b"no array", "damaged archive"),
]


@pytest.mark.parametrize(("member", "message"), HEADERS)
def test_an_array_header_that_lies_is_refused(tmp_path, member, message):
    path = write(tmp_path / "a.npz", ("experts.npy", member))
    with pytest.raises(InvalidTraceError, match=re.escape(message)) as caught:
        read_trace(path)
    assert str(caught.value).count(str(path)) == 1


def test_the_helper_writes_what_is_read(tmp_path):
    """So that the refusals above have the reason that they name."""
    path = write(tmp_path / "a.npz", ("experts.npy", npy(header(), BYTES)))
    np.testing.assert_array_equal(read_trace(path).topk_ids, IDS)


def test_members_that_are_no_arrays_or_come_twice(tmp_path):
    good = ("experts.npy", plain(IDS))
    path = write(tmp_path / "a.npz", good, ("readme.txt", b"hello"))
    with pytest.raises(InvalidTraceError, match=r"'readme\.txt' is not a NumPy array"):
        read_trace(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write(tmp_path / "b.npz", good, ("experts.npy", plain(IDS[:1])))
    with pytest.raises(
        InvalidTraceError, match=r"'experts\.npy' is in the archive twi"
    ):
        read_trace(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_numpys_own_compression_is_unpacked(tmp_path, method):
    path = write(tmp_path / "a.npz", ("experts.npy", plain(IDS)), method=method)
    with pytest.raises(InvalidTraceError, match="must be stored or deflated, got meth"):
        read_trace(path)


def test_every_truncation_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", experts=IDS, meta="{}")
    whole = (tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(InvalidTraceError, match=r"cut\.npz: "):
            read_trace(cut)


def test_a_wrong_checksum_is_noticed(tmp_path):
    path = write(tmp_path / "a.npz", ("experts.npy", plain(IDS)))
    data = bytearray(path.read_bytes())
    at = data.index(BYTES)
    data[at], data[at + 1] = data[at + 1], data[at]  # still a legal row
    path.write_bytes(data)
    with pytest.raises(InvalidTraceError, match="Bad CRC"):
        read_trace(path)


def bomb(path, num_bytes):
    """A trace of zeros that is honest about its size."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("experts.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(npy(header(f"({num_bytes}, 1, 1)")))
        for _ in range(num_bytes >> 24):
            stream.write(bytes(1 << 24))
    return path


def liar(path, num_bytes):
    """A tiny member that claims, everywhere, to be huge."""
    head = npy(header(f"({num_bytes}, 1, 1)"))
    write(path, ("experts.npy", head + BYTES))
    data = path.read_bytes()
    old = struct.pack("<I", len(head) + len(BYTES))
    path.write_bytes(data.replace(old, struct.pack("<I", num_bytes + len(head))))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [(bomb, "bytes would unpack to"), (liar, "the members claim")],
)
def test_bombs_are_refused_in_bounded_memory(tmp_path, make, message):
    """In a process that may not take more memory than they would unpack to."""
    path = make(tmp_path / "bomb.npz", 3 << 28)
    assert path.stat().st_size < 1 << 21
    script = (
        "import resource, sys; from moetuner.trace import read_trace\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))\n"
        "try: read_trace(sys.argv[1])\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith("InvalidTraceError")
    assert message in done.stdout
