"""What the folders of the recipes' datasets must look like."""

import re

import pytest

from stochca.data import LAYOUTS, check_layout


def write_layout(root, name):
    layout = LAYOUTS[name]
    for part in layout.parts:
        for number in range(layout.num_classes):
            (root / part / f"class {number:03}").mkdir(parents=True)
    return root


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "domainnet"])
def test_a_complete_dataset_passes(tmp_path, name):
    root = write_layout(tmp_path, name)
    (root / "README.txt").write_text("")
    (root / "archive.zip").write_text("")
    (root / "__MACOSX").mkdir()
    check_layout(name, str(root))


@pytest.mark.parametrize("name", ["vlcs", "aircraft"])
def test_a_missing_part_is_told_with_what_was_wanted_and_found(tmp_path, name):
    layout = LAYOUTS[name]
    first, *others = layout.parts
    for part in others:
        (tmp_path / part).mkdir()
    (tmp_path / f"{first}.tar.gz").write_text("")
    wanted = f"{layout.title} wants the {layout.part}s {', '.join(layout.parts)}; {tmp_path} has "
    found = f"{', '.join(sorted(others))} and the archives {first}.tar.gz, which must be extracted first"
    with pytest.raises(ValueError, match=re.escape(wanted + found)):
        check_layout(name, str(tmp_path))


def test_a_further_domain_is_refused_and_a_further_split_is_not(tmp_path):
    write_layout(tmp_path / "pacs", "pacs")
    write_layout(tmp_path / "dogs", "dogs")
    for name in ("pacs", "dogs"):
        (tmp_path / name / "more").mkdir()
    check_layout("dogs", str(tmp_path / "dogs"))
    with pytest.raises(ValueError, match=r"PACS wants .*art_painting, cartoon, more, photo, sketch"):
        check_layout("pacs", str(tmp_path / "pacs"))


def test_another_number_of_classes_is_told(tmp_path):
    write_layout(tmp_path, "pacs")
    (tmp_path / "photo" / "class 002").rmdir()
    with pytest.raises(
        ValueError, match=r"wants 7 folders of classes in each domain; .*photo has 6: class 000,"
    ):
        check_layout("pacs", str(tmp_path))
    for number in (0, 1, 3, 4, 5, 6):
        (tmp_path / "photo" / f"class 00{number}").rmdir()
    (tmp_path / "photo" / "all.zip").write_text("")
    with pytest.raises(ValueError, match=r"photo has 0: no folders and the archives all\.zip"):
        check_layout("pacs", str(tmp_path))


def test_a_missing_folder_and_an_unknown_layout_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"PACS wants the domains .*nowhere is not there"):
        check_layout("pacs", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"must be one of cub, cars, .*, got flowers"):
        check_layout("flowers", str(tmp_path))
