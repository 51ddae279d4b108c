"""The script in docs/datasets.md, on archives of a few images."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.fixture(scope="module")
def script():
    """What the script defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    defined = {"__name__": "lay_out"}
    exec(code, defined)
    return defined


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_cub(raw):
    base = raw / "CUB_200_2011"
    paths = [f"{name}/{name}_{i}.jpg" for name in ("001.Albatross", "002.Auklet") for i in range(6)]
    for path in paths:
        write(base / "images" / path)
    write(base / "images.txt", "".join(f"{i + 1} {path}\n" for i, path in enumerate(paths)))
    write(base / "train_test_split.txt", "".join(f"{i + 1} {int(i % 6 < 4)}\n" for i in range(12)))


def write_cars(raw):
    cells = np.empty((1, 2), dtype=object)
    cells[0] = ["Audi S4", "Ram C/V Van"]
    (raw / "devkit").mkdir()
    savemat(raw / "devkit/cars_meta.mat", {"class_names": cells})
    for file, count in (("devkit/cars_train_annos.mat", 4), ("cars_test_annos_withlabels.mat", 2)):
        split = "train" if "train" in file else "test"
        rows = [(number, f"{number}{i}.jpg") for number in (1, 2) for i in range(count)]
        for _, name in rows:
            write(raw / f"cars_{split}" / name)
        table = np.array([rows], dtype=[("class", object), ("fname", object)])
        savemat(raw / file, {"annotations": table})


def write_aircraft(raw):
    base = raw / "fgvc-aircraft-2013b/data"
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        rows = [
            (f"{split}{i}{j}", name) for j, name in enumerate(("707-320", "F/A-18")) for i in range(count)
        ]
        write(base / f"images_variant_{split}.txt", "".join(f"{number} {name}\n" for number, name in rows))
        for number, _ in rows:
            write(base / "images" / f"{number}.jpg")


def write_dogs(raw):
    for split, count in (("train", 4), ("test", 2)):
        paths = [f"n02-{name}/{split}_{i}.jpg" for name in ("Chihuahua", "Maltese") for i in range(count)]
        for path in paths:
            write(raw / "Images" / path)
        cells = np.empty((len(paths), 1), dtype=object)
        cells[:, 0] = paths
        savemat(raw / f"{split}_list.mat", {"file_list": cells})


@pytest.mark.parametrize(
    ("name", "write_archives", "classes"),
    [
        ("cub", write_cub, ["001.Albatross", "002.Auklet"]),
        ("cars", write_cars, ["Audi S4", "Ram C-V Van"]),
        ("aircraft", write_aircraft, ["707-320", "F-A-18"]),
        ("dogs", write_dogs, ["n02-Chihuahua", "n02-Maltese"]),
    ],
)
def test_the_archives_come_to_lie_as_the_recipes_want_them(tmp_path, script, name, write_archives, classes):
    raw, root = tmp_path / "raw", tmp_path / "root"
    raw.mkdir()
    write_archives(raw)
    script["lay_out"](script[name](raw), root, hold_out=0 if name == "aircraft" else 4)
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        assert sorted(path.name for path in (root / split).iterdir()) == classes
        for folder in (root / split).iterdir():
            assert len([path for path in folder.iterdir() if path.is_file()]) == count
