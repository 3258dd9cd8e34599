"""Configuration: flags and YAML -> one frozen dataclass, and back.

A program is one dataclass (its fields, their docstrings as help) and one `run(config)`.
`parse` gives the flags, `--config FILE` and `--print_config`; jsonargparse does the
typing. What it adds: a list flag may be repeated, a misspelt key names its file, line
and nearest neighbour, and an error of `__post_init__` ends as a message, not as a
traceback.
"""

import dataclasses
import difflib
import importlib
import json
import pathlib
import re
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

T = TypeVar("T")


def parse(config_type: type[T], argv: list[str], *, prog: str) -> T:
    """The config that a command line stands for; exits with code 2 on a bad one.

    Args:
        config_type: a frozen dataclass, possibly of dataclasses.
        argv: arguments after the program's name.
        prog: what help and errors call the command.
    """
    parser = _parser(config_type, prog)
    try:
        argv = _merge_repeated(config_type, argv)
        for path in _config_files(argv):
            check_keys(config_type, path)
        _check_flags(config_type, argv)
        namespace = parser.parse_args(argv)
        namespace.pop("config", None)
        values = parser.instantiate(namespace)
        return config_type(**vars(values))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def load(config_type: type[T], path: str | None, values: dict[str, Any]) -> T:
    """The config of a YAML file, with some values given; like `parse` in all else.

    Args:
        config_type: see `parse`.
        path: of the file; None = defaults.
        values: strings, numbers and lists by top-level key; None and [] = not given.
    """
    argv = [] if path is None else ["--config", path]
    for name, value in values.items():
        if value is not None and value != []:
            argv.append(
                f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            )
    return parse(config_type, argv, prog=f"rlhf-jax ({path or config_type.__name__})")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain YAML-able values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: Any) -> str:
    """The config as YAML; `--config` reads it back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> list[str]:
    """The dotted keys in which two configs differ, as "key: old -> new"."""
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        key = f"{prefix}{name}"
        before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{key}.")
        elif before != after:
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines


def check_keys(config_type: type, path: str) -> None:
    """Refuses a YAML file with a key that the config does not have, or one key twice.

    Raises:
        ValueError: names file, line, key and the nearest known key.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path}: expected a mapping of keys to values")
    _check_mapping(config_type, root, path, "")


def parse_named(specs: list[str], flag: str) -> dict[str, str]:
    """["NAME=SPEC", ...] as a dict; a spec without a name is an error that says so."""
    named: dict[str, str] = {}
    for item in specs:
        name, separator, spec = item.partition("=")
        if not separator or not name or not spec or not name.replace("_", "").isalnum():
            raise ValueError(
                f"{flag} {item!r}: expected NAME=SPEC with a NAME of letters, digits "
                "and _, such as id=pairs.jsonl"
            )
        if name in named:
            raise ValueError(f"{flag}: the name {name!r} is given twice")
        named[name] = spec
    return named


