"""Recipes: which layer gets how many bits.  Frozen; presets by name; written to TOML and read back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from lsquant._util.batches import unwrapped
from lsquant._util.entry import Entry, parse_toml, shown
from lsquant._util.errors import DamagedFile, LsquantError, MissingExtra, UsageError
from lsquant._util.optional import require
from lsquant._util.toml import to_toml
from lsquant.nn import quantized_type
from lsquant.spec import MAX_BITS, MIN_BITS, Container, QuantSpec

INHERIT = "inherit"
"""In a Rule: leave weight or activation to the next rule that matches, at last to the recipe's default."""

Setting = QuantSpec | int | None | str
FORMAT = 1
HALVES = ("weight", "activation")
Target = Literal["onnxruntime", "xnnpack", "tensorrt"]
CONTAINER_OF: dict[str, Container] = {"onnxruntime": "uint8", "xnnpack": "int8", "tensorrt": "symmetric"}
"""Target -> the container of stored tensors."""
PORTABLE_BITS = 7
"""Of weights for which two products with any byte fit 16 bits."""
POSITIONS = ("first", "last")
PRESET = re.compile(r"w(\d{1,9})(?:g(\d{1,9}))?(?:a(\d{1,9}))?", re.ASCII)
RE2_MEMORY = 1 << 20
"""Bytes that google-re2 may take for one pattern of a file."""
# in files; what code says is not bounded
MOST_RULES, MOST_PATTERNS, LONGEST_WHICH, MOST_STARS = 1 << 18, 1000, 1000, 32
CLASS_IN_FILE = re.compile(r"class:[\w.<>]+")
Made = TypeVar("Made")


# ---- names and patterns ----


def glob_of(name: str) -> str:
    """Return the glob that matches one name and nothing else: the name itself, but for characters of patterns."""
    escaped = re.sub(r"[*?[]", r"[\g<0>]", name)
    if name in POSITIONS or name.startswith(("re:", "re2:", "class:")):
        escaped = f"[{escaped[0]}]{escaped[1:]}"
    return escaped


def name_of(which: str) -> str | None:
    """Return the only name that a rule's ``which`` matches; None where it is a pattern, a class or a position.

    >>> name_of("blocks.0"), name_of("blocks[[]0]"), name_of("blocks.*")
    ('blocks.0', 'blocks[0]', None)
    """
    if which in POSITIONS or which.startswith(("re:", "re2:", "class:")):
        return None
    if not re.fullmatch(r"(?:[^*?[]|\[[*?[a-z]\])*", which, re.DOTALL):
        return None
    return re.sub(r"\[([*?[a-z])\]", r"\1", which)


def literal_of(pattern: str) -> str | None:
    """Return the only text that a regular expression matches as ``re.escape`` writes it, anchored or not, else None.

    >>> literal_of(re.escape("blocks.0-a")), literal_of("blocks.0"), literal_of(r"blocks\\d")
    ('blocks.0-a', None, None)
    """
    body = re.fullmatch(r"(?:\^|\\A)?((?:[^\\.^$*+?{}\[\]|()]|\\[^a-zA-Z0-9])*)(?:\$|\\Z)?", pattern, re.DOTALL)
    return None if body is None else re.sub(r"\\(.)", r"\1", body[1], flags=re.DOTALL)


def _re2(pattern: str) -> Any:
    """Compile a pattern of a file.  Raises: MissingExtra naming the rule; UsageError."""
    try:
        re2 = require("re2", extra="re2")
    except MissingExtra as error:
        said = shown(f"re:{pattern}")
        raise MissingExtra(
            f"the rule for {said} is a regular expression in a file; with Python's it could run for ever, so the "
            f"package google-re2 is needed: pip install 'lsquant[re2]', or write names and globs",
            name="re2",
        ) from error
    options = re2.Options()
    options.log_errors, options.max_mem = False, RE2_MEMORY
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise UsageError(f"Rule: {shown(pattern)} is not a regular expression of google-re2: {error}") from error


def _specification(value: Setting, what: str) -> QuantSpec | str | None:
    """Make a QuantSpec of bits, and weights signed; None and INHERIT stay.  Raises: UsageError naming ``what``."""
    if value is None:
        return None
    if value == INHERIT:
        return INHERIT
    if isinstance(value, int) and not isinstance(value, bool) and MIN_BITS <= value <= MAX_BITS:
        value = QuantSpec(value)
    if not isinstance(value, QuantSpec):
        raise UsageError(f"{what}={shown(value)}: give bits (2 to 8), a QuantSpec, or None for floating point")
    if what == "activation":
        if value.granularity != "tensor":
            raise UsageError(f"activation={value}: a layer's input has one step; use granularity='tensor'")
        return value
    if value.container != "uint8":
        raise UsageError(f"weight={value}: a container is that of stored tensors, which are activations")
    if value.offset:
        raise UsageError(f"weight={value}: weights are symmetric, an offset belongs to activations")
    return replace(value, signed=True) if value.signed is None else value


