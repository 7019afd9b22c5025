#!/usr/bin/env bash
# The benchmark on a machine with a GPU, several processes side by side:
#   benchmarks/quality/smollm2/gpu.sh [-n PROCESSES] [-t TASKS] [-s SEEDS] [-w WORK] [-p PYTHON] OUT BASE [OPTION...]
# BASE is the model's folder, OPTION one of `python -m benchmarks.quality.smollm2 measure`.
# Every process has tasks and seeds of its own, tasks first, and writes its rows to OUT/rows-N.jsonl as it
# measures them; at the end, and when it is stopped, OUT/rows.jsonl has them all. The same command goes on.
# Adapters are large and lie in WORK (default: a temporary folder): name it, too, to go on with them.
set -uo pipefail
usage="usage: gpu.sh [-n PROCESSES] [-t TASKS] [-s SEEDS] [-w WORK] [-p PYTHON] OUT BASE [OPTION...]"
processes=12 python=python3 work=
tasks="tone/factor slant/factor slant/mirror medical/factor faulty/factor"
seeds="0 1 2"
while getopts n:t:s:w:p: option; do
  case $option in
  n) processes=$OPTARG ;;
  t) tasks=$OPTARG ;;
  s) seeds=$OPTARG ;;
  w) work=$OPTARG ;;
  p) python=$OPTARG ;;
  *) echo "$usage" >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
out=${1:?"$usage"} base=${2:?"$usage"}
shift 2
work=${work:-$(mktemp -d)}
mkdir -p "$out" "$work"
out=$(cd "$out" && pwd) work=$(cd "$work" && pwd)
[[ -f $base/config.json ]] || {
  echo "There is no model in $base: give the folder that base.make_base wrote." >&2
  exit 2
}
base=$(cd "$base" && pwd)
cd "$(dirname "$0")/../../.."

jobs=()
for task in $tasks; do
  for seed in $seeds; do jobs+=("$task $seed"); done
done

lane() { # lane N OPTION...: every job of a process
  local n=$1 i name task seed status=0
  shift
  mkdir -p "$work/$n"
  for name in rows answers; do ln -sf "$out/$name-$n.jsonl" "$work/$n/$name.jsonl"; done
  for ((i = n; i < ${#jobs[@]}; i += processes)); do
    read -r task seed <<<"${jobs[i]}"
    "$python" -m benchmarks.quality.smollm2 measure --output "$work/$n" --base "$base" --tasks "$task" \
      --seeds "$seed" --dtype bfloat16 --threads 1 "$@" || status=1
  done
  return $status
}

finish() {
  local group name
  for group in $(jobs -pr); do kill -- "-$group"; done
  wait
  for name in rows answers; do
    # awk ends a line that was cut.
    awk 1 "$out/$name"-[0-9]*.jsonl >"$out/.$name.partial" 2>/dev/null && mv "$out/.$name.partial" "$out/$name.jsonl"
  done
  rm -f "$out"/.*.partial
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

set -m # every process is a group, which a signal reaches whole
lanes=()
for ((n = 0; n < processes && n < ${#jobs[@]}; n++)); do
  lane "$n" "$@" >"$out/log-$n.txt" 2>&1 &
  lanes+=($!)
done
status=0
for lane in "${lanes[@]}"; do wait "$lane" || status=1; done
exit $status
