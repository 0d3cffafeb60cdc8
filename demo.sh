#!/usr/bin/env bash
# One command on a fresh machine: set up .venv, then score the small model in demo/ zero-shot, few-shot and fine-tuned, on both
# tasks, on the CPU, and print one table. Started again, it finds what it has. PRICE_PER_HOUR is what this machine costs in USD.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=study/setup.sh
source study/setup.sh
set_up requirements.txt

export CUDA_VISIBLE_DEVICES= # the demo shows the CPU path, also where there is a GPU
common=(--pretrained_ckpt demo/model --output_dir demo/experiments --price_per_hour "${PRICE_PER_HOUR:-0.10}")
posts=(--train_file demo/data/posts_train.jsonl --test_file demo/data/posts_test.jsonl)
dialogues=(--train_file demo/data/dialogues_train.jsonl --test_file demo/data/dialogues_test.jsonl)
# A model this small learns at a higher rate than the 2e-4 that suits billions of weights.
tuning=(--learning_rate 3e-3 --batch_size 8)

folders=()
run() { # run SCRIPT FLAG...: say the command, run it, remember its folder
  printf '\n$ python %s\n' "$*"
  python "$@"
  folders+=("$(python "$@" --dry_run | tail -n 1 | cut -f 2)")
}

for prompt in zero-shot few-shot; do
  run llama2_baseline_inference.py --task_type classification --prompt_type $prompt "${common[@]}" "${posts[@]}"
done
printf '\n$ python %s\n' "llama2_classification.py ${common[*]} ${posts[*]} ${tuning[*]}"
python llama2_classification.py "${common[@]}" "${posts[@]}" "${tuning[@]}"
run llama2_classification_inference.py "${common[@]}" "${posts[@]}" "${tuning[@]}"

for prompt in zero-shot few-shot; do
  run llama2_baseline_inference.py --task_type summarization --prompt_type $prompt "${common[@]}" "${dialogues[@]}"
done
printf '\n$ python %s\n' "llama2_summarization.py ${common[*]} ${dialogues[*]} ${tuning[*]}"
python llama2_summarization.py "${common[@]}" "${dialogues[@]}" "${tuning[@]}" --epochs 8
run llama2_summarization_inference.py "${common[@]}" "${dialogues[@]}" "${tuning[@]}" --epochs 8

printf '\n'
python -m study.report "${folders[@]}"
