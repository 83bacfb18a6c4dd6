"""Replace attributes of other people's modules, classes and instances, and restore them."""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

logger = logging.getLogger("bagssl_fast.integrations")
_ABSENT = object()


class _Change(NamedTuple):
    piece: str
    owner: Any  # a module, a class or an instance
    name: str
    new: Any
    old: Any  # _ABSENT where the owner inherited the attribute


class Handle:
    """What `apply_to_*` replaced; `revert()` or the end of a `with` block restores it.

    Attributes:
        host: Whose code was changed.
        replaced: The pieces, by name.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.replaced: list[str] = []
        self._planned: list[_Change] = []
        self._changes: list[_Change] = []
        self._functions: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = []

    def plan(self, piece: str, owner: Any, name: str, new: Any) -> None:
        """Will set `owner.name` to `new` on `commit`."""
        self._planned.append(_Change(piece, owner, name, new, vars(owner).get(name, _ABSENT)))

    def plan_method(self, piece: str, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Will give a class, or one instance, another method."""
        new = function if isinstance(owner, type) else MethodType(function, owner)
        self.plan(piece, owner, name, new)

    def plan_function(self, piece: str, module: Any, name: str, function: Any) -> None:
        """Will replace `module.name` there and in every module that has imported it by name."""
        old, new = getattr(module, name), with_globals(function, {})  # a copy
        self.plan(piece, module, name, new)
        self._functions.append((name, old, new))

    def plans(self, piece: str) -> bool:
        """Whether a piece is planned."""
        return any(change.piece == piece for change in self._planned)

    def commit(self, note: str = "") -> "Handle":
        """Makes all planned replacements, or none of them, and logs one line.

        Raises:
            ValueError: Nothing was planned, or something is replaced already.
        """
        if not self._planned:
            raise ValueError(
                f"{self.host}: nothing to replace: every piece is switched off, or the model has "
                "none of those that are on"
            )
        for change in self._planned:
            if getattr(change.old, "__module__", "").startswith("bagssl_fast."):
                raise ValueError(
                    f"{self.host}: {change.piece} has already been replaced by bagssl_fast; call "
                    "revert() of the earlier handle first"
                )
        for change in self._planned:
            setattr(change.owner, change.name, change.new)
        self._changes, self._planned = self._planned, []
        for name, old, new in self._functions:
            _swap_everywhere(name, old, new)
        self.replaced = list(dict.fromkeys(change.piece for change in self._changes))
        logger.info("%s: replaced %s%s", self.host, ", ".join(self.replaced), note)
        return self

    def revert(self) -> None:
        """Restores everything, newest first; a second call does nothing.

        Raises:
            RuntimeError: Other code has replaced a piece since; undo that first.
        """
        for change in self._changes:
            if _bare(vars(change.owner).get(change.name)) is not _bare(change.new):
                raise RuntimeError(
                    f"{self.host}: {change.piece} was replaced again by other code; undo that "
                    "first, then call revert()"
                )
        for change in reversed(self._changes):
            if change.old is _ABSENT:
                delattr(change.owner, change.name)
            else:
                setattr(change.owner, change.name, change.old)
        for name, old, new in self._functions:
            _swap_everywhere(name, new, old)
        if self._changes:
            logger.info("%s: restored %s", self.host, ", ".join(self.replaced))
        self._changes, self._functions, self.replaced = [], [], []

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()

    def __repr__(self) -> str:
        return f"<{self.host}: {', '.join(self.replaced) or 'nothing replaced'}>"


def _swap_everywhere(name: str, old: Any, new: Any) -> None:
    """Every module that did `from host import f` has its own f: all of them are changed."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)


def with_globals(function: Any, names: dict[str, Any]) -> FunctionType:
    """A copy of a function whose global names are those of its module, and `names` over them."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    copy.__module__ = "bagssl_fast.integrations"
    return copy


def import_host(name: str, host: str, how_to_fix: str) -> ModuleType:
    """The host's module.

    Raises:
        ImportError: It cannot be imported; names the module, the reason and the fix.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{host}: cannot import {name} ({error}); {how_to_fix}") from error


def find_class(host: str, module: Any, name: str) -> type:
    """The host's class.

    Raises:
        ValueError: The module has none; names what was expected and the fix.
    """
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ValueError(
            f"{host}: {_label(module)} has no class {name}; supported are the versions in "
            "docs/swap-in.md; switch this piece off by its argument"
        )
    return found


def owners(theirs: type, model: nn.Module | None) -> list[Any]:
    """What to change: the host's class, or its instances in `model`."""
    if model is None:
        return [theirs]
    return [module for module in model.modules() if isinstance(module, theirs)]


def check_signature(host: str, owner: Any, name: str, needed: tuple[str, ...]) -> None:
    """Refuses a host whose function does not take the arguments that were replaced.

    Raises:
        ValueError: Names the arguments found, those supported, and the fix.
    """
    function = getattr(owner, name, None)
    code = getattr(_bare(function), "__code__", None)
    if code is None:
        raise ValueError(
            f"{host}: {_label(owner)} has no function {name}; supported are the versions in "
            "docs/swap-in.md; switch this piece off by its argument"
        )
    came = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if came != needed:
        raise ValueError(
            f"{host}: {_label(owner)}.{name} has the arguments ({', '.join(came)}), expected "
            f"({', '.join(needed)}), see docs/swap-in.md for versions; switch this piece off by "
            "its argument"
        )


def _bare(function: Any) -> Any:
    """Without the wrapper that torch.optim.Optimizer puts around `step`."""
    return inspect.unwrap(function) if callable(function) else function


def _label(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))
