"""What a docstring of the core must say, as far as a machine can tell: that it is there, arrays' shapes,
errors raised.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "momentum_lm"
ROOMS = ("ops", "model", "text", "formats", "lm", "icl", "analysis", "studies", "report", "planning", "harness")
ARRAYS = re.compile(r"\b(Tensor|NDArray|ArrayLike|Floats)\b")
SHAPE = re.compile(r"\([\w'*./ +-]+(, ?(\.\.\.|[\w'*./ +-]+))*,?\)|shape|as in :|[Aa]s :|Same function")
FILES = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))


def public(tree):
    """(name, node) of public functions, classes, and their public methods."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


def inherits(tree, name):
    """Whether the class of a method has a base, whose docstring stands for one that it lacks."""
    return any(
        isinstance(node, ast.ClassDef) and node.name == name.partition(".")[0] and node.bases for node in tree.body
    )


def takes_arrays(node):
    hints = [a.annotation for a in [*node.args.args, *node.args.kwonlyargs]] + [node.returns]
    return any(hint is not None and ARRAYS.search(ast.unparse(hint)) for hint in hints)


def raises(node):
    """Whether the function itself raises an error that a caller should know of."""
    raised = [
        ast.unparse(inner.exc) for inner in ast.walk(node) if isinstance(inner, ast.Raise) and inner.exc is not None
    ]
    return any(not re.match(r"(NotImplementedError|error\b)", error) for error in raised)


def overrides(name, node):
    """A method that fills in what a base class documents."""
    named = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
    return "." in name and (
        node.name in ("forward", "html") or any(text.endswith(("property", "setter")) for text in named)
    )


def problems(path):
    tree = ast.parse(path.read_text("utf-8"))
    if ast.get_docstring(tree) is None and path.name != "__init__.py":
        yield "the module has none"
    for name, node in public(tree):
        text = ast.get_docstring(node) or ""
        if not text and not overrides(name, node) and not ("." in name and inherits(tree, name)):
            yield f"{name} has none"
        if not text or isinstance(node, ast.ClassDef):
            continue
        if takes_arrays(node) and not SHAPE.search(text):
            yield f"{name} takes or gives arrays and says no shape"
        if raises(node) and not re.search(r"[Rr]aise|refuse", text):
            yield f"{name} raises and does not say so"


def test_docstrings():
    found = [f"{path.relative_to(PACKAGE)}: {problem}" for path in FILES for problem in problems(path)]
    assert len(FILES) > 80 and not found, "\n".join(found)
