# SPDX-License-Identifier: Apache-2.0
"""A tiny random MagpieTTS with three baked voices, made on the spot, saved and restored by NeMo."""

from pathlib import Path

import pytest
import torch
from nemo.collections.tts.models import AudioCodecModel, MagpieTTSModel
from nemo.collections.tts.parts.utils import tts_dataset_utils
from omegaconf import OmegaConf

from nemo_rba.synthesis.tts_magpie import MagpieTTS

pytestmark = pytest.mark.skipif(
    not hasattr(tts_dataset_utils, "LANGUAGE_TOKENIZER_MAP"), reason="MagpieTTS tells its languages since NeMo 3"
)

WIDTH, NUM_VOICES, NUM_FRAMES = 32, 3, 6
AUDIO = "nemo.collections.tts.modules.audio_codec_modules"
CODEC = {
    "sample_rate": 16000, "samples_per_frame": 320, "loss_resolutions": [[512, 128, 512]], "mel_loss_dims": [40],
    "use_scl_loss": False, "commit_loss_scale": 0.0,
    "audio_encoder": {"_target_": f"{AUDIO}.HiFiGANEncoder", "encoded_dim": 8, "down_sample_rates": [2, 4, 5, 8],
                      "base_channels": 4},
    "audio_decoder": {"_target_": f"{AUDIO}.HiFiGANDecoder", "input_dim": 8, "up_sample_rates": [8, 5, 4, 2],
                      "base_channels": 32},
    "vector_quantizer": {"_target_": f"{AUDIO}.GroupFiniteScalarQuantizer", "num_groups": 2,
                         "num_levels_per_group": [5, 5, 5, 5]},
    "generator_loss": {"_target_": "nemo.collections.tts.losses.audio_codec_loss.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": "nemo.collections.tts.losses.audio_codec_loss.DiscriminatorSquaredLoss"},
}  # fmt: skip
LAYER = {
    "n_layers": 1, "d_model": WIDTH, "d_ffn": 64, "sa_n_heads": 2, "kernel_size": 1, "p_dropout": 0.0,
    "is_causal": True, "use_learnable_pos_emb": True, "max_length_causal_mask": 256,
}  # fmt: skip
TOKENIZERS = "nemo.collections.common.tokenizers.text_to_speech.tts_tokenizers"


def build(model_class, config: dict):
    """Without the downloads and losses of training."""
    model_class._set_model_restore_state(is_being_restored=True)
    try:
        return model_class(OmegaConf.create(config)).eval()
    finally:
        model_class._set_model_restore_state(is_being_restored=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("magpie")
    build(AudioCodecModel, CODEC).save_to(str(folder / "codec.nemo"))
    model = build(MagpieTTSModel, {
        "model_type": "decoder_ce", "codecmodel_path": str(folder / "codec.nemo"), "embedding_dim": WIDTH,
        "hidden_dim": WIDTH,
        "text_tokenizers": {"english": {"_target_": f"{TOKENIZERS}.EnglishCharsTokenizer", "punct": True}},
        "encoder": LAYER | {"is_causal": False}, "context_encoder": LAYER | {"is_causal": False},
        "decoder": LAYER | {"has_xattn": True, "xa_d_memory": WIDTH, "xa_n_heads": 1, "xa_d_head": 16},
        "local_transformer_type": "autoregressive", "local_transformer_hidden_dim": 16,
        "local_transformer_n_layers": 1, "prior_scaling_factor": None, "prior_end_step": 0,
        "prior_scaledown_start_step": 0, "alignment_loss_scale": 0.0, "context_duration_min": 1.0,
        "context_duration_max": 2.0, "load_cached_codes_if_available": False, "max_epochs": 1,
        "inference_parameters": {"max_decoder_steps": 24},
    })  # fmt: skip
    model.save_to(str(folder / "voiceless.nemo"))
    model.baked_context_embedding = torch.nn.Embedding(NUM_VOICES, NUM_FRAMES * WIDTH)
    model._baked_embedding_T, model._baked_embedding_D = torch.tensor(NUM_FRAMES), torch.tensor(WIDTH)
    model.baked_context_embedding_len = torch.tensor([NUM_FRAMES] * NUM_VOICES)
    model.save_to(str(folder / "magpie.nemo"))
    return folder / "magpie.nemo"


def load(checkpoint: Path, **changes) -> MagpieTTS:
    settings = {"languages": ["en"], "speakers": [0, 2], "use_cfg": False, "sampling_rate": 8000, "seed": 1}
    return MagpieTTS(**({"model": str(checkpoint), "device": "cpu"} | settings | changes))


@pytest.fixture(scope="module")
def tts(checkpoint) -> MagpieTTS:
    return load(checkpoint)


def test_speech_depends_on_text_speaker_and_seed_alone(tts, checkpoint):
    assert tts.speakers == ("en-0", "en-2")
    assert tts.voices == {"en-0": "baked voice 0", "en-2": "baked voice 2"}, "whatever they speak"
    texts, speakers = ["hello there", "good morning", "hello there"], ["en-0", "en-2", "en-2"]
    forth = tts.synthesize(texts, speakers)
    back = tts.synthesize(texts[::-1], speakers[::-1])[::-1]
    assert all(torch.equal(a, b) for a, b in zip(forth, back, strict=True))
    assert all(audio.dtype == torch.float32 and audio.dim() == 1 and audio.abs().max() <= 1 for audio in forth)
    assert not (forth[0].shape == forth[2].shape and torch.equal(forth[0], forth[2])), "another voice"
    other = load(checkpoint, seed=2).synthesize(texts[:1], speakers[:1])[0]
    assert not (other.shape == forth[0].shape and torch.equal(other, forth[0]))


def test_the_randomness_of_others_is_left_alone(tts):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tts.synthesize(["hello"], ["en-0"])
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"speakers": [3]}, r"tts.speakers has 3; expected whole numbers 0 to 2"),
        ({"languages": ["xx"]}, r"tts.languages has 'xx'; this model speaks"),
        ({"speakers": []}, "expected at least one of each"),
        ({"model": "nowhere.nemo"}, r"tts.model: no file 'nowhere.nemo' with a MagpieTTSModel"),
    ],
)
def test_what_the_model_has_not_is_refused(checkpoint, changes, expected):
    with pytest.raises(ValueError, match=expected):
        load(checkpoint, **changes)


def test_a_model_without_voices_and_texts_that_cannot_be_said(checkpoint, tts):
    with pytest.raises(ValueError, match="has no baked voices"):
        load(checkpoint.with_name("voiceless.nemo"))
    for text in ("42 is right", "?!"):
        with pytest.raises(ValueError, match="write numbers and symbols in words"):
            tts.synthesize([text], ["en-0"])
    with pytest.raises(ValueError, match="MagpieTTS cannot say 'hello мир': its tokenizer does not know 'м', 'и', 'р'"):
        tts.synthesize(["hello мир"], ["en-0"])
    with pytest.raises(ValueError, match="unknown speaker 'en-1'"):
        tts.synthesize(["hello"], ["en-1"])
