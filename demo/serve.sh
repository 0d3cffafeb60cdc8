#!/usr/bin/env bash
# One command on a fresh machine: set up .venv, serve the demo's fine-tuned classifier over HTTP, ask it three texts with curl,
# load it for ten seconds, and print what that came to. The classifier is the one that ./demo.sh trains, or is trained now.
# PRICE_PER_HOUR is what this machine costs, in USD.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
(($# == 0)) || { [[ $1 == -h || $1 == --help ]] && sed -n '2,/^set /s/^# \{0,1\}//p' demo/serve.sh && exit 0; } ||
  { echo "error: $1: this demo takes no flags but --help" >&2 && exit 2; }
# shellcheck source=study/setup.sh
source study/setup.sh
set_up requirements.txt requirements-serving.txt

export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 # as in demo.sh
price=(--price_per_hour "${PRICE_PER_HOUR:-0.10}")
data=(--train_file demo/data/posts_train.jsonl --test_file demo/data/posts_test.jsonl)
train=(llama2_classification.py --pretrained_ckpt demo/model --output_dir demo/experiments "${price[@]}" "${data[@]}"
  --learning_rate 3e-3 --batch_size 8)
run=$(python "${train[@]}" --dry_run | tail -n 1 | cut -f 2)

say() { printf '\n$ %s\n' "$*" && "$@"; }

say python "${train[@]}" | tail -n 5
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
printf '\n$ python serving/serve_fastapi.py %s --port %s &\n' "$run" "$port"
python serving/serve_fastapi.py "$run" --port "$port" --served_model_name demo &
server=$!
trap 'kill "$server" 2>/dev/null && wait "$server" || true' EXIT
python serving/cells.py wait "$url/health" "$server" 120

for text in "The gears of my touring bike squeak. Should I oil the chain or replace the cassette?" \
  "If everything sticks to the pan, let the dough rest overnight and take less yeast." \
  "The thermometer reads too high in the sun. How do you measure the pressure?"; do
  say curl -sS "$url/v1/classify" -d "{\"text\": \"$text\"}"
  echo
done
say python serving/load_test.py --url "$url" --server fastapi --model demo --rates 8 --seconds 10 --bisections 0 --repeat_prompts \
  --pretrained_ckpt demo/model "${data[@]:2}" "${price[@]}" --output_dir demo/experiments/serving --force
kill "$server" && wait "$server"
printf '\n'
python -m study.report demo/experiments/serving
