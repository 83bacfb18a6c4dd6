"""The one dialect of all command lines: a frozen dataclass is read from arguments.

Each field of a command's record is an option, its docstring the help; a field without a default is
also a positional argument. `--test-data x`, `--test_data x` and `--test_data=x` are one, lists are
`1,4` or `[1,4]`, a bare `--overwrite` means true. What is wrong is a ValueError of one sentence
with a guess at what was meant. jsonargparse reads types and yaml. Without torch.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import types
from argparse import SUPPRESS, Action, ArgumentError
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

Record = TypeVar("Record")

# Names that other programs use. Those that only lack their group here, such as --lr, and misspelled
# ones are found without a table.
ELSEWHERE = {
    "wd": "optim.weight_decay",
    "learning_rate": "optim.lr",
    "bs": "batch_size",
    "workers": "loader.num_threads",
    "num_workers": "loader.num_threads",
    "arch": "encoder.name",
    "backbone": "encoder.name",
    "model": "encoder.name",
    "output_dir": "run_dir",
    "save_dir": "run_dir",
    "log_dir": "run_dir",
    "out": "run_dir",
    "data_dir": "data",
    "dataset": "data",
    "val_data": "test_data",
    "max_epochs": "epochs",
    "num_steps": "max_steps",
    "amp": "precision",
    "checkpoint": "resume",
}
VALUES_ELSEWHERE = {
    **dict.fromkeys(("16", "16-mixed", "16-true", "float16", "half"), "fp16"),
    **dict.fromkeys(("bf16-mixed", "bf16-true", "bfloat16"), "bf16"),
    **dict.fromkeys(("32", "32-true", "float32"), "fp32"),
    **dict.fromkeys(("gpu", "cuda:0"), "cuda"),
}
BOOLEANS = {"true": "true", "yes": "true", "false": "false", "no": "false"}


def read(record: type[Record], argv: Iterable[str], command: str) -> Record:
    """Reads a command line.

    Args:
        record: A frozen dataclass of plain fields.
        argv: The arguments after the command's name.
        command: Name of the command.

    Raises:
        ValueError: For a command line that is wrong.
        SystemExit: 0, for --help.
    """
    return record(**Parser(record, command).read(argv))


class _Help(DefaultHelpFormatter):
    """jsonargparse's help, without what the choices say already."""

    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        if text is None or "Literal[" in text:
            return None
        return "Path" if "Path'" in text else text


