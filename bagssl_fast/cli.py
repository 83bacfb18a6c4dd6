"""From a command line to a `Config` and back: recipes by name or path, flags, yaml, identity."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from bagssl_fast.config import Config, resolve

PACKAGE = Path(__file__).resolve().parent
# A checkout keeps the recipes in configs/; an installed wheel carries them as bagssl_fast/recipes/.
RECIPE_FOLDERS = (PACKAGE.parent / "configs", PACKAGE / "recipes")

# What may differ between a run and its resumption: paths, reporting and speed, never the result.
FREE_KEYS = re.compile(
    r"data|test_data|name|run_dir|resume|overwrite|device|threads|log_every|checkpoint_every|"
    r"keep_checkpoints|tensorboard|compile|cuda_graph|impl|"
    r"loader\.(num_threads|batches_ahead|views)|eval\..*"
)


class _Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line, and a guess at what was meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = list(_option_names(Config()))
        message = re.sub(
            r"Group '([\w.]+)' does not accept option '", r"unknown option '\1.", message
        )
        found = re.search(r"(?:unrecognized arguments: --|[Oo]ption ')([\w.]+)", message)
        close = difflib.get_close_matches(found[1], known, 1, 0.7) if found else []
        message += "".join(f"; did you mean {name}?" for name in close)
        sys.stderr.write(f"error: {message}\n(--help lists every option with its meaning)\n")
        raise SystemExit(2)


def make_parser(prog: str = "python -m bagssl_fast.train") -> ArgumentParser:
    """The parser of the trainer's command line: every field of `Config` is an option."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--config RECIPE] [--data PATH] [--option VALUE ...]",
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"A yaml file, or the bare name of a recipe: {', '.join(recipe_names())}.",
    )
    parser.add_class_arguments(Config)
    return parser


def parse(argv: Sequence[str]) -> Config:
    """Reads a command line: defaults < `--config` < flags; no `--config`, no `--data`: the demo.

    Args:
        argv: The arguments after the program's name. `--test-data` and `--test_data` are one.

    Raises:
        SystemExit: 2 for what is wrong, with one line that says so; 0 for --help and
            --print_config.
    """
    arguments = [_normalize(argument) for argument in argv]
    if not any(a.split("=")[0] in ("--config", "--data") for a in arguments):
        arguments = ["--config", "demo", *arguments]
    recipe = ""
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            arguments[i + 1] = recipe = str(find_recipe(arguments[i + 1]))
        elif argument.startswith("--config="):
            recipe = str(find_recipe(argument.partition("=")[2]))
            arguments[i] = f"--config={recipe}"
    parser = make_parser()
    values = parser.instantiate(parser.parse_args(arguments))
    config = Config(**{f.name: values[f.name] for f in fields(Config)})
    if not config.name:
        config = replace(config, name=Path(recipe).stem if recipe else config.encoder.name)
    return resolve(config)


def _normalize(argument: str) -> str:
    """`--test-data=x` -> `--test_data=x`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def recipe_names() -> list[str]:
    """The bare names of the recipes that come with the package."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.yaml")})


def find_recipe(name: str) -> Path:
    """The yaml file that `name` means: a path, `configs/x.yaml`, or the bare name of a recipe.

    Raises:
        SystemExit: 2 if there is no such file, naming the recipes that exist.
    """
    if Path(name).is_file():
        return Path(name)
    needed = Path(name)
    if needed.parent in (Path("."), Path("configs")) and needed.suffix in ("", ".yaml"):
        for folder in RECIPE_FOLDERS:
            path = folder / f"{needed.stem}.yaml"
            if path.is_file():
                return path
    sys.stderr.write(
        f"error: --config {name}: no such file or recipe; recipes: {', '.join(recipe_names())}\n"
    )
    raise SystemExit(2)


def _option_names(config: Any, prefix: str = "") -> Iterator[str]:
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from _option_names(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def to_yaml(config: Config) -> str:
    """The resolved configuration as yaml that `--config` reads back."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, default_flow_style=None)


def load(path: str | os.PathLike[str]) -> Config:
    """Reads a configuration that `to_yaml` wrote (any recipe will do)."""
    parser = make_parser()
    values = parser.instantiate(parser.parse_args(["--config", os.fspath(path)]))
    return resolve(Config(**{f.name: values[f.name] for f in fields(Config)}))


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides the trained weights, flat: dotted name -> value."""
    flat: dict[str, Any] = {}
    for key, value in _plain(asdict(config)).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if not FREE_KEYS.fullmatch(key)}


def _plain(value: Any) -> Any:
    """Tuples to lists, so that yaml, json and a reloaded checkpoint compare equal."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
