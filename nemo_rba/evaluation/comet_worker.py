# SPDX-License-Identifier: Apache-2.0
"""COMET in a process of its own, in the Python that has it. Run by path (``translation_comet.py``).

comet 2.2 wants transformers 4, NumPy 1 and torchmetrics 0.10: it does not work beside NeMo 3. So it scores in an
environment of its own: a line of standard input is a JSON list of samples as ``predict`` takes them, a line of standard
output their scores, or an error. The first line out says what was loaded. It ends when its input does. Nothing of ours
is imported.
"""

import hashlib
import json
import os
import sys

# One sample is scored before anything is promised: versions that do not go together show only then.
PROBE = {"src": "a b", "mt": "c d", "ref": "c e"}


def main(checkpoint: str, device: str, batch_size: int) -> None:
    """Load, then score until the input ends.

    Args:
        checkpoint: the .ckpt file; hparams.yaml is in the folder above its own.
        device: "cpu", or the number of a GPU.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between replies

    def reply(**content: object) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    def predict(samples: list[dict[str, str]]) -> list[float]:
        where = {"gpus": 0} if device == "cpu" else {"gpus": 1, "devices": [int(device)]}
        found = model.predict(samples, batch_size=batch_size, progress_bar=False, num_workers=0, **where)
        return [float(score) for score in found["scores"]]

    try:
        import comet
    except ImportError as error:
        return reply(missing=str(error))
    try:
        model = comet.load_from_checkpoint(checkpoint, local_files_only=True)
        predict([PROBE])
        segments = model.hparams.get("input_segments") or ()  # of a unified model, which reads any of the three
        takes_reference = bool(model.requires_references() or "ref" in segments)
        reply(version=comet.__version__, takes_reference=takes_reference, sha256=_sha256(checkpoint))
    except Exception as error:  # whatever it was, the other process must say it
        return reply(error=f"{type(error).__name__}: {error}")
    for line in sys.stdin:
        try:
            reply(scores=predict(json.loads(line)))
        except Exception as error:
            reply(error=f"{type(error).__name__}: {error}")


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    # Run by path, Python looks for modules beside this file first, where ``statistics`` is not the standard one.
    sys.path = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
