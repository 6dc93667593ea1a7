# SPDX-License-Identifier: Apache-2.0
"""A manifest as NeMo's ``multimodal_conversation`` JSONL, which NeMo's own SALM trainer reads.

    {"id": "train-000001", "conversations": [
        {"from": "User", "type": "text", "value": "Translate the speech into German."},       only with a context
        {"from": "User", "type": "audio", "value": "audio/train-000001.flac", "duration": 2.31},
        {"from": "Assistant", "type": "text", "value": "..."}]}

Schema: ``NeMoMultimodalConversationJsonlAdapter`` in nemo/collections/common/data/lhotse/text_adapters.py. Paths are
relative to the JSONL, so that the folder can be moved.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import soundfile
from tqdm import tqdm

from nemo_rba.manifest import AUDIO_FORMATS, cut_to_instruction, read_manifest, validate_cut
from nemo_rba.types import Instruction

JSONL = "conversations.jsonl"


def write_conversations(manifest: str | Path, folder: str | Path, *, audio_format: str) -> Counter[str]:
    """Write ``folder/conversations.jsonl`` and ``folder/audio/``; the folder appears when it is complete.

    Args:
        manifest: Shar folder or JSONL of cuts.
        folder: must not exist.
        audio_format: ``flac`` or ``wav``, both 16-bit.

    Returns:
        "written", and why others were left out -> how many.

    Raises:
        ValueError: the folder exists, the manifest cannot be read or holds nothing usable, or an unknown format.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder or remove it")
    if audio_format not in AUDIO_FORMATS:
        raise ValueError(f"audio_format is {audio_format!r}; expected one of {', '.join(AUDIO_FORMATS)}")
    draft, counts = folder.with_name(folder.name + ".partial"), Counter()
    shutil.rmtree(draft, ignore_errors=True)  # left by an interrupted export
    (draft / "audio").mkdir(parents=True)
    with (draft / JSONL).open("w", encoding="utf-8") as file:
        for number, cut in enumerate(tqdm(read_manifest(manifest), desc=folder.name, unit="clip")):
            reason = validate_cut(cut, sampling_rate=cut.sampling_rate, max_duration_seconds=float("inf"))
            if reason is None:
                path = Path("audio") / f"{number:08d}.{audio_format}"  # an id may be no file name
                samples = cut.load_audio()[0]
                soundfile.write(draft / path, samples, cut.sampling_rate, subtype="PCM_16")
                line = conversation(cut_to_instruction(cut), path, len(samples) / cut.sampling_rate)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            counts[reason or "written"] += 1
    if not counts["written"]:
        raise ValueError(f"nothing in {manifest} can be written: {dict(counts)}")
    draft.rename(folder)
    return counts


def conversation(instruction: Instruction, path: Path, duration: float) -> dict:
    """One line of the JSONL; ``duration`` in seconds."""
    turns = [{"from": "User", "type": "audio", "value": str(path), "duration": duration}]
    if instruction.context:
        turns.insert(0, {"from": "User", "type": "text", "value": instruction.context})
    turns.append({"from": "Assistant", "type": "text", "value": instruction.response})
    custom = {"task": instruction.task, "text": instruction.text}
    return {"id": instruction.id, "conversations": turns, "custom": custom}
