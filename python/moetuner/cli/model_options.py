"""What `--model`, `--weights`, `--rows` and the sizes are turned into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetuner.cli.messages import note
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.models import (
    DEFAULT_SHAPE,
    Model,
    ModelShape,
    ValueType,
    find_model,
    known_names,
    read_model,
)
from moetuner.evaluation.models.families import similar_names
from moetuner.evaluation.models.value_type import ROW_TYPES

if TYPE_CHECKING:
    from moetuner.trace import CountTrace, Trace


def priced_shape(
    trace: Trace | CountTrace,
    told: ModelShape | None,
    *,
    model: str | None,
    hidden_size: int | None,
    expert_hidden_size: int | None,
    weights: ValueType | None,
    rows_out: ValueType | None,
    rows_back: ValueType | None,
    quiet: bool,
) -> ModelShape:
    """Sizes and types of what placements are priced with.

    They are of the model that is named, else of the plan (``told``), else of the model
    that the recording names, else assumed, which is said even to the quiet. Sizes and
    types that are given count before all of these.
    """
    shape = told
    if model is not None:
        shape = _asked_shape(model, trace, weights, quiet)
    elif told is None:
        shape = _recorded_shape(trace, weights, quiet)
    shape = shape or DEFAULT_SHAPE
    shape = replace(
        shape,
        hidden_size=hidden_size or shape.hidden_size,
        expert_hidden_size=expert_hidden_size or shape.expert_hidden_size,
        guessed=shape.guessed and not (hidden_size and expert_hidden_size),
    ).with_types(weights=weights, rows_out=rows_out, rows_back=rows_back)
    if shape.guessed:
        note(
            f"model {trace.metadata.model or 'unknown'!r} is not in the table: "
            f"assuming hidden size {shape.hidden_size}, expert hidden size "
            f"{shape.expert_hidden_size}; set --model, or --hidden-size and "
            f"--expert-hidden-size",
            quiet=False,
        )
    return shape


def named_model(named: str) -> Model:
    """The model of a config.json, or of the table.

    Raises
    ------
    InvalidProblemError
        When there is no such file, and no such name in the table.
    """
    path = Path(named)
    if path.suffix == ".json" or path.exists():
        return read_model(path)
    return _model_of_table(named)


def row_types(rows: str | None) -> tuple[ValueType | None, ValueType | None]:
    """Types of rows out and back, as ``--rows`` says them; back is bf16 if not said.

    Raises
    ------
    InvalidProblemError
        When it is not one type or two between a comma.
    """
    if rows is None:
        return None, None
    known = {each.value: each for each in ROW_TYPES}
    parts = [part.strip() for part in rows.split(",")]
    if not 1 <= len(parts) <= 2 or not set(parts) <= set(known):
        raise InvalidProblemError(
            f"--rows must be OUT or OUT,BACK, each one of {', '.join(known)}, got "
            f"{rows!r}"
        )
    out, back = (known[part] for part in (*parts, "bf16")[:2])
    return out, back


def _asked_shape(
    named: str, trace: Trace | CountTrace, weights: ValueType | None, quiet: bool
) -> ModelShape:
    """Shape of the checkpoint of a config.json, or of a model of the table."""
    path = Path(named)
    if path.suffix == ".json" or path.exists():
        model = read_model(path)
        shape = model.shape
    else:
        model = _model_of_table(named)
        shape = _in_bf16(model, weights, quiet)
    model.check_experts(trace)
    _tell_differences(model, trace, quiet)
    return shape


def _recorded_shape(
    trace: Trace | CountTrace, weights: ValueType | None, quiet: bool
) -> ModelShape | None:
    """Shape of the model that the recording names; None when it is not known."""
    model = find_model(trace.metadata.model)
    if model is None:
        return None
    try:
        model.check_experts(trace)
    except InvalidTraceError as error:
        note(f"{error}; --model says which one it is", quiet)
    _tell_differences(model, trace, quiet)
    return _in_bf16(model, weights, quiet)


def _model_of_table(named: str) -> Model:
    found = find_model(named)
    if found is not None:
        return found
    similar = similar_names(named)
    meant = f"did you mean {' or '.join(similar)}?"
    if not similar:
        meant = f"the table has {', '.join(known_names())}."
    raise InvalidProblemError(
        f"--model {named}: not in the table, and no such file; {meant} A path to the "
        f"model's config.json always works"
    )


def _tell_differences(model: Model, trace: Trace | CountTrace, quiet: bool) -> None:
    for difference in model.differences(trace):
        note(difference, quiet)


def _in_bf16(model: Model, weights: ValueType | None, quiet: bool) -> ModelShape:
    """A name does not tell which checkpoint is served: the weights are bf16 then."""
    published = model.shape.weight_type
    if weights is None and published not in (None, ValueType.BF16):
        note(
            f"{model.source} is published with weights in {published.value}; priced in "
            f"bf16, --weights {published.value} says otherwise",
            quiet,
        )
    return model.shape.with_types(weights=ValueType.BF16)
