"""Prints the tables of README.md from the results: python examples/study/tables.py"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def rows(name: str) -> list[dict[str, Any]]:
    path = HERE / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: Iterable[float], digits: int = 1) -> str:
    """The mean and half the range over several seeds."""
    v = list(values)
    if not v:
        return "–"
    text = f"{sum(v) / len(v):.{digits}f}"
    return text if len(v) == 1 else f"{text} ± {(max(v) - min(v)) / 2:.{digits}f}"


def table(
    found: list[dict[str, Any]],
    row: Callable[..., str],
    column: Callable[..., str],
    value: str,
    digits: int = 1,
) -> str:
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    columns: dict[str, None] = {}
    for r in found:
        cells[row(r)][column(r)].append(r[value])
        columns.setdefault(column(r))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(spread(line[c], digits) for c in columns) + " |"
        for name, line in cells.items()
    ]
    return "\n".join(lines)


def bits_of(r: dict[str, Any]) -> str:
    kind = "" if r.get("per_channel", True) else " per tensor"
    return "float" if r["bits"] == 32 else f"W{r['bits']}A{r['bits']}{kind}"


def drops(found: list[dict[str, Any]]) -> str:
    """The accuracy that the net of each seed loses against its own float accuracy."""
    whole = {(r["variant"], r["seed"]): r["top1"] for r in found if r["bits"] == 32}
    lost = [
        r | {"drop": whole[r["variant"], r["seed"]] - r["top1"]} for r in found if r["bits"] != 32
    ]
    return table(lost, lambda r: r["variant"], bits_of, "drop")


def lead(found: list[dict[str, Any]], own: str) -> str:
    """The lead of `own` over each other method on the same nets: mean, standard error, extremes."""
    at = {(r["method"], r["net"], r["seed"]): r["top1"] for r in found}
    lines = ["| | nets | mean ± standard error | least | most |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(r["method"] for r in found if r["method"] not in (own, "float")):
        d = [at[own, *k[1:]] - v for k, v in at.items() if k[0] == method and (own, *k[1:]) in at]
        error = statistics.stdev(d) / len(d) ** 0.5
        mean = f"{statistics.mean(d):+.2f} ± {error:.2f}"
        lines.append(f"| {method} | {len(d)} | {mean} | {min(d):+.2f} | {max(d):+.2f} |")
    return "\n".join(lines)


def detection() -> None:
    """(h): AP of each way, and what each net loses by it against its own float AP."""
    found = rows("detection")
    for data in dict.fromkeys(r["data"] for r in found):
        some = [r for r in found if r["data"] == data]
        whole = {(r["variant"], r["seed"]): r["ap"] for r in some if r["way"] == "float"}
        lost = [r | {"lost": whole[r["variant"], r["seed"]] - r["ap"]} for r in some]
        for value in ("ap", "ap50"):
            print(f"\n(h) {data}, {value}\n")
            print(table(some, lambda r: r["way"], lambda r: r["variant"], value))
        print(f"\n(h) {data}, AP lost\n")
        print(table(lost, lambda r: r["way"], lambda r: r["variant"], "lost", 2))


def strategies() -> None:
    """(b): the accuracy of each strategy at its own best rate, and at every rate that was tried.

    `one_rate` was made by an earlier form of the study, at one rate."""

    def name(r: dict[str, Any]) -> str:
        return f"{r['net']}, {r['strategy']} {r.get('mode', '')}".strip()

    print("\n(b) one rate\n" + table(rows("one_rate"), name, bits_of, "top1"))
    found = rows("strategies")
    first = min((r["seed"] for r in found), default=0)
    tried = [r for r in found if r["bits"] == 4 and r["seed"] == first]
    best = {
        key: max((r for r in tried if name(r) == key), key=lambda r: float(r["top1"]))["lr"]
        for key in dict.fromkeys(map(name, tried))
    }
    kept = [r for r in found if r["bits"] == 32 or r["lr"] == best.get(name(r))]
    print("\n(b) each at its best rate\n" + table(kept, name, bits_of, "top1"))
    print("\n(b) rates, 4 bits, one seed\n" + table(tried, name, lambda r: f"{r['lr']:g}", "top1"))


def defaults() -> None:
    """(j): what every tool makes of every net by default."""
    found = [r for r in rows("defaults") if "score" in r]
    for value, digits in (("score", 2), ("sqnr", 2), ("seconds", 0)):
        some = [r for r in found if value in r]
        print(f"\n(j) {value}\n")
        print(table(some, lambda r: r["tool"], lambda r: r["net"], value, digits))


def main() -> None:
    variants = sorted(rows("variants"), key=lambda r: (not r.get("per_channel", True), -r["bits"]))
    order = ["S0", "Eq6", "S1", "S2", "S3", "S4"]
    variants.sort(key=lambda r: order.index(r["variant"]))
    for size in ("mini", "large"):
        some = [r for r in variants if r["size"] == size]
        print(f"(a) {size}\n" + table(some, lambda r: r["variant"], bits_of, "top1") + "\n")
        print("drops\n" + drops(some) + "\n")
    strategies()
    found = rows("sr")
    for name in ("set5", "set14"):
        print(
            f"\n(c) {name}\n"
            + table(
                found,
                lambda r: r["strategy"] + (f" {r['net']}" if "net" in r else ""),
                bits_of,
                name,
                2,
            )
        )
    found = rows("sr_ptq")
    for name in ("set5", "set14"):
        print(f"\n(f) {name}\n" + table(found, lambda r: r["method"], bits_of, name, 2))
    order = ["float", "max", "percentile", "entropy", "mse", "mae"]  # learned methods come after
    found = sorted(
        rows("ptq"), key=lambda r: order.index(r["method"]) if r["method"] in order else len(order)
    )
    for bits in ((6, 6), (8, 4), (8, 8)):
        some = [r for r in found if r["method"] == "float" or (r["bits"], r["weight_bits"]) == bits]
        print(
            f"\n(e) W{bits[1]}A{bits[0]}\n"
            + table(some, lambda r: r["method"], lambda r: r["net"], "top1")
        )
        print("\nlead of repapq\n" + lead(some, "repapq"))
    print(
        "\n(e) other tools, W8A8\n"
        + table(rows("peers"), lambda r: r["method"], lambda r: r["net"], "top1")
    )
    print("\nlead of ours\n" + lead(rows("peers"), "repfx repapq"))
    width = lambda r: f"{r['net']} W{r['weight_bits']}A{r['bits']}"  # noqa: E731
    print("\n(e) classics\n" + table(rows("classics"), lambda r: r["method"], width, "top1"))
    detection()
    found = rows("pretrained")
    for value in ("agree", "sqnr"):
        print(f"\n(i) {value}\n" + table(found, lambda r: r["way"], lambda r, v=value: v, value))
    defaults()


if __name__ == "__main__":
    main()
