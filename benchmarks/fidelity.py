"""``python -m benchmarks.fidelity``: how much of a model's features is left where tokens leave, beside the work.

A timm model, patched in several ways and with ToMe, is compared with itself unpatched, without labels: cosine of the
pooled feature (the class token, where the model has one), cosine of the patch features after the grid is restored, how
often the first class is the same (where there is a head), and how many of the nearest neighbours among the images are
the same. By default the model is DINOv2 ViT-S/14 with the weights of the demo, and the images are crops of the
photographs that come inside scikit-image and scikit-learn, cut at places that a fixed seed decides.

python -m benchmarks.fidelity                       methods, variants, table, plot and lines
python -m benchmarks.fidelity --images FOLDER --model vit_base_patch16_224 --weights FILE --json FILE
python -m benchmarks.fidelity --speed               adds images per second to what is there; nothing else may run
python -m benchmarks.fidelity --others FOLDER       the same on 128 crops of what benchmarks.photographs fetched
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import gtp_vit
from benchmarks.lines import Line
from benchmarks.measure import provenance
from benchmarks.plot import COLOURS
from benchmarks.tome import Matching, ToMe, unmerge
from gtp_vit import photos, timing, tuning, weights
from gtp_vit.cli import common, demo
from gtp_vit.tuning import Options, Outputs

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "benchmarks" / "results" / "dinov2-s" / "fidelity.json"
OTHERS = PATH.with_name("photographs.json")
PAGE = ROOT / "docs" / "fidelity.md"
NUM_PROPS = (14, 8, 16, 11, 4)
LINES_AT = {4: -0.0002, 8: 0.0, 11: 0.0, 14: 0.0, 16: 0.0}
VARIANTS_AT = (14, 8)  # all of them at the first, budgets at every one
NUM_CROPS, NUM_CROPS_OF_OTHERS = 64, 128
NEIGHBOURS = 5
TOME = "ToMe"
NOT_MEASURED = "not measured"

LIVE = tuning.LIVE
SPATIAL, MIXED = LIVE | {"graph_type": "Spatial"}, LIVE
METHODS: dict[str, Options | None] = {
    "GTP as published, θ = 0.6": tuning.PUBLISHED,
    "GTP as published, θ = 1": tuning.PUBLISHED | {"sparsity": 1.0},
    "no propagation": tuning.PRUNING,
    TOME: None,
    "LiveGraph Spatial": SPATIAL,
    "LiveGraph Spatial, θ = 0.95": SPATIAL | {"sparsity": 0.95},
    "LiveGraph Mixed": MIXED,
    "LiveGraph Mixed, θ = 0.95": MIXED | {"sparsity": 0.95},
    "LiveGraph Mixed, CLSAttnMean": MIXED | {"selection": "CLSAttnMean"},
}
LAST = ("LiveGraph Spatial, θ = 0.95", "LiveGraph Mixed, θ = 0.95")
# Every one differs in one thing from LiveGraph Spatial or Mixed with γ = 0.25, M = 8, θ = 1 and a constant P.
VARIANTS: dict[str, Options] = {
    **{f"Spatial, θ = {theta}": SPATIAL | {"sparsity": theta} for theta in (0.6, 0.8, 0.9)},
    **{f"Mixed, γ = {gamma:g}": MIXED | {"gamma": gamma} for gamma in (0.0, 0.1, 0.5, 1.0)},
    **{f"Mixed, M = {count}": MIXED | {"num_neighbours": count} for count in (2, 4, 16, 32)},
    "Semantic": LIVE | {"graph_type": "Semantic"},
    "Mixed, attention without sizes": MIXED | {"token_scale": False},
    "Mixed, CLSAttnMax": MIXED | {"selection": "CLSAttnMax"},
    "Mixed, DiagAttnMax": MIXED | {"selection": "DiagAttnMax"},
    "Mixed, IMGAttnMax": MIXED | {"selection": "IMGAttnMax"},
}
# Weights per block, of a depth; all at the GMACs of a constant P.
BUDGETS: dict[str, Callable[[int], np.ndarray]] = {
    "Mixed, first block spared": lambda depth: np.arange(depth) >= 1,
    "Mixed, first block spared, then 10 … 23": lambda depth: np.linspace(10, 23, depth) * (np.arange(depth) >= 1),
    "Mixed, budget 10 … 23": lambda depth: np.linspace(10, 23, depth),
    "Mixed, first two blocks spared": lambda depth: np.arange(depth) >= 2,
    "Mixed, budget 23 … 10": lambda depth: np.linspace(23, 10, depth),
}


@dataclass(frozen=True)
class Images:
    """What is looked at: float32 [n, 3, H, W], where it comes from, and a digest of the pixels."""

    pixels: Tensor
    what: str

    def describe(self) -> dict[str, object]:
        """For the report."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()[:12]
        return {"what": self.what, "count": len(self.pixels), "size": list(self.pixels.shape[-2:]), "digest": digest}


