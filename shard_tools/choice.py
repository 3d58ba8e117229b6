"""What a config chooses by name: one of ours, or one that an outside package adds by an entry point.

Laws: nothing is imported before it is chosen; a package cannot take a name of ours; what comes out has every member of
the seam's Protocol. A factory's keyword arguments are the options it takes, so its signature is all it has to say.
Knows nothing of the seams themselves: each has its table beside it (store/stores.py, index/indexes.py, and the
engines of serve_app).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError, LlmdError

Plain = str | int | float | bool | None
MAX_OPTIONS = 32  # of one choice; the largest of ours has one
_MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """A name out of a table, and options as plain values, sorted by key."""

    kind: str
    options: tuple[tuple[str, Plain], ...] = ()

    @classmethod
    def of(cls, kind: str, **options: Plain) -> Choice:
        """The choice of this name with these options."""
        return cls(kind, tuple(sorted(options.items())))

    @classmethod
    def parse(cls, value: object) -> Choice:
        """Read `{kind: name, option: value, ...}`. Raises InputError."""
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise InputError("expected `{kind: name}`, with the options of that kind beside it")
        if len(value) > MAX_OPTIONS + 1:
            raise InputError(f"{len(value) - 1} options; nothing takes more than {MAX_OPTIONS}")
        options = {}
        for key, item in value.items():
            if not isinstance(key, str) or not (item is None or isinstance(item, str | int | float | bool)):
                raise InputError(f"option {str(key)[:100]!r} is no text, number, true, false or null")
            if len(key) > _MAX_TEXT or (isinstance(item, str) and len(item) > _MAX_TEXT):
                raise InputError(f"option {key[:100]!r} is longer than {_MAX_TEXT} characters")
            options[key] = item
        kind = str(options.pop("kind"))
        return cls.of(kind, **options)


class Table:
    """The names of one seam and what makes its implementations."""

    def __init__(self, seam: str, group: str, protocol: type, built_in: Mapping[str, str]) -> None:
        """seam: what messages call it. group: of entry points. built_in: name -> "module:factory"."""
        self._seam, self._group, self._protocol = seam, group, protocol
        self._built_in = {name: EntryPoint(name, place, group) for name, place in built_in.items()}

    def names(self) -> tuple[str, ...]:
        """Every name that can be chosen, sorted; nothing is imported."""
        return tuple(sorted(self._built_in.keys() | {e.name for e in entry_points(group=self._group)}))

    def outside_names(self) -> tuple[str, ...]:
        """Those that installed packages add."""
        return tuple(name for name in self.names() if name not in self._built_in)

    def check(self, kind: str) -> None:
        """Returns if the name can be chosen. Raises InputError with the nearest known one."""
        self._entry(kind)

    def make(self, choice: Choice, *given: Any) -> Any:
        """What the chosen factory makes of `given` and the choice's options; an implementation of the seam.

        Raises InputError for an unknown name, a package that does not load or does not keep to the seam, and options
        that the factory does not take; and what the factory raises of our own errors.
        """
        entry, options = self._entry(choice.kind), dict(choice.options)
        where = self._describe(entry)
        try:
            factory = entry.load()
        except Exception as e:  # anything may go wrong while a stranger's module is imported
            raise InputError(f"{where} cannot be loaded: {type(e).__name__}: {e}") from e
        if not callable(factory):
            raise InputError(f"{where} is a {type(factory).__name__}, where a function that makes one is expected")
        _check_options(factory, given, options, where)
        try:
            made = factory(*given, **options)
        except LlmdError:
            raise
        except Exception as e:
            if entry.name in self._built_in:  # a mistake of our own stays what it is
                raise
            raise InputError(f"{where} cannot be made: {type(e).__name__}: {e}") from e
        missing = _missing(made, self._protocol)
        if missing:
            raise InputError(f"{where} made a {type(made).__name__}, which has no {', '.join(missing)}")
        return made

    def _entry(self, kind: str) -> EntryPoint:
        if kind in self._built_in:
            return self._built_in[kind]
        found = list({e.value: e for e in entry_points(group=self._group, name=kind)}.values())
        if not found:
            raise InputError(
                f"no {self._seam} is called {kind[:100]!r}{nearest(kind, self.names())}. "
                f"A package adds one by an entry point in the group {self._group}"
            )
        if len(found) > 1:
            packages = sorted(e.dist.name if e.dist else e.value for e in found)
            raise InputError(f"{self._seam} {kind!r} is added by {' and '.join(packages)}: uninstall all but one")
        return found[0]

    def _describe(self, entry: EntryPoint) -> str:
        package = f" of the package {entry.dist.name}" if entry.dist else ""
        return f"{self._seam} {entry.name!r} ({entry.value}{package})"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to end a message with: the known word that looks most like this one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


def absolute_path(text: object) -> Path:
    """The path with `~` expanded. Raises InputError for a relative one: it would mean another folder on each node."""
    if not isinstance(text, str):
        raise InputError(f"expected a path, found {str(text)[:100]!r}")
    try:
        expanded = Path(text).expanduser()
    except RuntimeError as e:
        raise InputError(f"{text[:200]!r} begins with the folder of a user who has none on this machine") from e
    if not expanded.is_absolute():
        raise InputError(f"{text[:200]!r} is relative; write an absolute path or one that starts with ~/")
    return expanded


def _check_options(factory: Any, given: tuple[Any, ...], options: dict[str, Plain], where: str) -> None:
    """Returns if the factory can be called so. Raises InputError saying which option is unknown or missing."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as e:
        raise InputError(f"{where} does not say which options it takes") from e
    own = list(signature.parameters.values())[len(given) :]
    if not any(p.kind is p.VAR_KEYWORD for p in own):
        known = [p.name for p in own if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for key in options:
            if key not in known:
                hint = nearest(key, known) if known else "; it takes none"
                raise InputError(f"{where} has no option {key[:100]!r}{hint}")
        for p in own:
            if p.name in known and p.default is p.empty and p.name not in options:
                raise InputError(f"{where} needs the option {p.name!r}")
    try:
        signature.bind(*given, **options)
    except TypeError as e:
        raise InputError(f"{where} does not take what this seam gives: {e}") from e


def _missing(made: object, protocol: type) -> list[str]:
    """Members of the Protocol that an object lacks, or has as a value where a method is expected."""
    out = []
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        found = getattr(made, name, None)
        if found is None or (inspect.isfunction(member) and not callable(found)):
            out.append(name)
    return sorted(out)
