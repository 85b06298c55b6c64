"""Changes of a configuration by dotted names, on the command line and in variants."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any


def parse(changes: Sequence[str]) -> dict[str, Any]:
    """["train.learning_rate=1e-4", …] as {name: value}; values are JSON, or else texts.

    Raises ValueError for a change without "=".
    """
    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r}: expected SECTION.KEY=VALUE, e.g. train.learning_rate=1e-4")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def override(config: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested dict with each {"section.key": value} put in; unknown keys are `from_config_dict`'s to find.

    Raises ValueError where a name goes through something that is no section.
    """
    changed = copy.deepcopy(dict(config))
    for name, value in (item for flat in changes for item in flat.items()):
        *sections, key = name.split(".")
        place = changed
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {section!r} is no section of the configuration")
        place[key] = value
    return changed
