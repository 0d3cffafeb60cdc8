#!/usr/bin/env bash
# Loop over models x share of the training examples x seeds: the columns of the published tables, and what costs nothing.
#
#   ./compare_models.sh [flags that all of its scripts know: of data, price, place]
#   MODELS="bert tfidf-nb" FRACTIONS="0.1 1.0" SEEDS="1 2 3" ./compare_models.sh --train_file train.jsonl --test_file test.jsonl
#   TASK=summarization MODELS="lead-3 flan-t5-base t5-lora=FOLDER" ./compare_models.sh --dry_run
# A model is one of the names below, a method of competitors/cheap.py, or KIND=CHECKPOINT (KIND: causal, encoder, t5, t5-lora).
set -euo pipefail
owns="pretrained_ckpt:MODELS train_sample_fraction:FRACTIONS seed:SEEDS task_type:TASK" # read by loop.sh
# shellcheck source=study/loop.sh
source "$(dirname "${BASH_SOURCE[0]}")/study/loop.sh"
task=${TASK:-classification}
case $task in
  classification) all="tfidf-nb tfidf-svm" ;;
  summarization) all="lead-3 longest-3" ;;
  *)
    echo "error: TASK=$task: it is classification or summarization" >&2
    exit 2
    ;;
esac
declare -A presets # KIND=CHECKPOINT by name, in the published order
while read -r name kind checkpoint tasks; do
  [[ $name != flan-t5-large ]] || kind=t5-lora # as published
  presets[$name]=$kind=$checkpoint
  [[ " $tasks " != *" $task "* ]] || all+=" $name"
done < <(own_python -c '
from study.presets import PRESETS

for name, about in PRESETS.items():
    print(name, about.kind, about.checkpoint, *about.tasks)')

kind_of() { # kind_of MODEL: as KIND=CHECKPOINT
  local found=${presets[$1]:-} only=$task
  case $1 in
    tfidf-nb | tfidf-svm | tfidf-lr) found=cheap=$1 only=classification ;;
    lead-3 | longest-3) found=cheap=$1 only=summarization ;;
    causal=?* | encoder=?* | t5=?* | t5-lora=?*) found=$1 ;;
  esac
  [[ $found != encoder=* ]] || only=classification
  if [[ ! $found ]]; then
    echo "error: MODELS: $1 is none of $all, nor KIND=CHECKPOINT with KIND causal, encoder, t5 or t5-lora" >&2
    return 2
  fi
  if [[ $only != "$task" ]]; then
    echo "error: MODELS: $1 is for $only alone, and TASK is $task" >&2
    return 2
  fi
  echo "$found"
}

models=()
for model in ${MODELS:-$all}; do # all of them before the first cell, which may take hours
  models+=("$(kind_of "$model")") || exit 2
done
for model in "${models[@]}"; do
  kind=${model%%=*} checkpoint=${model#*=}
  for fraction in ${FRACTIONS:-0.025 0.05 0.1 0.25 0.5 1.0}; do
    for seed in ${SEEDS:-42}; do
      flags=(--train_sample_fraction "$fraction" --seed "$seed" "$@")
      case $kind in
        cheap) cell "$root/competitors/cheap.py" -- --task_type "$task" --method "$checkpoint" "${flags[@]}" ;;
        encoder) cell "$root/competitors/encoder_classification.py" -- --pretrained_ckpt "$checkpoint" "${flags[@]}" ;;
        t5) cell "$root/competitors/flan_t5.py" -- --task_type "$task" --pretrained_ckpt "$checkpoint" --tuning full "${flags[@]}" ;;
        t5-lora) cell "$root/competitors/flan_t5.py" -- --task_type "$task" --pretrained_ckpt "$checkpoint" --tuning lora "${flags[@]}" ;;
        causal) cell "$root/llama2_$task.py" "$root/llama2_${task}_inference.py" -- --pretrained_ckpt "$checkpoint" "${flags[@]}" ;;
      esac
      [[ $checkpoint != lead-3 && $checkpoint != longest-3 ]] || break 2 # which learn nothing
    done
  done
  score_waiting --pretrained_ckpt "$checkpoint" "$@"
done
finish
