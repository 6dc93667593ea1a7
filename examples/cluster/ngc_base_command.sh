#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on NGC Base Command Platform, by the NGC CLI (first: ngc config set). Run it where the CLI is:
#
#   examples/cluster/ngc_base_command.sh                     # the recipe rba_8b
#   examples/cluster/ngc_base_command.sh rba_8b_lora seed=2  # another, with overrides
#   DRY_RUN=1 examples/cluster/ngc_base_command.sh           # show the command only
#
# One job of TOTAL_RUNTIME at most. Base Command does not queue it again; the same command goes on where it stopped,
# because runs/ is in the workspace. Checkpoints, runs and code must be in the workspace before (ngc workspace upload).
set -euo pipefail

ACE=${ACE:-CHANGE}                          # CHANGE: ngc ace list
INSTANCE=${INSTANCE:-dgxa100.80g.8.norm}    # CHANGE: 8 GPUs of 80 GB; ngc ace info $ACE lists what there is
IMAGE=${IMAGE:-CHANGE}                      # CHANGE: the Dockerfile's image, pushed to your organisation's registry
WORKSPACE=${WORKSPACE:-CHANGE}              # CHANGE: id of a workspace (ngc workspace list): a copy of this repository,
                                            # with checkpoints/ in it; runs/ is written there
NODES=${NODES:-1}                           # CHANGE: keep 64 prompts a batch by data.batch_size
TOTAL_RUNTIME=${TOTAL_RUNTIME:-8H}          # CHANGE: the job is ended after it
TIME_PER_RUN=${TIME_PER_RUN:-00:07:00:00}   # training saves and stops after it, before TOTAL_RUNTIME (DD:HH:MM:SS)
GPUS=8                                      # of one instance
CONFIG=${1:-rba_8b}

words=(
  examples/rba_align.py "--config-name=$CONFIG"
  "trainer.num_nodes=$NODES"
  "trainer.devices=$GPUS"
  "exp_manager.max_time_per_run=$TIME_PER_RUN"
  "${@:2}"
)
align=$(printf '%q ' "${words[@]}")
if [[ $align == *\'* ]]; then
  echo "an override has a single quote, which bcprun's own would end; write it with double quotes" >&2
  exit 2
fi

if ((NODES == 1)); then
  command="cd /opt/nemo_rba && torchrun --standalone --nproc_per_node=$GPUS $align"
  array=()
else
  # Base Command sets NGC_ARRAY_INDEX and NGC_MASTER_ADDR in every replica; bcprun runs one torchrun on each.
  run="torchrun --nnodes=$NODES --nproc_per_node=$GPUS --node_rank=\${NGC_ARRAY_INDEX} \
--master_addr=\${NGC_MASTER_ADDR} --master_port=29500 $align"
  command="bcprun --nnodes $NODES --npernode 1 --workdir /opt/nemo_rba --cmd '$run'"
  array=(--array-type PYTORCH --replicas "$NODES")
fi

submit=(
  ngc batch run
  --name "rba-align-$CONFIG"
  --ace "$ACE"
  --instance "$INSTANCE"
  --image "$IMAGE"
  --workspace "$WORKSPACE:/opt/nemo_rba:RW"
  --result /results                         # Base Command wants one; joblog.log is kept there
  --preempt RUNONCE
  --total-runtime "$TOTAL_RUNTIME"
  ${array[@]+"${array[@]}"}                 # bash 3.2, the one of macOS, takes an empty array for an unset one
  --commandline "$command"
)
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${submit[@]}"
  echo
else
  "${submit[@]}"
fi
