"""Read YAML strictly and say what is wrong with it: file, line or dotted key, found, allowed, and the nearest key."""

from __future__ import annotations

__all__ = ["describe_problems", "kind_of", "read_settings", "read_yaml", "with_overrides"]

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fedbio.errors import SettingsError
from fedbio.settings_parts import TEXT_FORMS


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader that also refuses a key written twice, which YAML would let win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is there twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text; people write learning rates like that and mean a number
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises
    ------
    SettingsError
        If the file is missing, not YAML, not a mapping, or names a key twice; with file and line.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_StrictLoader)  # noqa: S506 (is a SafeLoader)
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: there is no such settings file; check the path") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a YAML text file; give the path of a settings file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError(f"{where}: not valid YAML: {error.problem}; check the indentation and quotes") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected keys and values, found {_shown(content)}")
    return content


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the keys and values in a YAML, JSON or TOML file, told apart by the file's ending; YAML by default.

    Raises
    ------
    SettingsError
        As `read_yaml`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".toml"):
        return read_yaml(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_no_key_twice) if suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: there is no such settings file; check the path") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; check commas and quotes") from error
    except tomllib.TOMLDecodeError as error:
        # its message has the line
        raise SettingsError(f"{path}: not valid TOML: {error}; check the quotes") from error
    except (IsADirectoryError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not a settings file: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected keys and values, found {_shown(content)}")
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"key {twice[0]!r} is there twice")
    return dict(pairs)


def kind_of(content: Mapping[str, Any]) -> str | None:
    """Return which of `fedbio.settings.FILES` has these keys; None for the settings of a party, which name it.

    Examples
    --------
    >>> kind_of({"jobs": []}), kind_of({"federation": "study", "sites": []}), kind_of({"party": "site", "kit": "kit"})
    ('jobs', 'federation', None)
    """
    if "role" in content:
        return "kit"
    if isinstance(content.get("jobs"), list):
        return "jobs"
    # settings of a run have a section of this name, and a number of sites
    is_federation = isinstance(content.get("federation"), str) or isinstance(content.get("sites"), list)
    return "federation" if is_federation else None


def with_overrides(content: dict[str, Any], overrides: list[str], path: str | Path) -> dict[str, Any]:
    """Return `content` with each ``dotted.key=value`` of `overrides` put in; values are YAML."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"--set {override}: expected key=value, for example training.rounds=10")
        *parents, last = key.strip().split(".")
        branch = content
        for parent in parents:
            nested = branch.setdefault(parent, {})
            if not isinstance(nested, dict):
                raise SettingsError(f"{path}: {key}: {parent} holds {_shown(nested)}, not further keys")
            branch = nested
        try:
            branch[last] = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (is a SafeLoader)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {override}: the value is not valid YAML; put it in quotes") from error
    return content


def describe_problems(
    path: str | Path, error: pydantic.ValidationError, model: type[pydantic.BaseModel]
) -> SettingsError:
    """Turn pydantic's errors into one `SettingsError` with a line for each problem."""
    lines = [_describe(problem, model) for problem in error.errors(include_url=False)]
    return SettingsError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines)))


def _describe(problem: Any, model: type[pydantic.BaseModel]) -> str:
    location = [part for part in problem["loc"] if not (isinstance(part, str) and part in _UNION_TAGS)]
    key = ".".join(str(part) for part in location)
    found, context, kind = problem["input"], problem.get("ctx", {}), problem["type"]
    if kind == "extra_forbidden":
        known = _keys_at(model, list(problem["loc"][:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: missing; add this key"
    if kind == "union_tag_not_found":
        return f"{key}: missing key {context['discriminator']}"
    if kind == "union_tag_invalid":
        tag, allowed = context["discriminator"], context["expected_tags"]
        near = difflib.get_close_matches(str(context["tag"]), re.findall(r"'([^']*)'", allowed), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}: expected {tag} to be one of {allowed}, found {context['tag']!r}{hint}"
    if kind == "string_pattern_mismatch":
        return f"{key}: expected {TEXT_FORMS[context['pattern']]}, found {_shown(found)}"
    expected = {
        "greater_than_equal": "a number >= {ge}",
        "greater_than": "a number > {gt}",
        "less_than_equal": "a number <= {le}",
        "less_than": "a number < {lt}",
        "literal_error": "{expected}",
        "too_short": "at least {min_length} entries",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "int_type": "an integer",
        "int_parsing": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "float_parsing": "a number",
        "string_type": "text",
        "list_type": "a list",
        "model_type": "further keys",
        "model_attributes_type": "further keys",
        "dict_type": "further keys",
    }.get(kind)
    if expected is None:
        message = str(context["error"]) if "error" in context else problem["msg"]
        return f"{key}: {message}" if key else message
    return f"{key}: expected {expected.format(**context)}, found {_shown(found)}"


_UNION_TAGS = frozenset(
    {"embed", "classify", "projection", "fedavg", "cyclic", "evaluation", "swarm", "split", "statistics", "custom"}
)


def _keys_at(model: Any, location: list[str | int]) -> list[str]:
    """Return the keys that `model` knows at a location of nested models, lists and unions."""
    candidates = _models_in(model)
    for part in location:
        if isinstance(part, int):
            continue
        nested = [each.model_fields[part].annotation for each in candidates if part in each.model_fields]
        if nested:
            candidates = [found for annotation in nested for found in _models_in(annotation)]
        else:
            # a union's tag: keep the member that carries it
            candidates = [each for each in candidates if part in str(each.model_fields.get("workflow"))] or candidates
    return sorted({name for each in candidates for name in each.model_fields})


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _models_in(argument)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
