"""From a command line to a `Config` and back: recipes by name or path, flags, yaml, identity."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from bagssl_fast.arguments import Parser
from bagssl_fast.config import Config, resolve

PACKAGE = Path(__file__).resolve().parent
# A checkout keeps the recipes in configs/; an installed wheel carries them as bagssl_fast/recipes/.
RECIPE_FOLDERS = (PACKAGE.parent / "configs", PACKAGE / "recipes")

# What may differ between a run and its resumption: paths, reporting, speed and what trouble does,
# never the result of a run without trouble.
FREE_KEYS = re.compile(
    r"data|test_data|labels|name|run_dir|resume|overwrite|device|threads|on_nonfinite|ranks_timeout|"
    r"log_every|checkpoint_every|keep_checkpoints|tensorboard|compile|cuda_graph|impl|"
    r"loader\.(num_threads|batches_ahead|views)|eval\..*"
)


@functools.cache  # making it takes longer than reading by it
def make_parser() -> Parser:
    """The parser of the trainer's command line: every field of `Config` is an option."""
    recipes = ", ".join(recipe_names())
    return Parser(Config, "train", f"A yaml file, or the bare name of a recipe: {recipes}.")


def parse(argv: Sequence[str]) -> Config:
    """Reads a command line: defaults < `--config` < flags; no `--config`, no `--data`: the demo.

    Args:
        argv: The arguments after the program's name, as `bagssl_fast.arguments` reads them.

    Raises:
        ValueError, FileNotFoundError: For what is wrong, in one sentence.
        SystemExit: 0, for --help and --print_config.
    """
    parser = make_parser()
    arguments = parser.normalize(argv)
    recipes = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    if not recipes and not any(a.startswith("--data=") for a in arguments):
        recipes = ["demo"]
    paths = [find_recipe(recipe) for recipe in recipes]
    for path in paths:
        check_keys(parser, path)
    flags = [a for a in arguments if not a.startswith("--config=")]
    config = Config(**parser.read([*(f"--config={path}" for path in paths), *flags]))
    if not config.name:
        config = replace(config, name=paths[-1].stem if paths else config.encoder.name)
    return resolve(config)


def load(path: str | os.PathLike[str]) -> Config:
    """Reads a configuration that `to_yaml` wrote (any recipe will do).

    Raises:
        ValueError: If it is not valid yaml or no configuration.
    """
    parser = make_parser()
    check_keys(parser, Path(path))
    return resolve(Config(**parser.read([f"--config={os.fspath(path)}"])))


_OPTIONAL_SECTIONS = {field.name for field in fields(Config) if field.default is None}


def check_keys(parser: Parser, path: Path) -> None:
    """Refuses a yaml file with keys that are not options.

    Raises:
        ValueError: Naming the file and the key, with a guess at what was meant.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid yaml: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected options by name, such as `epochs: 10`")
    for key in _keys(parser, content):
        is_section = any(name.startswith(f"{key}.") for name in parser.types)
        if is_section and not (content.get(key) is None and key in _OPTIONAL_SECTIONS):
            raise ValueError(f"{path}: {key} has no options; give some, or leave the line out")
        try:
            parser.check_name(key, "null")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _keys(parser: Parser, content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names in a yaml file, down to options."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in parser.types:
            yield from _keys(parser, value, f"{name}.")
        else:
            yield name


def recipe_names() -> list[str]:
    """The bare names of the recipes that come with the package."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.yaml")})


def find_recipe(name: str) -> Path:
    """The yaml file that `name` means: a path, `configs/x.yaml`, or the bare name of a recipe.

    Raises:
        FileNotFoundError: If there is no such file, naming the recipes that exist.
    """
    if Path(name).is_file():
        return Path(name)
    needed = Path(name)
    if needed.parent in (Path("."), Path("configs")) and needed.suffix in ("", ".yaml"):
        for folder in RECIPE_FOLDERS:
            path = folder / f"{needed.stem}.yaml"
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"--config {name}: no such file or recipe; recipes: {', '.join(recipe_names())}"
    )


def to_yaml(config: Config) -> str:
    """The resolved configuration as yaml that `--config` reads back."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, default_flow_style=None)


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides the trained weights, flat: dotted name -> value."""
    flat: dict[str, Any] = {}
    for key, value in _plain(asdict(config)).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if not FREE_KEYS.fullmatch(key)}


def eval_identity(config: Config) -> dict[str, Any]:
    """What an evaluation measures of a run: two with the same are comparable."""
    options = asdict(config.eval)
    del options["enabled"], options["batch_size"]
    names = ("data", "test_data", "labels")
    return {**{name: getattr(config, name) for name in names}, **_plain(options)}


def _plain(value: Any) -> Any:
    """Tuples to lists, so that yaml, json and a reloaded checkpoint compare equal."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
