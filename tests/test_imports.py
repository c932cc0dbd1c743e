"""Imports between folders point one way, and the table of docs/architecture.md says what each folder imports."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "simvlg_jax"
VERBS = "verbs"
REMOTE_CODE = "remote_code"
ALIASES = {"data/prepare.py", "data/inspect.py", "convert/from_torch.py", "convert/to_torch.py"}  # of verbs


def folder_of(parts: tuple[str, ...]) -> str:
    """Returns the folder of a file or module, given by its path below the package."""
    return parts[0] if len(parts) > 1 else VERBS


def imported(path: Path) -> set[str]:
    """Returns the folders of the package that a file imports from, also inside functions."""
    folders = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if path.parent.name == REMOTE_CODE:  # it has no package where it is copied to
                assert node.level <= 1, f"{path}: import from outside of its folder"
                continue
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "simvlg_jax" and parts:
                is_folder = (PACKAGE / parts[0]).is_dir()
                folders.add(parts[0] if is_folder else VERBS)
    return folders


def arrows() -> dict[str, set[str]]:
    """Returns {folder: other folders that its files import from}."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] == "recipes":
            continue
        folder = VERBS if "/".join(parts) in ALIASES else folder_of(parts)
        found.setdefault(folder, set()).update(imported(path) - {folder})
    return found


def documented() -> dict[str, set[str]]:
    """Returns the table of folders in docs/architecture.md: {folder: what it imports}."""
    rows = re.findall(r"^\| `(\w+)/?`[^|]*\|[^|]*\| ([^|]*) \|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    return {folder: set(re.findall(r"\w+", imports)) for folder, imports in rows}


def test_table_of_folders_is_what_the_files_import():
    assert documented() == arrows()


def test_no_folder_imports_one_that_stands_below_it_in_the_table():
    """Each row imports only from rows above it, so there is no circle."""
    above: set[str] = set()
    for folder, imports in documented().items():
        assert imports <= above, folder
        above.add(folder)
