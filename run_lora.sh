#!/usr/bin/env bash
# Loop over LoRA rank x epochs x dropout: the 72 cells of the published ablation, on summarization.
#
#   ./run_lora.sh [flags of the training script]
#   RANKS="8 64" EPOCHS="1 5" DROPOUTS=0.1 LEARNING_RATES="1e-4 1e-3" SEEDS="1 2 3" TASK=classification ./run_lora.sh --dry_run
# Where the data have a validation split (--validation_file, --validation_fraction), cells are scored on that, and the best
# of them, once all are, on the test split. --split test scores all of them there.
set -euo pipefail
owns="lora_r:RANKS epochs:EPOCHS also_epochs:EPOCHS dropout:DROPOUTS seed:SEEDS" # read by loop.sh
[[ ! ${LEARNING_RATES:-} ]] || owns+=" learning_rate:LEARNING_RATES"
# shellcheck source=study/loop.sh
source "$(dirname "${BASH_SOURCE[0]}")/study/loop.sh"
task=${TASK:-summarization}
[[ -f $root/llama2_$task.py ]] || {
  echo "error: TASK=$task: it is classification or summarization" >&2
  exit 2
}

has_validation() { # has_validation FLAG...
  own_python -c '
import sys

from study import cli, data, errors

try:
    sys.exit(0 if data.has_split(cli.parse_args(sys.argv[1], "", sys.argv[2:]), "validation") else 3)
except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)' "$task" "$@"
}

split=()
if [[ " $* " != *" --split"[\ =]* ]]; then
  if has_validation "$@"; then
    split=(--split validation)
  else
    status=$?
    ((status == 3)) || exit "$status"
    echo "no validation split: cells are scored on the test split, and the best of them looks better there than it is"
  fi
fi
epochs=${EPOCHS:-2 5 10 20 30 50}
scripts=("$root/llama2_$task.py" "$root/llama2_${task}_inference.py")
for rank in ${RANKS:-2 4 8 16}; do
  for dropout in ${DROPOUTS:-0.1 0.2 0.5}; do
    for rate in ${LEARNING_RATES:-default}; do
      for seed in ${SEEDS:-42}; do
        flags=(--dropout "$dropout" --seed "$seed" "${split[@]}" "$@")
        [[ $rate == default ]] || flags=(--learning_rate "$rate" "${flags[@]}")
        # A run of 2 epochs is the beginning of one of 50.
        train_row "$epochs" "${scripts[@]}" -- --lora_r "$rank" "${flags[@]}"
        for epoch in $epochs; do
          cell "${scripts[@]}" -- --lora_r "$rank" --epochs "$epoch" "${flags[@]}"
        done
        score_waiting "${split[@]}" "$@"
      done
    done
  done
done
[[ ! ${split[*]} ]] || score_best "$@"
finish
