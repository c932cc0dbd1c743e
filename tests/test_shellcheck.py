"""shellcheck accepts every shell script."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"  # requirements-test.txt has it
    scripts = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"))
    result = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
