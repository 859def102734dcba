"""Pydantic's errors in the words of this project: one line each, naming key, expectation, finding and place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, Tag, ValidationError

from train.document import Document, Key, did_you_mean, dotted, show

_TAG = "kind"  # the key whose value picks one section of a union
PROBLEMS = "problems"  # type of a PydanticCustomError whose context carries {"problems": [(key, message), ...]}

_EXPECTED = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text (in quotes where it looks like a number)",
    "tuple_type": "must be a list",
    "string_pattern_mismatch": "must be made of letters, digits, - and _",
}


def explain(error: ValidationError, model: type[BaseModel], document: Document, prefix: Key = ()) -> list[str]:
    """The lines of a ConfigError for ``error``, raised while ``model`` read the part of ``document`` at ``prefix``."""
    lines: list[str] = []
    for item in error.errors():
        key = (*prefix, *_without_tags(model, item["loc"]))
        if item["type"] == PROBLEMS:
            lines += [document.problem((*prefix, *where), message) for where, message in item["ctx"]["problems"]]
        # Wrong items count as absent in pydantic's length check: a list that is long enough as written is not too short.
        elif item["type"] != "too_short" or len(item["input"]) < item["ctx"]["min_length"]:
            lines.append(document.problem(key, _message(item, model, prefix)))
    return lines


def _message(error: dict[str, Any], model: type[BaseModel], prefix: Key) -> str:
    """What was expected and found, for one item of ``ValidationError.errors()``."""
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    section, annotation, metadata = _field(model, error["loc"])
    if kind == "union_tag_invalid":
        choices = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        return f"{_TAG} must be one of {', '.join(choices)}, got {show(context['tag'])}{did_you_mean(context['tag'], choices)}"
    if kind == "missing":
        return "required, but not given"
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(error['loc'][-1], _names(section))}"
    if kind == "model_type":
        return f"must be a section with keys such as {', '.join(list(_names(_section(annotation)))[:3])}, got {show(found)}"
    if kind in ("literal_error", "enum"):
        choices = list(dict.fromkeys(choice.strip("'") for choice in re.split(", | or ", context["expected"])))
        return f"must be one of {', '.join(choices)}, got {show(found)}{did_you_mean(found, choices)}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{_interval([*metadata, *_flatten(annotation)])}, got {show(found)}"
    if kind == "too_short":
        return f"must have at least {context['min_length']} entry, got {context['actual_length']}"
    if kind == "too_long":
        return f"must have {context['max_length']} entries, got {context['actual_length']}"
    if kind in ("value_error", "assertion_error"):  # raised by the model's own validators, in their own words
        return error["msg"].partition(", ")[2].removeprefix(f"{dotted((*prefix, *error['loc']))} ")
    return f"{_EXPECTED.get(kind, error['msg'])}, got {show(found)}"


def _field(section: type[BaseModel], key: Key) -> tuple[type[BaseModel], Any, Sequence[Any]]:
    """The section that holds the last name in ``key``, and the annotation and metadata of that field (None, () if unknown)."""
    annotation, metadata = None, ()
    for name in key:
        if isinstance(name, int):  # an item of a list: its type is inside the list's annotation
            continue
        if tagged := _tagged(annotation, name):
            section, annotation = tagged, tagged
            continue
        section = _section(annotation) or section
        known = _names(section).get(name)
        annotation, metadata = (known.annotation, known.metadata) if known else (None, ())
    return section, annotation, metadata


def _tagged(annotation: Any, name: str | int) -> type[BaseModel] | None:
    """The section that ``name`` picks as the tag of a union of sections (see pydantic.Tag); pydantic counts it as part of a place."""
    for part in _flatten(annotation):
        if any(isinstance(m, Tag) and m.tag == name for m in getattr(part, "__metadata__", ())):
            return _section(part)
    return None


def _without_tags(model: type[BaseModel], loc: tuple[str | int, ...]) -> Key:
    """``loc`` as a file spells it."""
    return tuple(name for place, name in enumerate(loc) if not _tagged(_field(model, loc[:place])[1], name))


def _names(section: type[BaseModel]) -> dict[str, Any]:
    """The keys that ``section`` knows, as a file spells them."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _section(annotation: Any) -> type[BaseModel] | None:
    return next((part for part in _flatten(annotation) if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _flatten(annotation: Any) -> Iterator[Any]:
    """Everything inside an annotation: its classes, and the metadata of nested ``Annotated``."""
    yield annotation
    yield from getattr(annotation, "metadata", ())  # a pydantic Field inside Annotated
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from _flatten(part)


def _interval(metadata: Sequence[Any]) -> str:
    """``must lie in (0, 1]`` from annotated bounds."""
    low = next((f"({m.gt:g}" if isinstance(m, Gt) else f"[{m.ge:g}" for m in metadata if isinstance(m, Gt | Ge)), None)
    high = next((f"{m.lt:g})" if isinstance(m, Lt) else f"{m.le:g}]" for m in metadata if isinstance(m, Lt | Le)), None)
    if low and high:
        return f"must lie in {low}, {high}"
    return f"must be {'greater than' if low[0] == '(' else 'at least'} {low[1:]}"  # no field has an upper bound alone
