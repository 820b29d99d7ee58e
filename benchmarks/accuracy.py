"""``python -m benchmarks.accuracy``: what token reduction without fine-tuning costs in accuracy, on handwritten digits.

Trains the model of ``benchmarks.digits`` for each seed (the weights are kept in ``build/accuracy``), then counts the
test images that it gets right with P tokens leaving in each of its blocks, for every method of ``METHODS``, with and
without the threshold of the attention map and the token scales. Writes ``accuracy.json`` and ``accuracy.svg``, and the
tables of ``docs/accuracy.md``. Nothing is timed.

python -m benchmarks.accuracy                      everything
python -m benchmarks.accuracy --keep               only the methods and settings that are not in the JSON yet
python -m benchmarks.accuracy --redraw             tables and plot from the JSON that is there
python -m benchmarks.accuracy --quick              tries the tool on a tiny model, measures nothing
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch import Tensor, nn

import gtp_vit
from benchmarks import digits
from benchmarks.measure import provenance
from benchmarks.plot import COLOURS
from benchmarks.readme import replaced
from benchmarks.tome import ToMe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "digits"
DOCUMENT = ROOT / "docs" / "accuracy.md"
BUILD = ROOT / "build" / "accuracy"
COMMAND = "benchmarks.accuracy"
# The same for every method: random selection draws for one batch after another.
BATCH = 150

Report = dict[str, Any]
Reduce = Callable[[Any, int, float | None, bool | None], Any]


class Method(NamedTuple):
    """A way to reduce tokens, and the settings that are tried with it; the first of each is its default.

    Attributes:
        reduce: makes the reduced model of (model, P, θ, token scales); the model that it was given stays as it was.
        sparsities: θ, where 1 is without the threshold; (None,) for a method that has none.
        token_scales: whether the attention counts how many tokens each one stands for; (None,) where that is one.
    """

    reduce: Reduce
    sparsities: tuple[float | None, ...] = (0.6, 1.0)
    token_scales: tuple[bool | None, ...] = (True, False)

    def settings(self) -> Iterator[tuple[float | None, bool | None]]:
        """Every pair of θ and token scales, the default first."""
        for sparsity in self.sparsities:
            for scales in self.token_scales:
                yield sparsity, scales


def gtp(**options: Any) -> Reduce:
    """``gtp_vit.patch`` with these options in place of its own (MixedAttnMax, GraphProp, Mixed, α = 0.2, M = 8)."""

    def reduced(model: Any, num_prop: int, sparsity: float | None, scales: bool | None) -> Any:
        sparsity = 1.0 if sparsity is None else sparsity
        return gtp_vit.patch(copy.deepcopy(model), num_prop, sparsity, token_scale=bool(scales), **options)

    return reduced


def tome(model: Any, num_prop: int, sparsity: float | None, scales: bool | None) -> ToMe:
    """Token merging, r = P."""
    return ToMe(model, num_prop, proportional=bool(scales))


DROP = {"propagation": "None", "graph_type": "None"}
METHODS = {
    "GTP": Method(gtp()),
    "CLS attention": Method(gtp(selection="CLSAttnMax")),
    "random selection": Method(gtp(selection="Random")),
    "no propagation": Method(gtp(**DROP), token_scales=(None,)),
    "random, no propagation": Method(gtp(**DROP, selection="Random"), token_scales=(None,)),
    "ToMe": Method(tome, sparsities=(None,)),
    "LiveGraph": Method(gtp(propagation="LiveGraph"), sparsities=(1.0, 0.6)),
}


def num_props(num_tokens: int, depth: int, step: int) -> list[int]:
    """P from 0, every ``step``-th, and the largest one that leaves an image token in every block."""
    largest = (num_tokens - 1) // depth
    return sorted({*range(0, largest + 1, step), largest})


@torch.inference_mode()
def count_correct(model: nn.Module, data: digits.Digits, size: int, seed: int) -> int:
    """How many images of ``data``, sampled at ``size``, the model gets right; random selection draws from ``seed``."""
    found = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for images, labels in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
            found += int((model(digits.sampled(images, size)).argmax(1) == labels).sum())
    return found


@torch.inference_mode()
def tokens_left(reduced: Any, image: Tensor) -> int:
    """Image tokens after the last block."""
    inner = reduced.model if isinstance(reduced, ToMe) else reduced
    seen: list[int] = []
    handle = inner.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    try:
        reduced(image)
    finally:
        handle.remove()
    return seen[0] - int(inner.num_prefix_tokens)


def evaluate(
    models: Sequence[Any],
    seeds: Sequence[int],
    test: digits.Digits,
    size: int,
    ps: Sequence[int],
    known: Sequence[Report],
    commit: object,
    progress: Callable[[str], object],
) -> Report:
    """Every method at every setting and P, and the unpatched models, one for each seed.

    Args:
        known: rows that are taken as they are.
        commit: of the other rows.

    Returns:
        ``unpatched`` with ``correct``, one count for each seed, and ``rows`` with ``correct[i][j]``, of the i-th P and
        the j-th seed. The number of tokens left and the GMACs, of one image, are the same for every seed.
    """
    image = digits.sampled(test.images[:1], size)

    def correct(tested: Sequence[nn.Module]) -> list[int]:
        return [count_correct(model, test, size, seed) for model, seed in zip(tested, seeds, strict=True)]

    unpatched = {"correct": correct(models), "gmacs": gtp_vit.gmacs(models[0], image)}
    rows = []
    for name, method in METHODS.items():
        for number, (sparsity, scales) in enumerate(method.settings()):
            row: Report = {"method": name, "default": number == 0, "sparsity": sparsity, "token_scales": scales}
            earlier = [one for one in known if row.items() <= one.items()]
            if earlier:
                rows.append(earlier[0])
                continue
            row |= {"commit": commit, "tokens": [], "gmacs": [], "correct": []}
            for num_prop in ps:
                reduced = [method.reduce(model, num_prop, sparsity, scales) for model in models]
                row["tokens"].append(tokens_left(reduced[0], image))
                row["gmacs"].append(gtp_vit.gmacs(reduced[0], image))
                row["correct"].append(correct(reduced))
                progress(f"{name}, θ {_theta(row)}, token scales {_scales(row)}, P = {num_prop}")
            rows.append(row)
    return {"unpatched": unpatched, "rows": rows}


def per_cent(report: Report, correct: Sequence[int]) -> tuple[float, float]:
    """Mean and sample standard deviation over the seeds, in per cent of the test images."""
    values = [100 * count / report["recipe"]["test_images"] for count in correct]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def render(report: Report) -> str:
    """What the document says between its comments: the origin and the two tables."""
    recipe, unpatched = report["recipe"], report["unpatched"]
    mean, spread = per_cent(report, unpatched["correct"])
    each = ", ".join(f"{100 * count / recipe['test_images']:.1f}" for count in unpatched["correct"])
    commits = sorted({str(row["commit"]) for row in report["rows"]})
    origin = (
        f"Unpatched: {mean:.1f} ± {spread:.1f} % of {recipe['test_images']} test images ({each}), "
        f"{unpatched['gmacs']:.3f} GMACs. Seeds {', '.join(map(str, report['seeds']))}, torch {report['torch']}, "
        f"commit {', '.join(commits)}; `benchmarks/results/digits/accuracy.json`."
    )
    return "\n\n".join((origin, _defaults(report), _settings(report)))


def _defaults(report: Report) -> str:
    rows = [row for row in report["rows"] if row["default"]]
    body = [["tokens left", *map(str, rows[0]["tokens"])], ["GMACs", *(f"{value:.3f}" for value in rows[0]["gmacs"])]]
    for row in rows:
        shares = [per_cent(report, correct) for correct in row["correct"]]
        body.append([row["method"], *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in shares)])
    head = ["P", *map(str, report["num_props"])]
    text = "Test accuracy in per cent, mean ± standard deviation over the seeds. "
    text += f"Tokens and GMACs: of {rows[0]['method']}."
    others = [f"{row['method']} leaves {row['tokens'][-1]}" for row in rows if row["tokens"] != rows[0]["tokens"]]
    # It cannot merge more than half of the tokens of a block.
    note = f" At the largest P, {', '.join(others)}." if others else ""
    return f"{text}{note}\n\n{_table(head, body)}"


def _settings(report: Report) -> str:
    head = ["method", "θ", "token scales", *(f"P = {num_prop}" for num_prop in report["num_props"])]
    body = [
        [
            row["method"], _theta(row), _scales(row),
            *(f"{per_cent(report, correct)[0]:.1f}" for correct in row["correct"]),
        ]
        for row in report["rows"]
    ]  # fmt: skip
    return f"With and without the threshold (θ = 1) and the token scales, means:\n\n{_table(head, body)}"


def _theta(row: Report) -> str:
    return "–" if row["sparsity"] is None else f"{row['sparsity']:g}"


def _scales(row: Report) -> str:
    return {None: "–", True: "yes", False: "no"}[row["token_scales"]]


def _table(head: list[str], rows: Sequence[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def draw(report: Report) -> Any:
    """A figure: accuracy against P, of every method by default, and of the first one at all its settings."""
    from matplotlib.figure import Figure

    defaults = [row for row in report["rows"] if row["default"]]
    name = defaults[0]["method"]
    settings = [row for row in report["rows"] if row["method"] == name]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, report, {row["method"]: row for row in defaults})
    _curves(right, report, {f"θ = {_theta(row)}, token scales: {_scales(row)}": row for row in settings})
    left.set_ylabel("test accuracy, %")
    left.set_title("methods, each at its default")
    right.set_title(f"{name}, threshold and token scales")
    return figure


def _curves(axes: Any, report: Report, rows: dict[str, Report]) -> None:
    ps = report["num_props"]
    mean, _ = per_cent(report, report["unpatched"]["correct"])
    axes.axhline(mean, color="black", linewidth=0.8, linestyle=":", label="unpatched")
    for number, (label, row) in enumerate(rows.items()):
        colour = COLOURS[number % len(COLOURS)]
        style = ("-", "--", "-.")[number // len(COLOURS) % 3]
        means, spreads = zip(*(per_cent(report, correct) for correct in row["correct"]), strict=True)
        axes.errorbar(
            ps, means, yerr=spreads, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.2,
            elinewidth=0.8, capsize=2, label=label,
        )  # fmt: skip
    axes.set_xlabel("P, tokens that leave in each block")
    axes.set_xticks(ps)
    axes.legend(fontsize=8)


def digest(report: Report) -> str:
    """Of the report: the plot carries it."""
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()[:12]


def save_plot(report: Report, path: Path) -> None:
    """The figure as SVG; equal for equal reports and versions of matplotlib."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": COMMAND}):
        draw(report).savefig(path, metadata={"Date": None, "Identifier": digest(report)})


