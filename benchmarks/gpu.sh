#!/usr/bin/env bash
# What a GPU is asked in one go, in about ten minutes:
#
#   benchmarks/gpu.sh OUT [PYTHON]
#
# Writes into the folder OUT: the frozen blocks computed in several ways
# (gpu_forward), a step of every method (peers; with PyTorch's and
# torch.compile's where torch, transformers and peft are installed), each with
# the flags that give the same bits each time (as main.py sets them) and
# without. What takes longer than its share is cut off, and the rest goes on.
set -u
out="${1:?folder for what is measured}"
python="${2:-python}"
fast="--xla_gpu_deterministic_ops=false --xla_gpu_enable_triton_gemm=true"
mkdir -p "$out"
nvidia-smi > "$out/machine.txt" 2>&1 || true

measure() {  # NAME SECONDS FLAGS MODULE OPTIONS...
  local name="$1" limit="$2" flags="$3"
  shift 3
  echo "$name: $*"
  XLA_FLAGS="$flags" timeout "$limit" "$python" -m "$@" \
    > "$out/$name.txt" 2> "$out/$name.err" || echo "$name: status $?"
}

for variant in B/16 S/14; do
  for batch in 64 256; do
    name="${variant/\//}_$batch"
    options=(--variant="$variant" --batch_size="$batch" --dtype=bfloat16)
    measure "forward_$name" 45 "" benchmarks.gpu_forward "${options[@]}"
    measure "forward_${name}_fast" 45 "$fast" \
      benchmarks.gpu_forward "${options[@]}"
  done
done
torch=()
if "$python" -c "import peft, torch, transformers" 2> /dev/null; then
  torch=(--compile)
fi
options=(--batch_size=64 --dtype=bfloat16)
measure peers_fast 150 "$fast" benchmarks.peers "${options[@]}" "${torch[@]}"
measure peers 90 "" benchmarks.peers "${options[@]}" --only=vqt_jax
tail -n +1 "$out"/*.txt
