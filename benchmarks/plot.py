"""``python -m benchmarks.plot FILE``: bars and a roofline of a file of ``benchmarks.run --json`` or ``benchmarks.gpu``.

The bars are the time of every candidate over ours; whiskers span the quartiles. The roofline has a point for every case
whose bytes and FLOPs are known: FLOPs per byte, against FLOPs per second, under the two ceilings that were measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

COLOURS = ("#1b6ca8", "#f2a33a", "#7a9e3b", "#c8553d", "#6b5b95", "#8c8c8c")


def load(path: Path) -> list[dict[str, Any]]:
    """The results of a file, each with its ``ceilings``; those without numbers are left out.

    Raises:
        ValueError: no results with numbers.
    """
    report = json.loads(path.read_text())
    parts = report.get("pieces", {}).values() if "pieces" in report else [report]
    results = [{**result, "ceilings": part["ceilings"]} for part in parts for result in part.get("results", [])]
    results = [result for result in results if "median" in result]
    if not results:
        raise ValueError(f"{path}: no results with numbers")
    return results


def draw(results: list[dict[str, Any]], title: str) -> Any:
    """A figure: bars, and a roofline where a case has bytes and FLOPs."""
    from matplotlib.figure import Figure

    points = [result for result in results if result.get("bytes") and result.get("flops")]
    figure = Figure(figsize=(11, 1.5 + 0.55 * len(results) + (4.5 if points else 0)), layout="constrained")
    rows = figure.subplots(2 if points else 1, 1, squeeze=False, height_ratios=(len(results), 8) if points else (1,))
    _bars(rows[0][0], results)
    if points:
        _roofline(rows[1][0], points)
    figure.suptitle(title)
    return figure


def _bars(axes: Any, results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result["median"]))
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        rows = [row for row, result in enumerate(results) if name in result["median"]]
        ours = np.array([results[row]["median"]["ours"] for row in rows])
        value = np.array([results[row]["median"][name] for row in rows]) / ours
        low, high = np.array([results[row]["quartiles"][name] for row in rows]).T / ours
        axes.barh(
            np.array(rows) + (number - (len(names) - 1) / 2) * height, value, height, label=name,
            xerr=np.stack((value - low, high - value)), color=COLOURS[number % len(COLOURS)],
            error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    labels = [f"{r['case']} {r['shape']} {r.get('dtype', '')}\n{r['median']['ours'] * 1e3:.3f} ms" for r in results]
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time over ours (right of 1: slower than ours)")
    axes.legend(fontsize=8)


def _roofline(axes: Any, points: list[dict[str, Any]]) -> None:
    intensity = np.array([point["flops"] / point["bytes"] for point in points])
    rate = np.array([point["flops"] / point["median"]["ours"] for point in points])
    span = np.geomspace(intensity.min() / 4, intensity.max() * 4, 100)
    dtypes = list(dict.fromkeys(point.get("dtype", "") for point in points))
    for number, dtype in enumerate(dtypes):
        chosen = [index for index, point in enumerate(points) if point.get("dtype", "") == dtype]
        ceilings, colour = points[chosen[0]]["ceilings"], COLOURS[number % len(COLOURS)]
        roof = np.minimum(span * ceilings["bytes_per_second"], ceilings["flops_per_second"])
        axes.plot(span, roof / 1e9, color=colour, linewidth=1, label=f"ceiling {dtype}")
        axes.scatter(intensity[chosen], rate[chosen] / 1e9, color=colour, label=f"ours {dtype}")
        for index in chosen:
            axes.annotate(
                f"{points[index]['case']} {points[index]['shape']}", (intensity[index], rate[index] / 1e9), fontsize=7,
                xytext=(4, 3), textcoords="offset points",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8)


@click.command(help=__doc__)
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Picture; FILE with .svg by default.")
def main(path: Path, out: Path | None) -> None:
    """Draws and says where."""
    report = json.loads(path.read_text())
    try:
        figure = draw(
            load(path), f"{report.get('device', '')} · {report.get('commit', '')} · torch {report.get('torch', '')}"
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: pip install 'gtp-kernels[bench]'") from None
    out = out or path.with_suffix(".svg")
    figure.savefig(out)
    click.echo(str(out))


if __name__ == "__main__":
    main()
