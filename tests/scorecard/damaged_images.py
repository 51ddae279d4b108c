"""R12: images of any kind are read as they look, or refused by an error that names the file."""

import io
import os
import re
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.scorecard.row import Case, Figures

_OTHER = ".other.png"


def cases(long: bool) -> Iterator[Case]:
    """Each kind by index, in training, in evaluation, and as a stream."""
    yield Case("kinds look as they are", _kinds)
    yield Case("photographs are upright", _turned)
    yield Case("damaged files are named", partial(_named, "damaged"))
    yield Case("bombs are named, and take no memory", partial(_named, "bombs"))
    yield Case("what is no file", _no_files)
    yield Case("names that are no text", _odd_names)
    yield Case("links in circles", _circles)
    yield Case("kinds by torchvision", partial(_kinds, "torch/image_folder"))
    yield Case("kinds in shards", partial(_shards, damaged=False))
    yield Case("training and evaluation stop, naming the file", partial(_commands, long))
    if long:
        yield Case("damaged files in shards are counted", partial(_shards, damaged=True))
        yield Case("kinds of Hugging Face", _hugging_face)
        yield Case("training and evaluation leave them out", _left_out)


def _kinds(dataset: str = "") -> Figures:
    from tests.scorecard.pictures import readable

    files = readable()
    with _images({name: content for name, (content, _) in files.items()}, dataset) as images:
        for index in range(len(images)):
            name = Path(images.name(index)).name
            _looks(images[index][0], files[name.removesuffix(_OTHER)][1], name)
        images.check_readable()
        assert len(images) == len(files)
    return {"cases": len(files)}


def _looks(pixels: Any, colour: tuple[int, int, int], name: str) -> None:
    import numpy as np

    assert pixels.ndim == 3, f"{name}: {pixels.shape}"
    off = np.abs(pixels.astype(int) - np.array(colour)).max()
    assert off <= 4, f"{name}: {pixels[0, 0]}, wanted {colour}"


def _turned() -> Figures:
    from tests.scorecard.pictures import turned

    files = turned()
    with _images({f"{orientation}.jpg": content for orientation, content in files.items()}) as images:
        for index in range(len(images)):
            pixels, name = images[index][0], images.name(index)
            assert pixels[:12].min() > 250, f"{name}: the upper half is not white"
            assert pixels[20:].max() < 5, f"{name}: the lower half is not black"
    return {"cases": len(files)}


def _named(kind: str) -> Figures:
    from tests.scorecard import pictures

    files: Mapping[str, bytes] = getattr(pictures, kind)()
    most = 0.0
    for name, content in files.items():
        with _images({name: content}) as images:
            before = _peak(reset=True)
            images[0]
            most = max(most, _peak() - before)
            assert images.unreadable_names() == [images.name(0)], f"{name} is read"
            _raises(images.check_readable, f"cannot read image .*{re.escape(name)}.*: .+ --skip-corrupt")
    if kind == "bombs":
        assert most < 50, f"a bomb took {most:.0f} MiB"
        return {"cases": len(files), "bomb_MiB": round(most, 1)}
    return {"cases": len(files)}


