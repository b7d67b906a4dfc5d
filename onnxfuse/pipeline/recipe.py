"""Recipes: which passes run, in which order, with which options.

The short form is what `--passes` takes: names separated by commas, options after a colon.

    fold,fuse:kernel=3,max_blocks=4,refit

A piece with `=` and no pass name in front continues the options of the pass before it. Values are YAML
scalars or lists (`kernel=3`, `mode=paper`, `kernels=[1,3]`), and patterns (`only=*conv*`). The long form is a
YAML file:

    passes:
      - fold
      - fuse: {kernel: 3, max_blocks: 4}
    max_error: 0.05
    seed: 0
    retrain: {data: train.npz, epochs: 5, lr: 0.0001}

In Python, a list such as the file's may hold passes that were made already, too:

    ["fold", {"fuse": {"kernel": 3}}, Merge(layers=0.25)]

All end in the same place: the pass's own pydantic options, which refuse unknown names and wrong values.
Every refusal is one InputError line that names the pass and the option and says what is allowed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

import pydantic
import yaml

from onnxfuse.errors import InputError, unknown_name
from onnxfuse.pipeline.base import Pass
from onnxfuse.pipeline.discovery import load_pass

Passes: TypeAlias = "str | Sequence[str | Mapping[str, Mapping[str, Any] | None] | Pass]"
"""Passes in any of their forms."""


class RecipeRetraining(pydantic.BaseModel):
    """Retraining after the passes, as a recipe asks for it."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    data: str = pydantic.Field(description="samples to retrain on")
    epochs: int | None = pydantic.Field(None, ge=1, description="passes over the samples")
    lr: float | None = pydantic.Field(None, gt=0, description="the highest learning rate")
    schedule: str | None = pydantic.Field(None, description="retraining by turns: exponential:steps=4")


class RecipeSettings(pydantic.BaseModel):
    """The settings of a recipe beside its passes; None leaves it to the command line or the default."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    max_error: float | None = pydantic.Field(None, gt=0, description="relative output error allowed")
    max_drop: float | None = pydantic.Field(None, ge=0, description="drop of the metric allowed")
    metric: str | None = pydantic.Field(
        None, description="top1, mse, nll, agreement, cosine or file.py:function"
    )
    confidence: float | str | None = pydantic.Field(
        None, description="of the interval that keeps to max_drop, or none"
    )
    seed: int | None = pydantic.Field(None, ge=0, description="seed of everything random")
    retrain: RecipeRetraining | None = pydantic.Field(None, description="retraining after the passes")


@dataclass(frozen=True)
class Recipe:
    """Passes in order and the settings that came with them."""

    passes: tuple[Pass, ...]
    settings: RecipeSettings


@dataclass(frozen=True)
class Option:
    """One option of a pass as a person reads it."""

    name: str
    type: str
    default: str
    help: str


def options_of(pass_: type[Pass]) -> list[Option]:
    """The options that a pass takes."""
    return [_option(name, field) for name, field in pass_.Options.model_fields.items()]


def _option(name: str, field: pydantic.fields.FieldInfo) -> Option:
    kind = _type_name(field.annotation)
    default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
    return Option(name, kind, default, field.description or "")


def _type_name(annotation: Any) -> str:
    """`int | None` for `Optional[Annotated[int, Gt(gt=0)]]`."""
    if annotation is NoneType:
        return "None"
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type_name(parts[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type_name, parts))
    if (origin := get_origin(annotation)) in (dict, list):
        return f"{origin.__name__}[{', '.join(map(_type_name, parts))}]"
    plain = isinstance(annotation, type) and not parts
    return annotation.__name__ if plain else str(annotation).replace("typing.", "")


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass of that name with validated options. InputError names what is wrong and what is allowed."""
    kind = load_pass(name)
    return kind(_validated(kind.Options, options, f"pass '{name}'"))


def parse_recipe(text: str) -> list[Pass]:
    """Passes from the short form, `fold,fuse:kernel=3,max_blocks=4`.

    Raises:
        InputError: an empty piece, an unknown pass or option, a wrong value.
    """
    wanted: list[tuple[str, dict[str, Any]]] = []
    for piece in _pieces(text):
        name, colon, rest = piece.partition(":")
        is_option = "=" in name
        if is_option and not wanted:
            raise InputError(f"'{piece}' is an option and no pass stands before it; write pass:option=value")
        if not is_option:
            wanted.append((name.strip(), {}))
        if is_option or colon:
            _add_option(wanted[-1], piece if is_option else rest)
    return [make_pass(name, options) for name, options in wanted]


