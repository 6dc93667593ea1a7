# SPDX-License-Identifier: Apache-2.0
# Two images, by target. Torch, CUDA, Apex, Transformer Engine, megatron-core and NeMo stay as NVIDIA's image has them:
# examples/cluster/container.py adds the plug-in and the small packages that are lacking, all without dependencies, and
# ends the build where something cannot be imported. Never built by its authors (docs/cluster.md).
#
#   docker build --target nemo   -t nemo_rba:nemo   .     NeMo 2.7.3, with Apex, Transformer Engine and megatron-core
#   docker build --target speech -t nemo_rba:speech .     NeMo Speech 3.0
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v $PWD/checkpoints:/opt/nemo_rba/checkpoints \
#     -v $PWD/runs:/opt/nemo_rba/runs nemo_rba:nemo \
#     torchrun --nproc_per_node=8 examples/rba_align.py --config-name=rba_8b
#
# The tags are those that NeMo's README names; override with --build-arg (26.04.01 is a later patch of the first).
ARG NEMO_IMAGE=nvcr.io/nvidia/nemo:26.04
ARG SPEECH_IMAGE=nvcr.io/nvidia/nemo-speech:26.07.00

FROM ${SPEECH_IMAGE} AS speech
WORKDIR /opt/nemo_rba
COPY . .
# This image carries no megatron-core; without dependencies its wheel is Python and one small helper for data sets.
RUN python examples/cluster/container.py --constraints constraints.txt --megatron-core

# The last target is the one that is built when none is named.
FROM ${NEMO_IMAGE} AS nemo
WORKDIR /opt/nemo_rba
COPY . .
RUN python examples/cluster/container.py --constraints constraints-2.7.3.txt
