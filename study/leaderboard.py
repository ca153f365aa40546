"""Writes the leaderboard of a study: leaderboard.md for people, leaderboard.csv and leaderboard.json for programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from experiment.run_directory import Run
from study.design import Study
from study.summary import AGREES, summary


def write(study: Study, run: Run) -> str:
    """Writes the three leaderboard files and returns the text of leaderboard.md."""
    results = summary(study)
    text = as_markdown(results)
    run.write("leaderboard.json", results)
    run.write_text("leaderboard.csv", as_csv(results["cells"]))
    run.write_text("leaderboard.md", text)
    return text


def as_csv(cells: Sequence[dict]) -> str:
    """Returns CSV text with a header and one line for each cell."""
    file = io.StringIO()
    if cells:
        columns = [name for name in cells[0] if name != "by_name"]
        table = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows({**row, "found_by": " ".join(row["found_by"])} for row in cells)
    return file.getvalue()


def shown(value: Any) -> str:
    """Returns the text of a value in a table: two decimals for a float, and a dash for None."""
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def with_spread(value: float | None, sd: float | None) -> str:
    return shown(value) + ("" if sd is None else f" ± {sd:.2f}")


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """Returns a Markdown table; " | " separates the columns in `head`."""
    lines = [f"| {' | '.join(map(shown, row))} |" for row in rows]
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *lines])


def as_markdown(results: dict[str, Any]) -> str:
    """Returns the text of leaderboard.md for a `summary`."""
    parts = ["# Leaderboard", "Perplexities on the validation text, ± the standard deviation between seeds."]
    if results["chosen"]:
        c = results["chosen"]
        parts.append(
            f"Chosen: **{c['cell']}** ({c['run']}), {c['valid_ppl']:.2f} valid, "
            + ("test not read yet." if c["test_ppl"] is None else f"{c['test_ppl']:.2f} test, read once.")
        )
        if c["unknown"]:
            shares = " and ".join(f"{share:.1%} of {split}" for split, share in c["unknown"].items())
            parts.append(f"In these perplexities {shares} are unknown words, which count as `<unk>`.")
    rows = [
        (row["cell"], ", ".join(row["found_by"]),
         "halved" if row["halved"] else with_spread(row["select"], row["select_sd"]),
         with_spread(row["retrain"], row["retrain_sd"]))
        for row in results["cells"]
    ]  # fmt: skip
    parts += [table("cell | found by | short training | in full", rows)]
    if results["methods"]:
        parts += ["## By method (short trainings)", method_table(results["methods"])]
        if to_run := results["to_run"]:
            parts.append(f"No test is made before all searches and short trainings have ended: {to_run} have not.")
        if left_out := results["left_out"]:
            parts.append(f"Left out, as no short training of theirs ended: {', '.join(left_out)}.")
    if results["features"]:
        parts += ["## What tells cells apart", feature_table(results["features"])]
    rows = [a.values() for a in results["agreement"]]
    parts += ["## Agreement between stages", table("between | cells | Kendall's tau | Spearman's rho", rows)]
    if any(b["curve"] for b in results["baselines"]):
        rows = [(b["cell"], b["seed"], b["valid_ppl"], len(b["curve"])) for b in results["baselines"]]
        parts += ["## Baselines, in full", table("cell | seed | valid ppl | epochs", rows)]
    if results["proxies"]:
        head = "short training | cost, of one in full | cells | tau | rho | tau of seeds | sd of seeds | of cells"
        head += " | recommended"
        rows = [
            (p["proxy"], f"{100 * p['cost']:.1f}%", p["cells"], interval(p["tau"]), interval(p["rho"]),
             p["tau_of_seeds"], p["seed_sd"], p["cell_sd"], "yes" if p["recommended"] else "")
            for p in results["proxies"]
        ]  # fmt: skip
        parts += ["## Proxies", "tau and rho against the long training, with 90% intervals of the bootstrap; tau of "
                  "seeds against the same short training with other seeds."]  # fmt: skip
        parts += [table(head, rows)]
        if not any(p["recommended"] for p in results["proxies"]):
            parts.append(f"None has a tau of {AGREES} with an interval above 0: train longer, or rank more cells.")
    if results["proxy_cells"]:
        head = " | ".join(["cell", *results["proxy_cells"][0]["ppl"]])
        parts += ["## The cells of the proxies", "Perplexities after each short training, and after the long one."]
        parts += [table(head, [(row["cell"], *row["ppl"].values()) for row in results["proxy_cells"]])]
    rows = [
        (c["stage"], c["runs"], f"{value:.2f} {key.replace('_', '-')}")
        for c in results["cost"] for key, value in c.items() if key.endswith("hours")
    ]  # fmt: skip
    parts += ["## Cost", table("stage | runs | device time", rows)]
    parts += [f"The stage {stage} was stopped: {reason}." for stage, reason in results["stopped"].items()]
    if results["failures"]:
        parts += ["## Failures", table("trial | its last words", [f.values() for f in results["failures"]])]
    parts += ["## Genotypes", "\n".join(f"- {row['cell']}: `{row['genotype']}`" for row in results["cells"])]
    return "\n\n".join(parts) + "\n"


def method_table(rows: Sequence[dict]) -> str:
    """Returns the table of the methods, with what compares each of them with the random cells."""
    note = (
        "A cell that several searches found was trained anew for each of them. p: permutation test of the means (twice "
        "the smaller tail) against the random cells; corrected: for the number of methods (Holm). Random below: the "
        "share of the random cells that are better than the method's mean. Rival: the best of so many random cells, "
        "which take as long as one search and one short training; the method's mean minus the expected best of these, "
        "with the 90% interval of a bootstrap."
    )
    head = "method | n | mean | sd | median | best | p | corrected | random below | rival: cells | mean minus rival"
    texts = [
        (m["method"], m["n"], m["mean"], m["sd"], m["median"], m["best"], p_value(m["p"]), p_value(m["p_corrected"]),
         "-" if m["random_below"] is None else f"{100 * m['random_below']:.0f}%", m["rival_draws"],
         interval(m["minus_rival"]) if m["minus_rival"] else None)
        for m in rows
    ]  # fmt: skip
    return f"{note}\n\n{table(head, texts)}"


def feature_table(rows: Sequence[dict]) -> str:
    """Returns a table with a row for each feature, and a column for each group of cells and time."""
    columns = list(dict.fromkeys((row["cells"], row["n"], row["epochs"]) for row in rows))
    rho = {(row["feature"], row["cells"], row["epochs"]): row["rho"] for row in rows}
    head = ["feature", *(f"{cells} cells ({n}), after {epochs} epochs" for cells, n, epochs in columns)]
    texts = [
        (name, *(interval(rho[name, cells, epochs]) for cells, _, epochs in columns))
        for name in dict.fromkeys(row["feature"] for row in rows)
    ]
    note = (
        "Spearman's rho of a feature and the perplexity, with the 90% interval of a bootstrap over the cells, not "
        "corrected for the number of features. Random and all cells: in the short trainings; proxy cells: in the "
        "shortest proxy and in the long training."
    )
    return f"{note}\n\n{table(' | '.join(head), texts)}"


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def interval(estimate: Sequence[float | None]) -> str:
    value, low, high = map(shown, estimate)
    return f"{value} ({low} to {high})"