def crops(
    files: Sequence[Path], count: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> Tensor:
    """Float32 [count, 3, H, W]: crops of the files in turn, at places and scales that ``seed`` decides.

    The shorter side of a crop is 0.4 to 1 of what fits into the photograph.

    Raises:
        ValueError: no files.
        OSError: one that is no image.
    """
    from PIL import Image

    if not files:
        raise ValueError("files must name at least one image; got none")
    height, width = size
    draw = np.random.default_rng(seed)
    opened = [Image.open(file).convert("RGB") for file in files]
    found = []
    for number in range(count):
        image = opened[number % len(opened)]
        share, right, down = draw.uniform(0.4, 1), draw.uniform(), draw.uniform()
        scale = share * min(image.width / width, image.height / height)
        left, top = right * (image.width - scale * width), down * (image.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        found.append(torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC, box))))
    pixels = torch.stack(found).permute(0, 3, 1, 2).float() / 255
    channels = (1, 3, 1, 1)
    return (pixels - torch.tensor(tuple(mean)).view(channels)) / torch.tensor(tuple(std)).view(channels)


def read_images(model: nn.Module, folder: Path | None, count: int | None) -> Images:
    """``count`` crops of the bundled photographs or of a folder's images; None: 64, or all of the folder, whole."""
    config = common.data_config(model)
    size = config["input_size"][-2:]
    if folder is None:
        files, count = photos.bundled_files(), count or NUM_CROPS
        names = ", ".join(file.name for file in files)
        pixels = crops(files, count, size, config["mean"], config["std"])
        return Images(pixels, f"{count} crops, 0.4 to 1 of what fits, seed 0, of {names}")
    from gtp_vit.cli.data import unlabelled

    files = [folder / file for file in unlabelled(folder).files]
    if count is not None:
        pixels = crops(files, count, size, config["mean"], config["std"])
        return Images(pixels, f"{count} crops, 0.4 to 1 of what fits, seed 0, of the {len(files)} images of a folder")
    _, pixels = photos.read_photographs(files, size, mean=config["mean"], std=config["std"])
    return Images(pixels, f"the {len(files)} images of a folder, cut to the shape around the centre")


def tome_outputs(model: ToMe, images: Tensor, batch_size: int = 8) -> Outputs:
    """What ToMe gives; a patch is the token that it was merged into."""
    inner = model.model
    pooled, logits, patches = [], [], []
    with torch.inference_mode():
        for part in images.split(batch_size):
            matchings: list[Matching] = []
            tokens = model.forward_features(part, matchings)
            patches.append(unmerge(tokens[:, inner.num_prefix_tokens :], matchings).float())
            pooled.append(inner.forward_head(tokens, pre_logits=True).float().flatten(1))
            if inner.num_classes:
                logits.append(inner.forward_head(tokens).float())
    return Outputs(torch.cat(pooled), torch.cat(logits) if logits else None, torch.cat(patches))


def neighbour_agreement(found: Tensor, expected: Tensor, k: int) -> float:
    """The share of the k nearest other images, by cosine, that features [n, C] of two models have in common."""
    k = min(k, len(found) - 1)
    if k < 1:
        return float("nan")
    sets = []
    for features in (found, expected):
        unit = F.normalize(features, dim=-1)
        similar = (unit @ unit.T).fill_diagonal_(-torch.inf)
        sets.append(torch.zeros_like(similar).scatter_(1, similar.topk(k, dim=1).indices, 1.0))
    return ((sets[0] * sets[1]).sum(1) / k).mean().item()


