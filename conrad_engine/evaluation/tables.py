"""From rows of scores to a summary, and to tables as plain text and Markdown."""

from __future__ import annotations

from statistics import median

from .scoring import Row, mean_of

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("n", "objects", "d"),
    ("novel_psnr", "PSNR", ".2f"),
    ("novel_foreground", "fg PSNR", ".2f"),
    ("novel_ssim", "SSIM", ".3f"),
    ("novel_iou", "IoU", ".3f"),
    ("rear_psnr", "rear PSNR", ".2f"),
    ("detail", "detail", ".2f"),
    ("novel_perceptual", "LPIPS", ".3f"),
    ("chamfer", "Chamfer", ".4f"),
    ("f_score", "F@0.05", ".3f"),
    ("reference_psnr", "ref PSNR mesh", ".2f"),
    ("reference_psnr_common", "ref colors", ".2f"),
    ("field_reference_psnr", "ref PSNR field", ".2f"),
    ("reference_iou", "ref IoU", ".3f"),
    ("print_through_detail", "print-through", ".2f"),
    ("components", "parts", ".2f"),
    ("manifold_edges", "manifold", ".3f"),
    ("n_failures", "failures", "d"),
    ("seconds", "s/object", ".0f"),
)
LEGEND = (
    "Novel views: 8 azimuths x elevations 0 and 30 against the truth; PSNR on white, fg inside the true silhouette, "
    "rear: more than 130 degrees of azimuth away, detail: gradient energy of the rear views over the truth's (sums over "
    "all objects). Chamfer: mean of both mean distances, longest side 1, after scale and translation. ref: the picture's "
    "own view at its own resolution, PSNR inside the mask (colors: only where the mesh covers it, too). "
    "print-through: correlation of the back's detail with the "
    "picture printed through. An object without a mesh counts as an empty picture in the views."
)
WORST = 10
MEAN_KEYS = (
    *(f"{part}_{key}" for part in ("novel", "rear") for key in ("psnr", "foreground", "ssim", "iou", "perceptual")),
    "chamfer", "f_score", "chamfer_unaligned", "f_score_unaligned", "scale",
    "reference_psnr", "reference_psnr_common", "reference_ssim", "reference_iou", "field_reference_psnr",
    "print_through", "print_through_detail", "truth_print_through", "truth_print_through_detail",
    "components", "manifold_edges", "boundary_edges", "n_faces", "seconds",
)  # fmt: skip


def summarize(rows: list[Row]) -> dict:
    """Means over objects, the pooled detail ratio, how many failed and the ten worst by novel PSNR."""
    summary: dict = {"n": len(rows)}
    for key in MEAN_KEYS:
        value = mean_of(row.get(key) for row in rows)
        if value is not None:
            summary[key] = value
    true_energy = sum(row.get("truth_rear_energy") or 0.0 for row in rows)
    # A mean of ratios would be ruled by the plainest objects, so the energies are summed first.
    summary["detail"] = sum(row.get("rear_energy") or 0.0 for row in rows) / true_energy if true_energy else None
    ratios = [row["detail"] for row in rows if row.get("detail") is not None]
    summary["detail_median"] = median(ratios) if ratios else None
    summary["n_failures"] = sum(bool(row["failures"]) for row in rows)
    summary["failures"] = {row["object"]: row["failures"] for row in rows if row["failures"]}
    by_psnr = sorted(rows, key=lambda row: row["novel_psnr"])
    summary["worst"] = [{"object": row["object"], "novel_psnr": row["novel_psnr"]} for row in by_psnr[:WORST]]
    summary["by_source"] = {
        source: mean_of(row["novel_psnr"] for row in rows if row["source"] == source)
        for source in sorted({str(row["source"]) for row in rows})
    }
    return summary


def table_cells(summaries: dict[str, dict]) -> list[list[str]]:
    """Header and one line a variant; columns that no variant has are left out."""
    columns = [c for c in COLUMNS if any(summary.get(c[0]) is not None for summary in summaries.values())]
    lines = [["variant", *(title for _, title, _ in columns)]]
    for name, summary in summaries.items():
        values = [summary.get(key) for key, _, _ in columns]
        lines.append([name, *("-" if v is None else format(v, spec) for v, (_, _, spec) in zip(values, columns))])
    return lines


def plain_table(cells: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown_table(cells: list[list[str]]) -> str:
    lines = [cells[0], ["---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def worst_table(summary: dict, rows: list[Row]) -> str:
    """The worst objects of one variant, with what failed."""
    by_name = {row["object"]: row for row in rows}
    cells = [["object", "PSNR", "IoU", "Chamfer", "failures"]]
    for entry in summary["worst"]:
        row = by_name[entry["object"]]
        chamfer = row.get("chamfer")
        cells.append(
            [
                str(row["object"]),
                f"{row['novel_psnr']:.2f}",
                f"{row['novel_iou']:.3f}",
                "-" if chamfer is None else f"{chamfer:.4f}",
                ", ".join(row["failures"]) or "-",
            ]
        )
    return plain_table(cells)
