#!/usr/bin/env bash
# One command on a fresh machine: set up .venv, then score the small model in demo/ zero-shot, few-shot and fine-tuned, on
# both tasks at once, on the CPU, beside what costs nothing (TF-IDF, utterances taken from the dialogue), and print one
# table. Started again, it finds what it has.
# PRICE_PER_HOUR is what this machine costs, in USD.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case ${1:-} in
  '') ;;
  -h | --help) # the comment above
    sed -n '2,/^set /s/^# \{0,1\}//p' demo.sh
    exit 0
    ;;
  *)
    echo "error: $1: the demo takes no flags but --help" >&2
    exit 2
    ;;
esac
# shellcheck source=study/setup.sh
source study/setup.sh
set_up requirements.txt

export CUDA_VISIBLE_DEVICES= # the demo shows the CPU path, also where there is a GPU
export OMP_NUM_THREADS=1     # so small a model gains little from a second thread, and loses much where cores are shared
export PYTHONUNBUFFERED=1
common=(--output_dir demo/experiments --price_per_hour "${PRICE_PER_HOUR:-0.10}")
model=(--pretrained_ckpt demo/model)

run() { # run SCRIPT FLAG...: say the command and run it, or with LOOK_UP only say the folder of its run
  if [[ ${LOOK_UP:-} ]]; then
    python "$@" --dry_run | tail -n 1 | cut -f 2
  else
    printf '\n$ python %s\n' "$*"
    python "$@"
  fi
}

score() { # score TASK DATA FLAG...: every method on one task; a model this small learns best at a high rate
  local task=$1 files=(--train_file "demo/data/$2_train.jsonl" --test_file "demo/data/$2_test.jsonl") prompt
  local tuning=("${model[@]}" "${common[@]}" "${files[@]}" --learning_rate 3e-3 --batch_size 8 "${@:3}")
  run competitors/cheap.py --task_type "$task" "${common[@]}" "${files[@]}"
  for prompt in zero-shot few-shot; do
    run llama2_baseline_inference.py --task_type "$task" --prompt_type $prompt "${model[@]}" "${common[@]}" "${files[@]}"
  done
  [[ ${LOOK_UP:-} ]] || run "llama2_$task.py" "${tuning[@]}"
  run "llama2_${task}_inference.py" "${tuning[@]}"
}

score classification posts 2>&1 | sed -u 's/^/classification  /' &
other=$!
score summarization dialogues --epochs 6 2>&1 | sed -u 's/^/summarization   /'
wait $other

LOOK_UP=1
mapfile -t folders < <(score classification posts && score summarization dialogues --epochs 6)
printf '\n'
python -m study.report "${folders[@]}"
