# SPDX-License-Identifier: Apache-2.0
"""Languages without spaces between words: scores and signatures are those of sacrebleu's own command line."""

import json
import subprocess
import sys

import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_ko_mecab

from nemo_rba.evaluation.measures import short_name
from nemo_rba.evaluation.tasks import as_rollout
from nemo_rba.evaluation.translation import TranslationTask
from nemo_rba.types import Instruction

NEEDS_MECAB = pytest.mark.skipif(
    tokenizer_ja_mecab.MeCab is None, reason="BLEU's tokenizer of Japanese is not here: pip install 'sacrebleu[ja]'"
)
TEXTS = {  # language -> (references, answers); the last answer is silence
    "ja": (
        ["私は昨日、友達と東京へ行きました。", "この本はとても面白いと思います。", "すもももももももものうち。",
         "明日の会議は午後3時から始まります。", "窓を開けてもいいですか？"],
        ["私は昨日友達と東京に行きました。", "この本は面白いと思う。", "すももも桃も桃のうち。",
         "明日の会議は午後３時に始まる。", ""],
    ),
    "zh": (
        ["我昨天和朋友去了北京。", "这本书非常有意思。", "会议明天下午3点开始，请准时。",
         "他在Google工作了5年。", "可以开窗吗？"],
        ["昨天我和朋友去北京了。", "这本书很有意思。", "明天下午三点开会，请准时。", "他在Google工作5年了。", ""],
    ),
    "ko": (
        ["나는 어제 친구와 서울에 갔습니다.", "이 책은 매우 재미있다고 생각합니다.",
         "회의는 내일 오후 3시에 시작합니다."],
        ["어제 친구와 서울에 갔다.", "이 책은 재미있다.", ""],
    ),
    "th": (
        ["เมื่อวานฉันไปกรุงเทพกับเพื่อน", "หนังสือเล่มนี้น่าสนใจมาก", "การประชุมเริ่มบ่ายสามโมง"],
        ["ฉันไปกรุงเทพกับเพื่อนเมื่อวาน", "หนังสือนี้น่าสนใจ", ""],
    ),
}  # fmt: skip
SPLITS_CHARACTERS = ["--ter-normalized", "--ter-asian-support"]
# What sacrebleu is told: of Japanese and Chinese the language alone, from which it takes its tokenizer.
FLAGS = {
    "ja": ["-l", "en-ja", *SPLITS_CHARACTERS], "zh": ["-l", "en-zh", *SPLITS_CHARACTERS],
    "ko": ["-tok", "char"], "th": ["-tok", "char"],
}  # fmt: skip


def make_task(language: str, **changes) -> TranslationTask:
    settings = {"tokenizer": None, "word_order": 2, "num_references": 1, "own": "bleu", "kinds": {}}
    return TranslationTask(name="test", batches=list, target_language=language, **settings | changes)


def item(reference: str) -> Instruction:
    return Instruction(id="i", text="it is said", response=reference, task="")


def command_line(language: str, folder) -> dict[str, tuple[float, str]]:
    """Measure -> (score, signature), as ``sacrebleu`` prints them."""
    for name, texts in zip(("references", "answers"), TEXTS[language], strict=True):
        (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", folder / "references", "-i", folder / "answers", "-m", "bleu", "chrf",
               "ter", "--chrf-word-order", "2", "-f", "json", "-w", "6", *FLAGS[language]]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {found["name"]: (found["score"], found["signature"]) for found in json.loads(printed)}


@pytest.mark.parametrize("language", [pytest.param("ja", marks=NEEDS_MECAB), "zh", "ko", "th"])
def test_scores_and_signatures_are_those_of_the_command_line(language, tmp_path):
    expected = command_line(language, tmp_path)
    task = make_task(language)
    scores = task.score([as_rollout(item(r), a) for r, a in zip(*TEXTS[language], strict=True)])
    assert list(task.statistics(item("a"), "b")) == [f"{name}|{how}" for name, (_, how) in expected.items()]
    assert {name: scores[name] for name in expected} == pytest.approx(
        {k: v for k, (v, _) in expected.items()}, abs=1e-6
    )
    tokenizer = {"ja": "tok:ja-mecab", "zh": "tok:zh"}.get(language, "tok:char")
    assert tokenizer in expected["BLEU"][1]
    assert 1 < expected["BLEU"][0] < 99, "the texts are neither alike nor far apart"


@NEEDS_MECAB
def test_japanese_is_cut_into_the_words_of_the_ipa_dictionary():
    (measure,) = [name for name in make_task("ja-JP").statistics(item("a"), "b") if short_name(name) == "BLEU"]
    assert measure.split("|")[4] == f"tok:{BLEU(tokenize='ja-mecab').tokenizer.signature()}"
    assert measure.split("|")[4].endswith("-IPA")
    counts = make_task("ja").statistics(item("すもももももももものうち。"), "すもももももももものうち。")[measure]
    assert counts[:3] == [8.0, 8.0, 8.0], "すもも も もも も もも の うち 。"


@pytest.mark.parametrize(("language", "extra"), [("ja", "ja"), ("ko", "ko")])
def test_what_is_missing_is_said_before_anything_is_scored(monkeypatch, language, extra):
    for module in (tokenizer_ja_mecab, tokenizer_ko_mecab):
        monkeypatch.setattr(module, "MeCab", None)
    changes = {} if language == "ja" else {"tokenizer": "ko-mecab"}
    with pytest.raises(ImportError, match=rf"'{language}-mecab'.*pip install 'sacrebleu\[{extra}\]'.*to char"):
        make_task(language, **changes)
    assert "tok:char" in next(iter(make_task(language, tokenizer="char")._metrics))


def test_another_dictionary_than_the_published_one_is_refused(monkeypatch):
    class MeCab:
        class Tagger:
            def __init__(self, arguments):
                pass

            def dictionary_info(self):
                return type("Dictionary", (), {"size": 1, "next": None})

    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", MeCab)
    monkeypatch.setattr(tokenizer_ja_mecab, "ipadic", type("ipadic", (), {"MECAB_ARGS": ""}), raising=False)
    with pytest.raises(ImportError, match=r"'ja-mecab'.*Please make sure to use the IPA dictionary"):
        make_task("ja")
