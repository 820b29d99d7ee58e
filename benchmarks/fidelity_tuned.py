"""``python -m benchmarks.fidelity_tuned``: DINOv2 ViT-S/14, tuned at the GMACs of LiveGraph with a constant P.

The search sees crops of the photographs that come inside scikit-image and scikit-learn. The result is judged on others,
which benchmarks.photographs fetches, whole and in crops (without ``--others FOLDER``: the search sees half of the
photographs, and the other half judges); beside it a constant P, GTP as published and ToMe. What was found is in
``benchmarks/results/dinov2-s/tuned.json``, for ``gtp_vit.patch(model, **json.load(file)["patch"])``. ``--patches``
counts the features of the patches too, and writes ``tuned-patches.json``. ``--page`` writes the tables of
docs/fidelity.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import gtp_vit
from benchmarks import fidelity
from benchmarks.fidelity import Images
from benchmarks.lines import Line
from benchmarks.measure import provenance
from gtp_vit import photos, tuning, weights
from gtp_vit.cli import common, demo
from gtp_vit.cli.data import unlabelled

FOLDER = fidelity.PATH.parent
SEARCHED = ("chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
COMPARED = (
    "GTP as published, θ = 0.6", "no propagation", fidelity.TOME,
    "LiveGraph Spatial", "LiveGraph Mixed", "LiveGraph Mixed, CLSAttnMean",
)  # fmt: skip
TUNED = "tuned"


def files(others: Path | None) -> tuple[list[Path], list[Path]]:
    """The photographs that the search sees, and those that judge."""
    bundled = photos.bundled_files()
    if others is not None:
        return bundled, [others / file for file in unlabelled(others).files]
    return [file for file in bundled if file.name in SEARCHED], [file for file in bundled if file.name not in SEARCHED]


def judged_images(model: nn.Module, unseen: list[Path], num_crops: int) -> dict[str, Images]:
    """What the search does not see: photographs, whole, and crops of them."""
    whole, crops = _whole_and_crops(model, unseen, num_crops, seed=1)
    return {
        "photographs": Images(whole, f"whole, and mirrored: {_names(unseen)}"),
        "crops": Images(crops, f"{num_crops} crops, seed 1, of {_names(unseen)}"),
    }


def searched_images(model: nn.Module, seen: list[Path], num_crops: int) -> Images:
    """What the search sees."""
    whole, crops = _whole_and_crops(model, seen, num_crops, seed=0)
    # Mixed: the search looks at the first few before it looks at all.
    pixels = torch.cat((whole, crops))[
        torch.randperm(len(whole) + num_crops, generator=torch.Generator().manual_seed(0))
    ]
    return Images(pixels, f"{num_crops} crops, seed 0, of these, and whole, and mirrored: {_names(seen)}")


def _whole_and_crops(model: nn.Module, chosen: list[Path], num_crops: int, seed: int) -> tuple[Tensor, Tensor]:
    config = common.data_config(model)
    size, mean, std = config["input_size"][-2:], config["mean"], config["std"]
    _, whole = photos.read_photographs(chosen, size, mean=mean, std=std)
    # Mirrored, a picture is another one to the model.
    return torch.cat((whole, whole.flip(-1))), fidelity.crops(chosen, num_crops, size, mean, std, seed=seed)


def _names(chosen: list[Path]) -> str:
    return ", ".join(file.name for file in chosen)


def target(model: nn.Module, size: tuple[int, int], num_prop: int) -> float:
    """GMACs of LiveGraph on the Spatial graph with a constant P, the least of what is compared."""
    config = gtp_vit.GTPConfig(num_prop=num_prop, **fidelity.SPATIAL)
    return tuning.work_of(model, size).macs(config) / 1e9


def judge(model: Any, images: Tensor, best: tuning.Options, num_prop: int) -> list[dict[str, Any]]:
    """One row for what was tuned, and for each of what is not."""
    expected = tuning.outputs(model, images, patches=True)
    rows = []
    for name, options in {TUNED: best, **{name: fidelity.METHODS[name] for name in COMPARED}}.items():
        if name == TUNED:
            fixed = {key: value for key, value in best.items() if key != "num_prop"}
            row = fidelity.measured(model, fixed, best["num_prop"], images, expected, 8)
        else:
            row = fidelity.measured(model, options, num_prop, images, expected, 8)
        rows.append({"method": name, **row})
    return rows


def lines(judged: dict[str, list[dict[str, Any]]]) -> list[Line]:
    """The class token of what was tuned, on each set: against the best constant LiveGraph, and itself."""
    found = []
    for what, rows in judged.items():
        cosine = {row["method"]: row["pooled"]["mean"] for row in rows}
        constant = max(value for name, value in cosine.items() if name.startswith("LiveGraph"))
        found.append(Line(f"{what}: tuned − the better constant LiveGraph", cosine[TUNED] - constant, 0.0))
        found.append(Line(f"{what}: tuned, cosine of the class token", cosine[TUNED], constant, 0.998))
    return found


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """The tables of docs/fidelity.md."""
    parts = []
    for title, report in reports.items():
        patch = report["patch"]
        options = ", ".join(f"`{name} = {value!r}`" for name, value in patch.items())
        head = (
            f"**{title}** (commit {report['commit']}): {report['candidates']} candidates and {report['steps'][0]} "
            f"changes, {report['steps'][1]} of them kept, in {report['seconds']:g} s, on {report['searched']['what']}."
        )
        parts += [head, f"Found: {options}."]
        for what, rows in report["judged"].items():
            parts.append(f"Judged on {report['images'][what]['what']}:")
            table = [
                "| | GMACs | class token | least | patches | same neighbours |",
                "|---|---|---|---|---|---|",
            ]
            table += [
                f"| {row['method']} | {row['gmacs']:.3f} | {row['pooled']['mean']:.4f} | {row['pooled']['min']:.4f} | "
                f"{row['patches']['mean']:.4f} | {row['neighbours']:.3f} |"
                for row in rows
            ]
            parts.append("\n".join(table))
        parts.append("\n".join(f"- {text}" for text in texts(report["judged"])))
    return "\n\n".join(parts)


def texts(judged: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The lines, one sentence each."""
    return [f"{line.what}: {line.value:+.5f} (at least {line.line:.5g}): {line.verdict}" for line in lines(judged)]


