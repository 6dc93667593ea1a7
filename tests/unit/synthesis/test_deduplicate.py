# SPDX-License-Identifier: Apache-2.0
import copy
import gzip
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nemo_rba.manifest import write_shar
from nemo_rba.synthesis.deduplicate import ContaminationFilter, EmbeddingDuplicateFilter, NearDuplicateFilter
from nemo_rba.synthesis.embedding import HFEmbedder
from nemo_rba.synthesis.filters import apply_filters
from nemo_rba.types import Instruction, Utterance

from .conftest import build_tokenizer

CONF = Path(__file__).parents[3] / "conf"

LONG = "can you please tell me what the weather will be like in london tomorrow morning"
NEAR = "Can you please tell me what the weather will be like in London tomorrow evening?"
OTHER = "can you please explain what the stock market will do to my savings next year"
REASON = "shares 70% of its 2-word runs with an earlier text"


def instruction(text: str, response: str = "") -> Instruction:
    return Instruction(id="x", text=text, response=response, task="t")


def near(**changes) -> NearDuplicateFilter:
    return NearDuplicateFilter(**({"ngram": 2, "threshold": 0.7, "num_permutations": 128, "seed": 1} | changes))


def test_near_duplicates():
    pytest.importorskip("datasketch")
    duplicates = near()
    assert duplicates.reason(instruction(LONG)) is None
    assert duplicates.reason(instruction(OTHER)) is None
    assert duplicates.reason(instruction(NEAR)) == REASON
    assert duplicates.reason(instruction("hello")) is None
    assert duplicates.reason(instruction("Hello!")) == REASON  # shorter than a run: compared as a whole
    assert duplicates.reason(instruction("你叫什么名字")) is None
    assert duplicates.reason(instruction("你叫什么名字呢")) == REASON  # characters are words: 5 of 6 runs
    assert near().reason(instruction(NEAR)) is None
    strict = near(threshold=0.9)
    assert [strict.reason(instruction(text)) for text in (LONG, NEAR)] == [None, None]  # 13 of 15 runs


def test_a_dropped_text_is_not_remembered():
    pytest.importorskip("datasketch")
    texts = ["a b c d e f g h i j", "a b c d e f g h i x", "a b c d e f g h y x"]  # each 8 of 10 runs from the next
    kept, counts, _ = apply_filters([instruction(text) for text in texts], [near()])
    assert [item.text for item in kept] == [texts[0], texts[2]]
    assert counts == {f"near duplicate: {REASON}": 1}


def test_near_duplicates_come_out_the_same_when_resumed():
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    words = [
        "tell",
        "me",
        "what",
        "the",
        "weather",
        "is",
        "in",
        "rome",
        "paris",
        "berlin",
        "now",
        "today",
        "please",
        "and",
        "why",
    ]
    items = [instruction(" ".join(rng.choices(words, k=7))) for _ in range(400)]
    items += [instruction(f"{item.text} today") for item in items[::4]]
    fresh = near(threshold=0.6)
    used = copy.deepcopy(fresh)  # as SelfSynthesis does for every run
    whole = [used.reason(item) for item in items]
    assert 60 < sum(reason is not None for reason in whole) < 300
    runs = [set(zip(item.text.split(), item.text.split()[1:], strict=False)) for item in items]
    for place in (n for n, reason in enumerate(whole) if reason is not None):  # what LSH proposes is not enough
        earlier = [runs[n] for n in range(place) if whole[n] is None]
        assert any(len(runs[place] & other) >= 0.6 * len(runs[place] | other) for other in earlier)
    again = copy.deepcopy(fresh)
    half = len(items) // 2
    kept, _, _ = apply_filters(items[:half], [again])  # the kept batches once more, then the rest
    assert [item for item, reason in zip(items, whole, strict=True) if reason is None][: len(kept)] == kept
    assert [again.reason(item) for item in items[half:]] == whole[half:]


def test_near_duplicate_settings_and_a_missing_library(monkeypatch):
    for changes in ({"ngram": 0}, {"threshold": 1.0}, {"num_permutations": 8}, {"seed": -1}):
        with pytest.raises(ValueError, match="{}={}".format(*next(iter(changes.items())))):
            near(**changes)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match="pip install datasketch"):
        near().reason(instruction(LONG))


def by_length(texts):
    return torch.tensor([[float(len(text)), 10.0] for text in texts])


