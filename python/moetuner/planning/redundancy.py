"""Redundant experts as engines count them: more physical experts than logical ones.

SGLang's ``--ep-num-redundant-experts`` and vLLM's ``num_redundant_experts`` say how
many slots a layer has on all ranks together beyond one for each expert. Every rank
holds equally many, so not every number can be had.
"""

from __future__ import annotations

from moetuner._checks import is_whole
from moetuner._words import amount
from moetuner.errors import InvalidProblemError


def check_slots(num_experts: int, num_ranks: int, slots_per_rank: int) -> None:
    """Refuse ranks that would stay empty, and slots that no plan can fill; 0: least.

    Raises
    ------
    InvalidProblemError
        It names what can be had.
    """
    if num_ranks > num_experts:
        raise InvalidProblemError(
            f"plan: num_ranks must be at most {num_experts}, the number of experts, "
            f"or a rank would stay empty; got {num_ranks}"
        )
    least = -(-num_experts // num_ranks)
    if slots_per_rank and not least <= slots_per_rank <= num_experts:
        raise InvalidProblemError(
            f"plan: slots_per_rank must be {least}..{num_experts}, enough for "
            f"{num_experts} experts on {amount(num_ranks, 'rank')} and no expert twice "
            f"on one, "
            f"or 0; got {slots_per_rank}"
        )


def slots_with_redundant(num_experts: int, num_ranks: int, redundant: int) -> int:
    """Slots of each rank and layer, where a layer has so many beyond its experts.

    Raises
    ------
    InvalidProblemError
        When it is no whole number >= 0, or a rank would stay empty, or ranks would
        hold different numbers, or an expert twice; it names the nearest numbers that
        can be had.
    """
    if not is_whole(redundant) or redundant < 0:
        raise InvalidProblemError(
            f"plan: redundant must be a whole number >= 0, got {redundant!r}"
        )
    check_slots(num_experts, num_ranks, 0)
    slots, left = divmod(num_experts + redundant, num_ranks)
    possible = range(-(-num_experts // num_ranks), num_experts + 1)
    if not left and slots in possible:
        return slots
    near = [each for each in (slots, slots + 1) if each in possible] or [possible[-1]]
    wanted = " or ".join(
        f"{each * num_ranks - num_experts} ({amount(each, 'slot a rank')})"
        for each in near
    )
    raise InvalidProblemError(
        f"plan: redundant must leave equal slots on {num_ranks} ranks for "
        f"{num_experts} experts and no expert twice on one; {redundant} make "
        f"{num_experts + redundant}. Nearest: {wanted}"
    )
