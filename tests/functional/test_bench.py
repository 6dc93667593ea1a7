# SPDX-License-Identifier: Apache-2.0
"""The benchmark at its smallest: every table is filled. What it measures is not asserted, speeds least of all."""

import rba_bench
import rba_bench_synthesis
from bench import generation, memory, training
from bench.systems import Load, Size, answer_ours, load_ours, noise_clips, write_salm


def test_tables_and_picture(tmp_path):
    plan = rba_bench.Plan(
        sizes=[Size(hidden=64, layers=1)], load=Load(prompts=2, group=2, tokens=3, seconds=1.0), seconds=(1.0,),
        groups=(1, 2), lengths=(0.5, 1.0), sweep_prompts=1, update_prompts=2, step_prompts=2, repeats=1,
        tables=("speed", "sweeps", "updates", "shares"),
    )  # fmt: skip
    found = rba_bench.measure(plan, say=lambda message: None)
    assert found.speeds[0].greedy_agreement == 1.0
    assert found.updates[0].difference < 1e-4
    assert set(found.shares) == {*training.SHARES, "rest"}
    text = rba_bench.write(found, plan, tmp_path)
    assert text.count("\n## ") == 5
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_memory_is_counted_from_loading(tmp_path):
    load = Load(prompts=2, group=2, tokens=3, seconds=1.0)
    write_salm(Size(hidden=64, layers=1), tmp_path)
    loaded, peak = memory.measure("ours", tmp_path, load)
    assert 0 < loaded <= peak
    model = load_ours(tmp_path)
    assert answer_ours(model, noise_clips(model, 2, 1.0), load).shape == (4, 3)


def test_tables_of_synthesis(tmp_path):
    text = rba_bench_synthesis.tables(clips=3, repeats=1, ranks=[1, 2], items=[5], texts=60)
    assert text.count("\n## ") == 4
    assert "| synthesizer alone |" in text
    dropped = [row.split("|")[3].strip() for row in text.splitlines() if row.startswith(("| exact", "| MinHash"))]
    assert dropped == ["0", "5"], "six near copies, the first of which comes before what it copies"


def test_slope():
    rise, start = generation.slope([1, 2, 4], [5.0, 7.0, 11.0])
    assert (round(rise, 6), round(start, 6)) == (2.0, 3.0)