@click.command(help=__doc__)
@click.option("--num-prop", type=click.IntRange(min=1), default=14, show_default=True)
@click.option(
    "--others",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What benchmarks.photographs fetched.",
)
@click.option("--crops", "count", type=click.IntRange(min=1), default=48, show_default=True, help="For the search.")
@click.option("--judge-crops", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--patches", is_flag=True, help="The features of the patches count too.")
@click.option("--seconds", type=click.FloatRange(min=0), default=900.0, show_default=True, help="For the search.")
@click.option("--candidates", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: PyTorch's choice]")
@click.option("--page", is_flag=True, help="Only write the tables of docs/fidelity.md, from what is there.")
def main(
    num_prop: int,
    others: Path | None,
    count: int,
    judge_crops: int,
    patches: bool,
    seconds: float,
    candidates: int,
    seed: int,
    threads: int | None,
    page: bool,
) -> None:
    """Searches, judges, writes."""
    if page:
        write_page()
        return
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(width=140)
    with common.plain_errors():
        model, origin = demo.load_model(weights.DEMO_MODEL)
        model = model.eval()
        seen, unseen = files(others)
        searched, judged = searched_images(model, seen, count), judged_images(model, unseen, judge_crops)
    gmacs = target(model, (searched.pixels.shape[-2], searched.pixels.shape[-1]), num_prop)
    report: dict[str, Any] = {**provenance(), "model": weights.DEMO_MODEL, "weights": origin}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        result = tuning.tune(
            model, searched.pixels, gmacs, seconds=seconds, patches=patches, num_candidates=candidates, seed=seed,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )  # fmt: skip
        report = {
            "patch": result.best,
            **report,
            "constant": num_prop,
            "gmacs_asked": gmacs,
            "loss": result.loss,
            "candidates": result.candidates,
            "steps": list(result.steps),
            "finished": result.finished,
            "patches": patches,
            "seconds": seconds,
            "seed": seed,
            "searched": searched.describe(),
            "images": {what: images.describe() for what, images in judged.items()},
            "judged": {},
        }
        path = FOLDER / ("tuned-patches.json" if patches else "tuned.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        for what, images in judged.items():
            bar.update(task, description=f"judging on {what}", completed=1.0)
            report["judged"][what] = judge(model, images.pixels, result.best, num_prop)
            path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    console.print_json(json.dumps(report["patch"]))
    for text in texts(report["judged"]):
        console.print(text, highlight=False)
    raise SystemExit(0 if all(line.holds for line in lines(report["judged"])) else 1)


def write_page() -> None:
    """The tables of docs/fidelity.md, from the files that are there."""
    titles = {"tuned.json": "Tuned for the class token", "tuned-patches.json": "Tuned for class token and patches"}
    found = {
        title: json.loads((FOLDER / name).read_text()) for name, title in titles.items() if (FOLDER / name).exists()
    }
    fidelity.PAGE.write_text(fidelity.put(fidelity.PAGE.read_text(), "tuned", markdown(found)))


if __name__ == "__main__":
    main()
