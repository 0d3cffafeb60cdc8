#!/usr/bin/env bash
# Loop over LoRA rank x epochs x dropout: the 72 cells of the published ablation, on summarization.
#
#   ./run_lora.sh [flags of the training script]
#   RANKS="8 64" EPOCHS="1 5" DROPOUTS=0.1 SEEDS="1 2 3" TASK=classification ./run_lora.sh --dry_run
set -euo pipefail
owns="lora_r:RANKS epochs:EPOCHS also_epochs:EPOCHS dropout:DROPOUTS seed:SEEDS" # read by loop.sh
# shellcheck source=study/loop.sh
source "$(dirname "${BASH_SOURCE[0]}")/study/loop.sh"
task=${TASK:-summarization}
[[ -f $root/llama2_$task.py ]] || {
  echo "error: TASK=$task: it is classification or summarization" >&2
  exit 2
}

epochs=${EPOCHS:-2 5 10 20 30 50}
scripts=("$root/llama2_$task.py" "$root/llama2_${task}_inference.py")
for rank in ${RANKS:-2 4 8 16}; do
  for dropout in ${DROPOUTS:-0.1 0.2 0.5}; do
    for seed in ${SEEDS:-42}; do
      flags=(--dropout "$dropout" --seed "$seed" "$@")
      # A run of 2 epochs is the beginning of one of 50.
      train_row "$epochs" "${scripts[@]}" -- --lora_r "$rank" "${flags[@]}"
      for epoch in $epochs; do
        cell "${scripts[@]}" -- --lora_r "$rank" --epochs "$epoch" "${flags[@]}"
      done
    done
  done
done
finish