def write(report: Report, folder: Path, document: Path) -> None:
    """The plot, and the document's tables; the document is made where there is none."""
    save_plot(report, folder / "accuracy.svg")
    text = document.read_text() if document.is_file() else _comments("")
    document.write_text(generated(text, report))


def generated(text: str, report: Report) -> str:
    """A document's text with the tables of the report.

    Raises:
        ValueError: the comments that hold them are not there, each once.
    """
    return replaced(text, "accuracy", render(report), COMMAND)


def _comments(part: str) -> str:
    return f"<!-- accuracy: python -m {COMMAND} -->\n{part}\n<!-- accuracy: end -->\n"


@click.command(help=__doc__)
@click.option("--seeds", default=None, type=click.IntRange(1), help="How many; 3 by default, 2 with --quick.")
@click.option("--epochs", default=None, type=click.IntRange(1), help="Of training; the recipe's own by default.")
@click.option("--step", default=2, show_default=True, type=click.IntRange(1), help="Between one P and the next.")
@click.option("--threads", default=None, type=click.IntRange(1), help="torch's own choice by default.")
@click.option("--quick", is_flag=True, help="A tiny model and few images: tries the tool, measures nothing.")
@click.option("--keep", is_flag=True, help="Keep what is there, also where it comes from other sources.")
@click.option("--redraw", is_flag=True, help="Only the plot and the tables, from the JSON that is there.")
@click.option(
    "--output", "folder", default=None, type=click.Path(file_okay=False, path_type=Path),
    help="For JSON and plot; benchmarks/results/digits by default, build/accuracy/quick with --quick.",
)  # fmt: skip
@click.option(
    "--document", default=None, type=click.Path(dir_okay=False, path_type=Path),
    help="Where the tables go; docs/accuracy.md, or with --output or --quick accuracy.md beside the JSON.",
)  # fmt: skip
def main(
    seeds: int | None,
    epochs: int | None,
    step: int,
    threads: int | None,
    quick: bool,
    keep: bool,
    redraw: bool,
    folder: Path | None,
    document: Path | None,
) -> None:
    """Trains what is not trained yet, evaluates, writes, and prints the tables."""
    if document is None:
        document = folder / "accuracy.md" if folder else BUILD / "quick" / "accuracy.md" if quick else DOCUMENT
    folder = folder or (BUILD / "quick" if quick else RESULTS)
    path = folder / "accuracy.json"
    if redraw:
        if not path.is_file():
            raise click.UsageError(f"--redraw: there is no {path}")
        report = json.loads(path.read_text())
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        recipe = digits.TINY if quick else digits.Recipe()
        if epochs is not None:
            recipe = replace(recipe, epochs=epochs)
        earlier = json.loads(path.read_text()) if keep and path.is_file() else None
        report = run(recipe, list(range(seeds or (2 if quick else 3))), step, earlier)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    write(report, folder, document)
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(render(report)))


