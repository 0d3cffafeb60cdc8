#!/usr/bin/env bash
# Serve an exported model with Text Generation Inference (TGI), in its container, under /FOLDER's name.
# NEVER RUN by those who wrote it: no machine that they had runs containers. It follows TGI's documentation.
#
#   serving/serve_tgi.sh FOLDER [--port 8000] [--host 127.0.0.1] [--api_key_file FILE] [flags of TGI's launcher]
#
# TGI_IMAGE names another image than the pinned one. TGI is archived since 2026-03 and gets no more releases.
set -euo pipefail
# shellcheck source=serving/peer.sh
source "$(dirname "${BASH_SOURCE[0]}")/peer.sh"
read_flags "$@"
[[ ! -d $folder/adapter ]] ||
  refuse "$folder has its adapter by itself: export it without --adapter_on_dequantized for TGI"
command -v docker >/dev/null || refuse "docker is not on PATH: TGI runs in its container"
docker info >/dev/null 2>&1 || refuse "docker has no daemon that this user may use (docker info says why): TGI runs in its container"
image=${TGI_IMAGE:-ghcr.io/huggingface/text-generation-inference:3.3.5}
devices=(--gpus all)
if ! has_gpu; then
  image=${TGI_IMAGE:-$image-intel-cpu}
  devices=(--cap-add=sys_nice)
  flags=(--cuda-graphs 0 "${flags[@]}")
fi
secret=()
if [[ $key ]]; then
  export API_KEY=$key # by name alone, so that it stands in no list of processes
  secret=(-e API_KEY)
fi
exec docker run --rm --shm-size 1g "${devices[@]}" -e HF_HUB_OFFLINE=1 "${secret[@]}" -p "$host:$port:80" \
  -v "$folder:/$name:ro" "$image" --model-id "/$name" "${flags[@]}"
