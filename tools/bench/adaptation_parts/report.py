"""What a person reads of the results."""

from __future__ import annotations

from typing import Any

from tools.bench._tables import show_table

COLUMNS = ("implementation", "ms/task", "x fastest peer", "wall ms", "first call s", "peak MB", "GFLOP/s", "of sgemm",
           "float32 error", "float64 error")  # fmt: skip


GROWTH = ("implementation", "MB, 1 inner step", "MB, 10", "copies of the parameters a step")


def show_growth(title: str, rows: list[dict[str, Any]]) -> None:
    """How memory grows with the inner steps of one workload."""
    found = [[r["implementation"], *(f"{r[k]:.4g}" for k in ("mb_of_1", "mb_of_10", "copies_a_step"))] for r in rows]
    show_table(GROWTH, found, title)
    print(flush=True)


def cells(row: dict[str, Any]) -> list[str]:
    """A row's words, in the order of COLUMNS."""
    ratio, peak, ms = row["ratio_to_fastest_peer"], row["peak_mb"], row["ms_per_task"]
    return [
        row["implementation"],
        f"{ms:.1f}" if ms >= 10 else f"{ms:.4f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{row['wall_ms_per_task']:.3g}",
        f"{row['first_call_s']:.1f}",
        "" if peak is None else f"{peak:.0f}",
        f"{row['gflops']:.2f}",
        f"{100 * row['share_of_sgemm']:.1f} %",
        f"{row['error_float32']:.0e}",
        "" if row["error_float64"] is None else f"{row['error_float64']:.0e}",
    ]


def show(title: str, result: dict[str, Any]) -> None:
    """One workload: a table on a terminal, lines of tabs elsewhere."""
    heading = title
    if best := result.get("attainable_gflops"):
        heading += f"; attainable GFLOP/s: sgemm {best['sgemm']:.0f}, 3x3 convolution {best['conv3x3']:.0f}"
    rows = sorted(result["rows"], key=lambda r: r["ms_per_task"])
    show_table(COLUMNS, [cells(row) for row in rows], heading)
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    print(flush=True)
