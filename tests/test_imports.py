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
        if path.parent.name == REMOTE_CODE:
            assert "simvlg_jax" not in ast.unparse(node) or not isinstance(node, ast.Import | ast.ImportFrom), path
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == "simvlg_jax" and parts:
                is_folder = (PACKAGE / parts[0]).is_dir()
                folders.add(parts[0] if is_folder else VERBS)
    return folders


def test_code_that_is_exported_stands_alone_and_one_file_names_all_others():
    """It has no package where it is copied to, and older transformers copy only what modeling_simvlg imports itself."""
    folder = PACKAGE / "huggingface" / REMOTE_CODE
    files = {path.stem: ast.walk(ast.parse(path.read_text())) for path in folder.glob("[a-z]*.py")}
    found = {name: [node for node in nodes if isinstance(node, ast.ImportFrom)] for name, nodes in files.items()}
    assert all(node.level <= 1 for nodes in found.values() for node in nodes)
    assert {node.module for node in found["modeling_simvlg"] if node.level} == files.keys() - {"modeling_simvlg"}


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