def run(recipe: digits.Recipe, seeds: list[int], step: int, earlier: Report | None = None) -> Report:
    """Trains and evaluates: the report. Of an earlier one, of the same models and P, the rows are kept."""
    ps = num_props((recipe.img_size // recipe.patch_size) ** 2, recipe.depth, step)
    about = {"recipe": asdict(recipe), "training": digits.digest(recipe), "seeds": seeds, "num_props": ps}
    same = earlier is not None and {key: earlier.get(key) for key in about} == about
    known = earlier["rows"] if earlier is not None and same else []
    evaluations = len(ps) * (sum(len(list(method.settings())) for method in METHODS.values()) - len(known))
    _, test = digits.load(recipe)
    # Before the training: what is committed meanwhile is not what ran.
    origin = provenance()
    with Progress(transient=True) as bar:
        task = bar.add_task("", total=len(seeds) * recipe.epochs)
        models = []
        for number, seed in enumerate(seeds):
            bar.update(task, description=f"training, seed {seed}", completed=number * recipe.epochs)
            models.append(digits.trained(recipe, seed, BUILD, lambda: bar.advance(task)))
        bar.reset(task, total=evaluations)

        def progress(what: str) -> None:
            bar.update(task, description=what, advance=1)

        found = evaluate(models, seeds, test, recipe.img_size, ps, known, origin["commit"], progress)
    return {**origin, **about, **found}


if __name__ == "__main__":
    main()
