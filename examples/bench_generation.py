# SPDX-License-Identifier: Apache-2.0
"""How fast is group sampling? Ours against NeMo's ``SALM.generate(num_return_sequences=G)``, same weights, same run.

    python examples/bench_generation.py --hidden 128 --layers 4 --seconds 3 --prompts 8 --group 8 --tokens 32

Prints CPU seconds of each, alternating, and the ratio of their medians. Answers never end early on either side, so both
do the same number of steps.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from nemo.collections.speechlm2.models import SALM
from transformers import Qwen3Config

from nemo_rba.models.rba_speech_lm import RBASpeechLM
from nemo_rba.types import Instruction, SamplingParams, SpeechBatch

TINY = Path(__file__).parent / "tiny" / "salm"


def build(hidden: int, layers: int, folder: Path) -> tuple[SALM, RBASpeechLM]:
    """NeMo's SALM with a random Qwen3 of the given size, and the same weights as an RBASpeechLM."""

    config = json.loads((TINY / "config.json").read_text())
    llm = Qwen3Config(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=hidden // 8, max_position_embeddings=4096,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    backbone = folder / "llm_backbone"
    llm.save_pretrained(backbone)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / file, folder / file)
        shutil.copy(TINY / file, backbone / file)
    config["perception"]["output_dim"] = hidden
    salm = SALM(config | {"pretrained_llm": str(backbone), "pretrained_weights": False}).eval()
    salm.save_pretrained(folder)
    model = RBASpeechLM.from_salm(
        folder=folder,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        params_dtype="float32",
        seed=0,
        sequence_parallel=False,
    )
    return salm, model


def batch_of_noise(model: RBASpeechLM, prompts: int, seconds: float) -> SpeechBatch:
    instructions = tuple(Instruction(id=str(i), text="", response="", task="") for i in range(prompts))
    ids = torch.tensor([model.prompt.encode_prompt(instruction) for instruction in instructions])
    samples = int(16000 * seconds)
    return SpeechBatch(
        instructions=instructions,
        audio=0.1 * torch.randn(prompts, samples),
        audio_lens=torch.full((prompts,), samples),
        prompt_ids=ids,
        prompt_lens=torch.full((prompts,), ids.shape[1]),
        response_ids=ids,
        response_lens=torch.full((prompts,), ids.shape[1]),
    )


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        salm, model = build(args.hidden, args.layers, Path(folder))
    batch = batch_of_noise(model, args.prompts, args.seconds)
    model.prompt.eot_id = -1  # never ends, like the other
    params = SamplingParams(max_new_tokens=args.tokens)
    turns = [[{"role": "user", "slots": {"message": salm.audio_locator_tag}}]] * args.prompts

    def ours() -> None:
        model.generate(batch, model.encode(batch), group_size=args.group, params=params)

    def nemo() -> None:
        salm.generate(
            prompts=turns, audios=batch.audio, audio_lens=batch.audio_lens, max_new_tokens=args.tokens,
            min_new_tokens=args.tokens, do_sample=True, num_return_sequences=args.group,
        )  # fmt: skip

    times = {"ours": [], "nemo": []}
    for _ in range(args.repeats + 1):  # the first round warms up
        for name, function in (("ours", ours), ("nemo", nemo)):
            begin = time.process_time()
            function()
            times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    parameters = sum(p.numel() for p in model.llm.parameters()) / 1e6
    print(
        f"LLM {parameters:.1f} M, {args.seconds:g} s of audio, {args.prompts} x {args.group} answers of {args.tokens} "
        f"tokens: ours {medians['ours']:.2f} s, NeMo {medians['nemo']:.2f} s, "
        f"NeMo / ours = {medians['nemo'] / medians['ours']:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
