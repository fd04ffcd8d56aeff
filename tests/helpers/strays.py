"""A folder as somebody may have it: with Python files of his own under names that others have too."""

from pathlib import Path

FOLDERS = ("jobs", "schemas", "pipeline", "tinyworld")
MODULES = ("types", "random", "torch")


def fill(folder: Path) -> Path:
    """Put there packages and modules that end whoever imports them."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('a stray {name} was imported')\n")
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('a stray {name} was imported')\n")
    return folder
