#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prepares the server's files, on the machine with its GPU: converts the published checkpoints and builds TensorRT
# engines. Existing files are kept. Pods may share $CACHE; a lock serializes them.
#
#   $SOURCE   the checkpoints, in any layout that `python -m export.convert` reads    (/weights)
#   $CACHE    the output folder: weights/longlive, graphs/, engines/                  (/cache)
#   $ENGINES  a link to the engines for this GPU; empty: build no engines             (/run/longlive/engines)
#   $CONFIG   the server's serve.toml, whose `weights` is $CACHE/weights/longlive     (the image's own)
#   $PRESET   its `preset`                                                            (longlive-1.3b)
#   $MODELS   models to build engines for; the text encoder runs in PyTorch           (dit vae_decoder)
set -eu
: "${SOURCE=/weights}" "${CACHE=/cache}" "${ENGINES=/run/longlive/engines}" "${MODELS=dit vae_decoder}"
: "${PRESET=longlive-1.3b}" "${CONFIG=/opt/longlive/model_repository/longlive/1/serve.toml}"

mkdir -p "$CACHE/graphs" "$CACHE/engines"
exec 9> "$CACHE/.lock"
flock 9

weights=$CACHE/weights/longlive
python3 -m export.convert --preset "$PRESET" --weights "$SOURCE" --out "$weights"
test -n "$ENGINES" || exit 0

# Folder names depend on the content: graphs on weights, settings and models; engines also on the GPU and TensorRT.
made_of=$(cat "$weights/config.json"; grep -E '^(preset|variant) ' "$CONFIG"; echo "$MODELS")
name=$(echo "$made_of" | sha256sum | cut -c 1-16)
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' -)
tensorrt=$(python3 -c 'import tensorrt; print(tensorrt.__version__)')
graphs=$CACHE/graphs/$name
engines=$CACHE/engines/$name-$gpu-$tensorrt

if ! test -e "$graphs/.complete"; then
  # shellcheck disable=SC2086  # several words
  python3 -m export.to_onnx --config "$CONFIG" --models $MODELS --dtype bfloat16 --no-check --out "$graphs"
  touch "$graphs/.complete"
fi
python3 -m export.to_tensorrt "$graphs" --out "$engines"
mkdir -p "$(dirname "$ENGINES")"
ln -sfn "$engines" "$ENGINES"
