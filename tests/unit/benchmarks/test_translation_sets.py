# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import soundfile

from nemo_rba.benchmarks.translation import CoVoST2, Fleurs, MustC

from .conftest import NO_SOUND, check_round_trip, pitch, tone, write_lines, write_sound

CONTEXT = "Translate the speech into {language}."


def covost(folder, **changes) -> CoVoST2:
    arguments = {
        "folder": str(folder), "source_language": "fr", "target_language": "en", "target_name": "English",
        "context": CONTEXT, "split": "test", "sampling_rate": 16000,
    }  # fmt: skip
    return CoVoST2(**(arguments | changes))


def write_common_voice(folder) -> None:
    """Common Voice's own table, in which CoVoST's rows are some."""
    rows = ["client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"]
    rows += [f'speaker{n}\t{n}.mp3\tIl dit "non {n}\t2\t0\t\t\t' for n in range(6)]
    write_lines(folder / "validated.tsv", rows)
    for number in range(6):
        write_sound(folder / "clips" / f"{number}.mp3", 400 + 100 * number, rate=48000)


def write_covost(folder) -> None:
    splits = ["train", "train_covost", "dev", "test", "test", "test"]
    translations = [f'He says "no {n}' for n in range(5)] + [""]
    rows = [f"{n}.mp3\t{t}\t{s}" for n, (t, s) in enumerate(zip(translations, splits, strict=True))]
    write_lines(folder / "covost_v2.fr_en.tsv", ["path\ttranslation\tsplit", *reversed(rows)])


def test_covost_is_joined_with_common_voice(tmp_path):
    write_common_voice(tmp_path)
    write_covost(tmp_path)
    benchmark = covost(tmp_path)
    items = check_round_trip(benchmark, tmp_path / "manifest")
    first = items[0].instruction
    assert (first.text, first.response) == ('Il dit "non 3', 'He says "no 3')
    assert first.context == "Translate the speech into English."
    assert first.extra == {"source_language": "fr", "target_language": "en", "file": "3.mp3"}
    assert (first.task, items[0].speaker) == ("fr-en", "speaker3")
    assert [pitch(item.audio) for item in items] == [700, 800]
    assert benchmark.counts == {"no translation": 1}
    assert [item.speaker for item in covost(tmp_path, split="train")] == ["speaker0", "speaker1"]


def test_covost_reads_the_splits_of_its_script_too(tmp_path):
    write_common_voice(tmp_path)
    write_covost(tmp_path)
    joined = [item.instruction for item in covost(tmp_path)]
    rows = [f'{n}.mp3\tIl dit "non {n}\tHe says "no {n}\tspeaker{n}' for n in (3, 4)]
    write_lines(tmp_path / "covost_v2.fr_en.test.tsv", ["path\tsentence\ttranslation\tclient_id", *rows])
    (tmp_path / "validated.tsv").unlink()
    assert [item.instruction for item in covost(tmp_path)] == joined


def test_covost_names_and_counts_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"lacks 2 of 2 files: covost_v2.fr_en.tsv, validated.tsv.*fr_en.test.tsv"):
        covost(tmp_path)
    write_common_voice(tmp_path)
    write_covost(tmp_path)
    (tmp_path / "clips" / "3.mp3").write_bytes(NO_SOUND)
    benchmark = covost(tmp_path)
    assert [item.speaker for item in benchmark] == ["speaker4"]
    assert benchmark.counts == {"unreadable audio": 1, "no translation": 1}
    (tmp_path / "clips" / "4.mp3").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 files: clips/4.mp3.*Common Voice version 4"):
        covost(tmp_path)
    with pytest.raises(ValueError, match=r"context is 'Into English'; expected \{language\} in it"):
        covost(tmp_path, context="Into English")


def fleurs(folder, **changes) -> Fleurs:
    arguments = {
        "folder": str(folder), "source_language": "en_us", "target_language": "de_de", "target_name": "German",
        "context": CONTEXT, "split": "test", "sampling_rate": 16000,
    }  # fmt: skip
    return Fleurs(**(arguments | changes))


def fleurs_line(sentence: str, file: str, raw: str) -> str:
    return "\t".join([sentence, file, raw, raw.lower(), "c h a r |", "3200", "FEMALE"])


def write_fleurs(folder) -> None:
    english = [fleurs_line("7", "a.wav", 'He said: "No."'), fleurs_line("7", "b.wav", 'He said: "No."'),
               fleurs_line("8", "c.wav", "Only English.")]  # fmt: skip
    write_lines(folder / "metadata" / "en_us" / "test.tsv", english)
    write_lines(folder / "metadata" / "de_de" / "test.tsv", [fleurs_line("7", "x.wav", "Er sagte: „Nein.“")])
    for number, name in enumerate("abc"):
        write_sound(folder / "en_us" / "test" / f"{name}.wav", 400 + 100 * number, rate=16000)


