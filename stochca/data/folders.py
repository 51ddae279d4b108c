"""What lies in a folder, for checks of datasets and for what they say."""

from pathlib import Path

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".7z", ".rar")


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order, but hidden ones and what archivers of macOS leave."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    )


def archives_in(folder: Path) -> list[str]:
    """Names of the archives in a folder, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and is_archive(path))


def is_archive(path: Path) -> bool:
    """Whether a file is an archive, by its name."""
    return path.suffix.lower() in _ARCHIVES


def contents(folder: Path) -> str:
    """What lies in a folder, in words: its folders, and archives that wait to be extracted."""
    folders, archives = folders_in(folder), archives_in(folder)
    words = [listed(folders) or "no folders"]
    if archives:
        words.append(f"the archives {listed(archives)}, which must be extracted first")
    return " and ".join(words)


def listed(names: list[str], most: int = 10) -> str:
    """Names in a row, not more than a reader bears."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
