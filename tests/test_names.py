"""A public name means one thing in the package, and a docstring says what the name does not."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sae_lightning"
FILES = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text("utf8")) for name, file in FILES.items()}

# Names that several modules define, with the one meaning that they share.
SHARED = {
    "weighted_sums": "the same product, in torch and in Triton",
    "dots": "the same product, in torch and in Triton",
}
# Methods that unrelated classes have, with the one meaning that they share.
PROTOCOLS = {
    "add_histogram": "takes the distribution of a curve's values at a number of tokens",
    "add_scalars": "takes one point of each named curve",
    "add": "takes the next part of what is summed up",
    "close": "frees what an object holds",
    "epoch": "how often the text has been read so far",
    "flush": "writes what is buffered to disk",
    "forward": "torch's",
    "backward": "torch's",
    "llm_seconds": "time that the LLM has taken so far",
    "load_state_dict": "torch's",
    "state_dict": "torch's",
    "next": "the next rows of an endless stream",
    "peek": "the next rows without consuming them",
    "result": "what a reducer has summed up",
    "scalars": "numbers by name, for a file",
    "to_dict": "results by key, as a JSON file holds them",
}
LIGHTNING = "on_"  # its hooks


def tops(tree: ast.Module) -> list[str]:
    """The names that a module defines: functions, classes, constants."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def classes() -> dict[str, tuple[list[str], list[str]]]:
    """Class -> its bases, and its public methods."""
    found = {}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
                methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
                found[node.name] = bases, [m for m in methods if not m.startswith("_")]
    return found


def families(known: dict[str, tuple[list[str], list[str]]], name: str) -> frozenset[str]:
    """A class and all that it inherits from within the package."""
    bases = [base for base in known[name][0] if base in known]
    return frozenset({name}).union(*(families(known, base) for base in bases))


def test_a_name_is_defined_in_one_module():
    where = defaultdict(list)
    for module, tree in TREES.items():
        for name in tops(tree):
            where[name].append(module)
    twice = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert {n: m for n, m in twice.items() if n not in SHARED} == {}
    assert sorted(SHARED) == sorted(set(SHARED) & set(twice)), "exceptions that nothing needs"


def test_a_method_means_the_same_wherever_it_is_defined():
    known, where = classes(), defaultdict(list)
    for name, (_, methods) in known.items():
        for method in methods:
            if not method.startswith(LIGHTNING):
                where[method].append(name)
    unrelated = {}
    for method, owners in where.items():
        # overriding is one meaning: all owners inherit from one that defines it
        roots = [o for o in owners if not (families(known, o) - {o}) & set(owners)]
        if len(roots) > 1:
            unrelated[method] = roots
    assert {m: o for m, o in unrelated.items() if m not in PROTOCOLS} == {}
    assert sorted(PROTOCOLS) == sorted(set(PROTOCOLS) & set(unrelated)), "nothing needs these"


def test_a_function_and_a_method_of_one_name_do_the_same():
    functions = {name for tree in TREES.values() for name in tops(tree)}
    methods = {method for _, names in classes().values() for method in names}
    assert functions & methods == set()


def test_a_file_name_is_used_once():
    where = defaultdict(list)
    for module in FILES:
        where[Path(module).name].append(module)
    assert {n: m for n, m in where.items() if len(m) > 1 and n != "__init__.py"} == {}


def test_a_docstring_says_what_the_name_does_not():
    short = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                doc = ast.get_docstring(node)
                if doc is not None and len(doc.split()) < 5:
                    short.append((module, getattr(node, "name", ""), doc))
    assert short == []
