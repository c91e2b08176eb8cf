"""Imports run one way, between packages and inside them."""

import ast
import re
from graphlib import TopologicalSorter

from helpers import ROOT

# Each line of this part of the page imports from its own line and those below it.
ORDER = re.search(r"```\n(main .*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)[1]
LEVEL = {name: -level for level, line in enumerate(ORDER.splitlines()) for name in line.split()}
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for name in LEVEL
    for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")]
}


def imports_of(module: str) -> set[str]:
    """The full names of the modules that a module imports."""
    modules = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = [module.split(".")[0]] if node.level else []  # packages are not nested
            base = ".".join([*package, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            modules |= names & TREES.keys() or {base}
    return modules - {module}


def test_imports_run_one_way():
    assert len(TREES) > 50
    ours = {module: imports_of(module) & TREES.keys() for module in TREES}
    for module, below in ours.items():
        for other in below:
            levels = [LEVEL[name.split(".")[0]] for name in (module, other)]
            assert levels[0] >= levels[1], f"{module} imports {other}"
    TopologicalSorter(ours).prepare()  # raises CycleError


def test_flags_and_errors_need_neither_torch_nor_timm():
    for module in TREES:
        if LEVEL[module.split(".")[0]] == min(LEVEL.values()):
            assert not {"torch", "timm"} & {name.split(".")[0] for name in imports_of(module)}


def test_the_packages_below_know_flags_as_plain_values_only():
    """A namespace of argparse goes no further down than teacher/ and training/."""
    for module, tree in TREES.items():
        if module.split(".")[0] in ("data", "models", "runtime", "reporting", "deploy"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert node.value.id != "args", f"{module}, line {node.lineno}"
