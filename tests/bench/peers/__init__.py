"""Other people's ways to bring a topic into Postgres, each from PyPI in an environment of its own.

    <name>/requirements.txt   what it is installed from
    <name>/land.py            python land.py STARTED TASK: lands the topic in TABLE, prints seconds and memory

Off by default: `python -m tests.bench --contestants limit warehouse pathway`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parent
NAMES = sorted(path.parent.name for path in HOME.glob("*/land.py"))
# Where each of them leaves its rows.
TABLE = "public.peer"


def ensure_python(name: str, folder: Path) -> Path:
    """The interpreter of the peer's environment below the folder, made on first use."""
    home = folder / name
    python = home / "bin" / "python"
    if (home / ".ready").exists():
        return python
    requirements = HOME / name / "requirements.txt"
    if shutil.which("uv"):
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, home], check=True)
        install = ["uv", "pip", "install", "--quiet", "--python", python]
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--requirement", requirements], check=True)
    (home / ".ready").touch()
    return python
