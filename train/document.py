"""Config files as plain data that remembers where every key was written.

YAML is read by the 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), not by PyYAML's 1.1 habits: ``1e-4`` is a
float, only ``true`` and ``false`` are booleans, ``010`` is ten, and a repeated key is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from train.redact import redact

Key = tuple[str | int, ...]  # ("stages", 0, "epochs")
Problem = tuple[Key, str]  # where, and what is wrong there


class ConfigError(ValueError):
    """Bad configuration. ``problems`` holds every problem found, one line each, naming key and place."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class Document:
    """``data`` as read from ``name``, and the place of every key in it: ``train/recipes/demo.yaml, line 14``."""

    name: str
    data: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where ``key`` was written; for a key that is absent, where the section it belongs to was."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.name)

    def problem(self, key: Key, message: str) -> str:
        """One line of a ConfigError: ``head.sample_rate: must lie in (0, 1], got 2 (train/recipes/demo.yaml, line 14)``."""
        return f"{dotted(key)}: {message} ({self.place(key)})" if key else f"{message} ({self.name})"

    def override(self, assignment: str) -> None:
        """Apply one ``dotted.key=value`` from the command line; the value is YAML, list items are addressed by index.

        Raises: ConfigError when ``=`` is missing, the value is not YAML, or the key leads through something that is no section.
        """
        dotted_key, equals, text = assignment.partition("=")
        shown = f"{dotted_key}{equals}{redact(text, dotted_key)}"
        if not equals or not all(dotted_key.split(".")):
            raise ConfigError(f"{shown}: an override must read key=value, such as data.path=OUT (command line)")
        try:
            value = _parse_yaml(text, "command line").data
        except ConfigError as error:
            raise ConfigError(f"{shown}: {problem}" for problem in error.problems) from None
        parent: Any = self.data
        key: Key = ()
        for name in dotted_key.split("."):
            if key:
                parent = self._child(parent, key)
            if isinstance(parent, list):
                if not name.isdecimal() or int(name) >= len(parent):
                    raise ConfigError(f"{dotted_key}: {dotted(key)} has items 0 to {len(parent) - 1}, not {name!r} (command line)")
                name = int(name)
            elif not isinstance(parent, dict):
                raise ConfigError(f"{dotted_key}: {dotted(key)} is {show(redact(parent, dotted(key)))}, which has no keys (command line)")
            key = (*key, name)
        if key[-1] == "kind" and isinstance(parent, dict) and parent.get("kind") != value:
            parent.clear()  # the other keys are those of another kind
        parent[key[-1]] = value
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}
        self.places[key] = "command line"

    def _child(self, parent: Any, key: Key) -> Any:
        """The section at ``key``; made on the spot when the file left it out or empty, so that its defaults can be overridden."""
        if isinstance(parent, dict) and parent.get(key[-1]) is None:
            parent[key[-1]] = {}
            self.places[key] = "command line"
        return parent[key[-1]]


def dotted(key: Key) -> str:
    return ".".join(map(str, key))