def _peak(*, reset: bool = False) -> float:
    """The most memory that the process has had, in MiB; from now on where it is reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _no_files() -> Figures:
    """Folders are passed over; what cannot be opened is named."""
    with tempfile.TemporaryDirectory() as folder:
        root = _written(Path(folder), {"good.png": _good()})
        (root / "a" / "folder.jpg").mkdir()
        (root / "a" / "to_itself.jpg").symlink_to("to_itself.jpg")
        (root / "a" / "to_nothing.jpg").symlink_to("nothing.jpg")
        images = _opened(root)
        for index in range(len(images)):
            images[index]
        names = [Path(name).name for name in images.unreadable_names()]
        assert names == ["to_itself.jpg", "to_nothing.jpg"], names
        assert len(images) == 3
    return {"cases": 3}


def _odd_names() -> Figures:
    """Files and classes whose names are no UTF-8 can be read, and named."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, content in ((b"good-\xff.png", _good()), (b"bad-\xfe.png", b"no image")):
            path = os.path.join(os.fsencode(root), b"class-\xfd", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
        images = _opened(root)
        for index in range(len(images)):
            images[index]
        (name,) = images.unreadable_names()
        assert name.encode().endswith(rb"class-\xfd/bad-\xfe.png"), name
        _raises(images.check_readable, r"bad-\\xfe.png: cannot identify")
    return {"cases": 2}


def _circles() -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        root = _written(Path(folder), {"good.png": _good()})
        for target in (root, root / "a"):
            link = root / "a" / "link"
            link.symlink_to(target)
            _raises(lambda: _opened(root), "a/link is a link to a folder that it lies in")
            link.unlink()
    return {"cases": 2}


def _shards(damaged: bool) -> Figures:
    """WebDataset reads the kinds as they look, and counts those that cannot be read."""
    from tests.scorecard import pictures

    files = {name: content for name, (content, _) in pictures.readable().items()}
    # It knows images by these endings.
    files = {name: content for name, content in files.items() if name.endswith((".png", ".jpg", ".webp"))}
    bad = (
        {f"bad_{n}": c for n, c in pictures.damaged().items() if n.endswith(("png", "jpg"))}
        if damaged
        else {}
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to the garbage collector
        with tarfile.open(f"{folder}/set-0.tar", "w") as tar:
            for number, (name, content) in enumerate({**files, **bad}.items()):
                for suffix, data in ((name.rpartition(".")[2], content), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        images = _opened(Path(folder), "wds/set", f"set-0.tar|{len(files) + len(bad)}")
        names = list(files)
        seen = 0
        for pixels, target in images:
            _looks(pixels, pictures.readable()[names[target]][1], names[target])
            seen += 1
        assert (seen, images.skipped.value) == (len(files), len(bad)), (seen, images.skipped.value)
        if bad:
            _raises(images.check_readable, f"cannot read {len(bad)} images of split .* of wds/set")
    return {"cases": len(files) + len(bad)}


def _hugging_face() -> Figures:
    from tests.scorecard.pictures import readable, turned

    files = {name: content for name, (content, _) in readable().items()}
    colours = {colour for _, colour in readable().values()}
    with tempfile.TemporaryDirectory() as folder:
        root = _written(Path(folder) / "train", files).parent
        (root / "train" / "b").mkdir()
        for orientation, content in turned().items():
            (root / "train" / "b" / f"{orientation}.jpg").write_bytes(content)
        seen = [0, 0]
        for pixels, target in _opened(root, f"hfids/{root}", "train", num_samples=len(files) + 8):
            if target:
                assert pixels[:12].min() > 250, "not upright"
            else:
                assert any(abs(pixels[0, 0].astype(int) - c).max() <= 4 for c in colours), pixels[0, 0]
            seen[target] += 1
        assert seen == [len(files), 8], seen
    return {"cases": len(files) + 8}


def _commands(long: bool) -> Figures:
    """Both end with code 2 and one line that names the file, whatever reads the images."""
    from tests.scorecard.commands import call, finetuning
    from tests.train.image_folder import write_images

    count = 0
    with tempfile.TemporaryDirectory() as folder:
        root = write_images(Path(folder) / "images", {"train": 2, "validation": 2}, ("ant", "bee"))
        for split in ("train", "validation"):
            bad = root / split / "bee" / "bad.jpg"
            for content in (b"", *([b"no image"] if long else [])):
                bad.write_bytes(content)
                for workers in ("0", *(["1"] if long else [])):
                    run = finetuning(root, Path(folder) / f"run{count}", "--workers", workers)
                    code, errors = call(run)
                    assert code == 2, f"{split}: {code}, {errors}"
                    assert f"cannot read image {bad}" in errors, errors
                    assert "Traceback" not in errors, errors
                    count += 1
            bad.unlink()
    return {"cases": count}


def _left_out() -> Figures:
    """With the option, a run and its evaluation end, and tell what they have left out."""
    import json

    from tests.scorecard.commands import call, finetuning
    from tests.scorecard.pictures import bombs, damaged
    from tests.train.image_folder import write_images

    files = {**damaged(), **{f"bomb_{name}": content for name, content in bombs().items()}}
    with tempfile.TemporaryDirectory() as folder:
        root = write_images(Path(folder) / "images", {"train": 2, "validation": 2}, ("ant", "bee"))
        for split in ("train", "validation"):
            for name, content in files.items():
                (root / split / "bee" / _found(name)).write_bytes(content)
        run = Path(folder) / "run"
        code, errors = call(finetuning(root, run, "--skip-corrupt", "--workers", "1"))
        assert code == 0, errors
        skipped = json.loads((run / "summary.json").read_text())["skipped"]
        wanted = {
            str(root / split / "bee" / _found(name)) for split in ("train", "validation") for name in files
        }
        assert {*skipped} == wanted, f"told {len(skipped)} of {len(wanted)}"
        evaluation = ["evaluate", str(run / "last.safetensors"), "--data-dir", str(root), "--device", "cpu"]
        code, errors = call([*evaluation, "--workers", "0", "--skip-corrupt"])
        assert code == 0, errors
        code, errors = call([*evaluation, "--workers", "0"])
        assert code == 2, errors
        assert "cannot read image" in errors, errors
    return {"cases": 2 * len(files)}


@contextmanager
def _images(files: Mapping[str, bytes], dataset: str = "") -> Iterator[Any]:
    """Files of one class, opened for evaluation; a sample is its pixels `[height, width, 3]`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on files that it reads or refuses all the same
        yield _opened(_written(Path(folder), files), dataset)


def _opened(root: Path, dataset: str = "", split: str = "", **how: Any) -> Any:
    import numpy as np

    from stochca.data import open_images

    images = open_images(str(root), dataset, split, is_training=False, **how)
    images.transform = np.asarray
    return images


def _written(root: Path, files: Mapping[str, bytes]) -> Path:
    (root / "a").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / "a" / _found(name)).write_bytes(content)
    return root


def _found(name: str) -> str:
    """The name, with an ending that timm looks for; the content says what it is."""
    return name if name.endswith((".png", ".jpg", ".jpeg")) else f"{name}{_OTHER}"


def _good() -> bytes:
    from tests.scorecard.pictures import readable

    return readable()["plain.png"][0]


def _raises(call: Callable[[], object], pattern: str) -> None:
    try:
        call()
    except (ValueError, OSError) as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"the error does not say {pattern!r}: {error}") from error
        return
    raise AssertionError(f"no error, wanted {pattern!r}")
