"""Read annotation files that may be broken or hostile: JSON, XML and lists of lines, checked piece by piece."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from xml.etree import ElementTree
from xml.parsers import expat

from pydantic import BaseModel, ConfigDict, ValidationError

from mim_core.data.images import RefusedError


class Entry(BaseModel):
    """One object of a JSON file, of which the fields that we read are strict; others are passed over."""

    model_config = ConfigDict(strict=True, frozen=True)


Model = TypeVar("Model", bound=Entry)


def read_text(path: Path, root: Path) -> str:
    """Read a text file as UTF-8.

    Raises ValueError, naming the file below `root` and the place, where it is missing or something else.
    """
    where = path.relative_to(root).as_posix()
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{where}: the file is missing; the dataset's images have their annotations there") from None
    except OSError as error:
        raise ValueError(f"{where}: the file cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise ValueError(f"{where}: {at}; the text must be UTF-8; save it so") from None


def read_lines(path: Path, root: Path) -> list[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers from 1 on. Raises ValueError as `read_text`."""
    lines = enumerate(read_text(path, root).splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_json(path: Path, root: Path, *keys: str) -> dict[str, list[Any]]:
    """Read a JSON object that has a list under each of `keys`.

    Raises ValueError with file and place where it is none. Entries of the lists are not checked.
    """
    where, text = path.relative_to(root).as_posix(), read_text(path, root)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where} line {error.lineno} column {error.colno}"
        raise ValueError(f"{place}: {error.msg}; it must be JSON; write the file again") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: {error}; it must be JSON of lists and objects; write the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: found {_short(content)}; it must be an object with {list(keys)}")
    for key in keys:
        if not isinstance(content.get(key), list):
            found = _short(content[key]) if key in content else f"only {sorted(content)[:9]}"
            raise ValueError(f"{where}: found {found}; it must have a list under '{key}'; write the file again")
    return content


def entry(model: type[Model], value: Any) -> Model:
    """Check one object of a JSON file; raises RefusedError with the field, what was found there, and the rule."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"])) or "the entry"
        if first["type"] == "missing":
            raise RefusedError(f"'{path}' is missing") from None
        rule = first["msg"].replace("Input should", "must").replace("input should", "must")
        raise RefusedError(f"{path}: found {_short(first['input'])}; {rule}") from None


def by_number(entries: list[Any], model: type[Model], where: str) -> dict[int, str]:
    """Names by id of a file's `categories`; those that share a name have their id behind it.

    Raises ValueError where one is broken, or shares its id: no label could be trusted.
    """
    names: dict[int, str] = {}
    for index, value in enumerate(entries):
        place = f"{where}: categories[{index}]"
        try:
            fields = entry(model, value).model_dump()
        except RefusedError as error:
            raise ValueError(f"{place}: {error}; mend the category") from None
        if fields["id"] in names:
            raise ValueError(f"{place}: found the id {fields['id']}; another category has it; each needs its own")
        names[fields["id"]] = fields["name"]
    often = Counter(names.values())
    return {number: name if often[name] == 1 else f"{name} ({number})" for number, name in names.items()}


def read_xml(path: Path) -> ElementTree.Element:
    """Read an XML file; one with a document type is refused, for entities live there, and they can fill the memory.

    Raises RefusedError.
    """

    def refuse_type(*_: Any) -> NoReturn:
        raise RefusedError("the file declares a document type, in which entities can hide; take the DOCTYPE out")

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RefusedError(f"its annotation {path.name} is missing") from None
    except OSError as error:
        raise RefusedError(f"its annotation {path.name} cannot be read ({error.strerror})") from None
    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse_type
    try:
        guard.Parse(content, True)
        return ElementTree.fromstring(content)
    except expat.ExpatError as error:
        raise RefusedError(
            f"{path.name} line {error.lineno}: {expat.ErrorString(error.code)}; it must be XML"
        ) from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise RefusedError(f"{path.name}: {error}") from None
        raise RefusedError(f"{path.name}: {error}; it must be XML") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def box_inside(box: tuple[float, float, float, float], frame: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box (left, top, right, bottom in px) to an image's `frame`; raises RefusedError where nothing is left."""
    left, top, right, bottom = box
    if not (right > left and bottom > top):
        raise RefusedError(f"the box {_corners(box)} has no area")
    clipped = max(left, 0.0), max(top, 0.0), min(right, float(frame[1])), min(bottom, float(frame[0]))
    if not (clipped[2] > clipped[0] and clipped[3] > clipped[1]):
        raise RefusedError(f"the box {_corners(box)} lies outside the image of {frame[0]} x {frame[1]} px")
    return clipped


def _corners(box: tuple[float, ...]) -> str:
    return "[{}]".format(", ".join(f"{number:g}" for number in box))
