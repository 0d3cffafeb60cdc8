#!/usr/bin/env bash
# What stands behind benchmarks/README.md: every measurement, from the data and a tokenizer alone, on one GPU.
#
#   benchmarks/all.sh DATA TOKENIZER [STEP...]
#
# DATA holds newsgroups_{train,test}.jsonl.gz and samsum_{train,test}.jsonl.gz. Checkpoints with random weights and
# trained runs go to experiments/benchmarks/, results to benchmarks/results/. Steps, all by default:
#   training training_13b training_samsum sizes exactness mutations curves
#   inference inference_sizes inference_13b inference_samsum equality scripts competitors
# and, only where they are named, on a machine with several GPUs (GPUS, 2 of them) scaling and sharding, and with a
# GPU of 80 GB or more seventy (Llama-2-70B).
# "competitors" takes BERT_TOKENIZER and T5_TOKENIZER, hub ids or folders, from the environment.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
data=$(realpath -s --relative-to="$root" "${1:?usage: benchmarks/all.sh DATA TOKENIZER [STEP...]}")
tokenizer=$(realpath -s --relative-to="$root" "${2:?usage: benchmarks/all.sh DATA TOKENIZER [STEP...]}")
shift 2
cd "$root"
work=experiments/benchmarks
results=benchmarks/results
posts=(--train_file "$data/newsgroups_train.jsonl.gz" --test_file "$data/newsgroups_test.jsonl.gz")
dialogues=(--train_file "$data/samsum_train.jsonl.gz" --test_file "$data/samsum_test.jsonl.gz")
price=(--price_per_hour "${PRICE_PER_HOUR:-4}")
mkdir -p "$results" "$work"

checkpoint() { # checkpoint SIZE: sets $model
  model=$work/$1
  [[ ! -d $model ]] || return 0
  rm -rf "$model.part"
  python -m benchmarks.checkpoint "$1" "$model.part" --tokenizer "$tokenizer"
  mv "$model.part" "$model"
}

train() { # train SIZE NAME FLAG...: one table of training speed
  checkpoint "$1"
  python -m benchmarks.training --model "$model" --dataset "$data/newsgroups_train.jsonl.gz" --steps 14 \
    --output "$results/$2.json" "${@:3}"
}

infer() { # infer SIZE NAME FLAG...: one table of inference speed
  checkpoint "$1"
  python -m benchmarks.inference --model "$model" --output "$results/$2.json" "${@:3}"
}

run_of() { echo "$work/$1"; } # run_of NAME: the folder of a trained run

tune() { # tune NAME FLAG...: 200 steps on posts
  checkpoint 7b
  python llama2_classification.py --pretrained_ckpt "$model" "${posts[@]}" "${price[@]}" --max_train_samples 1600 \
    --batch_size 8 --epochs 1 --dropout 0 --experiment_dir "$(run_of "$1")" "${@:2}"
}