def _joins(value: Setting) -> QuantSpec | None:
    """Make a QuantSpec of what joins read.  Raises: UsageError for one that a stored tensor cannot have."""
    spec = _specification(value, "activation") if isinstance(value, (int, QuantSpec)) else value
    if spec is None:
        return None
    plain = isinstance(spec, QuantSpec) and spec.step_dtype == "float32"
    if not isinstance(spec, QuantSpec) or not plain or (spec.signed is not None and not spec.offset) or spec.narrow:
        raise UsageError(
            f"joins={shown(value)}: give bits (2 to 8), or None for floating point; the tensors that joins read have "
            "one float32 step each, and an offset or a sign that calibration decides"
        )
    return spec


def _contained(value: QuantSpec | str | None, target: str, where: str) -> QuantSpec | str | None:
    """Return what an activation is quantized by, in the container of a target.  Raises: UsageError naming ``where``."""
    if not isinstance(value, QuantSpec):
        return value
    container = CONTAINER_OF[target]
    if value.container not in ("uint8", container):
        other = target_of(value)
        raise UsageError(f"{where}={value}: this container is that of target={other!r}, and the recipe's is {target!r}")
    try:
        return replace(value, container=container)
    except UsageError as error:
        raise UsageError(f"{where}={value} with target={target!r}: {error}") from error


def target_of(joins: QuantSpec | None) -> Target:
    """Return the target whose container a specification has; the default one for None."""
    return next(t for t in get_args(Target) if joins is None or CONTAINER_OF[t] == joins.container)


