"""The report on a GPU's first hour has every measured step and says which targets are met, on canned results."""

import json

import pytest

from benchmarks import gpu_report


def step(name, engine, precision, ms):
    return {"step": name, "engine": engine, "precision": precision, "ms": ms, "floor_ms": ms / 2, "tokens_per_s": 1e5,
            "peak_mb": 1234.0, "device": "Canned GPU", "torch": "2.11.0",
            "compiled": engine == "fused", "graphs": engine == "fused"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Writes what gpu.sh leaves: the quickest unrolled step takes 40 ms, the last epochs 9 and 2.5 seconds."""
    steps = [step("search-unrolled", "eager", "fp32", 900.0), step("search-unrolled", "fused", "fp32", 70.0),
             step("search-unrolled", "fused", "bf16", 40.0), step("train", "fused", "bf16", 12.0)]  # fmt: skip
    for name in ("search-unrolled", "train"):
        of_step = [record for record in steps if record["step"] == name]
        (tmp_path / f"step-{name}.json").write_text(json.dumps(of_step))
    for name, seconds in (("search", (60.0, 69.0)), ("train", (30.0, 33.0, 35.5))):
        (tmp_path / name).mkdir()
        records = [{"kind": "epoch", "epoch": i, "seconds": s, "valid_ppl": 90.0} for i, s in enumerate(seconds, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_report_has_the_steps_and_the_targets(folder, capsys):
    assert gpu_report.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Canned GPU, torch 2.11.0"
    assert "| search-unrolled | fused | bf16 | 40.0 | 20.0 | 100,000 | 1,234 |" in lines
    assert sum(line.startswith(("| search-", "| train ")) for line in lines) == 4
    assert "| unrolled step: at most 50 ms | 40.0 ms | yes |" in lines
    assert "| search of 50 epochs: at most 8 min | 7.5 min | yes |" in lines
    assert "| epoch of retraining: at most 2 s | 2.5 s | no |" in lines
    assert "| unrolled step against the eager engine: at least 20 times | 22.5 times | yes |" in lines


def test_report_passes_once_every_target_is_met(folder, capsys):
    path = folder / "train" / "metrics.jsonl"
    path.write_text(path.read_text().replace("35.5", "34.9"))
    assert gpu_report.main([str(folder)]) == 0
    assert "no |" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_results_are_not_measured_and_failures_are_listed(damage, folder, capsys):
    for path in folder.glob("step-*.json"):
        path.unlink() if damage == "missing" else path.write_text("[{")
    (folder / "failed.txt").write_text("step: exit 124\n")
    assert gpu_report.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("an unknown device") and out.count("not measured") == 2
    assert out.endswith("Failed: step: exit 124\n")


@pytest.mark.parametrize(("lost", "shown"), [("graphs", "no CUDA graphs"), ("compiled", "uncompiled")])
def test_step_without_graphs_or_compiled_kernels_meets_no_target(lost, shown, folder, capsys):
    path = folder / "step-search-unrolled.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([{**r, lost: r[lost] and r["precision"] != "bf16"} for r in records]))
    assert gpu_report.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"| search-unrolled | fused ({shown}) | bf16 | 40.0 |" in out
    assert "| unrolled step: at most 50 ms | 70.0 ms | no |" in out


def test_missing_folder_exits_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_report.main([str(tmp_path / "nowhere")])
    assert end.value.code == 2 and "run benchmarks/gpu.sh first" in capsys.readouterr().err
