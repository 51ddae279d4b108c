"""Made-up results, for tests of what is rendered from them."""

import json

from bench.digest import digests
from bench.report.recorded import Results

COMMIT = "0123456789abcdef"


def make_checkout(root):
    """A repository with one file of code, and no results."""
    (root / "bench" / "results").mkdir(parents=True)
    (root / "docs").mkdir()
    (root / "code").mkdir()
    (root / "code" / "one.py").write_text("x = 1  # one\n")
    return Results(root)


def where(results):
    """Where and of which code a result was made: the code as it is."""
    return {
        "machine": "a machine",
        "gpu": None,
        "versions": {"python": "3.11.7", "stochca": "0.1.0", "torch": "2.11.0", "triton": None},
        "commit": COMMIT,
        "dirty": False,
        "code": digests(["code"], results.root),
    }


def record(results, name, result):
    """Write a result that measured the code as it is."""
    path = results.root / "bench" / "results" / f"{name}.json"
    path.write_text(json.dumps({**where(results), **result}))


def timed(mean_ms, **others):
    """A provider that was timed; optional figures are left out."""
    around = {"p20_ms": 0.9 * mean_ms, "p50_ms": mean_ms, "p80_ms": 1.1 * mean_ms}
    return {"status": "timed", **around, "mean_ms": mean_ms, "spread_ms": 0.1 * mean_ms, **others}


def make_case(providers, study="main", p=0.1, dtype="bfloat16", batch=128, image_size=224, **kwargs):
    """A case with the ratios that `bench.step` would record; ours is called so."""
    workload = {
        "name": f"vit-B{batch}",
        "title": "ViT",
        "model": "vit_tiny_patch16_224",
        "batch": batch,
        "image_size": image_size,
        "kwargs": kwargs,
    }
    times = {name: entry["mean_ms"] for name, entry in providers.items() if entry["status"] == "timed"}
    return {
        "name": f"{study} vit-B{batch} {dtype} p={p:g}",
        "study": study,
        "workload": workload,
        "dtype": dtype,
        "p": p,
        "draws": [[True, False] * 6] * 8,
        "seconds": 1.0,
        "providers": providers,
        "ratios": {name: times["ours"] / ms for name, ms in times.items() if name != "ours"},
    }


def make_step(*cases, device="cpu", **others):
    """A result of `bench.step`."""
    gpu = {"name": "a GPU", "driver": "570.1", "cuda": "12.8"} if device == "cuda" else None
    return {"device": device, "gpu": gpu, "rounds": 2, "seconds": 60.0, "cases": list(cases), **others}