def _listed(value: Any, what: str) -> tuple[Any, ...]:
    """Return what was given as a list.  Raises: UsageError naming ``what``."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"{what}={shown(value)}; give a list")
    return tuple(value)


@dataclass(frozen=True)
class Rule:
    """Give some layers their bits.

    which: a glob on the layer's name ("stem.*"), "re:..." for a regular expression on the whole name ("re2:..." for
        one of google-re2, which takes bounded time), a layer class (subclasses included), "first" or "last" (of the
        layers that multiply).
    weight, activation: bits, a QuantSpec, None for floating point; left out, the next matching rule decides.
    Raises: UsageError for a value that is not allowed; MissingExtra for "re2:..." without google-re2.

    >>> lsquant.Rule("head", weight=8).weight.bits
    8
    """

    which: Any
    weight: Setting = INHERIT
    activation: Setting = INHERIT

    def __post_init__(self) -> None:
        which = self.which
        if isinstance(which, type):
            if not issubclass(which, nn.Module):
                raise UsageError(f"Rule: {which.__name__} is not a layer class")
            object.__setattr__(self, "which", f"class:{which.__module__}.{which.__qualname__}")
        elif not isinstance(which, str):
            raise UsageError(f"Rule: which={shown(which)}; give a glob, 're:...', a layer class, 'first' or 'last'")
        elif which.startswith("re:"):
            try:
                re.compile(which[3:])
            except re.error as error:
                raise UsageError(f"Rule: {which!r} is not a regular expression: {error}") from error
        elif which.startswith("re2:"):
            _re2(which[4:])
        for what in HALVES:
            object.__setattr__(self, what, _specification(getattr(self, what), what))

    @cached_property
    def name(self) -> str | None:
        """The only name that the rule is for; None for a pattern, a class or a position."""
        return name_of(self.which)

    def matches(self, names: Sequence[str], layer: nn.Module, position: Iterable[str] = ()) -> bool:
        """Tell whether the rule is for a layer.  names: all names of the layer; position: "first" and/or "last"."""
        which: str = self.which
        if self.name is not None:
            return self.name in names
        if which in POSITIONS:
            return which in position
        if which.startswith("class:"):
            return any(f"class:{c.__module__}.{c.__qualname__}" == which for c in type(layer).__mro__)
        if which.startswith("re:"):
            return any(re.fullmatch(which[3:], name) for name in names)
        if which.startswith("re2:"):
            pattern = _re2(which[4:])
            return any(pattern.fullmatch(name) for name in names)
        return any(fnmatchcase(name, which) for name in names)


@dataclass(frozen=True)
class Recipe:
    """Default bits of weights and layer inputs, and rules for some layers.

    For weight and activation each, the first rule that matches a layer and sets it wins.

    weight, activation: bits, a QuantSpec, or None for floating point.
    rules: one that matches no layer is an error in ``prepare``.
    preset_rules: those of a preset; they come after ``rules`` and may match nothing.
    joins: bits or a QuantSpec of what additions, concatenations, averages and elementwise functions read, usually 8:
        every tensor between two layers is then stored as codes, and all who read it share its step
        (docs/integer-only.md).  An offset is that of tensors which no addition reads.  None: joins compute in floating
        point, and every layer has an input step of its own.
    target: with joins, for which runtimes: "onnxruntime", stored tensors are uint8; "xnnpack", the same codes as int8;
        "tensorrt", int8 with zero point 0, so that unsigned codes have at most 7 bits.
    Raises: UsageError for a value that is not allowed.

    >>> recipe = lsquant.Recipe(4, 4, [lsquant.Rule("first", 8, 8)])
    >>> recipe == lsquant.Recipe.from_toml(recipe.to_toml())
    True
    """

    weight: Setting = None
    activation: Setting = None
    rules: Sequence[Rule] = ()
    preset_rules: Sequence[Rule] = field(default=())
    joins: Setting = field(default=None, kw_only=True)
    target: Target = field(default="onnxruntime", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "joins", _joins(self.joins))
        target = self.target
        if not isinstance(target, str) or target not in CONTAINER_OF:
            raise UsageError(f"Recipe: target={shown(target)}; use one of {', '.join(CONTAINER_OF)}")
        if target != "onnxruntime" and self.joins is None:
            raise UsageError(f"Recipe: target={target!r} is for integer-only networks: give joins=8 as well")
        for what in HALVES:
            if getattr(self, what) == INHERIT:
                raise UsageError(f"Recipe: {what}='inherit' has nothing to inherit from")
            object.__setattr__(self, what, _specification(getattr(self, what), what))
        for name in ("rules", "preset_rules"):
            rules = _listed(getattr(self, name), f"Recipe: {name}")
            for rule in rules:
                if not isinstance(rule, Rule):
                    raise UsageError(f"Recipe: {name} holds {rule!r}, which is not a Rule")
            object.__setattr__(self, name, tuple(self._of_target(rule) for rule in rules))
        for what in ("activation", "joins"):
            object.__setattr__(self, what, _contained(getattr(self, what), target, f"Recipe: {what}"))

    def _of_target(self, rule: Rule) -> Rule:
        """Return a rule whose activation is in the target's container."""
        value = _contained(rule.activation, self.target, f"Recipe: the rule for {rule.which!r}: activation")  # type: ignore[arg-type]
        return rule if value == rule.activation else replace(rule, activation=value)

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        first_last: int | None = 8,
        skip: Iterable[Any] = (),
        rules: Iterable[Rule] = (),
        integer_only: bool = False,
        target: Target = "onnxruntime",
        portable_x86: bool = False,
    ) -> Recipe:
        """Make a recipe from a name: ``w4a4``, ``w2a2``, ``w4`` (= ``w4a16``: weights only), ``w4g32`` (groups of 32).

        name: ``w<bits>[g<group size>][a<bits>]``, any case.
        first_last: bits of weight and input of the first and the last layer that multiplies, 8 as in the paper; None:
            like all others.
        skip: names, globs or classes that stay float.
        rules: more rules, which go first.
        integer_only: whether every tensor between two layers is stored in 8 bits, as ``joins=8``.
        target: as of a recipe, with ``integer_only``.
        portable_x86: with ``integer_only``, whether weights that would have 8 bits have 7: on x86 processors without
            VNNI ONNX Runtime then takes its fast kernels, which add pairs of products in 16 bits.
        Raises: UsageError for an unknown name.

        >>> lsquant.Recipe.preset("w4a4").weight.bits
        4
        """
        match = PRESET.fullmatch(name.lower()) if isinstance(name, str) else None
        if match is None:
            raise UsageError(
                f"Recipe.preset({name!r}): no such preset. Names are w<bits>[g<group size>][a<bits>]: "
                "w2a2, w3a3, w4a4, w8a8, w4a8, w4 (weights only), w4g32"
            )
        bits, group_size, input_bits = (int(digits) if digits else None for digits in match.groups())
        assert bits is not None
        activation = None if input_bits is None or input_bits in (16, 32) else QuantSpec(input_bits)
        for option, value in (("integer_only", integer_only), ("portable_x86", portable_x86)):
            if type(value) is not bool:
                raise UsageError(f"Recipe.preset: {option}={shown(value)}; it must be True or False")
        if portable_x86 and not integer_only:
            raise UsageError("Recipe.preset: portable_x86=True is for integer-only networks: give integer_only=True")
        weight = QuantSpec(PORTABLE_BITS if portable_x86 and bits == 8 else bits, signed=True)
        if group_size is not None:
            weight = replace(weight, granularity="group", group_size=group_size)
        first_and_last: tuple[Rule, ...] = ()
        if first_last is not None:
            input_setting = None if activation is None else first_last
            few = PORTABLE_BITS if portable_x86 and first_last == 8 else first_last
            first_and_last = tuple(Rule(position, few, input_setting) for position in POSITIONS)
        skipped = _listed([skip] if isinstance(skip, (str, type)) else skip, "Recipe.preset: skip")
        skip_rules = tuple(Rule(which, None, None) for which in skipped)
        own = (*_listed(rules, "Recipe.preset: rules"), *skip_rules)
        if not integer_only and target != "onnxruntime":
            raise UsageError(
                f"Recipe.preset: target={shown(target)} is for integer-only networks: give integer_only=True"
            )
        return cls(weight, activation, own, first_and_last, joins=8 if integer_only else None, target=target)

    def all_rules(self) -> tuple[Rule, ...]:
        """Return the user's rules, then the preset's."""
        return (*self.rules, *self.preset_rules)

    @property
    def has_only_names(self) -> bool:
        """Whether no rule is for a class or a regular expression, so that a file can hold it as it is."""
        return not any(rule.which.startswith(("re:", "re2:", "class:")) for rule in self.all_rules())

    def with_names(self, model: nn.Module) -> Recipe:
        """Return the recipe as files hold it: a rule for a class or a regular expression by the names it matches.

        model: the one that the recipe is for, float or prepared.

        >>> recipe = lsquant.Recipe(4, 4, [lsquant.Rule("re:[02]", weight=8)])
        >>> [rule.which for rule in recipe.with_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))).rules]
        ['0', '2']
        """
        layers: dict[nn.Module, list[str]] = {}
        for name, module in unwrapped(model).named_modules(remove_duplicate=False):
            if quantized_type(module) is not None:
                layers.setdefault(module, []).append(name)

        def named(rules: Sequence[Rule]) -> list[Rule]:
            found = []
            for rule in rules:
                if rule.which.startswith(("re:", "re2:", "class:")):
                    hits = [names[0] for layer, names in layers.items() if rule.matches(names, layer)]
                    found += [replace(rule, which=glob_of(name)) for name in hits]
                else:
                    found.append(rule)
            return found

        return replace(self, rules=named(self.rules), preset_rules=named(self.preset_rules))

    def resolve(
        self, names: Sequence[str], layer: nn.Module, position: Iterable[str] = ()
    ) -> tuple[QuantSpec | None, QuantSpec | None, int]:
        """Return (weight, activation, strength) of one layer; None is floating point.

        names: all names of the layer.
        layer: the module.
        position: "first" and/or "last".
        strength: what decided the weight: 2 a rule of the user's, 1 a rule of the preset, 0 the default.
        """

        hits = [(2 - i, rule) for i, table in enumerate(self._tables) for rule in table.hits(names, layer, position)]

        def pick(get: Callable[[Rule | Recipe], Any]) -> tuple[QuantSpec | None, int]:
            for strength, rule in hits:
                if get(rule) != INHERIT:
                    return get(rule), strength
            return get(self), 0

        weight, strength = pick(lambda r: r.weight)
        return weight, pick(lambda r: r.activation)[0], strength

    @cached_property
    def _tables(self) -> tuple[_Table, _Table]:
        return _Table(self.rules), _Table(self.preset_rules)

    # ---- TOML ----

    def to_toml(self) -> str:
        """Return the recipe as TOML; ``Recipe.from_toml`` gives an equal one.

        Regular expressions are written as they are, and read with the extra re2 only; ``with_names`` replaces them.
        """

        def entry(value: Any) -> Any:
            if isinstance(value, QuantSpec):  # its container is the target's
                return {k: v for k, v in value.to_dict().items() if k != "container"}
            return "float" if value is None else value

        def table(rule: Rule) -> dict[str, Any]:
            halves = {half: entry(getattr(rule, half)) for half in HALVES if getattr(rule, half) != INHERIT}
            return {"which": rule.which, **halves}

        values: dict[str, Any] = {
            "format": FORMAT,
            "weight": entry(self.weight),
            "activation": entry(self.activation),
            "rules": [table(r) for r in self.rules],
            "preset_rules": [table(r) for r in self.preset_rules],
            **({} if self.joins is None else {"joins": entry(self.joins)}),
            **({} if self.target == "onnxruntime" else {"target": self.target}),
        }
        return to_toml({k: v for k, v in values.items() if v != []})

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Read a recipe.

        A rule is for a name or a glob; a regular expression that is one escaped name is read as that name, another
        needs the extra re2.  A class is compared by its name with the layers' classes; nothing is imported.

        Raises: UsageError for broken TOML, unknown keys, a value of another type, or a newer format; MissingExtra.
        """
        return recipe_of_file(text, "recipe", UsageError)


class _Table:
    """Rules, ready to be asked: those for one name are found by it, the others are tried."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules, self.tried = rules, []
        self.named: dict[str, list[int]] = {}
        for number, rule in enumerate(rules):
            if rule.name is None:
                self.tried.append(number)
            else:
                self.named.setdefault(rule.name, []).append(number)

    def hits(self, names: Sequence[str], layer: nn.Module, position: Iterable[str]) -> list[Rule]:
        """Return the rules that match, in their order."""
        found = {number for name in names for number in self.named.get(name, ())}
        found |= {number for number in self.tried if self.rules[number].matches(names, layer, position)}
        return [self.rules[number] for number in sorted(found)]


