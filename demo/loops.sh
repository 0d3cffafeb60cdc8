#!/usr/bin/env bash
# The three loops with the small model in demo/, on the CPU, and every table and plot from their records in results/demo/.
# About an hour on 2 cores; started again, it goes on where it was.
#
#   ./demo/loops.sh
#   REAL_DATA=FOLDER ./demo/loops.sh   # also on newsgroups_{train,test}.jsonl.gz and samsum_{train,test}.jsonl.gz there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=study/setup.sh
source study/setup.sh
set_up requirements.txt

export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 MODELS=demo/model
common=(--output_dir results/demo/experiments --price_per_hour "${PRICE_PER_HOUR:-0.10}")
learning=(--pretrained_ckpt "$MODELS" --learning_rate 3e-3 --batch_size 8) # a model this small learns best at a high rate
posts=(--train_file demo/data/posts_train.jsonl --test_file demo/data/posts_test.jsonl)
dialogues=(--train_file demo/data/dialogues_train.jsonl --test_file demo/data/dialogues_test.jsonl)

real() { # real NAME: the flags that read real data, a part of the test set
  printf '%s\n' --train_file "$REAL_DATA/$1_train.jsonl.gz" --test_file "$REAL_DATA/$1_test.jsonl.gz" --max_eval_samples 256
}

classify() {
  SEEDS="1 2 3" ./sample_ablate.sh "${common[@]}" "${learning[@]}" "${posts[@]}"
  SEEDS="1 2 3" TASKS=classification ./baseline_inference.sh "${common[@]}" "${posts[@]}"
  if [[ ${REAL_DATA:-} ]]; then
    mapfile -t news < <(real newsgroups)
    FRACTIONS="0.025 0.1" SEEDS="1 2" ./sample_ablate.sh "${common[@]}" "${learning[@]}" --epochs 1 "${news[@]}"
  fi
}

summarize() {
  RANKS="4 16" EPOCHS="2 5" DROPOUTS="0.1 0.5" SEEDS="1 2 3" ./run_lora.sh "${common[@]}" "${learning[@]}" "${dialogues[@]}"
  SEEDS="1 2 3" TASKS=summarization ./baseline_inference.sh "${common[@]}" "${dialogues[@]}"
  if [[ ${REAL_DATA:-} ]]; then
    mapfile -t samsum < <(real samsum)
    RANKS="8 64" EPOCHS=1 DROPOUTS=0.1 SEEDS="1 2" ./run_lora.sh "${common[@]}" "${learning[@]}" --max_train_samples 500 "${samsum[@]}"
    TASKS=summarization ./baseline_inference.sh "${common[@]}" --shots 1 "${samsum[@]}"
  fi
}

classify 2>&1 | sed -u 's/^/classification  /' &
other=$!
summarize 2>&1 | sed -u 's/^/summarization   /'
wait $other
python -m study.report results/demo/experiments --published --output_dir results/demo
