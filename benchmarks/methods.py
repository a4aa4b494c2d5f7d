"""The methods side by side, and mixed bits beside even ones, from points that are recorded.

    python -m qbench -m task=wikitext2 task.path=TEXT task.window=1024 quantizer=rtn,gptq quantizer.nbits=4,3,2 ...
    python benchmarks/methods.py OUTPUTS [--alone OUTPUTS] [-o JSON]

The tables of docs/methods.md: for every method and number of bits perplexity, the interval of its difference to the
original, KL and bits per weight; seconds are those of `--alone`, points that had a GPU to themselves. A mixed point has
beside it each point with about as many bits per weight: the difference in KL, paired over the windows, jackknife.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from qbench.intervals import jackknife
from qbench.report import entries

NAMES = {"asinq": "A-SINQ"}
NEAR = 0.1, 0.035  # bits per weight that an even point may take less or more than the mixed one that it is beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--alone", type=Path, help="outputs of points whose seconds count")
    parser.add_argument("-o", "--output", type=Path, help="write all rows as JSON")
    asked = parser.parse_args()
    rows = list(read(asked.outputs))
    seconds = (
        {}
        if asked.alone is None
        else {row["method"]: row["quantize_seconds"] for row in read(asked.alone) if row["nbits"] == 4}
    )
    for row in rows:
        row["quantize_seconds"] = seconds.get(row["method"]) if row["nbits"] == 4 else None
    found = list(differences(rows))
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        print(f"### {protocol}\n\n{table([row for row in rows if row['protocol'] == protocol])}\n")
    for line in found:
        low, high = line["difference_low"], line["difference_high"]
        print(f"{line['mixed']} - {line['even']}: KL {line['difference']:+.4f} ({low:+.4f} to {high:+.4f})")
    if asked.output:
        kept = [{key: value for key, value in row.items() if key != "kl_windows"} for row in rows]
        parts = [
            f'"{name}": [\n' + ",\n".join(map(json.dumps, part)) + "\n]"
            for name, part in (("rows", kept), ("mixed", found))
        ]
        asked.output.write_text("{\n" + ",\n".join(parts) + "\n}\n")  # a line a point


def read(outputs: Path) -> Iterator[dict[str, Any]]:
    """A row for every point of a whole model, the last recorded of each."""
    for entry in entries.latest(entries.read(outputs).entries):
        result, settings = entry.result, dict(entry.identity.quantizer)
        if settings["name"] == "partly" or result.quantization is None:
            continue
        for record in (record for record in result.evaluation if record.divergence is not None):
            kl = record.divergence.kl
            bits = result.quantization.bits_per_weight
            method, nbits = named(settings, bits)
            windows = load_file(outputs / "results" / result.run_id / record.window_nll_file)
            yield {
                "protocol": record.protocol,
                "method": method,
                "nbits": nbits,
                "bits_per_weight": round(bits, 4),
                "ppl": record.ppl,
                "original_ppl": record.baseline_ppl,
                "ppl_difference_low": record.ppl_delta_low,
                "ppl_difference_high": record.ppl_delta_high,
                "kl": kl.value,
                "kl_low": kl.low,
                "kl_high": kl.high,
                "weight_error": entry.weight_error,
                "quantize_seconds": result.seconds.get("quantize"),
                "device": result.environment.get("gpu") or result.environment["device"],
                "dtype": entry.identity.dtype,
                "settings": {key: value for key, value in settings.items() if value is not None},
                "kl_windows": windows["kl"],
            }


def named(settings: dict[str, Any], bits: float) -> tuple[str, float]:
    """`RTN rotated` and 4, `HIGGS pairs` and 3, `mixed RTN` and 3.5: what a row is called, and the bits of its code."""
    name = str(settings["name"])
    words = [name if name in ("none", "mixed") else NAMES.get(name, name.upper())]
    words += [str(settings["method"]).upper()] if name == "mixed" else []
    words += ["rotated"] if settings.get("rotation") else []
    words += [["single", "pairs"][settings["grid_dim"] - 1]] if "grid_dim" in settings else []
    words += [f"g{settings['group_size']}"] if settings.get("group_size", 64) not in (64, 256) else []
    words += ["int8"] if settings.get("aux_dtype") == "int8" else []
    return " ".join(words), settings.get("nbits", round(bits, 2) if name == "mixed" else 4)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a line a method, in the order of KL at the most bits."""
    widths = [4, 3, 2]
    held = {(row["method"], row["nbits"]): row for row in rows}
    methods = sorted({row["method"] for row in rows if row["nbits"] in widths and row["method"] != "none"})
    methods.sort(
        key=lambda name: min(held[name, n]["kl"] for n in widths[:1] if (name, n) in held) if (name, 4) in held else 99
    )
    lines = [
        "| method | " + " | ".join(f"{n} bits | difference | KL" for n in widths) + " | bits/weight at 4 | seconds |"
    ]
    lines += ["|---" * (3 * len(widths) + 3) + "|"]
    for name in methods:
        cells = [name]
        for n in widths:
            row = held.get((name, n))
            cells += ["", "", ""] if row is None else [
                number(row["ppl"]),
                f"+{number(row['ppl_difference_low'])} to +{number(row['ppl_difference_high'])}",
                f"{row['kl']:.3f}",
            ]  # fmt: skip
        first = held.get((name, 4), {})
        seconds = first.get("quantize_seconds")
        cells += [f"{first['bits_per_weight']:.3f}" if first else "", f"{seconds:.1f}" if seconds is not None else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"Original {rows[0]['original_ppl']:.3f}.", "", *lines])


def number(value: float) -> str:
    """Two decimals below a hundred, one below a thousand, then none."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def differences(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each mixed point less every even one of about as many bits, the best of them by KL first."""
    for mixed in (row for row in rows if row["settings"]["name"] == "mixed"):
        even = [
            row
            for row in rows
            if row["protocol"] == mixed["protocol"] and row["settings"]["name"] not in ("mixed", "none")
            if -NEAR[0] <= row["bits_per_weight"] - mixed["bits_per_weight"] <= NEAR[1]
        ]
        for row in sorted(even, key=lambda row: row["kl"]):
            found = jackknife(lambda a, b: a - b, mixed["kl_windows"], row["kl_windows"])
            yield {
                "mixed": f"{mixed['method']} {mixed['nbits']}",
                "even": f"{row['method']} {row['nbits']}",
                "bits_per_weight": [mixed["bits_per_weight"], row["bits_per_weight"]],
                "kl": [mixed["kl"], row["kl"]],
                "difference": found.value,
                "difference_low": found.low,
                "difference_high": found.high,
            }


if __name__ == "__main__":
    main()