# ---- what files say ----


def recipe_of_file(text: str, file: str, error: type[LsquantError] = DamagedFile) -> Recipe:
    """Return the recipe in a text, as ``Recipe.from_toml``; errors are of that type and name the file."""
    if not isinstance(text, str):
        raise UsageError(f"{file} is {shown(text)}; needed is a text in TOML")
    document = parse_toml(text, file, error)
    version = document.value.pop("format", FORMAT)
    if type(version) is not int or version != FORMAT:
        document.refuse(f"format {shown(version)}; this lsquant reads format {FORMAT}, update it")
    found = document.record((), (*HALVES, "rules", "preset_rules", "joins", "target"))
    weight, activation = (_setting(found[half]) if half in found else None for half in HALVES)
    lists = [_rules_of_file(found[name]) if name in found else [] for name in ("rules", "preset_rules")]
    if sum(len(rules) for rules in lists) > MOST_RULES:
        document.refuse(f"more than {MOST_RULES:,} rules")
    patterns = sum(rule.name is None and rule.which not in POSITIONS for rules in lists for rule in rules)
    if patterns > MOST_PATTERNS:
        document.refuse(f"{patterns:,} rules with patterns; a file may have {MOST_PATTERNS:,}, and more with names")
    joins = _setting(found["joins"]) if "joins" in found else None
    target: Any = found["target"].choice(tuple(CONTAINER_OF)) if "target" in found else "onnxruntime"
    return _made(document, lambda: Recipe(weight, activation, *lists, joins=joins, target=target))


