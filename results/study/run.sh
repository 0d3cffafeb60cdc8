#!/usr/bin/env bash
# The study on real data, by the folder's own scripts, one step after the other. Each finds what is finished.
#
#   DATA=FOLDER results/study/run.sh [STEP...] [-- FLAG...]     # FLAGs go to every script of a step, e.g. --dry_run
#
# DATA holds newsgroups_{train,test}.jsonl.gz, samsum_{train,validation,test}.jsonl.gz, more_texts.jsonl.gz and
# definitions.jsonl.gz (README.md says where they come from), ENCODER the folder of all-MiniLM-L6-v2, SHAPES those of
# benchmarks/checkpoint.py (7b, 13b).
# GRID="python scale/ray_grid.py --gpus_per_cell 0.3" does the cells of a loop on all GPUs, three side by side on each
# (not those of words, which need none, nor those of shapes, which are there for their speed).
# STEPs: base choose choose_encoder table1 encoder words prompting dialogues grid serving shapes report; without one all
# but shapes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${DATA:-data} base=${BASE:-llama-72m} encoder=${ENCODER:-all-MiniLM-L6-v2} shapes=${SHAPES:-shapes}
read -ra spread <<<"${GRID:-}"
price=(--price_per_hour "${PRICE_PER_HOUR:-4}")
posts=(--train_file "$data/newsgroups_train.jsonl.gz" --test_file "$data/newsgroups_test.jsonl.gz" "${price[@]}")
dialogues=(--train_file "$data/samsum_train.jsonl.gz" --validation_file "$data/samsum_validation.jsonl.gz"
  --test_file "$data/samsum_test.jsonl.gz" "${price[@]}")
place=(--output_dir results/study/experiments)
tuned=(--pretrained_ckpt "$base" --lora_r 32 --lora_alpha 64)
held_out=(--validation_fraction 0.1 --train_sample_fraction 0.1 --output_dir results/study/experiments/choose)
chosen=(--learning_rate 5e-4 --epochs 16) # by the step choose
chosen_encoder=(--learning_rate 2e-4 --epochs 8) # by the step choose_encoder

base() { # eight minutes on one GPU
  local of=() not=() file
  for file in newsgroups_train:text samsum_train:dialogue more_texts:text definitions:text; do
    of+=("$data/${file/:/.jsonl.gz:}")
  done
  for file in newsgroups_test:text samsum_{train,validation,test}:summary samsum_{validation,test}:dialogue; do
    not+=("$data/${file/:/.jsonl.gz:}")
  done
  python demo/pretrain.py "$base" --passes 10 --dropout 0.2 --block 2048 --rows 32 --texts "${of[@]}" --exclude "${not[@]}"
}

choose() { # learning rate and epochs, on a tenth of the training posts, trained on a tenth of the others
  TASK=classification RANKS=32 DROPOUTS=0.1 LEARNING_RATES="2e-4 5e-4 1e-3" EPOCHS="4 8 16" "${spread[@]}" ./run_lora.sh \
    --split validation --pretrained_ckpt "$base" --lora_alpha 64 "${posts[@]}" "${held_out[@]}" "$@"
}

choose_encoder() { # likewise
  local rate epochs
  for rate in 5e-5 1e-4 2e-4 4e-4; do
    for epochs in 4 8 16; do
      python competitors/encoder_classification.py --pretrained_ckpt "$encoder" --learning_rate "$rate" --epochs "$epochs" \
        --split validation "${posts[@]}" "${held_out[@]}" "$@"
    done
  done
}

table1() {
  SEEDS="${SEEDS:-1 2 3}" "${spread[@]}" ./sample_ablate.sh "${tuned[@]}" "${chosen[@]}" "${posts[@]}" "${place[@]}" "$@"
}

encoder() {
  SEEDS="${SEEDS:-1 2 3}" MODELS="encoder=$encoder" "${spread[@]}" ./compare_models.sh "${chosen_encoder[@]}" \
    "${posts[@]}" "${place[@]}" "$@"
}

words() { # on the CPU
  SEEDS="1 2 3" MODELS="tfidf-nb tfidf-svm" ./compare_models.sh "${posts[@]}" "${place[@]}" "$@"
  TASK=summarization MODELS="lead-3 longest-3" ./compare_models.sh "${dialogues[@]}" "${place[@]}" "$@"
}

prompting() {
  local way ask=("${spread[@]}" ./baseline_inference.sh)
  for way in free constrained; do
    MODELS=$base TASKS=classification SEEDS="1 2 3" "${ask[@]}" --decoding $way "${posts[@]}" "${place[@]}" "$@"
  done
  MODELS=$base TASKS=summarization SEEDS="1 2 3" "${ask[@]}" "${dialogues[@]}" "${place[@]}" "$@"
}

dialogues() { # all dialogues; learning rate and epochs by the validation split, the best on the test split
  RANKS=64 DROPOUTS=0.1 LEARNING_RATES="5e-4 1e-3" EPOCHS="2 4" \
    "${spread[@]}" ./run_lora.sh --pretrained_ckpt "$base" --lora_alpha 128 "${dialogues[@]}" "${place[@]}" "$@"
}

grid() { # the published 72 cells, on a tenth of the dialogues
  "${spread[@]}" ./run_lora.sh --pretrained_ckpt "$base" --learning_rate 1e-3 --train_sample_fraction 0.1 "${dialogues[@]}" \
    --output_dir results/study/experiments/grid "$@"
}

serving() { # the classifier of all posts behind HTTP
  local run
  run=$(python llama2_classification.py "${tuned[@]}" "${chosen[@]}" --seed 1 "${posts[@]}" "${place[@]}" --dry_run |
    tail -n 1 | cut -f 2)
  SERVERS="fastapi ray" ./serve_and_load.sh "$run" --rates 100,200,400,800,1000 --seconds 20 --bisections 1 --slo_seconds 1 \
    --repeat_prompts "${price[@]}" --output_dir results/study/experiments/serving "$@"
}

shapes() { # Llama-2's sizes with random weights: what training and scoring take
  local size
  for size in ${SIZES:-7b 13b}; do
    FRACTIONS=1.0 ./sample_ablate.sh --pretrained_ckpt "$shapes/$size" --epochs 1 --max_train_samples 1600 --max_eval_samples 1000 \
      "${posts[@]}" --output_dir results/study/experiments/shapes "$@"
  done
}

report() {
  python -m study.report results/study/experiments --published --output_dir results/study
}

steps=()
while (($#)) && [[ $1 != -- ]]; do
  steps+=("$1")
  shift
done
[[ ${1:-} != -- ]] || shift
((${#steps[@]})) || steps=(base choose choose_encoder table1 encoder words prompting dialogues grid serving report)
for step in "${steps[@]}"; do
  declare -F "$step" >/dev/null || {
    echo "error: $step: there is no such step (the comment in $0 has them)" >&2
    exit 2
  }
  if [[ $step == base || $step == report ]]; then "$step"; else "$step" "$@"; fi
done