training() {
  train 7b training-7b --modes fast,22,8,dropout --peers unsloth-fast,unsloth,trl,published --profile
}
training_13b() { train 13b training-13b --modes fast,22; }
training_samsum() {
  train 7b training-7b-samsum --modes fast --task summarization --dataset "$data/samsum_train.jsonl.gz"
}
sizes() {
  train 7b training-7b-tokens --modes fast --tokens 1024,4096 --steps 40 --profile
  train 7b training-7b-65536 --modes fast --tokens 65536 --steps 8
  train 7b training-7b-lengths --modes fast --lengths 256,2048,4096 --steps 8
  train 7b training-7b-samples --samples 100,400,1600
}
exactness() { python -m tests.exactness --output "$results/exactness.json"; }
mutations() { python -m tests.mutations --output "$results/mutations.json"; }
curves() {
  tune fused --force
  tune plain --force --attn_implementation sdpa
  cp "$(run_of fused)/train.json" "$results/curve-fused.json"
  cp "$(run_of plain)/train.json" "$results/curve-plain.json"
  python -m benchmarks.curves "$(run_of fused)" "$(run_of plain)" --names fused plain --output "$results/curves.png"
}
inference() {
  infer 7b inference-7b "${posts[@]}" --modes fast,8,zero-shot,few-shot,constrained --profile --examples 1500 \
    --peers published,generate,generate-merged,vllm
}
inference_sizes() { infer 7b inference-7b-examples "${posts[@]}" --modes fast --examples 100,1000,7317; }
inference_13b() { infer 13b inference-13b "${posts[@]}" --modes fast --examples 1500; }
inference_samsum() { infer 7b inference-7b-samsum "${dialogues[@]}" --task summarization --modes fast; }
equality() { # of answers that a model has learned: the demo's small one, and one of full size with random weights
  local small=(--learning_rate 3e-3 --batch_size 8 "${price[@]}") more=$work/more task name count
  PYTHONPATH=demo${PYTHONPATH:+:$PYTHONPATH} python -c "import pathlib, make_data as m
m.FOLDER, m.POSTS['test'], m.DIALOGUES['test'] = pathlib.Path('$more'), 1000, 400
m.main()"
  for task in classification:posts:1000 summarization:dialogues:400; do
    IFS=: read -r task name count <<<"$task"
    python "llama2_$task.py" --pretrained_ckpt demo/model --train_file "$more/${name}_train.jsonl" \
      --test_file "$more/${name}_test.jsonl" "${small[@]}" --epochs 6 --experiment_dir "$(run_of "$name")"
    python -m benchmarks.inference --model demo/model --task "$task" --train_file "$more/${name}_train.jsonl" \
      --test_file "$more/${name}_test.jsonl" --adapter "$(run_of "$name")/adapter" --modes '' --stop \
      --equality "$count" --output "$results/equality-$name.json"
  done
  tune fused
  infer 7b equality-7b "${posts[@]}" --adapter "$(run_of fused)/adapter" --modes '' --stop --equality 128
}
scripts() { # the whole test sets through the ordinary scripts
  tune fused
  python llama2_classification_inference.py --experiment_dir "$(run_of fused)" "${price[@]}" --force
  cp "$(run_of fused)/eval.json" "$results/eval-newsgroups.json"
  python llama2_summarization.py --pretrained_ckpt "$model" "${dialogues[@]}" "${price[@]}" --max_train_samples 800 \
    --experiment_dir "$(run_of samsum)"
  python llama2_summarization_inference.py --experiment_dir "$(run_of samsum)" "${price[@]}" --force
  cp "$(run_of samsum)/eval.json" "$results/eval-samsum.json"
}
competitors() {
  local name full=()
  tokenizer=${BERT_TOKENIZER:-google-bert/bert-base-uncased} checkpoint bert-base
  python competitors/encoder_classification.py --pretrained_ckpt "$model" "${posts[@]}" "${price[@]}" \
    --experiment_dir "$(run_of bert)"
  for name in base large; do
    tokenizer=${T5_TOKENIZER:-google/flan-t5-base} checkpoint flan-t5-$name
    [[ $name == large ]] && full=(--tuning lora) || full=(--epochs 1)
    python competitors/flan_t5.py --task_type summarization --pretrained_ckpt "$model" "${dialogues[@]}" \
      "${price[@]}" --learning_rate 1e-5 --max_eval_samples 64 "${full[@]}" --experiment_dir "$(run_of t5-$name)"
  done
  python -m benchmarks.competitors "$(run_of bert)" "$(run_of t5-base)" "$(run_of t5-large)" \
    --output "$results/competitors.json"
}
scaling() { # on a machine with several GPUs: GPUS (2) beside one
  checkpoint 7b
  python -m benchmarks.scaling --model "$model" "${posts[@]}" --gpus "${GPUS:-2}" --steps 14 \
    --output "$results/scaling-7b.json"
}

sharding() { # likewise: a model that has no room in what memory a GPU is left
  checkpoint 13b
  python -m benchmarks.sharding --model "$model" "${posts[@]}" --gpus "${GPUS:-2}" --gib "${GIB:-8}" --examples 160 \
    --output "$results/sharding-13b.json"
}

seventy() { # on one card of 80 GB or more
  train 70b training-70b --modes fast --tokens 3072,16384 --steps 5
  infer 70b inference-70b "${posts[@]}" --modes fast --examples 1000
}

steps=(training training_13b training_samsum sizes exactness mutations curves
  inference inference_sizes inference_13b inference_samsum equality scripts competitors)
(($#)) || set -- "${steps[@]}"
steps+=(scaling sharding seventy) # only where they are named
for step in "$@"; do
  [[ " ${steps[*]} " == *" $step "* ]] || {
    echo "error: there is no step $step: the head of this script lists them" >&2
    exit 2
  }
done
for step in "$@"; do
  printf '\n%s, %s\n' "$step" "$(date -u +%FT%TZ)"
  "$step"
done