def test_fleurs_finds_the_translation_by_the_sentence(tmp_path):
    write_fleurs(tmp_path)
    benchmark = fleurs(tmp_path)
    items = check_round_trip(benchmark, tmp_path / "manifest")
    first = items[0].instruction
    assert (first.text, first.response) == ('He said: "No."', "Er sagte: „Nein.“")
    assert (first.context, first.task) == ("Translate the speech into German.", "en_us-de_de")
    assert first.extra == {"source_language": "en_us", "target_language": "de_de", "sentence": "7", "file": "a.wav"}
    assert [pitch(item.audio) for item in items] == [400, 500]
    assert benchmark.counts == {"no translation": 1}


def test_fleurs_names_and_counts_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"lacks 2 of 2 files: metadata/en_us/test.tsv, metadata/de_de/test.tsv"):
        fleurs(tmp_path)
    write_fleurs(tmp_path)
    (tmp_path / "en_us" / "test" / "a.wav").write_bytes(NO_SOUND)
    benchmark = fleurs(tmp_path)
    assert [item.instruction.id for item in benchmark] == ["fleurs-en_us-de_de-test-000001"]
    assert benchmark.counts == {"unreadable audio": 1, "no translation": 1}
    (tmp_path / "en_us" / "test" / "b.wav").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 files: en_us/test/b.wav"):
        fleurs(tmp_path)
    write_lines(tmp_path / "metadata" / "de_de" / "test.tsv", ["7\tx.wav\tNein"])
    with pytest.raises(ValueError, match=r"test.tsv line 1 has 3 fields, expected 7"):
        fleurs(tmp_path)


def must_c(folder) -> MustC:
    return MustC(folder=str(folder), target_language="de", target_name="German", context=CONTEXT, split="tst-COMMON",
                 sampling_rate=16000)  # fmt: skip


def write_must_c(folder, stretches: list[tuple[float, float]]) -> None:
    """One talk: a tone of 400 Hz for half a second, then one of 800 Hz."""
    place = folder / "en-de" / "data" / "tst-COMMON"
    (place / "wav").mkdir(parents=True, exist_ok=True)
    talk = np.concatenate([tone(400, 0.5, 16000), tone(800, 0.5, 16000)])
    soundfile.write(place / "wav" / "ted_1.wav", talk, 16000)
    lines = [
        f"- {{duration: {duration:f}, offset: {offset:f}, rW: 9, uW: 0, speaker_id: spk.767, wav: ted_1.wav}}"
        for offset, duration in stretches
    ]
    write_lines(place / "txt" / "tst-COMMON.yaml", lines)
    write_lines(place / "txt" / "tst-COMMON.en", [f"Sentence {n}." for n in range(len(stretches))])
    write_lines(place / "txt" / "tst-COMMON.de", [f"Satz {n}." for n in range(len(stretches))])


def test_must_c_cuts_its_sentences_out_of_the_talk(tmp_path):
    write_must_c(tmp_path, [(0.05, 0.4), (0.55, 0.3), (0.75, 9.0), (2.0, 0.5)])
    benchmark = must_c(tmp_path)
    items = check_round_trip(benchmark, tmp_path / "manifest")
    assert [pitch(item.audio) for item in items] == [400, 800, 800]
    assert [len(item.audio) for item in items] == [6400, 4800, 4000], "a stretch ends where its talk ends"
    assert benchmark.counts == {"outside its recording": 1}
    first = items[0].instruction
    assert (first.text, first.response, items[0].speaker) == ("Sentence 0.", "Satz 0.", "spk.767")
    assert (first.task, first.context) == ("en-de", "Translate the speech into German.")
    assert first.extra == {
        "source_language": "en", "target_language": "de", "file": "ted_1.wav", "offset": 0.05, "duration": 0.4
    }  # fmt: skip


def test_must_c_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"lacks 3 of 3 files: en-de/data/tst-COMMON/txt/tst-COMMON.yaml, .*\.de"):
        must_c(tmp_path)
    write_must_c(tmp_path, [(0.0, 0.4)] * 2)
    place = tmp_path / "en-de" / "data" / "tst-COMMON"
    (place / "wav" / "ted_1.wav").write_bytes(NO_SOUND)
    benchmark = must_c(tmp_path)
    assert list(benchmark) == []
    assert benchmark.counts == {"unreadable audio": 2}
    (place / "wav" / "ted_1.wav").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 1 files: en-de/data/tst-COMMON/wav/ted_1.wav"):
        must_c(tmp_path)
    write_lines(place / "txt" / "tst-COMMON.de", ["Satz 0."])
    with pytest.raises(ValueError, match=r"has 2 sentences, tst-COMMON.en 2 and tst-COMMON.de 1"):
        must_c(tmp_path)
