"""Small faults put into a module's source one at a time: what a test-suite must notice."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
}
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}

Edit = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: where, what the statement was and became, and the code of the whole module with it."""

    module: str
    line: int
    before: str
    after: str
    code: CodeType

    @property
    def told(self) -> str:
        """`check_order:41: a < b -> a <= b`."""
        return f"{self.module.rsplit('.', 1)[-1]}:{self.line}: {self.before} -> {self.after}"


def mutants(module: str, path: Path) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its source."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for owner in _functions(tree):
        for node in _judged(owner):
            for before, after, change, undo in _edits(node):
                change()
                code = compile(ast.fix_missing_locations(tree), str(path), "exec")
                undo()
                line = getattr(node, "lineno", owner.lineno)
                yield Mutant(module, line, before, after, code)


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions and methods, not those inside others."""
    found: list[ast.FunctionDef] = []
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        found += [one for one in inner if isinstance(one, ast.FunctionDef)]
    return found


def _judged(owner: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body whose value can decide something: no annotation, docstring or message."""
    for name, value in ast.iter_fields(owner):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(owner, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.Assign) and _is_message(child):
                continue
            yield child
            yield from _judged(child)
            if isinstance(child, ast.stmt) and isinstance(value, list):
                yield _Place(value, value.index(child))


class _Place(ast.AST):
    """A statement's place in its block, where it can be left out."""

    def __init__(self, block: list[ast.stmt], number: int) -> None:
        super().__init__()
        self.block, self.number = block, number
        self.lineno = block[number].lineno


def _is_message(node: ast.Assign) -> bool:
    target = node.targets[0]
    return isinstance(target, ast.Name) and target.id in ("message", "path", "where", "what")


def _edits(node: ast.AST) -> Iterator[tuple[str, str, Edit, Edit]]:
    """(before, after, change, undo) of every fault that one node can have."""
    if isinstance(node, _Place):
        yield from _omissions(node)
    elif isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            yield _swap(node, node.ops, number, COMPARISONS[type(operator)]())
    elif isinstance(node, ast.BoolOp):
        yield _set(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for number in range(len(node.values)):
            yield _swap(node, node.values, number, ast.Constant(isinstance(node.op, ast.And)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _become(node, node.operand)
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.BitOr):
            yield _become(node, node.left)
            yield _become(node, node.right)
        elif type(node.op) in OPERATORS:
            yield _set(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield _set(node, "value", not node.value)
        elif isinstance(node.value, int | float):
            yield _set(node, "value", node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield _set(node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension):
        for number in range(len(node.ifs)):
            yield _swap(node, node.ifs, number, ast.Constant(True))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OPPOSITES:
        yield _set(node, "func", ast.Name(OPPOSITES[node.func.id], ast.Load()))
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.UnaryOp):
        yield _set(node, "slice", ast.Constant(0))


def _omissions(place: _Place) -> Iterator[tuple[str, str, Edit, Edit]]:
    """A yield, a call, an addition or a jump that is left out, a result that is forgotten."""
    node = place.block[place.number]
    if isinstance(node, ast.Return) and node.value is not None:
        is_constant = isinstance(node.value, ast.Constant)
        if not is_constant:
            yield _swap(place, place.block, place.number, ast.Return(ast.Constant(None)))
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Continue | ast.Break | ast.Return | ast.Delete):
        yield _swap(place, place.block, place.number, _nothing(node))


def _nothing(node: ast.stmt) -> ast.stmt:
    """A statement that does nothing; a generator without its only yield stays one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom):
        return ast.Expr(ast.YieldFrom(ast.Tuple([], ast.Load())))
    return ast.Pass()


def _swap(node: ast.AST, items: list, number: int, new: ast.AST) -> tuple[str, str, Edit, Edit]:  # type: ignore[type-arg]
    old = items[number]
    owner = old if isinstance(node, _Place) else node
    before = ast.unparse(owner)

    def put(what: ast.AST) -> None:
        items[number] = what

    put(ast.copy_location(new, old) if isinstance(new, ast.stmt) else new)
    after = ast.unparse(ast.fix_missing_locations(items[number] if isinstance(node, _Place) else node))
    put(old)
    return before, after, lambda: put(new), lambda: put(old)


def _set(node: ast.AST, name: str, new: object) -> tuple[str, str, Edit, Edit]:
    old = getattr(node, name)
    before = _head(node)
    setattr(node, name, new)
    after = _head(node)
    setattr(node, name, old)
    return before, after, lambda: setattr(node, name, new), lambda: setattr(node, name, old)


def _become(node: ast.AST, other: ast.AST) -> tuple[str, str, Edit, Edit]:
    """The node turns into one of its parts."""
    fields, kind = dict(node.__dict__), node.__class__

    def change() -> None:
        node.__class__ = other.__class__
        node.__dict__.clear()
        node.__dict__.update(other.__dict__)

    def undo() -> None:
        node.__class__ = kind
        node.__dict__.clear()
        node.__dict__.update(fields)

    return ast.unparse(node), ast.unparse(other), change, undo


def _head(node: ast.AST) -> str:
    """The text of a node; of a statement with a block, its condition."""
    if isinstance(node, ast.If | ast.While):
        return f"if {ast.unparse(node.test)}"
    return ast.unparse(node)


class CodeLoader(InspectLoader):
    """Runs compiled code as a module that is there already."""

    def __init__(self, code: CodeType) -> None:
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        """The code, whatever the module is called."""
        return self._code

    def get_source(self, fullname: str) -> None:
        """Nobody reads it."""
        return


def run_in(module: ModuleType, code: CodeType) -> None:
    """Run `code` as if it were the text of `module`."""
    CodeLoader(code).exec_module(module)