def _pieces(text: str) -> Iterator[str]:
    """The pieces between commas that are not inside brackets or quotes."""
    start, closing = 0, ""
    pairs = {"[": "]", "{": "}", '"': '"', "'": "'"}
    for index, letter in enumerate([*text, ","]):
        if closing and letter == closing[-1]:
            closing = closing[:-1]
        elif letter in pairs and not closing.endswith(("'", '"')):
            closing += pairs[letter]
        elif (letter == "," and not closing) or index == len(text):
            piece = text[start:index].strip()
            if not piece:
                raise InputError(
                    f"'{text}' has an empty place where a pass should be; write fold,fuse:kernel=3"
                )
            yield piece
            start = index + 1


def _add_option(target: tuple[str, dict[str, Any]], text: str) -> None:
    pass_name, options = target
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise InputError(f"pass '{pass_name}': '{text}' is not an option; write {pass_name}:option=value")
    if name in options:
        raise InputError(f"pass '{pass_name}': option '{name}' is given twice")
    try:
        options[name] = yaml.load(value, _ShortLoader)
    except yaml.YAMLError:
        raise InputError(
            f"pass '{pass_name}': the value of option '{name}' cannot be read: {value}"
        ) from None


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file.

    Raises:
        InputError: the file can't be read, isn't YAML, or asks for what there isn't.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read the recipe '{path}': {reason}") from error
    try:
        return read_recipe(text)
    except InputError as error:
        raise InputError(f"recipe '{path}': {error}") from error


def read_recipe(text: str) -> Recipe:
    """A recipe from YAML text: a mapping with `passes`, or just the list of passes. InputError as
    `load_recipe`."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        about = f"{error.context or ''} {error.problem}"
        hint = "; a pattern that begins with * must be quoted: '*conv'" if "alias" in about else ""
        raise InputError(f"not valid YAML{line}: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, (list, str)):
        content = {"passes": content}
    if not isinstance(content, dict) or "passes" not in content:
        raise InputError("it has no 'passes'; write passes: [fold, {fuse: {kernel: 3}}]")
    settings = {key: value for key, value in content.items() if key != "passes"}
    return Recipe(
        tuple(make_passes(content["passes"])),
        _validated(RecipeSettings, settings, "the recipe", extra=["passes"]),
    )


def make_passes(wanted: Passes) -> list[Pass]:
    """Passes from the short form, or from a list of names, of `{name: {option: value}}` and of passes.

    Raises:
        InputError: another form, an empty list, an unknown pass or option, a wrong value.
    """
    items = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(items, Sequence) or not items:
        raise InputError("'passes' must be a list of names or of name: {option: value}")
    return [pass_ for item in items for pass_ in _made(item)]


def _made(item: Any) -> Iterator[Pass]:
    if isinstance(item, Pass):
        yield item
        return
    if isinstance(item, str):
        yield from parse_recipe(item)
        return
    options = next(iter(item.values())) if isinstance(item, Mapping) and len(item) == 1 else item
    if not isinstance(item, Mapping) or not isinstance(options, (Mapping, type(None))) or len(item) != 1:
        raise InputError(f"{item!r} is not a pass; write a name or name: {{option: value}}")
    yield make_pass(str(next(iter(item))), options or {})


class _ShortLoader(yaml.SafeLoader):
    """YAML of a single value: there is nothing that an alias could refer to, so `*x` is the pattern it looks
    like."""

    def fetch_alias(self) -> None:
        self.fetch_plain()


_ShortLoader.yaml_implicit_resolvers = {
    first: found for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items() if first != "*"
}


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _validated(kind: type[Any], values: Mapping[str, Any], owner: str, extra: Sequence[str] = ()) -> Any:
    """`kind` made from `values`, or one line about the first thing that is wrong with them."""
    try:
        return kind.model_validate({str(key): value for key, value in values.items()})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    allowed = [*extra, *kind.model_fields]
    if first["type"] == "extra_forbidden":
        raise InputError(f"{owner}: {unknown_name('option', place, allowed)}")
    if first["type"] == "missing":
        raise InputError(f"{owner}: option '{place}' is required")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not place:  # of the options together, and says itself what it found
        raise InputError(f"{owner}: {message}")
    raise InputError(f"{owner}: option '{place}' {message}, not {first['input']!r}")
