"""Options of the paper's experiments, as YAML files: one per dataset and, for fine-tuning, image size."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of all recipes, in order."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe, to be given as `--config`.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in recipe_names():
        raise ValueError(f"there is no recipe {name!r}, only {', '.join(recipe_names())}")
    return _FOLDER / f"{name}.yaml"
