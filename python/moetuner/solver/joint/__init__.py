"""The joint planner: load, remote ranks and links of every batch at once."""
