"""Ways of damaging a file, for fuzzing; `MOETUNER_FUZZ` multiplies the inputs tried."""

import os
import struct

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from strategies import examples

FACTOR = int(os.environ.get("MOETUNER_FUZZ", "1"))
LONG = settings(
    max_examples=examples(30).max_examples * FACTOR,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# Numbers that sit on edges: sizes, signs, types.
EDGES = [0, 1, -1, 127, 128, 255, 32767, 32768, 2**31 - 1, 2**31, 2**53, 2**63, 2**64]
WORDS = ["NaN", "Infinity", "null", "[]", "{}", '"x"', "1e999", "[[[[[[", "true", "0.5"]


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["byte", "cut", "double", "truncate", "edge", "digit", "word"]),
        st.floats(0, 1),  # where
        st.sampled_from([1, 2, 4, 8, 32, 200]),  # how much
        st.integers(0, 255),  # with what
    ),
    min_size=1,
    max_size=3,
)


def damaged(content, damage):
    """Bytes changed, a piece cut or doubled, a number on an edge, a word of JSON."""
    data = bytearray(content)
    for kind, where, size, value in damage:
        place = int(where * max(len(data) - 1, 0))
        edge = EDGES[value % len(EDGES)]
        word = WORDS[value % len(WORDS)].encode()
        if kind == "byte":
            data[place : place + 1] = bytes([value])
        elif kind == "cut":
            del data[place : place + size]
        elif kind == "double":
            data[place:place] = data[place : place + size]
        elif kind == "truncate":
            data = data[:place]
        elif kind == "edge":
            data[place : place + 8] = struct.pack("<Q", edge % 2**64)
        elif kind == "digit":
            data[place:place] = str(edge).encode()
        else:
            data[place : place + len(word)] = word
    return bytes(data)
