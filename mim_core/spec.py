"""Choose a piece by name and check its params: the signature of a function is its schema.

A family of pieces is a plain dict, `MASKS = {"random": random}`. Positional parameters of a piece are wiring, given by
code; keyword-only parameters are params, given by a row in `params/`, with their defaults and bounds in the signature
(`ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6`). `OneOf(MASKS)` makes such a family a field of a pydantic model.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
)
from pydantic_core import CoreSchema, core_schema

Table = Mapping[str, Callable[..., Any]]
Model = typing.TypeVar("Model", bound=BaseModel)


SHOWN = 200
"""Characters of a wrong value that a message shows."""


class SpecError(ValueError):
    """Params that cannot run; the message lists every fault, one a line, as `where: found; rule; what to do`."""


class Strict(BaseModel):
    """A params model: unknown keys are errors, numbers are finite, and nothing is coerced but int to float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Piece(Strict):
    """A chosen piece: its `name` in a table and, as further fields, its params."""

    name: str

    def params(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in type(self).model_fields if key not in {"name", *self.common()}}

    @classmethod
    def common(cls) -> frozenset[str]:
        """Names of fields that belong to the row and not to the piece's function (see `OneOf`)."""
        return frozenset()


def build(table: Table, piece: Piece, *wiring: Any, **wired: Any) -> Any:
    """Call the piece's function with its wiring and its params."""
    return table[piece.name](*wiring, **wired, **piece.params())


def bind(table: Table, piece: Piece) -> Callable[..., Any]:
    """Give the piece's function with its params bound, for pieces that are pure functions (masks, losses).

    The result can be pickled, so that loader workers can have it.
    """
    return functools.partial(table[piece.name], **piece.params())


class OneOf:
    """Annotate a field as `Annotated[Piece, OneOf(TABLE)]`: it takes `{name: ..., <params>}` or the bare name.

    `common` adds fields that all pieces of the family share and that the caller, not the piece, reads.
    """

    def __init__(self, table: Table, **common: Any) -> None:
        self.models = {name: schema(name, function, common) for name, function in table.items()}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(model) for name, model in self.models.items()}
        union = core_schema.tagged_union_schema(choices, discriminator="name")
        return core_schema.no_info_before_validator_function(
            lambda value: {"name": value} if isinstance(value, str) else value, union
        )


def schema(name: str, function: Callable[..., Any], common: Mapping[str, Any]) -> type[Piece]:
    """Make the pydantic model of a piece from the keyword-only parameters of its function."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function if inspect.isfunction(function) else function.__init__, include_extras=True)
    fields: dict[str, Any] = {"name": (typing.Literal[name], name)}
    for key, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[key] = (hints[key], default)
    model = create_model(name, __base__=Piece, **fields, **common)
    shared = frozenset(common)
    model.common = classmethod(lambda cls: shared)  # type: ignore[method-assign,assignment]
    return model


def pair(value: Any) -> Any:
    """Read a pair as YAML writes it: a list of two, or one number for both."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value, value)
    return tuple(value) if isinstance(value, list) else value


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"found {list(value)}; the first number may not exceed the second; swap them")
    return value


_Side = typing.Annotated[int, Field(gt=0, le=2**15)]

Pair = typing.Annotated[tuple[_Side, _Side], BeforeValidator(pair)]
"""(height, width) in px; one number stands for a square."""

Depth = typing.Annotated[int, Field(gt=0, le=1000)]
"""A number of blocks or layers: a row that asks for a million of them is checked by building them."""

Counts = typing.Annotated[
    tuple[Depth, ...],
    Field(min_length=1, max_length=32),
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
"""A positive number for each stage, which YAML writes as a list."""

Range = typing.Annotated[tuple[float, float], BeforeValidator(pair), AfterValidator(_ordered)]
"""(low, high); one number stands for both."""


def check(model: type[Model], value: Any, where: str) -> Model:
    """Validate `value` as `model`.

    Raises SpecError with every fault at once; `where` is the path that the messages begin with.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = [_explain(model, value, fault, where) for fault in error.errors()]
        raise SpecError("\n".join(faults)) from None


def shown(value: Any) -> str:
    """Give a wrong value for a message, of which a long one has the beginning only."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, or depth
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shown_key(key: Any) -> str:
    """Give a key for a message: as it is where a line can show it."""
    text = str(key)
    return text[:SHOWN] if text.isprintable() and text.strip() else shown(text)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _explain(model: type[BaseModel], value: Any, fault: Any, where: str) -> str:
    loc, kind, found = _untagged(value, fault["loc"]), fault["type"], fault["input"]
    path = ".".join([where, *map(shown_key, loc)])
    context = fault.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(model, value, loc[:-1])
        return f"{path}: unknown key; known keys are {sorted(known)}{nearest(str(loc[-1]), known)}"
    if kind == "missing":
        return f"{path}: missing; this key is required"
    if kind == "union_tag_invalid":
        names = [name.strip(" '") for name in context["expected_tags"].split(",")]
        return f"{path}.name: {shown(context['tag'])} is not one of {names}{nearest(context['tag'], names)}"
    if kind in {"union_tag_not_found", "model_attributes_type"}:
        return f"{path}: found {shown(found)}; it must be a name, or a mapping with the key 'name'"
    if kind == "model_type":
        return f"{path}: found {shown(found)}; it must map keys to values"
    if kind == "value_error":
        return f"{path}: {'; '.join(str(context['error']).splitlines())}"
    rule = fault["msg"].replace("Input should", "must").replace("input should", "must")
    hint = ""
    if isinstance(found, str) and _is_number(found):
        plain = f"as a plain number with a point, such as {float(found):.1e} (YAML reads 1e-4 as text)"
        hint = f"; write it {plain if 'e' in found.lower() else 'without quotes'}"
    return f"{path}: found {shown(found)}; {rule}{hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _untagged(value: Any, loc: tuple[Any, ...]) -> list[Any]:
    """Drop from an error's path the names of chosen pieces, which pydantic puts in after the field."""
    path: list[Any] = []
    at = value
    for part in loc:
        if part == at or (isinstance(at, Mapping) and part == at.get("name") and part not in at):
            continue
        path.append(part)
        try:
            at = at[part]
        except (KeyError, IndexError, TypeError):
            at = None
    return path


def _known_keys(model: type[BaseModel], value: Any, loc: list[Any]) -> set[str]:
    """Find the keys that the model at a path takes."""
    for part in loc:
        value = value.get(part) if isinstance(value, Mapping) else None
        field = model.model_fields.get(part)
        if field is None:
            return set()
        # The annotation's own parts, and those of each option of `X | None`.
        parts = [*field.metadata, field.annotation]
        for option in typing.get_args(field.annotation):
            parts += [option, *typing.get_args(option)]
        families = [part for part in parts if isinstance(part, OneOf)]
        nested = [part for part in parts if inspect.isclass(part) and issubclass(part, BaseModel)]
        if families and isinstance(value, Mapping):
            model = families[0].models[value["name"]]
        elif nested:
            model = nested[0]
    return set(model.model_fields)
