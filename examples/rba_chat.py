# SPDX-License-Identifier: Apache-2.0
"""Speak to a model: one audio file in, one answer out.

python examples/rba_chat.py model=model.nemo audio=question.wav
"""

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from nemo.core.config import hydra_runner
from omegaconf import DictConfig, MissingMandatoryValue

from nemo_rba.algorithms.frozen_policy import FrozenPolicy
from nemo_rba.data.audio import read_audio, single_prompt
from nemo_rba.models.rba_speech_lm import RBASpeechLM


@hydra_runner(config_path="../conf/chat", config_name="rba_chat")
def main(cfg: DictConfig) -> None:
    try:
        params = instantiate(cfg.params)
        model = RBASpeechLM.restore_from(cfg.model)
        batch = single_prompt(read_audio(cfg.audio, model.sampling_rate), cfg.context, model.prompt)
    except (ValueError, InstantiationException, MissingMandatoryValue) as problem:
        raise SystemExit(str(problem)) from None
    policy = FrozenPolicy(model=model, generation_batch_size=1, speech_cache=None)
    print(policy.generate(batch, group_size=1, params=params)[0].response)


if __name__ == "__main__":
    main()
