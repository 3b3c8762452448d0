"""Makes the tables of the READMEs and docs from the records in benchmarks/results; `--check` fails when they differ.

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import Any

from flopwise.experiments.claims.attention import NEAR_CHANCE
from flopwise.report import claims, lake, read_records, settings
from flopwise.report.attention import NAMES, OURS, by_method
from flopwise.report.importance import markdown_table
from flopwise.report.page import markdown
from flopwise.report.words import mean_std

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/claims.md",
    "docs/importance_sampling.md",
    "docs/attention_sampling.md",
    "docs/linear_attention.md",
    "docs/clustered_attention.md",
    "src/flopwise/attention_sampling/README.md",
    "src/flopwise/linear_attention/README.md",
    "src/flopwise/clustered_attention/README.md",
)
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def verdicts() -> str:
    """What came of the thesis' claims in `flopwise reproduce`."""
    records = read_records(RESULTS / "claims.jsonl")
    return f"{claims.summary(records)}.\n\n{claims.markdown_table(records)}"


def importance() -> str:
    """The comparison at equal FLOPs."""
    return markdown_table(read_records(RESULTS / "importance.jsonl"))


def overhead() -> str:
    """What the ledger and the sampler cost, from the newest benchmark record."""
    record = json.loads((RESULTS / "importance_sampling.jsonl").read_text().splitlines()[-1])
    rows = [f"| {name} | {ratio:.3f} |" for name, ratio in record["overhead"].items()]
    kept = record["score quality after one epoch"]
    rows += [
        f"| variance reduction that the {name} keeps of exact norms' | {kept[name]['variance reduction kept']:.2f} |"
        for name in ("upper bound", "loss")
    ]
    return "\n".join(["| CPU time of | ratio |", "|---|---|", *rows])


def importance_settings() -> str:
    """Ours, as it comes, and tuned uniform sampling in every setting; how often each of ours won."""
    results = _settings()
    table = markdown(*settings.comparison(results, settings.OURS))
    others = (line for method in (settings.SHRINK, settings.PROXY) for line in settings.summary(results, method))
    return "\n".join([table, *settings.summary(results), *others])


def importance_settings_all() -> str:
    """The same with the proxy and all baselines."""
    results = _settings()
    parts = [importance_settings(), "", "With a proxy:", "", markdown(*settings.comparison(results, settings.PROXY))]
    for kind, same in settings.SAME.items():
        title = f"All methods at equal {same}, training loss and test error relative to tuned uniform sampling's:"
        parts += [title, "", markdown(*settings.all_methods(results, kind))]
    return "\n".join(parts)


def importance_predictions() -> str:
    """What the audit said, and what came of it."""
    results = _settings()
    return f"{markdown(*settings.predictions(results))}\n{settings.audit_summary(results)}"


def _settings() -> settings.Results:
    return settings.Results.of(read_records(RESULTS / "importance_settings.jsonl"))


def importance_cheap_scores() -> str:
    """R of every score at its best ratio, the mean over a quarter, a half and three quarters of each training."""
    records = {}
    for record in map(json.loads, (RESULTS / "importance_cheap_scores.jsonl").read_text().splitlines()):
        records[record["setting"]] = {
            name: fmean(stage["scores"][name]["R"] for stage in record["stages"])
            for name in record["stages"][0]["scores"]
        }
    names = dict.fromkeys(name for found in records.values() for name in found)
    rows = [[name, *(f"{found[name]:.2f}" if name in found else "–" for found in records.values())] for name in names]
    return markdown(["score", *records], rows)


def trainers_overhead() -> str:
    """A step with the gate off over the trainer's own."""
    record = json.loads((RESULTS / "importance_trainers.jsonl").read_text().splitlines()[-1])
    columns = list(next(iter(record["overhead"].values())))
    rows = [
        [name, *(f"{found[key]:.3f}" if "ms" not in key else f"{found[key]:.1f}" for key in columns)]
        for name, found in record["overhead"].items()
    ]
    return markdown(["trainer", *columns], rows)


