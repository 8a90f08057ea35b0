"""Redundant experts as engines count them: more physical experts than logical ones.

SGLang's ``--ep-num-redundant-experts`` and vLLM's ``num_redundant_experts`` say how
many slots a layer has on all ranks together beyond one for each expert. Every rank
holds equally many, so not every number can be had.
"""

from __future__ import annotations

from moetuner.errors import InvalidProblemError


def slots_with_redundant(num_experts: int, num_ranks: int, redundant: int) -> int:
    """Slots of each rank and layer, where a layer has so many beyond its experts.

    Raises
    ------
    InvalidProblemError
        When ranks would hold different numbers, or an expert twice; it names the
        nearest numbers that can be had.
    """
    slots, left = divmod(num_experts + redundant, num_ranks)
    possible = range(-(-num_experts // num_ranks), num_experts + 1)
    if not left and slots in possible:
        return slots
    near = [each for each in (slots, slots + 1) if each in possible] or [possible[-1]]
    wanted = " or ".join(
        f"{each * num_ranks - num_experts} ({each} slots a rank)" for each in near
    )
    raise InvalidProblemError(
        f"plan: redundant must leave equal slots on {num_ranks} ranks for "
        f"{num_experts} experts and no expert twice on one; {redundant} make "
        f"{num_experts + redundant}. Nearest: {wanted}"
    )
