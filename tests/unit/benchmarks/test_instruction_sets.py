# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from nemo_rba.benchmarks.instructions import AlpacaEval, IFEval, SpokenAlpaca

from .conftest import NO_SOUND, check_round_trip, embedded, pitch, write_arrow, write_lines


def test_alpaca_eval_keeps_the_baseline_and_has_no_reference(tmp_path):
    rows = [{"instruction": " Name three cities. ", "output": "Rome", "generator": "gpt4", "dataset": "vicuna"},
            {"instruction": "", "output": "Rome", "generator": "gpt4", "dataset": "koala"}]  # fmt: skip
    (tmp_path / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    benchmark = AlpacaEval(folder=str(tmp_path), subset="alpaca_eval_gpt4_baseline")
    (item,) = benchmark
    assert (item.id, item.text, item.response, item.task) == ("alpaca_eval-000000", "Name three cities.", "", "vicuna")
    assert item.extra == {"baseline": "Rome", "baseline_system": "gpt4"}
    assert benchmark.counts == {"no words": 1}
    with pytest.raises(ValueError, match=r"lacks 1 of 1 files: alpaca_eval.json"):
        AlpacaEval(folder=str(tmp_path), subset="alpaca_eval")
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": "x"}]))
    with pytest.raises(ValueError, match="object 1 has no output, generator, dataset"):
        AlpacaEval(folder=str(tmp_path), subset="alpaca_eval")


def test_ifeval_keeps_its_constraints(tmp_path):
    first = {
        "key": 1000, "prompt": "Write 300 words, no commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 300}],
    }  # fmt: skip
    write_lines(tmp_path / "ifeval_input_data.jsonl", map(json.dumps, [first, first | {"kwargs": [{}]}]))
    benchmark = IFEval(folder=str(tmp_path))
    (item,) = benchmark
    assert item.extra == {key: first[key] for key in ("key", "instruction_id_list", "kwargs")}
    assert (item.text, item.response) == (first["prompt"], "")
    assert benchmark.counts == {"constraints and their arguments differ in number": 1}
    with pytest.raises(ValueError, match=r"ifeval_input_data.jsonl"):
        IFEval(folder=str(tmp_path / "elsewhere"))


def write_alpaca(folder, num_shards: int = 2, per_shard: int = 5) -> None:
    for shard in range(num_shards):
        rows = [
            {"instruction": "Say", "input": str(n), "output": f"answer {n}", "speech_input": f"Say {n}",
             "input_audio": embedded(300 + 100 * n), "output_audio": embedded()}
            for n in range(shard * per_shard, (shard + 1) * per_shard)
        ]  # fmt: skip
        path = folder / f"data-{shard:05d}-of-{num_shards:05d}.arrow"
        write_arrow(path, rows, sounds=("input_audio", "output_audio"))


def spoken_alpaca(folder, num_items: int | None, seed: int = 0) -> SpokenAlpaca:
    return SpokenAlpaca(folder=str(folder), num_items=num_items, sampling_rate=16000, seed=seed)


def test_spoken_alpaca_is_read_across_shards(tmp_path):
    write_alpaca(tmp_path)
    items = check_round_trip(spoken_alpaca(tmp_path, None), tmp_path / "manifest")
    assert [item.instruction.text for item in items] == [f"Say {n}" for n in range(10)]
    assert [pitch(item.audio) for item in items] == [300 + 100 * n for n in range(10)]
    assert items[7].instruction.response == "answer 7"


def test_spoken_alpaca_draws_the_same_items_for_a_seed(tmp_path):
    write_alpaca(tmp_path)
    drawn = {seed: [item.instruction.id for item in spoken_alpaca(tmp_path, 4, seed)] for seed in range(5)}
    assert all(len(set(ids)) == 4 and ids == sorted(ids) for ids in drawn.values())
    assert drawn[0] == [item.instruction.id for item in spoken_alpaca(tmp_path, 4, 0)]
    assert len({tuple(ids) for ids in drawn.values()}) > 1
    for item in spoken_alpaca(tmp_path, 4):
        assert item.instruction.text == f"Say {int(item.instruction.id[-6:])}"


def test_spoken_alpaca_names_and_counts_what_is_wrong(tmp_path):
    write_alpaca(tmp_path, num_shards=3)
    with pytest.raises(ValueError, match="num_items is 16; expected 1 to 15"):
        spoken_alpaca(tmp_path, 16)
    (tmp_path / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 files: data-00001-of-00003.arrow"):
        spoken_alpaca(tmp_path, None)
    (tmp_path / "data-00001-of-00003.arrow").write_bytes(b"no stream at all")
    with pytest.raises(ValueError, match=r"data-00001-of-00003.arrow is no Arrow stream"):
        spoken_alpaca(tmp_path, None)
    rows = [{"speech_input": "x", "output": "y", "input_audio": {"bytes": NO_SOUND, "path": "z"}},
            {"speech_input": "x", "output": "", "input_audio": embedded()}]  # fmt: skip
    write_arrow(tmp_path / "data-00001-of-00003.arrow", rows, sounds=("input_audio",))
    benchmark = spoken_alpaca(tmp_path, None)
    assert len(list(benchmark)) == 10
    assert benchmark.counts == {"unreadable audio": 1, "no answer": 1}
    write_arrow(tmp_path / "data-00001-of-00003.arrow", [{"text": "x"}], sounds=())
    with pytest.raises(ValueError, match="has no speech_input, output, input_audio; it has text"):
        spoken_alpaca(tmp_path, None)
