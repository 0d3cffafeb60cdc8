#!/usr/bin/env bash
# Loop over LoRA rank x epochs x dropout: the 72 cells of the published ablation, on summarization.
#
#   ./run_lora.sh [flags of the training script]
#   RANKS="8 64" EPOCHS="1 5" DROPOUTS=0.1 SEEDS="1 2 3" TASK=classification ./run_lora.sh --dry_run
set -euo pipefail
owns="lora_r:RANKS epochs:EPOCHS dropout:DROPOUTS seed:SEEDS" # read by loop.sh
# shellcheck source=study/loop.sh
source "$(dirname "${BASH_SOURCE[0]}")/study/loop.sh"
task=${TASK:-summarization}
[[ -f $root/llama2_$task.py ]] || {
  echo "error: TASK=$task: it is classification or summarization" >&2
  exit 2
}

for rank in ${RANKS:-2 4 8 16}; do
  for epochs in ${EPOCHS:-2 5 10 20 30 50}; do
    for dropout in ${DROPOUTS:-0.1 0.2 0.5}; do
      for seed in ${SEEDS:-42}; do
        cell "$root/llama2_$task.py" "$root/llama2_${task}_inference.py" -- \
          --lora_r "$rank" --epochs "$epochs" --dropout "$dropout" --seed "$seed" "$@"
      done
    done
  done
done
finish
