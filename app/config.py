"""One frozen object per job: defaults, then YAML, then `--section.field VALUE`.

`load_config` merges the three, validates with pydantic and answers `--help` and `--dry-run`; `with_overrides` makes
the same change in code. An unknown key is an error with its dotted path and the nearest key that exists.
It reads no environment variables and imports nothing heavy.
"""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

USAGE_ERROR = 2  # exit code of a bad command line, config or input


class Config(BaseModel):
    """A closed, frozen set of settings; nested sections are Configs too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A validated copy with dotted keys replaced, e.g. `{"optimizer.learning_rate": 1e-3}`.

        Raises ValueError for a key that does not exist or a value that does not fit.
        """
        values = self.model_dump()
        for key, value in overrides.items():
            _set(values, key, value)
        return validate(type(self), values)

    def plan(self) -> list[str]:
        """What the job would do, a line each; printed by `--dry-run`."""
        return []


class RunConfig(Config):
    """What every job has: where its artifacts lie, and what to do with an older output."""

    storage_uri: str = Field("", description="folder or URI that relative artifact URIs start from")
    overwrite: bool = Field(False, description="replace an output that was made with other settings or inputs")

    def resolve(self, uri: str) -> str:
        """The full path or URI of an artifact. Raises ValueError if it is relative and storage_uri is not set."""
        if "://" in uri or uri.startswith("/"):
            return uri
        root = self.storage_uri
        if not root:
            raise ValueError(f"{uri!r} is a relative artifact URI: set storage_uri (--storage_uri /path/or/s3://…)")
        if "://" not in root and not root.startswith("/"):
            raise ValueError(f"storage_uri: {root!r} must be absolute: a job runs in a copy of the working directory")
        return f"{root.rstrip('/')}/{uri}"


C = typing.TypeVar("C", bound=Config)


def load_config(config_type: type[C], description: str = "", argv: Sequence[str] | None = None) -> C:
    """The config of a job from its command line; exits with code 2 and a message when it is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(_help(config_type, description))
        raise SystemExit(0)
    try:
        dry_run, values = _parse(config_type, arguments)
        config = validate(config_type, values)
        if not dry_run:
            return config
        plan = config.plan()
    except ValueError as error:
        _fail(str(error))
    sys.stdout.write(to_yaml(config) + "".join(f"# {line}\n" for line in plan))
    raise SystemExit(0)


def validate(config_type: type[C], values: Mapping[str, Any]) -> C:
    """The config, or ValueError with one line per bad key: dotted path, what is wrong, nearest valid key."""
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(config_type, detail) for detail in error.errors())) from None


def read_yaml(config_type: type[Config], path: Path) -> dict[str, Any]:
    """The YAML file as a mapping; a section given as `name.yaml` is read from that file, relative to this one."""
    if not path.is_file():
        raise ValueError(f"--config: {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} must hold a mapping of settings, not {type(values).__name__}")
    for name, section in _sections(config_type).items():
        if isinstance(values.get(name), str) and values[name].endswith(".yaml"):
            values[name] = read_yaml(section, path.parent / values[name])
    return values


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(config_type: type[Config], arguments: list[str]) -> tuple[bool, dict[str, Any]]:
    values: dict[str, Any] = {}
    overrides: list[tuple[str, Any]] = []
    dry_run = False
    rest = iter(arguments)
    for argument in rest:
        if argument == "--dry-run":
            dry_run = True
            continue
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r}: expected --section.field VALUE, --config FILE, --dry-run or --help")
        key, has_value, value = argument[2:].partition("=")
        if not has_value:
            try:
                value = next(rest)
            except StopIteration:
                raise ValueError(f"--{key}: needs a value") from None
        if key == "config":
            values = read_yaml(config_type, Path(value))
        else:
            overrides.append((key, _literal(key, value)))
    for key, value in overrides:
        _set(values, key, value)
    return dry_run, values


def _literal(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--{key}: {value!r} is not a YAML value; quote it") from None


def _set(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, name = dotted_key.split(".")
    for section in sections:
        nested = values.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ValueError(f"{dotted_key}: {section} is a value, not a section")
        values = nested
    values[name] = value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, of sections in sections.

    >>> flatten({"a": 1, "b": {"c": 2.5}})
    {'a': 1, 'b.c': 2.5}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _explain(config_type: type[Config], detail: Any) -> str:
    path = [str(part) for part in detail["loc"]]
    message = f"{'.'.join(path) or 'config'}: {detail['msg'].removeprefix('Value error, ')}"
    if detail["type"] == "extra_forbidden":
        parent = config_type
        for part in path[:-1]:
            parent = _sections(parent).get(part, parent)  # a mapping's own keys are no sections
        known = list(parent.model_fields)
        nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        nearest_key = ".".join([*path[:-1], *nearest])
        message = f"{'.'.join(path)}: unknown key; " + (
            f"did you mean {nearest_key}?" if nearest else f"known keys: {', '.join(known)}"
        )
    elif detail["type"] != "missing" and not isinstance(detail["input"], dict):
        message += f" (got {detail['input']!r})"
    return message


def _section(field: FieldInfo) -> type[Config] | None:
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _sections(config_type: type[Config]) -> dict[str, type[Config]]:
    found = {name: _section(field) for name, field in config_type.model_fields.items()}
    return {name: section for name, section in found.items() if section}


def _help(config_type: type[Config], description: str) -> str:
    lines = [description.strip(), "", "  --config FILE   YAML file with the settings below"]
    lines += ["  --dry-run       print the resolved settings and the plan, do nothing", "", "settings:"]
    return "\n".join([*lines, *_help_lines(config_type, ""), ""])


def _help_lines(config_type: type[Config], prefix: str) -> list[str]:
    lines = []
    for name, field in config_type.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            lines += _help_lines(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  --{prefix}{name}  {field.description or ''} ({default})")
    return lines


def _fail(message: str) -> NoReturn:
    sys.stderr.write("".join(f"error: {line}\n" for line in message.splitlines()))
    raise SystemExit(USAGE_ERROR)
