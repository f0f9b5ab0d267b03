"""A jinja2 sandbox for templates that strangers wrote: what a render may cost is bounded, in time and in memory.

jinja2's sandbox keeps a template from Python's internals, but lets it loop for ever and build strings of any size. Here
every loop pass, call, operation that makes a value grow, and printed value is charged to a budget, before the memory is
taken where an operator or filter can multiply.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 5.0  # of one render
MAX_INT_BITS = 4096
MAX_SOURCE = 1 << 20  # characters of a template

# Filters that no chat template needs and whose cost is hard to bound.
_REMOVED = ("filesizeformat", "lipsum", "pprint", "random", "striptags", "urlize", "xmlattr")
# Methods of str and bytes that make a value longer than what goes in, but for those that `_growth` estimates.
_METHODS_REFUSED = frozenset({"translate", "format_map", "to_bytes", "encode", "maketrans"})
# A width, precision or nested field in a format string that could make a short value long.
_WIDE_FORMAT = re.compile(r"\d{4,}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class BudgetError(Exception):
    """The template did more than a chat template has reason to."""


class _Budget:
    """What one render may still do. A unit is about a character, a loop pass or a call."""

    def __init__(self, units: int) -> None:
        self._left = units
        self._deadline = time.monotonic() + SECONDS

    def charge(self, units: int = 1) -> None:
        self._left -= units
        if self._left < 0:
            raise BudgetError("it builds too much text, or loops too often")
        if time.monotonic() > self._deadline:
            raise BudgetError(f"it runs for more than {SECONDS:.0f} seconds")

    def charge_tree(self, value: Any) -> None:
        """Charges for all that is in a value, as often as printing it would show it."""
        stack = [value]
        while stack:
            match stack.pop():
                case str() | bytes() as text:
                    self.charge(1 + len(text))
                case dict() as table:
                    self.charge(1 + len(table))
                    stack.extend(table.keys())
                    stack.extend(table.values())
                case list() | tuple() | set() | frozenset() as items:
                    self.charge(1 + len(items))
                    stack.extend(items)
                case _:
                    self.charge()


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it shows what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


def _safe_namespace(*args: Any, **kwargs: Any) -> _SafeNamespace:
    names = dict(*args, **kwargs)
    made = _SafeNamespace()
    for name, value in names.items():
        made[name] = value
    return made


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict`, without its class methods."""
    return dict(*args, **kwargs)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders templates within a budget. Thread-safe."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: dict[str, Callable[..., Any]], functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._print
        )
        self._local = threading.local()
        for name in _REMOVED:
            self.filters.pop(name, None)
            self.globals.pop(name, None)
        self.filters.update(filters)
        self.filters = {name: self._charged(name, f) for name, f in self.filters.items()}
        self.filters |= {"__each": self._each, "__concat": self._concat, "__literal": self._literal}
        self.globals |= {"namespace": _safe_namespace, "dict": _dict}
        self.globals.update(functions)

    @contextlib.contextmanager
    def budget(self, units: int) -> Iterator[None]:
        """What this thread compiles or renders inside the block may cost `units`, and SECONDS."""
        self._local.budget = _Budget(units)
        try:
            yield
        finally:
            del self._local.budget

    def parse_bounded(self, source: str) -> nodes.Template:
        """The template's tree, with what jinja2 has no hooks for sent through filters that charge."""
        if len(source) > MAX_SOURCE:
            raise BudgetError(f"it is {len(source)} characters long, more than {MAX_SOURCE}")
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            fixed = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
            loop.iter = _filter(loop.iter, "__each", nodes.Const(1 + fixed))
        self._fixed_text = sum(len(d.data) for m in tree.find_all(nodes.Macro) for d in m.find_all(nodes.TemplateData))
        return _Rewriter().visit(tree).set_environment(self)

    @property
    def _budget(self) -> _Budget:
        return self._local.budget

    # --- what the generated code calls

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charges for the result before it is made."""
        match operator:
            case "+" if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                self._budget.charge(len(left) + len(right))
            case "*":
                for a, b in ((left, right), (right, left)):
                    if isinstance(a, str | bytes | list | tuple) and isinstance(b, int):
                        self._budget.charge(max(0, b) * len(a))
                if isinstance(left, int) and isinstance(right, int):
                    _check_bits(left.bit_length() + right.bit_length())
            case "**" if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * max(0, right))
            case "%" if isinstance(left, str):
                self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Charges for the call, what it may grow to, and its result."""
        budget = __self._budget
        if isinstance(__obj, LoopContext):  # a recursive loop calls itself with what to loop over
            args = tuple(__self._each(a, 1 + __self._fixed_text) for a in args)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes | int | float) and not isinstance(owner, Undefined):
            if name in _METHODS_REFUSED:
                raise SecurityError(f"the method `{name}` is not available in chat templates")
            budget.charge(_growth(name, owner, args, kwargs))
        budget.charge(1 + __self._fixed_text)
        result = super().call(__context, __obj, *args, **kwargs)
        __self._charge_result(result, nests=__obj is _dict)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, with widths that are not out of reason."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, (args, kwargs))
            return inner(*args, **kwargs)

        return bounded

    def _check_format(self, text: str, values: Any) -> None:
        if _WIDE_FORMAT.search(text):
            raise BudgetError("a format string asks for a wide field")
        copies = text.count("%") + text.count("{")
        self._budget.charge(len(text))
        for _ in range(min(copies, 1000)):
            self._budget.charge_tree(values)
        if copies > 1000:
            raise BudgetError("a format string has too many fields")

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, charged for what it may grow to and for its result."""

        @functools.wraps(function)  # keeps jinja2's mark for filters that take the environment first
        def charged(*args: Any, **kwargs: Any) -> Any:
            values = args[1:] if hasattr(function, "jinja_pass_arg") else args
            if values:
                if name == "format":
                    self._check_format(str(values[0]), (values[1:], kwargs))
                elif name == "join":
                    values = (list(values[0]), *values[1:])
                    args = (*args[: len(args) - len(values)], *values)
                if name in ("join", "string", "tojson"):
                    self._budget.charge_tree(values[0])
                self._budget.charge(_growth(name, values[0], values[1:], kwargs))
            result = function(*args, **kwargs)
            self._charge_result(result, nests=name in ("batch", "slice", "groupby"))
            return result

        return charged

    def _charge_result(self, result: Any, nests: bool) -> None:
        """Charges for a new value. One that puts values into others is walked: doing so can double its size."""
        if nests:
            self._budget.charge_tree(result)
        elif isinstance(result, str | bytes | list | tuple | dict):
            self._budget.charge(len(result))

    def _print(self, value: Any) -> Any:
        self._budget.charge_tree(value)
        return value

    def _each(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in items:
            self._budget.charge(cost)
            yield item

    def _concat(self, values: list[Any]) -> str:
        self._budget.charge_tree(values)
        return "".join(map(str, values))

    def _literal(self, value: Any) -> Any:
        self._budget.charge_tree(value)
        return value


class _Rewriter:
    """Sends `a ~ b` and list, tuple and dict literals through filters."""

    def visit(self, node: Any) -> Any:
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, field, self.visit(value))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(v) if isinstance(v, nodes.Node) else v for v in value])
        if isinstance(node, nodes.Concat):
            return _filter(nodes.List(node.nodes, lineno=node.lineno), "__concat")
        if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return _filter(node, "__literal")
        return node


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise BudgetError("it computes with very large numbers")


def _growth(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """An upper bound for the size of what a method or filter that can multiply its input returns."""

    def arg(position: int, keyword: str, default: Any) -> Any:
        return args[position] if len(args) > position else kwargs.get(keyword, default)

    size = len(value) if isinstance(value, str | bytes | list | tuple | dict) else 32
    match name:
        case "replace":
            old, new = str(arg(0, "old", arg(0, "s", ""))), str(arg(1, "new", ""))
            return size + (size // max(1, len(old)) + 1) * len(new)
        case "join" if isinstance(value, str):  # sep.join(items)
            items = arg(0, "iterable", ())
            if not isinstance(items, str | list | tuple | dict):
                raise BudgetError("`join` of something that is no list")
            return sum(len(i) if isinstance(i, str) else 1 for i in items) + size * len(items)
        case "join":  # items | join(sep)
            return size * (1 + len(str(arg(0, "d", ""))))
        case "center" | "ljust" | "rjust" | "zfill":
            return size + _number(arg(0, "width", 80))
        case "expandtabs" | "batch" | "slice":
            return size * _number(arg(0, "tabsize", arg(0, "linecount", arg(0, "slices", 8))))
        case "indent":
            width = arg(0, "width", 4)
            lines = 1 + str(value).count("\n")
            return size + lines * (len(width) if isinstance(width, str) else _number(width))
        case "wordwrap":
            return size * (1 + len(str(arg(2, "wrapstring", "\n"))))
        case "truncate":
            return size + len(str(arg(2, "end", "...")))
        case "sum":
            if not isinstance(arg(1, "start", 0), int | float):
                raise BudgetError("`sum` of something other than numbers")
        case "tojson":
            indent, separators = arg(1, "indent", 0), arg(2, "separators", ())
            widths = [len(x) if isinstance(x, str) else _number(x or 0) for x in (indent, *(separators or ()))]
            if max(widths, default=0) > 64:
                raise BudgetError("`tojson` with wide indents or separators")
    return size


def _number(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0