def newest(name: str, *keys: str) -> dict[tuple, dict[str, Any]]:
    """The last record of a file for every value of `keys`; None where a record lacks one."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return {tuple(record.get(key) for key in keys): record for record in map(json.loads, lines)}


def clustered(settings: Sequence[str] | None = None) -> str:
    """What pretrained models keep and cost with clustered attention; `settings` picks lines by their first cells."""
    rows = []
    for record in newest("clustered_models", "kind", "clusters", "topk", "length", "joined", "model").values():
        if record["kind"] == "tune":
            continue
        seconds, attention = record["seconds"], record.get("attention_seconds")
        cells = [
            f"{record['model']}{', joined prompts' if record.get('joined') else ''}",
            str(record["length"]),
            f"{record['clusters']} / {record['topk']}",
            _kept(record),
            f"{attention['clustered'] / attention['exact']:.2f} x" if attention else "–",
            f"{seconds['clustered'] / seconds['exact']:.2f} x"
            + (f" (free attention: {seconds['without'] / seconds['exact']:.2f} x)" if "without" in seconds else ""),
        ]
        if settings is None or " ".join(cells[:3]) in settings:
            rows.append(f"| {' | '.join(cells)} |")
    head = "| model | length | clusters / top-k | kept | attention time | model time |\n|---|---|---|---|---|---|"
    return "\n".join([head, *rows])


def _kept(record: dict[str, Any]) -> str:
    if record["kind"] == "text":
        topics = record["topic_accuracy"]
        return (
            f"cosine {record['cosine']['mean']:.3f} (lowest {record['cosine']['min']:.3f}), "
            f"{record['neighbours_kept']:.0%} of nearest neighbours, "
            f"topics {topics['clustered']:.1%} (exact {topics['exact']:.1%})"
        )
    return f"{record['word_error']:.1%} of words differ" if record["kind"] == "speech" else "–"


def clustered_speed() -> str:
    """The operator against SDPA, by length."""
    found = newest("clustered_attention", "kind", "direction", "backend", "clusters", "length")
    lengths = sorted({key[4] for key in found if key[0] == "speed"})
    rows = [f"| | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for direction in ("forward", "forward and backward"):
        for backend in ("numba", "torch"):
            for clusters in (32, 64):
                cells = [found["speed", direction, backend, clusters, length]["speedup"] for length in lengths]
                rows.append(f"| {direction}, {backend}, C={clusters} | {' | '.join(map(_times, cells))} |")
    for clusters in (32, 64):
        for name, key in (("error", "error"), ("plain (`topk=0`)", "plain_error")):
            cells = [found["speed", "forward", "numba", clusters, length][key] for length in lengths]
            rows.append(f"| {name}, C={clusters} | {' | '.join(f'{x:.2f}' for x in cells)} |")
    return "\n".join(rows)


def linear_speed() -> str:
    """The causal operator against SDPA, by length."""
    found = newest("linear_attention", "kind", "causal", "direction", "backend", "length")
    lengths = sorted({key[4] for key in found if key[0] == "speed" and key[1]})
    rows = [f"| causal, 8 heads of 64 | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for backend in ("numba", "torch"):
        for direction in ("forward", "forward and backward"):
            records = [found["speed", True, direction, backend, length] for length in lengths]
            rows.append(f"| {direction}, {backend} | {' | '.join(_times(r['speedup']) for r in records)} |")
    both = [found["speed", True, "forward and backward", "numba", length] for length in lengths]
    errors, shares = ([f"{max(r['errors']):.0e}" for r in both], [f"{r['share_of_matmul']:.0%}" for r in both])
    rows.append(f"| largest error against float64, numba | {' | '.join(errors)} |")
    rows.append(f"| share of the matmul rate, numba | {' | '.join(shares)} |")
    return "\n".join(rows)


def linear_decoding(int8: bool = True) -> str:
    """Tokens a second of a decoder with 256 features, 8 layers and 8 heads, and the gains."""
    record = json.loads((RESULTS / "linear_decoding.jsonl").read_text().splitlines()[-1])
    rows = [
        "| batch, steps | linear, tokens/s | cache, tuned | gain | cache of torch's modules | gain | over no cache |",
        "|---" * 7 + "|",
    ]
    for part in record["batches"]:
        for row in part["lengths"]:
            for name in (name for name in part["step_ms"] if int8 or "int8" not in name):
                rates = row["tokens_per_second"]
                weights = ", int8" if "int8" in name else ""
                rows.append(
                    f"| {part['batch']}, {row['length']}{weights} | {rates[name]:.0f} | {rates['cache']:.0f} "
                    f"| {row['gain over cache'][name]:.2g} x | {rates['modules']:.0f} "
                    f"| {row['gain over modules'][name]:.2g} x | {row['gain over no cache'][name]:.0f} x |"
                )
    return "\n".join(rows)


def linear_bits() -> str:
    """What digit models of one size learned from the same FLOPs, each at its own best rate, and the one shipped."""
    records = map(json.loads, (RESULTS / "linear_training.jsonl").read_text().splitlines())
    runs = [r for r in records if r["task"] == "digits" and r["kind"] != "tune"]
    shipped = [r for r in runs if r["kind"] == "shipped"][-1]
    names = {"softmax": "softmax", "linear": "linear, the thesis' recipe", "modern": "linear, the modern recipe"}
    rows = ["| digits, 0.5 M weights | bits a pixel | digits seen | best rate | FLOPs |", "|---|---|---|---|---|"]
    for r in sorted(runs, key=lambda r: -r["bits_per_dim"]):
        name = names[r["method"]] + (", shipped" if r is shipped else "")
        flops = f"{r['budget']['flops']:.3g}"
        rows.append(f"| {name} | {r['bits_per_dim']:.3f} | {r['examples']} | {r['rate']:g} | {flops} |")
    return "\n".join(rows)


def attention_step(smallest: int = 0) -> str:
    """CPU time and added memory of a training step for one image, from `smallest` pixels a side on.

    Of all runs, that on the quietest machine, where the full network was fastest.
    """
    runs = map(json.loads, (RESULTS / "attention_sampling.jsonl").read_text().splitlines())
    record = min(runs, key=lambda run: run["step"]["1504"]["ms"]["cnn_1"])
    rows = [
        "| training step, one image | attention sampling | all pixels, same layers | time, memory |",
        "|---|---|---|---|",
    ]
    for side, found in record["step"].items():
        if int(side) < smallest:
            continue
        cells = [f"{found['ms'][name]:.3g} ms, {found['mb'][name]:.3g} MB" for name in ("murthy", "cnn_1")]
        less = f"{found['times_less_cpu']['cnn_1']:.0f} x, {found['times_less_memory']['cnn_1']:.0f} x less"
        rows.append(f"| {side} x {side} | {' | '.join(cells)} | {less} |")
    return "\n".join(rows)


def attention_estimators() -> str:
    """Monte Carlo errors of the estimators, with 90 % of the mass on five of 2500 positions."""
    record = json.loads((RESULTS / "attention_sampling.jsonl").read_text().splitlines()[-1])
    rows = ["| estimator | error of the features (RMSE) | error of the gradient (MSE) |", "|---|---|---|"]
    rows += [
        f"| `{name}` | {e['rmse']:.3f} | {e['gradient_mse']:.3g} |"
        for name, e in record["estimators"]["peaked"].items()
    ]
    return "\n".join(rows)


def lakes() -> str:
    """Attention sampling against networks on the whole crop at equal seconds, and who won."""
    records = read_records(RESULTS / "lake.jsonl")
    return f"{lake.markdown_table(records)}\n{lake.verdict(records)}"


def large_images() -> str:
    """What it takes to classify an image of 100,000 squared, and how memory in training grows with the images."""
    rows = ["| whole process, one thread | seconds | peak MB |", "|---|---|---|"]
    for record in map(json.loads, (RESULTS / "large_images.jsonl").read_text().splitlines()):
        if record["part"] == "predict":
            what = f"classify {record['size']:,} squared, attention at 1/{record['reduction']}, 64 patches of 256"
            rows.append(f"| {what} | {max(record['seconds']):.1f} | {max(record['peak MB']):.0f} |")
        else:
            for size, peak in record["peak MB"].items():
                what = f"train on {int(size):,} squared, attention at 1/{record['reduction'][size]}"
                rows.append(f"| {what}, batches of 4 x 16 patches of 256 | – | {peak:.0f} |")
    return "\n".join(rows)


def attention_digits() -> str:
    """Test errors in per cent, all methods with the same seconds of one core; means over seeds."""
    columns = {"drawn as in training": "", "5 largest (`topk`)": "topk_5", "10": "topk_10", "20": "topk_20"}
    rows = [f"| test error, % | {' | '.join(columns)} | seeds | images seen |", "|---" * (len(columns) + 3) + "|"]
    for method, runs in by_method(read_records(RESULTS / "attention.jsonl")).items():
        cells = [
            _percent([{"": run["test_error"], **run["test_errors"]}.get(key) for run in runs])
            for key in columns.values()
        ]
        seen = mean(run["examples"] for run in runs)
        rows.append(f"| {NAMES[method]} | {' | '.join(cells)} | {len(runs)} | {seen:.0f} |")
    return "\n".join(rows)


def attention_equal_error(side: str = "1504") -> str:
    """What attention sampling takes for the errors at which networks without it ended, each at its best rate."""
    runs = by_method(read_records(RESULTS / "attention.jsonl"))
    step = json.loads((RESULTS / "attention_sampling.jsonl").read_text().splitlines()[-1])["step"][side]
    curves = [run["curve"] for run in runs[OURS]]
    columns = (
        "network",
        "a step, one image",
        "rate",
        "test error after",
        "attention sampling is there after",
        "factor",
    )
    rows = []
    for method, found in runs.items():
        error, seconds = mean(run["test_error"] for run in found), mean(run["seconds"] for run in found)
        if method not in step["ms"] or method == OURS or error > NEAR_CHANCE:
            continue
        there = mean(_first(curve, error) for curve in curves)
        cost = f"{step['ms'][method]:.3g} ms, {step['mb'][method]:.3g} MB"
        taken = f"{seconds:.0f} s: {100 * error:.1f} %"
        rows.append([NAMES[method], cost, f"{found[0]['rate']:g}", taken, f"{there:.0f} s", f"{seconds / there:.1f} x"])
    ours = f"{step['ms'][OURS]:.3g} ms, {step['mb'][OURS]:.3g} MB"
    seconds, error = (mean(run[key] for run in runs[OURS]) for key in ("seconds", "test_error"))
    last = [NAMES[OURS], ours, f"{runs[OURS][0]['rate']:g}", f"{seconds:.0f} s: {100 * error:.1f} %", "–", "–"]
    return markdown(columns, [*rows, last])


def _first(curve: Sequence[dict[str, Any]], error: float) -> float:
    """The seconds at which a curve first crosses an error; it starts at chance, its points are joined by lines."""
    before, chance = 0.0, 0.9
    for point in curve:
        if point["test_error"] <= error:
            share = (chance - error) / (chance - point["test_error"]) if chance > point["test_error"] else 1.0
            return before + share * (point["seconds"] - before)
        before, chance = point["seconds"], point["test_error"]
    return float("nan")


def _percent(shares: Sequence[float | None]) -> str:
    found = [100 * share for share in shares if share is not None]
    return mean_std(mean(found), stdev(found) if len(found) > 1 else None) if found else "–"


def _times(speed: float) -> str:
    return f"{speed:.2g}" if speed < 10 else f"{speed:.1f}"


README_LINES = (
    "MiniLM 512 64 / 64",
    "Whisper tiny.en 1500 64 / 64",
    "BERT, 6 layers, 12 heads x 32 8192 32 / 32",
)
TABLES = {
    "claims": verdicts,
    "importance": importance,
    "importance-settings": importance_settings,
    "importance-settings-all": importance_settings_all,
    "importance-predictions": importance_predictions,
    "importance-cheap-scores": importance_cheap_scores,
    "trainers-overhead": trainers_overhead,
    "overhead": overhead,
    "linear-speed": linear_speed,
    "linear-decoding": partial(linear_decoding, int8=False),
    "linear-decoding-all": linear_decoding,
    "linear-bits": linear_bits,
    "attention-step": partial(attention_step, 1000),
    "attention-step-all": attention_step,
    "attention-estimators": attention_estimators,
    "attention-lakes": lakes,
    "attention-large-images": large_images,
    "attention-digits": attention_digits,
    "attention-equal-error": attention_equal_error,
    "clustered": partial(clustered, README_LINES),
    "clustered-all": clustered,
    "clustered-speed": clustered_speed,
}


def main(check: bool) -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        made = PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]().strip()}\n{place[3]}", text)
        if not check:
            path.write_text(made)
        elif made != text:
            sys.exit(f"{page}: a table differs from the records; run `python scripts/readme_tables.py` and commit.")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
