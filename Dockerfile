# SPDX-License-Identifier: Apache-2.0
# Two images, by target; both keep the base's torch, CUDA, Transformer Engine and NeMo as they are (hence --no-deps).
#   docker build --target nemo   -t nemo_rba:nemo   .     NeMo 2.7.3, with Apex, Transformer Engine and megatron-core
#   docker build --target speech -t nemo_rba:speech .     NeMo Speech 3.0
#   docker run --gpus all --ipc=host -v $PWD/runs:/opt/nemo_rba/runs nemo_rba:nemo \
#     python examples/rba_align.py --config-name=rba_8b
# Tags are those of https://catalog.ngc.nvidia.com; override with --build-arg if yours differ.
ARG NEMO_IMAGE=nvcr.io/nvidia/nemo:26.04
ARG SPEECH_IMAGE=nvcr.io/nvidia/nemo-speech:26.07

FROM ${SPEECH_IMAGE} AS speech
WORKDIR /opt/nemo_rba
COPY . .
# The speech image carries no megatron-core; the pure-Python parts of the wheel are all that is needed.
RUN pip install --no-cache-dir --no-deps megatron-core==0.16.1 espeakng-loader==0.2.4 \
    && pip install --no-cache-dir --no-deps . \
    && python -c "import megatron.core, nemo.collections.asr, nemo_rba"

FROM ${NEMO_IMAGE} AS nemo
WORKDIR /opt/nemo_rba
COPY . .
RUN pip install --no-cache-dir --no-deps espeakng-loader==0.2.4 sacrebleu==2.6.0 portalocker==4.4.2 \
    && pip install --no-cache-dir --no-deps . \
    && python -c "import megatron.core, nemo.collections.asr, sacrebleu, nemo_rba"
