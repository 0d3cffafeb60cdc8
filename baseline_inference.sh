#!/usr/bin/env bash
# Loop over model x task x zero-shot and few-shot, untuned.
#
#   ./baseline_inference.sh [flags of llama2_baseline_inference.py]
#   MODELS="NousResearch/Llama-2-7b-chat-hf" ./baseline_inference.sh --chat_template auto
#   TASKS=classification SEEDS="1 2 3" ./baseline_inference.sh --train_file train.jsonl --test_file test.jsonl
set -euo pipefail
owns="pretrained_ckpt:MODELS task_type:TASKS seed:SEEDS" together=1 # read by loop.sh
# shellcheck source=study/loop.sh
source "$(dirname "${BASH_SOURCE[0]}")/study/loop.sh"

for model in ${MODELS:-NousResearch/Llama-2-7b-hf NousResearch/Llama-2-13b-hf}; do
  for task in ${TASKS:-classification summarization}; do
    for prompt in zero-shot few-shot; do
      for seed in ${SEEDS:-42}; do
        cell "$root/llama2_baseline_inference.py" -- \
          --pretrained_ckpt "$model" --task_type "$task" --prompt_type "$prompt" --seed "$seed" "$@"
        [[ $prompt == few-shot ]] || break # only the choice of examples depends on the seed
      done
    done
  done
  score_waiting
done
finish
