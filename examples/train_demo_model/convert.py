"""Writes the recording of `train.py` as the trace file that the package ships.

python convert.py demo_trace.npz demo_trace.safetensors
"""

import argparse
from dataclasses import replace
from pathlib import Path

from moetuner import read_trace, write_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("trace", type=Path)
    arguments = parser.parse_args()
    trace = read_trace(arguments.recording)
    metadata = replace(trace.metadata, source="examples/train_demo_model/train.py")
    write_trace(replace(trace, metadata=metadata), arguments.trace)


if __name__ == "__main__":
    main()