class Parser:
    """Reads the options of a record.

    Args:
        record: A dataclass, which may have nested ones.
        command: Name of the command that has these options.
        config: Help of the option --config, which names a yaml file; empty for no such option.
        defaults: Whether options that are not given get the record's defaults; else they are absent
            from what is read, and `--help` shows none.
        skip: Fields that are not options.
    """

    def __init__(
        self,
        record: type[Any],
        command: str,
        config: str = "",
        defaults: bool = True,
        skip: Sequence[str] = (),
    ) -> None:
        self.defaults, self.has_config = defaults, bool(config)
        self.types = dict(option_types(record)) | ({"config": str} if config else {})
        for name in skip:
            del self.types[name]
        self.bare = {f.name: f.metadata["bare"] for f in fields(record) if "bare" in f.metadata}
        self.positionals = [
            f.name for f in fields(record) if f.default is f.default_factory is MISSING
        ]
        names = [
            *map(str.upper, self.positionals),
            *(["[--option VALUE ...]"] if self.types else []),
        ]
        self.usage = " ".join(["bagssl", command, *names])
        self.parser = ArgumentParser(
            prog=f"bagssl {command}",
            usage=self.usage,
            description=(record.__doc__ or "").split("Args:")[0],
            exit_on_error=False,
            formatter_class=_Help,
        )
        if config:
            self.parser.add_argument("--config", action="config", help=config)
        self.parser.add_class_arguments(record, as_group=False, skip=set(skip))
        if not defaults:
            for action in self.parser._actions:
                action.default = SUPPRESS

    def read(self, argv: Iterable[str]) -> dict[str, Any]:
        """The values of a command line by name; nested records are instances.

        Raises:
            ValueError: Naming the option, what came and what is expected.
            SystemExit: 0, for --help and --print_config.
        """
        arguments = self.normalize(argv)
        try:
            values = self.parser.parse_args(arguments, defaults=self.defaults)
            read = vars(self.parser.instantiate(values))
        except ArgumentError as error:
            raise ValueError(self.explain(str(error), arguments)) from None
        return {name: v for name, v in read.items() if not (self.has_config and name == "config")}

    def normalize(self, argv: Iterable[str]) -> list[str]:
        """Every argument as `--name=value`, the name as the record has it.

        Raises:
            ValueError: For unknown names and missing values.
        """
        left, missing = deque(argv), list(self.positionals)
        found: list[str] = []
        while left:
            argument = left.popleft()
            if argument in ("-h", "--help"):
                return ["--help"]
            if not argument.startswith("--"):
                if not missing:
                    raise ValueError(f"unexpected argument {argument}; {self.usage}")
                argument = f"--{missing[0]}={argument}"
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name == "print_config" and self.has_config:
                found.append(f"--{name}{equals}{value}")
                continue
            if not equals:
                value = self._take_value(name, left)
            self.check_name(name, value)
            if name in missing:
                missing.remove(name)
            found.append(f"--{name}={self._spell(name, value)}")
        if missing:
            raise ValueError(f"{missing[0].upper()} is missing; {self.usage}")
        return found

    def _take_value(self, name: str, left: deque[str]) -> str:
        """The value that follows a name, or what the bare name means."""
        boolean = self.types.get(name) is bool
        if left and not left[0].startswith("--") and (not boolean or left[0].lower() in BOOLEANS):
            return left.popleft()
        if boolean or name in self.bare or self._is_free(name):
            return str(self.bare.get(name, "true"))
        if name in self.types:
            raise ValueError(f"--{name} needs a value; expected {describe(self.types[name])}")
        return ""

    def _spell(self, name: str, value: str) -> str:
        """A value as jsonargparse reads it: `1,4` as a list, `yes` as true."""
        kind = self.types.get(name)
        numbers = self._is_free(name) and re.fullmatch(r"[-+.\de]+(,[-+.\de]+)+", value)
        if (numbers or get_origin(kind) is tuple) and not value.startswith("["):
            return f"[{value}]"
        return BOOLEANS.get(value.lower(), value) if _takes_booleans(kind) else value

    def _is_free(self, name: str) -> bool:
        """Whether a name is an entry of a dictionary, such as `loss.options.eps`."""
        parents = (option for option in self.types if name.startswith(f"{option}."))
        return any(get_origin(self.types[parent]) is dict for parent in parents)

    def check_name(self, name: str, value: str = "") -> None:
        """Refuses what is not an option.

        Raises:
            ValueError: With a guess at what was meant.
        """
        if name in self.types or self._is_free(name):
            return
        text = f"--{name} {value}".strip()
        members = [option for option in self.types if option.startswith(f"{name}.")]
        if members:
            if value.startswith("{") or value == "null" or os.path.isfile(value):
                return
            if f"{name}.name" in members and value:
                raise ValueError(
                    f"{text}: {name} is a group of options; did you mean --{name}.name {value}?"
                )
            raise ValueError(f"{text}: a group of options: --{', --'.join(members)}")
        if name in ("gpus", "devices", "nproc_per_node") and "resume" in self.types:
            raise ValueError(
                f"{text}: every GPU takes a process; did you mean torchrun --nproc_per_node N -m "
                "bagssl_fast.train?"
            )
        near = self.guess(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the options"
        raise ValueError(f"unknown option --{name}; {hint}")

    def guess(self, name: str) -> list[str]:
        """What an unknown name may have meant, the likeliest options."""
        name = ELSEWHERE.get(name, name)
        last = {option: option.rpartition(".")[2] for option in self.types}
        word = name.rpartition(".")[2]
        near = [name] if name in self.types else [o for o, end in last.items() if end == word]
        if not near and name.startswith("no_") and _takes_booleans(self.types.get(name[3:])):
            return [f"--{name[3:]} false"]
        if not near:
            near = difflib.get_close_matches(name, self.types, 1, 0.7)
        if not near and len(word) > 2:
            near = [option for option, end in last.items() if end.startswith(word)]
        if not near:
            words = difflib.get_close_matches(word, last.values(), 1, 0.7)
            near = [option for option, end in last.items() if end in words]
        return [f"--{option}" for option in near[:3]]

    def explain(self, message: str, arguments: Sequence[str]) -> str:
        """jsonargparse's message as a sentence about the option."""
        given = dict(argument[2:].split("=", 1) for argument in arguments if "=" in argument)
        # The last key is the innermost; inside of an optional record it lacks the record's name.
        keys = re.findall(r'Parser key "([\w.]+)"', message)[-1:]
        ends = [name for name in given for key in keys if f".{name}".endswith(f".{key}")]
        name = next((name for name in (*ends, *keys) if name in self.types), "")
        if not name:
            return message
        got = re.search(r"Got value: (.*)", message)
        value = given.get(name, got[1] if got else "")
        kind = self.types[name]
        if get_origin(kind) is tuple:
            value = value.strip("[]")
        return f"--{name} {value}: expected {describe(kind)}{_hint(name, value, kind)}"


def check_options(
    owner: str, names: Iterable[str], function: Callable[..., Any], hidden: Sequence[str] = ()
) -> None:
    """Refuses keyword options that a function does not have.

    Args:
        owner: What the options belong to, such as "loss vicreg".
        names: The options given.
        function: What takes them.
        hidden: Parameters of it that are not for the user.

    Raises:
        ValueError: With a guess and the options that there are.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in hidden]
    for name in names:
        if name not in parameters:
            near = difflib.get_close_matches(name, known, 1)
            guess = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{owner} has no option {name}{guess}; it has {', '.join(known)}")


def option_types(record: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and type of every field of a record, the nested ones' in place of theirs."""
    hints = get_type_hints(record)
    for f in fields(record):
        kind = hints[f.name]
        nested = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        if nested is not None:
            yield from option_types(nested, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + f.name, kind


def _takes_booleans(kind: Any) -> bool:
    return kind is bool or bool in get_args(kind)


def describe(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        *others, last = map(str, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments if part is not type(None))
    if origin is tuple:
        count = "" if Ellipsis in arguments else f"{len(arguments)} "
        whole = arguments[0] is int
        return f"{count}{'whole numbers, such as 1,4' if whole else 'numbers, such as 0.5,1'}"
    if origin is dict:
        return "options by name, such as {name: value}"
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(kind, "text")


def _hint(name: str, value: str, kind: Any) -> str:
    """What a value of another type may have meant."""
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    if name == "device" and re.fullmatch(r"cuda:\d+", value):
        return (
            f"; did you mean CUDA_VISIBLE_DEVICES={value[5:]} in front of the command and "
            "--device cuda?"
        )
    meant = VALUES_ELSEWHERE.get(value)
    near = [meant] if meant in choices else difflib.get_close_matches(value, choices, 1)
    return f"; did you mean --{name} {near[0]}?" if near else ""
