"""The runs of scripts/strategies_ptb.sh as a table: mean and both seeds, best first.

python scripts/strategies.py runs/strategies
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are, each in NAME-SEED")
    rows = defaultdict(list)
    for path in sorted(parser.parse_args().folder.glob("*/result.json")):
        rows[path.parent.name.rpartition("-")[0]].append(json.loads(path.read_text(encoding="utf-8")))
    print("| strategy | valid ppl (seeds) | test ppl (seeds) | epochs | stopped by | weights |")
    print("|---|---|---|---|---|---|")
    for name, results in sorted(rows.items(), key=lambda row: mean(r["valid_ppl"] for r in row[1])):
        cells = [
            f"{mean(r[split] for r in results):.1f} ({', '.join(f'{r[split]:.1f}' for r in results)})"
            for split in ("valid_ppl", "test_ppl")
        ]
        epochs, why = (", ".join(sorted({str(r[key]) for r in results})) for key in ("epochs", "stopped_by"))
        print(f"| {name} | {cells[0]} | {cells[1]} | {epochs} | {why} | {results[0]['params']:,} |")


if __name__ == "__main__":
    main()
