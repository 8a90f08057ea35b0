import pytest
from moetuner.trace import read_trace
from moetuner.trace.importers import ImportOptions, RecordingFormat, import_recording


class Importing:
    """Runs imports into a folder and keeps what they noted."""

    def __init__(self, folder):
        self.folder = folder
        self.notes = []
        self.result = None

    def __call__(self, *paths, format=None, **options):
        out = self.folder / "imported.safetensors"
        self.result = import_recording(
            paths,
            out,
            format=None if format is None else RecordingFormat(format),
            options=ImportOptions(note=self.notes.append, **options),
        )
        return read_trace(out)


@pytest.fixture
def importing(tmp_path):
    return Importing(tmp_path)