def spread(values: Tensor) -> dict[str, float]:
    """Mean, least, and quartiles."""
    low, median, high = np.quantile(values.numpy(), (0.25, 0.5, 0.75))
    found = {"mean": values.mean().item(), "min": values.min().item(), "low": low, "median": median, "high": high}
    return {name: round(float(value), 6) for name, value in found.items()}


def compare(found: Outputs, expected: Outputs) -> dict[str, Any]:
    """The numbers of one row; ``pooled_each`` has the cosine of every image, for paired differences."""
    agreed = tuning.agreement(found, expected)
    return {
        "pooled": spread(agreed.pooled),
        "patches": None if agreed.patches is None else spread(agreed.patches),
        "top1": None if agreed.top1 is None else agreed.top1.mean().item(),
        "neighbours": round(neighbour_agreement(found.pooled, expected.pooled, NEIGHBOURS), 4),
        "pooled_each": [round(value, 7) for value in agreed.pooled.tolist()],
    }


def candidate(model: Any, options: Options | None, num_prop: int | Sequence[int]) -> Any:
    """A patched copy of a model, which shares its weights; ToMe where there are no options."""
    if options is None:
        assert isinstance(num_prop, int)
        return ToMe(model, num_prop)
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    return gtp_vit.patch(shared, num_prop=num_prop, **options)


def measured(
    model: Any, options: Options | None, num_prop: int | Sequence[int], images: Tensor, expected: Outputs, batch: int
) -> dict[str, Any]:
    """One row, without its names."""
    module = candidate(model, options, num_prop)
    if isinstance(module, ToMe):
        found = tome_outputs(module, images, batch)
    else:
        found = tuning.outputs(module, images, patches=True, batch_size=batch)
    size = (images.shape[-2], images.shape[-1])
    return {"gmacs": round(gtp_vit.gmacs(module, size), 6), **compare(found, expected)}


@dataclass(frozen=True)
class Planned:
    """One row: which part of the report, its name, the P that its work is that of, and what patches the model."""

    part: str
    method: str
    constant: int
    options: Options | None
    num_prop: int | tuple[int, ...]


def plan(model: Any, size: tuple[int, int], num_props: Sequence[int], variants_at: Sequence[int]) -> Iterator[Planned]:
    """Every row, in an order in which a run that is stopped has the most to say."""
    work = tuning.work_of(model, size)
    methods = [method for method, options in METHODS.items() if options is not None or _takes_tome(model)]
    for num_prop in num_props:
        for method in methods:
            if method not in LAST:
                yield Planned("methods", method, num_prop, METHODS[method], num_prop)
    for name, budget in BUDGETS.items():
        for num_prop in variants_at:
            target = work.macs(gtp_vit.GTPConfig(num_prop=num_prop, **MIXED)) / 1e9
            share = [float(value) for value in budget(len(work.blocks))]
            yield Planned("variants", name, num_prop, MIXED, tuning.fit(work, MIXED, share, target))
    for num_prop in variants_at[:1]:
        for name, options in VARIANTS.items():
            yield Planned("variants", name, num_prop, options, num_prop)
    for method in LAST:
        for num_prop in num_props:
            if method in methods:
                yield Planned("methods", method, num_prop, METHODS[method], num_prop)


def _takes_tome(model: Any) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer)


def lines(rows: Iterable[dict[str, Any]]) -> Iterator[Line]:
    """LiveGraph's class token against ToMe's, at equal constant P: mean of the paired differences; and what a budget
    gives, at the GMACs of that P on the Mixed graph."""
    means = {(row["method"], row["constant"]): row["pooled"]["mean"] for row in rows}
    for num_prop, bound in LINES_AT.items():
        for method in (*METHODS, *BUDGETS):
            ours = method in BUDGETS or method.startswith("LiveGraph")
            if ours and {(method, num_prop), (TOME, num_prop)} <= set(means):
                difference = means[method, num_prop] - means[TOME, num_prop]
                yield Line(f"P = {num_prop}: {method} − {TOME}", difference, bound)


def differences(rows: Sequence[dict[str, Any]], method: str, num_prop: int) -> np.ndarray:
    """What a method's cosine is above ToMe's, for each image."""
    each = {row["method"]: np.array(row["pooled_each"]) for row in rows if row["constant"] == num_prop}
    found: np.ndarray = each[method] - each[TOME]
    return found