class _Parser(jsonargparse.ArgumentParser):
    """The parser with short errors: one line, and where to read more."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r"\s*\n\s*", " ", message).strip()
        message = re.sub(r'^Parser key "([^"]+)": ', r"--\1: ", message)
        message = re.sub(r"Expected an? <class '(\w+)'>", r"expected \1", message)
        message = re.sub(r"Expected an? (typing\.)?", "expected ", message)
        message = re.sub(
            r"Does not validate against any of the Union subtypes.*?expected (\w+)"
            r".*Given value: (.*)$",
            r"expected \1 or null, got \2",
            message,
        )
        message = message.replace(". Got value: ", ", got ")
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.stderr.write(f"options: {self.prog} --help\n")
        sys.exit(2)


def _parser(config_type: type, prog: str) -> _Parser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, allow_abbrev=False, usage=f"{prog} [options]")
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(config_type)
    return parser


def _field_types(config_type: type) -> dict[str, Any]:
    return typing.get_type_hints(config_type)


def _dataclass_of(annotation: Any) -> type | None:
    known = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return annotation if known else None


def known_keys(config_type: type, prefix: str = "") -> list[str]:
    """All dotted keys of a config type."""
    keys = []
    for name, annotation in _field_types(config_type).items():
        keys.append(prefix + name)
        if nested := _dataclass_of(annotation):
            keys += known_keys(nested, f"{prefix}{name}.")
    return keys


def _suggest(key: str, keys: list[str]) -> str:
    """ "; did you mean ...?" by initials (lr), by the last name, then by likeness."""
    leaf = key.rsplit(".", 1)[-1]
    leaves = {known: known.rsplit(".", 1)[-1] for known in keys}
    near = [
        known
        for known, name in leaves.items()
        if name == leaf or leaf == "".join(word[0] for word in name.split("_"))
    ]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near and (names := difflib.get_close_matches(leaf, leaves.values(), n=1)):
        near = [known for known, name in leaves.items() if name == names[0]]
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_mapping(
    config_type: type, node: yaml.MappingNode, path: str, prefix: str
) -> None:
    types = _field_types(config_type)
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        dotted = prefix + key
        if key in seen:
            raise ValueError(f"{path}:{line}: key {dotted!r} is given twice")
        seen.add(key)
        if key not in types:
            near = _suggest(dotted, known_keys(config_type, prefix))
            raise ValueError(f"{path}:{line}: unknown key {dotted!r}{near}")
        nested = _dataclass_of(types[key])
        if nested and isinstance(value_node, yaml.MappingNode):
            _check_mapping(nested, value_node, path, f"{dotted}.")
        elif nested:
            raise ValueError(
                f"{path}:{line}: {dotted!r}: expected a mapping with keys "
                f"{', '.join(_field_types(nested))}"
            )


def _config_files(argv: list[str]) -> list[str]:
    files = []
    for here, argument in enumerate(argv):
        if argument == "--config" and here + 1 < len(argv):
            files.append(argv[here + 1])
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
    return files


def _check_flags(config_type: type, argv: list[str]) -> None:
    keys, lists = known_keys(config_type), _list_keys(config_type)
    for argument in argv:
        if argument == "--":
            return
        if not argument.startswith("--"):
            continue
        flag = argument[2:].split("=", 1)[0]
        if flag in ("help", "config") or flag.startswith("print_config"):
            continue
        if flag not in keys and flag.removesuffix("+") not in lists:
            raise ValueError(f"unknown option --{flag}{_suggest(flag, keys)}")


def _merge_repeated(config_type: type, argv: list[str]) -> list[str]:
    """argv with every list flag's values (repeated or not) as one JSON list; those of
    --name+, which go behind the config file's, as another."""
    lists = _list_keys(config_type)
    merged: dict[str, list[str]] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name.removesuffix("+") not in lists:
            rest.append(argument)
            continue
        if not separator:
            value = next(arguments, None)
            if value is None:
                raise ValueError(f"{flag}: expected a value")
        merged.setdefault(name, []).extend(_as_list(flag, value))
    return rest + [
        f"--{name}={json.dumps(merged[name])}"
        for name in sorted(merged, key=lambda name: name.endswith("+"))
    ]


def _list_keys(config_type: type, prefix: str = "") -> set[str]:
    keys = set()
    for name, annotation in _field_types(config_type).items():
        if typing.get_origin(annotation) in (list, tuple):
            keys.add(prefix + name)
        elif nested := _dataclass_of(annotation):
            keys |= _list_keys(nested, f"{prefix}{name}.")
    return keys


def _as_list(flag: str, value: str) -> list[str]:
    """A flag's value: the items of [a, b], quoted as in YAML or bare, else one item.

    YAML reads no bare `?` inside brackets, and our SPECs have one: a list without
    quotes is split at its commas.
    """
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    try:
        return [str(item) for item in yaml.load(value, Loader=yaml.BaseLoader)]
    except yaml.YAMLError:
        if set(value[1:-1]) & set("[]{}'\""):
            raise ValueError(
                f"{flag}: {value} is no list in YAML; quote each item, "
                f"""'["a","b"]', or repeat {flag}"""
            ) from None
    return [item.strip() for item in value[1:-1].split(",") if item.strip()]


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """The function that "package.module:function" names.

    The current directory counts as a place to import from, as under `python -m`.

    Raises:
        ValueError: the spec has no colon, the module does not import, or it has no such
            function; names which.
    """
    module_name, separator, name = spec.partition(":")
    if not separator or not module_name or not name:
        raise ValueError(f"{flag} {spec!r}: expected package.module:function")
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{flag} {spec!r}: cannot import: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [k for k, v in vars(module).items() if callable(v) and k[0] != "_"]
        raise ValueError(
            f"{flag} {spec!r}: {module_name} has no function {name!r}; it has "
            f"{', '.join(functions) or 'none'}"
        )
    return function