def show(value: object) -> str:
    """A value as the file would spell it, shortened and without secrets: true, null, "text", [1, 2]."""
    text = json.dumps(redact(value), default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`` did you mean sample_rate?`` with its leading ``;``, or the empty string when nothing is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_yaml(path: Path) -> Document:
    """Read a YAML mapping. Raises: ConfigError (unreadable, not YAML, repeated key, not a mapping), with file and line."""
    document = _parse_yaml(_read_text(path), str(path))
    if document.data is None:
        document.data = {}
    return _require_mapping(document)


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> Document:
    """Read a YAML mapping on top of the one that its ``base: other.yaml`` names, a path relative to this file's folder.

    The base is read first, and may have one itself. Sections are merged key by key; a value or a list replaces the base's, and so does a
    section that says its ``kind``: the keys of one kind are not those of another. Every key keeps the place where it was written.

    Args:
        above: the files that lead here, each the base of the one before.
    Raises: ConfigError as :func:`read_yaml`; and if ``base`` is no path of a file, or leads back to a file above.
    """
    document = read_yaml(path)
    if "base" not in document.data:
        return document
    name = document.data.pop("base")
    if not isinstance(name, str):
        raise ConfigError(document.problem(("base",), f"must be the path of a recipe, relative to this file's folder, got {show(name)}"))
    base, chain = path.parent / name, (*above, path)
    if not base.is_file():
        raise ConfigError(document.problem(("base",), f"no such file: {base}"))
    if any(base.samefile(file) for file in chain):
        circle = " -> ".join(map(str, (*chain, base)))
        raise ConfigError(document.problem(("base",), f"leads back to a file that it was read for: {circle}"))
    return _merge(read_recipe(base, chain), document)


def _merge(base: Document, document: Document) -> Document:
    places = dict(base.places)

    def merged(below: Any, value: Any, key: Key) -> Any:
        if isinstance(below, dict) and isinstance(value, dict) and "kind" not in value:
            return {**below, **{name: merged(below.get(name), item, (*key, name)) for name, item in value.items()}}
        for place in [place for place in places if place[: len(key)] == key]:
            del places[place]
        return value

    data = merged(base.data, document.data, ())
    return Document(document.name, data, {**places, **document.places})


def read_json(path: Path) -> Document:
    """Read a JSON object strictly: no comments, no NaN, no repeated key. Raises: ConfigError with file and line."""
    return parse_json(_read_text(path), str(path))


def parse_json(text: str, name: str) -> Document:
    """:func:`read_json` of a text that is called ``name`` in errors."""

    def refuse_constant(constant: str) -> None:
        raise ConfigError(f"{constant} is not JSON ({name})")

    try:
        data = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg} ({name}, line {error.lineno})") from None
    # Every JSON text is YAML 1.2 once tabs are spaces, so one node walk finds the lines and the repeated keys of both formats.
    places = _parse_yaml(text.expandtabs(), name).places
    return _require_mapping(Document(name, data, places))


def write_yaml(data: dict[str, Any]) -> str:
    """The inverse of ``read_yaml``: text that reads back as ``data``, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text: byte {error.start} of {path}") from None


def _require_mapping(document: Document) -> Document:
    if not isinstance(document.data, dict):
        raise ConfigError(f"expected keys and values at the top, got {show(document.data)} ({document.name})")
    return document


class _CoreResolver(yaml.resolver.BaseResolver):
    """Which plain scalars are not strings: the YAML 1.2 core schema."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
):
    _CoreResolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _CoreResolver.yaml_implicit_resolvers


class _Dumper(yaml.SafeDumper):
    """Quotes exactly those strings that the loader would take for something else."""

    yaml_implicit_resolvers = _CoreResolver.yaml_implicit_resolvers


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # PyYAML would read 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML value. ``places`` covers mapping keys and list items; all repeated keys are reported together."""
    places: dict[Key, str] = {}
    problems: list[str] = []

    def place(node: yaml.Node) -> str:
        return name if name == "command line" else f"{name}, line {node.start_mark.line + 1}"

    def walk(node: yaml.Node, key: Key, ancestors: tuple[yaml.Node, ...]) -> Any:
        if node in ancestors:
            raise ConfigError(f"{dotted(key)}: refers to itself ({place(node)})")
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                places[(*key, index)] = place(item)
            return [walk(item, (*key, index), (*ancestors, node)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            value = loader.construct_object(node)
            if not isinstance(value, str | int | float | None):  # an explicit !!binary, !!timestamp, ...
                raise ConfigError(f"{dotted(key)}: must be text, a number, true, false or null, got {node.tag} ({place(node)})")
            return value
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            child = (*key, str(key_node.value)) if isinstance(key_node, yaml.ScalarNode) else key
            if child == key:
                raise ConfigError(f"a key must be plain text ({place(key_node)})")
            if child[-1] in mapping:
                problems.append(f"{dotted(child)}: repeated, first given at {places[child].rpartition(', ')[2]} ({place(key_node)})")
                continue
            places[child] = place(key_node)
            mapping[child[-1]] = walk(value_node, child, (*ancestors, node))
        return mapping

    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        data = None if root is None else walk(root, (), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark and name != "command line" else name
        raise ConfigError(f"not YAML: {error.problem or error.context} ({where})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())} ({name})") from None
    finally:
        loader.dispose()
    if problems:
        raise ConfigError(problems)
    return Document(name, data, places)