def line_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines, one sentence each."""
    found = []
    for line in lines(rows):
        num_prop, method = re.match(r"P = (\d+): (.*) − ToMe", line.what).groups()  # type: ignore[union-attr]
        difference = differences(rows, method, int(num_prop))
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else float("nan")
        found.append(
            f"{line.what}: {line.value:+.5f} ± {error:.5f} (at least {line.line:g}): {line.verdict}; median "
            f"{np.median(difference):+.5f}, {int((difference > 0).sum())} of {len(difference)} images better"
        )
    return found


def per_block(model: Any, image: Tensor, options: Options, num_prop: int) -> list[dict[str, float]]:
    """What every block does to the pooled feature of one image [1, 3, H, W].

    Returns:
        For each block the cosine where tokens leave in it alone, and where they leave in all the others; and least,
        median and most of the importance over its mean, of a forward in which tokens leave in this block alone.
    """
    expected = tuning.outputs(model, image)
    depth = len(model.blocks)

    def cosine(num_props: list[int]) -> tuple[float, Any]:
        with tuning.patched(model, {**options, "num_prop": num_props}), gtp_vit.trace(model) as trace:
            found = tuning.outputs(model, image)
        return tuning.agreement(found, expected).pooled.item(), trace

    found = []
    for block in range(depth):
        alone, trace = cosine([num_prop * (other == block) for other in range(depth)])
        without, _ = cosine([num_prop * (other != block) for other in range(depth)])
        importance = trace.layers[block].importance[0]
        low, median, high = (importance.float().quantile(torch.tensor((0.0, 0.5, 1.0))) / importance.mean()).tolist()
        found.append({"alone": alone, "without": without, "least": low, "median": median, "most": high})
    return [{name: round(value, 5) for name, value in row.items()} for row in found]


def _head(report: dict[str, Any]) -> str:
    shown = report["images"]
    commits = sorted({str(row.get("commit") or row.get("source")) for row in report["rows"]})
    source = f"commit {', '.join(commits)}; torch {report['torch']}"
    what = f"{shown['count']} images of {shown['size'][0]} × {shown['size'][1]}: {shown['what']}"
    return f"{report['model']} ({report['weights']} weights), {what}. {source}."


def summary(report: dict[str, Any]) -> str:
    """Two tables and the lines, of other photographs than those on which options were chosen."""
    methods = [row for row in report["rows"] if row["part"] == "methods"]
    out = [
        _head(report),
        "",
        "Mean cosine of the class token:",
        "",
        *_by_num_prop(methods, lambda row: f"{row['pooled']['mean']:.4f}"),
        "",
        "Mean cosine of the patch features:",
        "",
        *_by_num_prop(methods, lambda row: f"{row['patches']['mean']:.4f}"),
        "",
        *(f"- {text}" for text in line_texts(report["rows"])),
    ]
    return "\n".join(out)


def markdown(report: dict[str, Any]) -> str:
    """The tables of docs/fidelity.md."""
    rows = report["rows"]
    methods = [row for row in rows if row["part"] == "methods"]
    out = [
        _head(report),
        "",
        "Mean cosine of the pooled feature (here the class token) to the unpatched model:",
        "",
        *_by_num_prop(methods, lambda row: f"{row['pooled']['mean']:.4f}"),
        "",
        "The first quartile of the same: a quarter of the images is below.",
        "",
        *_by_num_prop(methods, lambda row: f"{row['pooled']['low']:.4f}"),
        "",
        "Mean cosine of the patch features, on the restored grid (ToMe: a patch is the token that it was merged into):",
        "",
        *_by_num_prop(methods, lambda row: f"{row['patches']['mean']:.4f}" if row["patches"] else NOT_MEASURED),
        "",
        f"Share of the {NEIGHBOURS} nearest other images that stay the same:",
        "",
        *_by_num_prop(methods, lambda row: f"{row['neighbours']:.3f}"),
        "",
        *_top1(methods),
        "GMACs of one image (unpatched: " + f"{report['gmacs']:.3f}):",
        "",
        *_by_num_prop(methods, lambda row: f"{row['gmacs']:.3f}"),
        "",
        "Images per second, and how many times those of the unpatched model, in turns with it:",
        "",
        *_by_num_prop(methods, _speed),
        "",
        "LiveGraph against ToMe: mean difference of the class token's cosine, with its standard error over the images:",
        "",
        *(f"- {text}" for text in line_texts(rows)),
    ]
    if any(row["part"] == "variants" for row in rows):
        out += ["", *_variants(rows)]
    if "worst" in report:
        out += ["", *_worst(report["worst"])]
    return "\n".join(out)


def _speed(row: dict[str, Any]) -> str:
    if not row.get("images_per_second"):
        return NOT_MEASURED
    return f"{row['images_per_second']:.1f} (× {row['times_unpatched']:.2f})"


def _top1(methods: list[dict[str, Any]]) -> list[str]:
    if all(row["top1"] is None for row in methods):
        return ["The model has no head, so that there is no first class to agree on.", ""]
    table = _by_num_prop(methods, lambda row: f"{row['top1']:.3f}")
    return ["Share of the images with the same first class:", "", *table, ""]


def _by_num_prop(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    num_props = sorted({row["constant"] for row in rows})
    cells = {(row["method"], row["constant"]): cell(row) for row in rows}
    out = ["| constant P | " + " | ".join(map(str, num_props)) + " |", "|---" * (len(num_props) + 1) + "|"]
    return out + [
        f"| {method} | " + " | ".join(cells.get((method, p), "") for p in num_props) + " |"
        for method in dict.fromkeys(row["method"] for row in rows)
    ]


def _worst(worst: dict[str, Any]) -> Iterator[str]:
    yield (
        f"The image on which {worst['method']} is furthest behind ToMe at P = {worst['num_prop']} (number "
        f"{worst['image']}; {worst['cosine']:.4f} against {worst['tome']:.4f}), with P in one block alone, and in "
        "all but one; and the importance of the image tokens over its mean:"
    )
    yield ""
    blocks = worst["blocks"]
    yield "| block | " + " | ".join(map(str, range(len(blocks)))) + " |"
    yield "|---" * (len(blocks) + 1) + "|"
    for name, title in (
        ("alone", "alone"),
        ("without", "all but it"),
        ("least", "least importance"),
        ("median", "median"),
        ("most", "most"),
    ):
        digits = 4 if name in ("alone", "without") else 2
        yield f"| {title} | " + " | ".join(f"{block[name]:.{digits}f}" for block in blocks) + " |"


def _variants(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Variants of LiveGraph (γ = 0.25, M = 8, θ = 1 where nothing else is said). The budgets have at most the GMACs "
        "of the constant P:"
    )
    yield ""
    found = [row for row in rows if row["part"] == "variants"]
    num_props = list(dict.fromkeys(row["constant"] for row in found))
    heads = [f"P = {p}: class token | patches | GMACs" for p in num_props]
    yield "| variant | " + " | ".join(heads) + " |"
    yield "|---" * (1 + 3 * len(num_props)) + "|"
    base = [row for row in rows if row["method"] in ("LiveGraph Spatial", "LiveGraph Mixed")]
    for name in dict.fromkeys(row["method"] for row in [*base, *found]):
        here = {row["constant"]: row for row in [*base, *found] if row["method"] == name}
        cells = []
        for p in num_props:
            if p in here:
                row = here[p]
                cells += [f"{row['pooled']['mean']:.4f}", f"{row['patches']['mean']:.4f}", f"{row['gmacs']:.3f}"]
            else:
                cells += [""] * 3
        yield f"| {name} | " + " | ".join(cells) + " |"


def put(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its comments of this name.

    Raises:
        ValueError: the comments are not there.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the comments {begin} and {end} once each")
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def draw(report: dict[str, Any]) -> Any:
    """A figure: what is lost against GMACs, for the class token and for the patches."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["part"] == "methods"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2), ("pooled", "patches"), ("class token", "patches, restored grid"), strict=True
    ):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = [row for row in rows if row["method"] == method and row[what] is not None]
            points.sort(key=lambda row: float(row["gmacs"]))
            lost = [max(1 - row[what]["mean"], 1e-6) for row in points]
            style = "--" if "0.95" in method else "-"
            axes.plot(
                [row["gmacs"] for row in points], lost, style, marker="o", markersize=3.5, linewidth=1.2, label=method,
                color=COLOURS[number % len(COLOURS)],
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel(f"GMACs of one image (unpatched: {report['gmacs']:.2f})")
        axes.set_ylabel("1 − mean cosine")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, linewidth=0.5)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{report['model']}, {report['images']['count']} images")
    return figure


