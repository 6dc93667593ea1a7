# SPDX-License-Identifier: Apache-2.0
"""Who speaks in the tiny world: espeak-ng voices for training, and others, disjoint, for dev and test."""

SAMPLING_RATE = 16000

TRAIN_VOICES = [
    language + variant
    for language in ("en-us", "en", "en-gb-x-rp")
    for variant in ("", "+m1", "+m3", "+m5", "+f1", "+f3", "+f5")
]
TRAIN_RATES = [140, 155, 170, 185, 200]  # words per minute
TRAIN_PITCHES = [35, 50, 65]

DEV_VOICES = ["en-us+m2", "en+f2", "en-us+f4"]
TEST_VOICES = ["en+m2", "en-us+m7", "en+m7", "en-us+f2", "en+f4", "en-gb-scotland"]
HELD_OUT_RATES = [150, 165, 180, 195]
HELD_OUT_PITCHES = [40, 55]

SNR_DB = (15.0, 35.0)
PEAK = (0.3, 0.9)

SPEAKERS = {  # split -> arguments of EspeakTTS
    "train": {"voices": TRAIN_VOICES, "rates": TRAIN_RATES, "pitches": TRAIN_PITCHES},
    "dev": {"voices": DEV_VOICES, "rates": HELD_OUT_RATES, "pitches": HELD_OUT_PITCHES},
    "test": {"voices": TEST_VOICES, "rates": HELD_OUT_RATES, "pitches": HELD_OUT_PITCHES},
}
