import numpy as np
import pytest
from moetuner.placement.file import read_placement
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology


@pytest.fixture
def placement():
    """Two layers, the second and fourth of the model; four experts, one empty slot."""
    return Placement(
        slot_experts=np.array([[1, 0, 3, 2, -1, 0], [2, -1, 0, 1, 3, 2]], np.int32),
        layer_ids=np.array([1, 3], np.int32),
        num_experts=4,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )


@pytest.fixture
def full():
    """What the engines' scripts were given: 64 experts in 72 slots of four ranks."""
    from engine_files import FOLDER

    return read_placement(FOLDER / "placement.json")