def save(figure: Any, path: Path) -> None:
    """Equal numbers give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gtp-kernels"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def time_rows(model: Any, report: dict[str, Any], images: Tensor, rounds: int, advance: Callable[[], object]) -> None:
    """Images per second of every method, those of one P in turns; it changes the report."""
    rows = [row for row in report["rows"] if row["part"] == "methods"]
    for num_prop in dict.fromkeys(row["constant"] for row in rows):
        here = [row for row in rows if row["constant"] == num_prop]
        modules = {row["method"]: candidate(model, METHODS[row["method"]], num_prop) for row in here}
        calls = {name: _call(module, images) for name, module in {**modules, "unpatched": model}.items()}
        with torch.inference_mode():
            found = timing.interleave(calls, rounds=rounds, progress=advance)
        for row in here:
            each = found[row["method"]].per_second(len(images))
            row["images_per_second"] = round(each.median, 3)
            row["images_per_second_quartiles"] = [round(each.low, 3), round(each.high, 3)]
            row["times_unpatched"] = round(found["unpatched"].ratio(found[row["method"]]).median, 4)


def _call(module: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    return lambda: module(images)


@click.command(help=__doc__)
@click.option("--model", "name", default=weights.DEMO_MODEL, show_default=True, help="A Vision Transformer of timm.")
@click.option("--weights", "source", metavar="demo|hub|random|FILE", help="As in gtp-vit demo.")
@click.option("--img-size", type=click.IntRange(min=1), help="Side of the images.")
@click.option("--images", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder.")
@click.option(
    "--others",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What benchmarks.photographs fetched.",
)
@click.option("--crops", "count", type=click.IntRange(min=1), help="[default: 64; the images of a folder: whole]")
@click.option("--num-prop", "num_props", type=click.IntRange(min=1), multiple=True, help="P; may be repeated.")
@click.option("--variants/--no-variants", default=True, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--fresh", is_flag=True, help="Measure again what is there.")
@click.option("--keep", is_flag=True, help="Keep what is there, also where it comes from other sources.")
@click.option("--speed", is_flag=True, help="Add images per second to what is there, and measure nothing else.")
@click.option("--worst", is_flag=True, help="Add what every block does to the worst image to what is there.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Timed batches of each.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: PyTorch's choice]")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help=f"[default: {PATH.name}]")
@click.option("--page/--no-page", default=None, help="Write the tables of docs/fidelity.md.  [default: with its file]")
def main(
    name: str,
    source: str | None,
    img_size: int | None,
    folder: Path | None,
    others: Path | None,
    count: int | None,
    num_props: tuple[int, ...],
    variants: bool,
    batch_size: int,
    fresh: bool,
    keep: bool,
    speed: bool,
    worst: bool,
    rounds: int,
    threads: int | None,
    output: Path | None,
    page: bool | None,
) -> None:
    """Measures what is not there, writes the file and prints the lines."""
    if threads is not None:
        torch.set_num_threads(threads)
    if others is not None:
        folder, count, variants = others, count or NUM_CROPS_OF_OTHERS, False
        output = output or OTHERS
    if output is None and (folder is not None or name != weights.DEMO_MODEL or source not in (None, "demo")):
        raise click.UsageError("--json: say where the numbers go; the default file is that of the default model")
    path = PATH if output is None else output
    console = Console(width=140)
    with common.plain_errors():
        model, origin = demo.load_model(name, source, img_size)
        model = model.eval()
        images = read_images(model, folder, count)
    size = (images.pixels.shape[-2], images.pixels.shape[-1])
    work = tuning.work_of(model, size)
    largest = gtp_vit.GTPConfig().largest_num_prop(work.num_image_tokens, len(work.blocks))
    usual = dict.fromkeys([p for p in NUM_PROPS if p <= largest] + [largest])
    chosen = tuple(dict.fromkeys(num_props or usual))
    about = {"model": name, "weights": origin, "images": images.describe()}
    report: dict[str, Any] = {**provenance(), **about, "gmacs": round(gtp_vit.gmacs(model, size), 6), "rows": []}
    if path.is_file() and not fresh:
        earlier = json.loads(path.read_text())
        if all(earlier.get(key) == value for key, value in about.items()) and (
            speed or worst or keep or earlier["source"] == report["source"]
        ):
            report["rows"] = earlier["rows"]
            if speed:
                report = {**earlier, "speed": {**provenance(), "batch": batch_size, "rounds": rounds}}
            elif worst:
                report = earlier
            else:
                report |= {key: earlier[key] for key in ("worst", "speed") if key in earlier}
    if (speed or worst) and not report["rows"]:
        raise click.UsageError(
            f"--speed, --worst: {path} has no rows of this model and these images; run without it first"
        )
    with Progress(console=console, transient=True) as bar:
        if speed:
            timed = [row for row in report["rows"] if row["part"] == "methods"]
            total = (len(timed) + len({row["constant"] for row in timed})) * (rounds + 2)
            task = bar.add_task("timing, in turns", total=total)
            batch = images.pixels[torch.arange(batch_size) % len(images.pixels)]
            time_rows(model, report, batch, rounds, lambda: bar.advance(task))
            _write(path, report)
        elif worst:
            method, num_prop = "LiveGraph Spatial", 8
            here = [row for row in report["rows"] if row["part"] == "methods" and row["constant"] == num_prop]
            if not {method, TOME} <= {row["method"] for row in here}:
                raise click.UsageError(f"--worst: {path} has no rows of {method} and {TOME} at P = {num_prop}")
            image = int(differences(here, method, num_prop).argmin())
            cosine = {row["method"]: row["pooled_each"][image] for row in here}
            report["worst"] = {
                "method": method,
                "num_prop": num_prop,
                "image": image,
                "cosine": cosine[method],
                "tome": cosine[TOME],
                "blocks": per_block(model, images.pixels[image : image + 1], SPATIAL, num_prop),
                "commit": provenance()["commit"],
            }
            _write(path, report)
        else:
            measure_rows(
                model, report, images.pixels, plan(model, size, chosen, VARIANTS_AT if variants else ()), batch_size,
                path, bar,
            )  # fmt: skip
    save(draw(report), path.with_suffix(".svg"))
    if page or (page is None and path in (PATH, OTHERS)):
        text = summary(report) if path == OTHERS else markdown(report)
        PAGE.write_text(put(PAGE.read_text(), "others" if path == OTHERS else "fidelity", text))
    for text in _by_num_prop(
        [row for row in report["rows"] if row["part"] == "methods"], lambda row: f"{row['pooled']['mean']:.5f}"
    ):
        console.print(text, highlight=False)
    for text in line_texts(report["rows"]):
        console.print(text, highlight=False)
    missed = sum(not line.holds for line in lines(report["rows"]))
    console.print(f"{len(list(lines(report['rows'])))} lines, {missed} missed; {path}", highlight=False)
    raise SystemExit(1 if missed else 0)


def measure_rows(
    model: Any,
    report: dict[str, Any],
    images: Tensor,
    planned: Iterable[Planned],
    batch_size: int,
    path: Path,
    bar: Progress,
) -> None:
    """Adds the rows that the report lacks, and writes it after each."""
    planned = list(planned)
    known = {(row["part"], row["method"], row["constant"]) for row in report["rows"]}
    task = bar.add_task("unpatched", total=len(planned))
    expected = tuning.outputs(model, images, patches=True, batch_size=batch_size)
    for row in planned:
        bar.update(task, description=f"P = {row.constant}: {row.method}")
        if (row.part, row.method, row.constant) not in known:
            found = measured(model, row.options, row.num_prop, images, expected, batch_size)
            schedule = row.num_prop if isinstance(row.num_prop, int) else list(row.num_prop)
            about = {"part": row.part, "method": row.method, "constant": row.constant, "num_prop": schedule}
            origin = {"commit": report["commit"], "source": report["source"]}
            report["rows"].append({**about, "options": row.options, **found, "images_per_second": None, **origin})
            _write(path, report)
        bar.advance(task)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