def test_embedding_duplicates():
    texts = ["x" * 3, "x" * 4, "x" * 40, "y" * 41, "x" * 3]
    expected = ["xxx", "x" * 40]
    items = [instruction(text) for text in texts]
    whole = EmbeddingDuplicateFilter(embed=by_length, max_similarity=0.99)
    kept, counts, _ = apply_filters(items, [whole])
    assert [item.text for item in kept] == expected
    assert counts == {"embedding duplicate: means the same as an earlier text": 3}
    single = EmbeddingDuplicateFilter(embed=by_length, max_similarity=0.99)
    assert [item.text for item in items if single.reason(item) is None] == expected
    assert whole.reason(items[0]) is not None
    assert copy.deepcopy(whole).reason(items[0]) is not None
    loose = EmbeddingDuplicateFilter(embed=by_length, max_similarity=0.999)
    assert len(apply_filters(items, [loose])[0]) == 3
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 texts"):
        EmbeddingDuplicateFilter(embed=lambda texts: torch.ones(2), max_similarity=0.5).reason(items[0])
    with pytest.raises(ValueError, match=r"max_similarity=1\.5"):
        EmbeddingDuplicateFilter(embed=by_length, max_similarity=1.5)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A random encoder of 16 numbers a token, whose words are the teacher's."""
    from transformers import BertConfig, BertModel

    folder, tokenizer = tmp_path_factory.mktemp("encoder"), build_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=32, initializer_range=0.5)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)  # as many encoders come
    tokenizer.save_pretrained(folder)
    return folder


def embedder(folder, **changes) -> HFEmbedder:
    settings = {"path": str(folder), "batch_size": 2, "device": "cpu", "dtype": "float32", "max_tokens": 8}
    return HFEmbedder(**(settings | changes))


def test_an_embedding_is_the_mean_over_real_tokens_whatever_stands_beside_them(encoder_folder):
    from transformers import AutoModel, AutoTokenizer

    texts = ["cat dog", "what is one plus two", "hello", "say the word red", ""]
    found = embedder(encoder_folder)(texts)
    assert found.shape == (5, 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    model, tokenizer = AutoModel.from_pretrained(encoder_folder).eval(), AutoTokenizer.from_pretrained(encoder_folder)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedder(encoder_folder, batch_size=99)(texts), found, atol=1e-5, rtol=1e-4)
    long = "cat " * 30  # <bos> and seven words are read
    torch.testing.assert_close(embedder(encoder_folder)([long]), embedder(encoder_folder)(["cat " * 7]))


def test_an_embedder_finds_duplicates_from_yaml(encoder_folder):
    chosen = OmegaConf.load(CONF / "filter" / "embedding_duplicate.yaml")
    chosen.embed.path, chosen.max_similarity = str(encoder_folder), 0.999
    kept, counts, _ = apply_filters(
        [instruction(text) for text in ("cat dog", "hello blue", "cat  dog", "say hello")],
        [copy.deepcopy(instantiate(chosen))],
    )
    assert [item.text for item in kept] == ["cat dog", "hello blue", "say hello"]
    assert counts == {"embedding duplicate: means the same as an earlier text": 1}


def test_embedders_that_cannot_work_are_explained(encoder_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"config\.json is missing; give a local folder"):
        embedder(tmp_path)
    for changes in ({"batch_size": 0}, {"max_tokens": 0}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="{}={!r}".format(*next(iter(changes.items())))):
            embedder(encoder_folder, **changes)
    shutil.copytree(encoder_folder, tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    lost = next(name for name in weights if "layer.1.attention" in name)
    save_file(
        {n: w for n, w in weights.items() if n != lost}, tmp_path / "half" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lack 1 tensors \(.*layer\.1\.attention"):
        embedder(tmp_path / "half")


QUESTION = "how many legs do three spiders and two cats have together in the house"
SHORT = "who wrote hamlet"


def contamination(*files, **changes) -> ContaminationFilter:
    return ContaminationFilter(**({"files": [str(file) for file in files], "ngram": 8, "max_covered": 0.5} | changes))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "shar", "cuts", "json", "lines.json", "pretty.json"])
def test_every_kind_of_evaluation_set(tmp_path, kind):
    path, texts = tmp_path / f"eval.{kind}", [SHORT, QUESTION]
    if kind == "txt":
        path.write_text("\n".join(texts) + "\n\n")
    elif kind in ("json", "pretty.json"):
        rows = [{"question": text} for text in texts]
        path.write_text(json.dumps(rows, indent=None if kind == "json" else 2))
    elif kind in ("jsonl", "lines.json"):
        path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    elif kind == "cuts":
        path = tmp_path / "eval.jsonl"
        path.write_text("".join(json.dumps({"id": t, "supervisions": [{"text": t}]}) + "\n" for t in texts))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps({"question": text}) + "\n" for text in texts).encode()))
    else:
        items = [Instruction(id=f"i{n}", text=text, response="r", task="t") for n, text in enumerate(texts)]
        spoken = [Utterance(instruction=i, audio=torch.zeros(800), sampling_rate=8000, speaker="s") for i in items]
        write_shar(spoken, path, shard_size=1, audio_format="wav", teacher="t")
    checked = contamination(path, key="question")
    assert checked.reason(instruction(QUESTION.title() + "?")) == f"is in {path.name}"
    assert checked.reason(instruction("Who wrote Hamlet?")) == f"is in {path.name}"
    assert checked.reason(instruction("and who wrote hamlet")) is None  # too short to be evidence
    assert checked.reason(instruction("how many legs do three cats have")) is None


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_an_evaluation_set(tmp_path, kind):
    row = json.dumps({"text": SHORT})
    data = {"txt": SHORT, "json": f"[{row}]"}.get(kind, row).encode("utf-8-sig")
    path = tmp_path / f"eval.{kind}"
    path.write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    assert contamination(path).reason(instruction(SHORT)) == f"is in eval.{kind}"


