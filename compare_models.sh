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
  classification) all="tfidf-nb tfidf-svm distilbert bert flan-t5-large falcon-7b redpajama-3b redpajama-7b llama-2-7b llama-2-13b" ;;
  summarization) all="lead-3 longest-3 flan-t5-base flan-t5-large falcon-7b redpajama-3b redpajama-7b llama-2-7b llama-2-13b" ;;
  *)
    echo "error: TASK=$task: it is classification or summarization" >&2
    exit 2
    ;;
esac

kind_of() { # kind_of MODEL: as KIND=CHECKPOINT
  case $1 in
    distilbert) echo encoder=distilbert/distilbert-base-uncased ;;
    bert) echo encoder=google-bert/bert-base-uncased ;;
    flan-t5-base) echo t5=google/flan-t5-base ;;
    flan-t5-large) echo t5-lora=google/flan-t5-large ;;
    falcon-7b) echo causal=tiiuae/falcon-7b ;;
    redpajama-3b) echo causal=togethercomputer/RedPajama-INCITE-Base-3B-v1 ;;
    redpajama-7b) echo causal=togethercomputer/RedPajama-INCITE-7B-Base ;;
    llama-2-7b) echo causal=NousResearch/Llama-2-7b-hf ;;
    llama-2-13b) echo causal=NousResearch/Llama-2-13b-hf ;;
    tfidf-* | lead-3 | longest-3) echo "cheap=$1" ;;
    causal=* | encoder=* | t5=* | t5-lora=*) echo "$1" ;;
    *)
      echo "error: MODELS: $1 is none of $all, nor KIND=CHECKPOINT with KIND causal, encoder, t5 or t5-lora" >&2
      return 2
      ;;
  esac
}

for model in ${MODELS:-$all}; do
  found=$(kind_of "$model") || exit 2
  kind=${found%%=*} checkpoint=${found#*=}
  if [[ $kind == encoder && $task != classification ]]; then
    echo "error: MODELS: $model classifies only, and TASK is $task" >&2
    exit 2
  fi
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
done
finish