def _made(entry: Entry, make: Callable[[], Made]) -> Made:
    """Return what is made of an entry, or raise its error with the key."""
    try:
        return make()
    except UsageError as error:
        entry.refuse(str(error))


def _setting(entry: Entry) -> Any:
    """Return what weight or activation says: bits, a QuantSpec, or None for "float"."""
    if isinstance(entry.value, dict):
        return _made(entry, lambda: QuantSpec.from_dict(entry.value))
    return None if entry.value == "float" else entry.value


def _rules_of_file(entry: Entry) -> list[Rule]:
    """Return the rules of a list of tables."""
    if not isinstance(entry.value, list):
        entry.refuse(f"a list of rules is needed, written [[{entry.key}]], not {shown(entry.value)}")
    return [_rule_of_file(item) for item in entry.items()]


def _rule_of_file(entry: Entry) -> Rule:
    found = entry.record(("which",), HALVES)
    which = _which_of_file(found["which"])
    halves = {half: _setting(found[half]) for half in HALVES if half in found}
    return _made(entry, lambda: Rule(which, **halves))


def _which_of_file(entry: Entry) -> str:
    """Return for which layers a rule of a file is: a glob or name of bounded length, or the name of a class."""
    which = entry.text(LONGEST_WHICH)
    if which.startswith("re:"):
        name = literal_of(which[3:])
        return f"re2:{which[3:]}" if name is None else glob_of(name)
    if which.startswith("class:"):
        if not CLASS_IN_FILE.fullmatch(which):
            entry.refuse(f"{shown(which)} is no name of a class")
    elif which.count("*") > MOST_STARS and name_of(which) is None:
        entry.refuse(f"{which.count('*')} stars in one glob; a file may have {MOST_STARS}")
    return which
