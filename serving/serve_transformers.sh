#!/usr/bin/env bash
# Serve an exported model with `transformers serve`, under the name of its folder, in an environment of its own
# (.venv-transformers).
#
#   serving/serve_transformers.sh FOLDER [--port 8000] [--host 127.0.0.1] [flags of transformers serve]
#
# It answers one request at a time unless --continuous-batching is given, and knows no keys and no adapters.
set -euo pipefail
# shellcheck source=serving/peer.sh
source "$(dirname "${BASH_SOURCE[0]}")/peer.sh"
read_flags "$@"
[[ ! $key ]] || refuse "--api_key_file: transformers serve knows no keys"
[[ ! -d $folder/adapter ]] ||
  refuse "$folder has its adapter by itself, which transformers serve does not load: export it without --adapter_on_dequantized"
own_environment "$root/.venv-transformers" "transformers[serving]==5.17.0" torch==2.13.0 requests
export HF_HUB_OFFLINE=1
cd "$(dirname "$folder")" # its name for a model is the path that it is given
exec "$(dirname "$python")/transformers" serve "$name" --host "$host" --port "$port" "${flags[@]}"
