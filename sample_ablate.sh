#!/usr/bin/env bash
# Loop over the share of training examples, on classification.
#
#   ./sample_ablate.sh [flags of llama2_classification.py]
#   FRACTIONS="0.025 1.0" SEEDS="1 2 3" ./sample_ablate.sh --dry_run
set -euo pipefail
owns="train_sample_fraction:FRACTIONS seed:SEEDS" # read by loop.sh
# shellcheck source=study/loop.sh
source "$(dirname "${BASH_SOURCE[0]}")/study/loop.sh"

for fraction in ${FRACTIONS:-0.025 0.05 0.1 0.25 0.5 1.0}; do
  for seed in ${SEEDS:-42}; do
    cell "$root/llama2_classification.py" "$root/llama2_classification_inference.py" -- \
      --train_sample_fraction "$fraction" --seed "$seed" "$@"
  done
done
score_waiting "$@"
finish
