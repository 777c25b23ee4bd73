"""Typed reading of the JSON files of a model directory: config.json, generation_config.json and their like.

Every bad value ends in one StartupError line that names the file and the field. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from engine.config import StartupError

# Sizes above this are typing errors; it also keeps products of two sizes inside 64 bits.
MAX_SIZE = 2**31 - 1

_REQUIRED = object()


class Fields:
    """Typed reading of one JSON object; a field that is null counts as absent, but for the optional ones.

    defaults: what the model's class has for a field that is absent. In an optional field null means none; in any
    other the default counts then, too. assumed: the fields that were read from the defaults so far.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], prefix: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.assumed: set[str] = set()
        self._values = values
        self._prefix = prefix
        self._defaults = defaults or {}

    def over(self, defaults: Mapping[str, Any]) -> Fields:
        """The same object, read over a class's defaults."""
        return Fields(self.path, self._values, self._prefix, defaults)

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Read a JSON file that holds an object. Raises StartupError."""
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise StartupError(f"{path}: no such file; is this a model directory?") from None
        except OSError as error:
            raise StartupError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise StartupError(f"{path}: is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise StartupError(f"{path}: must hold a JSON object, not {show(values)}")
        return cls(path, values)

    def over_values(self, below: Fields) -> Fields:
        """The same object with what `below` has beside it."""
        return Fields(self.path, {**below._values, **self._values}, self._prefix)

    def with_values(self, values: Mapping[str, Any]) -> Fields:
        """The same object with these fields, too."""
        return Fields(self.path, {**self._values, **values}, self._prefix, self._defaults)

    def differing(self, other: Fields) -> list[str]:
        """The fields that the two have not in common."""
        names = [*self._values, *(name for name in other._values if name not in self._values)]
        return [name for name in names if self._values.get(name) != other._values.get(name)]

    def taking(self, name: str, other: Fields) -> Fields:
        """The same object with this one field as `other` has it, or without it."""
        values = {key: value for key, value in self._values.items() if key != name}
        if other.mentions(name):
            values[name] = other.raw(name)
        return Fields(self.path, values, self._prefix, self._defaults)

    def only(self, names: Iterable[str]) -> Fields:
        """The same object with no other fields than these."""
        return Fields(self.path, {name: self._values[name] for name in names if name in self._values}, self._prefix)

    def empty(self, name: str, values: Mapping[str, Any] | None = None) -> Fields:
        """An object without fields, or with `values`, in place of the one that is not there under `name`."""
        return Fields(self.path, values or {}, f"{self._prefix}{name}.")

    @property
    def is_empty(self) -> bool:
        return not self._values

    def declares(self, name: str) -> bool:
        """Whether the model's class has a default for it."""
        return name in self._defaults

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raise the one line that a user gets: file, field, problem."""
        raise StartupError(f"{self.path}: {self._prefix}{name} {problem}")

    def has(self, name: str) -> bool:
        """Whether there is a value, be it the class's default."""
        return self._values.get(name, self._defaults.get(name)) is not None

    def has_any(self, name: str) -> bool:
        """`has`, and a null that stands for the class's default."""
        return self.has(name) or self._defaults.get(name) is not None

    def names(self) -> set[str]:
        """Of the fields that are there."""
        return set(self._values)

    def names_in_order(self) -> list[str]:
        """The same, as the file has them."""
        return list(self._values)

    @property
    def prefix(self) -> str:
        """What stands before the names of its fields in errors."""
        return self._prefix

    def as_json(self) -> str:
        """The object, in the order of the file."""
        return json.dumps(dict(self._values))

    def mentions(self, name: str) -> bool:
        """Whether the field is there at all, be it null."""
        return name in self._values

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def nested(self, name: str) -> Fields | None:
        """The object under `name`, or None where there is none."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, f"must be an object, not {show(value)}")
        return Fields(self.path, value, f"{self._prefix}{name}.")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if self._defaults.get(name) is not None:
            self.assumed.add(name)
            return self._defaults[name]
        if default is _REQUIRED:
            self.fail(name, "is missing")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            self.fail(name, f"must be an integer from {minimum} to {maximum}, not {show(value)}")
        return value

    def optional_integer(self, name: str, *, minimum: int = 1) -> int | None:
        """None where the file says null, or neither it nor the class says anything."""
        return self.integer(name, minimum=minimum) if self.has(name) else None

    def number(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        above: float | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float:
        value = self._get(name, default)
        wanted = "a finite number"
        wanted += f" above {above:g}" if above is not None else ""
        wanted += f" of at least {minimum:g}" if minimum is not None else ""
        wanted += f" and at most {maximum:g}" if maximum is not None else ""
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not _is_finite(value)
            or (above is not None and value <= above)
            or (minimum is not None and value < minimum)
            or (maximum is not None and value > maximum)
        ):
            self.fail(name, f"must be {wanted}, not {show(value)}")
        return float(value)

    def optional_number(
        self,
        name: str,
        *,
        above: float | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float | None:
        return self.number(name, above=above, minimum=minimum, maximum=maximum) if self.has(name) else None

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, not {show(value)}")
        return value

    def nullable_flag(self, name: str, default: bool = False) -> bool:
        """A flag of which null means false, and absence the default."""
        if self.mentions(name) and self.raw(name) is None:
            return False
        return self.flag(name, default)

    def choice(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            self.fail(name, f"must be one of {', '.join(choices)}, not {show(value)}")
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers above zero."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list) or len(value) != length:
            count = f"of {len(value)}" if isinstance(value, list) else show(value)
            self.fail(name, f"must be a list of {length} numbers, not {count}")
        for item in value:
            if not isinstance(item, int | float) or isinstance(item, bool) or not _is_finite(item) or item <= 0:
                self.fail(name, f"must hold numbers above 0, not {show(item)}")
        return tuple(float(item) for item in value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty where it is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            self.fail(name, f"must be a list of integers, not {show(value)}")
        return tuple(value)

    def words(self, name: str) -> tuple[str, ...]:
        """A list of words, empty where it is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            self.fail(name, f"must be a list of words, not {show(value)}")
        return tuple(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self._values.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        for item in items:
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= MAX_SIZE:
                self.fail(name, f"must be a token id or a list of token ids, not {show(item)}")
        return tuple(items)

    def default_token_ids(self, name: str) -> tuple[int, ...]:
        """Those of the class."""
        return Fields(self.path, self._defaults, self._prefix).token_ids(name)

    def layer_types(
        self, num_layers: int, kinds: tuple[str, ...] = ("full_attention", "sliding_attention")
    ) -> tuple[str, ...] | None:
        """`layer_types`: one of `kinds` for every layer, or None where it is absent."""
        value = self._values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != num_layers:
            count = f"{len(value)} entries" if isinstance(value, list) else show(value)
            self.fail("layer_types", f"must be a list of num_hidden_layers = {num_layers} entries, not {count}")
        for item in value:
            if item not in kinds:
                self.fail("layer_types", f"must hold {' or '.join(kinds)}, not {show(item)}")
        return tuple(value)


def _is_finite(value: float) -> bool:
    """Whether a number of a JSON file, which may be an integer of any length, is a finite float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def show(value: Any) -> str:
    """A value of a JSON file, short enough for one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