def test_evaluation_sets_that_cannot_be_read_are_explained(tmp_path):
    (tmp_path / "latin.txt").write_bytes("wer hat Grün gewählt".encode("latin-1"))
    (tmp_path / "broken.json").write_text('[{"text": "a"}, {"text": ')
    (tmp_path / "nested.json").write_text(json.dumps({"data": [{"text": "a"}]}, indent=1))
    (tmp_path / "words.json").write_text('["a text", {"text": "b"}]')
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9])
    for name, message in [
        ("latin.txt", r"latin.txt is not UTF-8 \(byte 0xfc: .*iconv -f LATIN1"),
        ("broken.json", r"broken.json begins as an array and is none: .*expected \[{...}, ...\]"),
        ("nested.json", r"nested.json line 1 is '{'; expected JSON with a text under key='text'"),
        ("words.json", r"words.json item 1 is 'a text'; expected JSON with a text"),
        ("half.jsonl.gz", r"half.jsonl.gz is not a whole gzip file"),
    ]:
        with pytest.raises(ValueError, match=message):
            contamination(tmp_path / name)


def test_how_much_overlap_is_too_much(tmp_path):
    (tmp_path / "gsm.txt").write_text(QUESTION)
    (tmp_path / "other.txt").write_text(f"{OTHER}\n{QUESTION}\n")
    files = tmp_path / "gsm.txt", tmp_path / "other.txt"
    nine = "how many legs do three spiders and two cats"  # two runs of eight: 9 words
    long = f"{nine} own in a very small zoo near the old town hall"  # 9 of 20 words
    assert contamination(*files).reason(instruction(nine)) == "is in gsm.txt"
    assert contamination(*files).reason(instruction(long)) is None
    assert contamination(*files, max_covered=0).reason(instruction(long)) == "is in gsm.txt"
    assert contamination(*files, max_covered=0.44).reason(instruction(long)) == "is in gsm.txt"
    assert contamination(*files, max_covered=0, ngram=10).reason(instruction(long)) is None
    items = [instruction(text, answer) for text, answer in [(nine, ""), (OTHER, ""), (LONG, QUESTION)]]
    assert apply_filters(items, [contamination(*files)])[1] == {
        "contamination: is in gsm.txt": 1,
        "contamination: is in other.txt": 1,
    }
    both = copy.deepcopy(contamination(*files, responses=True))
    assert both.reason(items[2]) == "its answer is in gsm.txt"


def test_unusable_evaluation_sets_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "wrong key"}\n')
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "c.txt").write_text("\n")
    (tmp_path / "d.jsonl").write_text('{"text": 3}\n')
    for name, message in [
        ("a.jsonl", "a.jsonl line 2 .*expected JSON with a text under key='text'"),
        ("b.csv", "b.csv in files; expected .txt"),
        ("c.txt", "c.txt holds no texts"),
        ("d.jsonl", "d.jsonl line 1"),
        ("e.txt", "no evaluation set at .*e.txt"),
    ]:
        with pytest.raises(ValueError, match=message):
            contamination(tmp_path / name)
    with pytest.raises(ValueError, match=r"files=\[\]"):
        contamination()
    (tmp_path / "f.txt").write_text("fine")
    with pytest.raises(ValueError, match="ngram=0"):
        contamination(tmp_path / "f.txt", ngram=0)
    with pytest.raises(ValueError, match="max_covered=1"):
        contamination(tmp_path / "f.txt", max_covered=1)
