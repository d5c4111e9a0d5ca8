"""Replacing symbols of another library so that every one can be put back."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, MutableMapping
from typing import Any

_ABSENT: Any = object()


class Patches:
    """Symbols replaced so far, in order; `undo` restores each exactly, the last first."""

    def __init__(self) -> None:
        self._undo: list[tuple[str, Any, str, Any]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of what is replaced."""
        return tuple(name for name, *_ in self._undo)

    def once(self, replace: Callable[[], None]) -> bool:
        """Let `replace` make its replacements, all or none of them; False if there are some already."""
        if self._undo:
            return False
        try:
            replace()
        except BaseException:
            self.undo()
            raise
        return True

    def attribute(self, owner: Any, name: str, replacement: Any) -> None:
        """Set `owner.name`; what the owner only inherited is deleted again by `undo`."""
        label = owner.__name__ if isinstance(owner, types.ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        self._undo.append((f"{label}.{name}", owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, replacement)

    def everywhere(self, package: str, function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Set it in the modules of `package` that have been imported and have `function` under its own name."""
        name = function.__name__
        for module_name, module in sorted(sys.modules.items()):
            if f"{module_name}.".startswith(f"{package}.") and getattr(module, "__dict__", {}).get(name) is function:
                self.attribute(module, name, replacement)

    def instance(self, owner: object, name: str, replacement: Any, label: str) -> None:
        """Set an attribute of an object that is neither class nor module; `label` names it."""
        self._undo.append((label, owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)

    def item(self, label: str, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Set `mapping[key]`; `label` names the mapping."""
        self._undo.append((f"{label}[{key!r}]", mapping, key, mapping.get(key, _ABSENT)))
        mapping[key] = value

    def undo(self) -> None:
        """Put everything back; nothing if nothing is replaced."""
        while self._undo:
            _, owner, name, original = self._undo.pop()
            if isinstance(owner, MutableMapping):
                if original is _ABSENT:
                    owner.pop(name, None)
                else:
                    owner[name] = original
            elif original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
