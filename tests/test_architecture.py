"""The layout is the architecture: imports only point down, and files stay readable."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "lorank"

# From the bottom to the top. A module may import from lower lines, and within its own folder.
LAYERS = [
    {"errors", "version"},
    {"extras", "idle"},
    {"lowrank", "hosts", "fingerprint", "reading", "shapes", "copied"},
    {"merge_report"},
    {"variants"},
    {"adapted"},
    {"tree"},
    {"companions", "names", "ties"},
    {"targets", "tied"},
    {"tokens"},
    {"copies", "blocks"},
    {"baselines"},
    {"planned"},
    {"planning"},
    {"surgery"},
    {"merging", "health", "calibrating", "prefixes"},
    {"formats"},
    {"training", "data", "checkpoints", "examining", "converting"},
    {"evaluation", "streaming", "models"},
    {"tasks", "arithmetic", "accounting"},
    {"runs", "demo"},
    {"adapter_files", "reproduction", "comparison"},
    {"card"},
    {"hub"},
    {"cli"},
    {"", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LONGEST = 400  # lines of a file


def part(path: Path) -> str:
    """Return the first component of a module's path in the package: its place in LAYERS."""
    first = path.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the parts of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].relative_to(ROOT)
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(base / module.replace(".", "/")).parts[0] for module in modules}
    return found


def test_every_part_has_its_place() -> None:
    assert {part(path) for path in ROOT.rglob("*.py")} == set(RANK)


def test_imports_only_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {it}"
        for path in ROOT.rglob("*.py")
        for it in imports(path)
        if it != part(path) and RANK[it] >= RANK[part(path)]
    ]
    assert not wrong, wrong


def test_files_stay_readable() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
