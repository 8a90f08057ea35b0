"""Files of torch.save: nothing runs, nothing fills the memory."""

import os
import zipfile

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError, MissingDependencyError
from moetuner.trace.importers.torch_file import FREE_PICKLE_BYTES, read_torch_file

torch = pytest.importorskip("torch")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-done",)


def test_tensors_stay_in_the_file_until_they_are_read(tmp_path):
    values = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    content = {"a": values, "b": [values.transpose(0, 2), values[1]], "c": "text"}
    torch.save(content, tmp_path / "a.pt")
    read = read_torch_file(tmp_path / "a.pt")
    assert read["c"] == "text"
    assert np.array_equal(read["a"].read(), values)
    assert np.array_equal(read["b"][0].read(), values.transpose(0, 2))
    assert np.array_equal(read["b"][1].read(1, 3), values[1][1:3])
    assert np.array_equal(read["a"].read(2, 4, axis=2), values[:, :, 2:4])


def test_pickled_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"records": Harmful()}, "a.pt")
    with pytest.raises(InvalidTraceError, match="not plain data"):
        read_torch_file(tmp_path / "a.pt")
    assert not (tmp_path / "harm-done").exists()


def rewritten(path, **changes):
    """The archive with members replaced, by the end of their names."""
    with zipfile.ZipFile(path) as archive:
        members = {m: archive.read(m) for m in archive.namelist()}
    with zipfile.ZipFile(path, "w", changes.pop("method", 0)) as archive:
        for name, content in members.items():
            archive.writestr(name, changes.get(name.rpartition("/")[2], content))
    return path


@pytest.fixture
def saved(tmp_path):
    torch.save({"x": torch.zeros(1000, dtype=torch.int64)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_compressed_archives_are_refused(saved):
    with pytest.raises(InvalidTraceError, match="compressed"):
        read_torch_file(rewritten(saved, method=zipfile.ZIP_DEFLATED))


def test_a_pickle_larger_than_recordings_have_is_refused(saved):
    bomb = b"\x80\x02](" + b"]" * (2 * FREE_PICKLE_BYTES) + b"e."
    with pytest.raises(InvalidTraceError, match="pickled objects: refused"):
        read_torch_file(rewritten(saved, **{"data.pkl": bomb}))


def test_tensors_larger_than_their_file_are_refused(saved, tmp_path):
    torch.save({"x": torch.zeros(1, dtype=torch.int64).expand(10**12)}, saved)
    with pytest.raises(InvalidTraceError, match=r"claims the shape|makes no sense"):
        read_torch_file(saved)


def test_tensors_are_where_they_are_looked_for(saved):
    """torch works offsets out instead of reading them, so other packers mislead it."""
    torch.save({"x": torch.zeros(5), "y": torch.ones(7)}, saved)
    with pytest.raises(InvalidTraceError, match="packed anew"):
        read_torch_file(rewritten(saved))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), "a tensor of bfloat16 is not read"),
        (torch.zeros(2, dtype=torch.complex64), "a tensor of complex64 is not read"),
        (torch.ones(2, 2).to_sparse(), "with the layout sparse_coo is not read"),
    ],
)
def test_kinds_that_no_recording_has_are_refused_by_name(saved, tensor, message):
    torch.save({"x": tensor}, saved)
    with pytest.raises(InvalidTraceError, match=message):
        read_torch_file(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InvalidTraceError):
        read_torch_file(saved)


def test_deep_nesting_is_refused(saved):
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(InvalidTraceError):
        read_torch_file(rewritten(saved, **{"data.pkl": deep}))


def test_old_formats_are_refused(saved):
    torch.save([1], saved, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidTraceError, match="older and damaged files"):
        read_torch_file(saved)


def test_without_torch_the_message_says_how_to_get_it(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"moetuner\[torch\]"):
        read_torch_file(saved)


@pytest.mark.parametrize("alignment", [b"0", b"", b"-1", b"x"])
def test_a_damaged_alignment_does_not_end_the_process(saved, alignment):
    with pytest.raises(InvalidTraceError, match="no alignment"):
        read_torch_file(rewritten(saved, **{".storage_alignment": alignment}))
