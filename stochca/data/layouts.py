"""What the folders of the recipes' datasets look like. docs/datasets.md says how to get there."""

from pathlib import Path
from typing import NamedTuple

from stochca.data.folders import contents, folders_in, listed


class Layout(NamedTuple):
    """Folders of a dataset, and how many classes each of them holds.

    Attributes:
        title: What the dataset is called.
        part: What its folders are: splits or domains.
        parts: Their names.
        num_classes: Folders of classes in each of them.
    """

    title: str
    part: str
    parts: tuple[str, ...]
    num_classes: int


_SPLITS = ("train", "val", "test")

LAYOUTS = {
    "cub": Layout("CUB-200-2011", "split", _SPLITS, 200),
    "cars": Layout("Stanford Cars", "split", _SPLITS, 196),
    "aircraft": Layout("FGVC-Aircraft", "split", _SPLITS, 100),
    "dogs": Layout("Stanford Dogs", "split", _SPLITS, 120),
    "pacs": Layout("PACS", "domain", ("art_painting", "cartoon", "photo", "sketch"), 7),
    "vlcs": Layout("VLCS", "domain", ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5),
    "officehome": Layout("OfficeHome", "domain", ("Art", "Clipart", "Product", "Real World"), 65),
    "terraincognita": Layout(
        "TerraIncognita", "domain", ("location_100", "location_38", "location_43", "location_46"), 10
    ),
    "domainnet": Layout(
        "DomainNet", "domain", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 345
    ),
}


def check_layout(name: str, root: str) -> None:
    """Check that a folder looks as a dataset should.

    Args:
        name: One of `LAYOUTS`.
        root: The folder.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No such layout, or the folder is of another.
    """
    if name not in LAYOUTS:
        raise ValueError(f"--layout must be one of {', '.join(LAYOUTS)}, got {name}")
    layout, folder = LAYOUTS[name], Path(root)
    wanted = f"{layout.title} wants the {layout.part}s {', '.join(layout.parts)}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{wanted}; {root} is {'a file' if folder.exists() else 'not there'}")
    missing = {*layout.parts} - {*folders_in(folder)}
    # A further domain would be trained on; a further split is nobody's concern.
    is_fine = not missing and (layout.part == "split" or len(folders_in(folder)) == len(layout.parts))
    if not is_fine:
        raise ValueError(f"{wanted}; {root} has {contents(folder)}")
    for part in layout.parts:
        classes = folders_in(folder / part)
        if len(classes) != layout.num_classes:
            found = listed(classes, 5) if classes else contents(folder / part)
            raise ValueError(
                f"{layout.title} wants {layout.num_classes} folders of classes in each {layout.part}; "
                f"{folder / part} has {len(classes)}: {found}"
            )
