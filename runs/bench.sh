#!/usr/bin/env bash
# Everything there is to measure about the training step on one GPU, in less than ten minutes, most important first:
# tests, the step compared to its peer and under FSDP, the other kinds of steps, attention kernels, compilations, memory,
# and how the cost grows.
#
#   ./runs/bench.sh                            # the paper's sizes; prints everything and also writes it to $OUT
#   BUDGET=120 ./runs/bench.sh --device cpu --model vit_ti --num-frames 8 --resolution 64 --batch-size 2   # flags override
#
# A part that fails or takes too long is ended, and the next one starts. The last line counts the parts that succeeded.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export OUT=${OUT:-out/bench} PYTHONUNBUFFERED=1
BUDGET=${BUDGET:-540} # seconds
mkdir -p "$OUT"

succeeded=0 parts=0
part() { # NAME MAX_SECONDS COMMAND...
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS status
    shift 2
    parts=$((parts + 1))
    echo "== $name, after $SECONDS s: $*"
    ((left > 0)) || { echo "== $name: no time left"; return; }
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" 2>&1 | tee "$OUT/$name.txt"
    status=$?
    echo "== $name: exit status $status, $((SECONDS - start)) s"
    succeeded=$((succeeded + (status == 0)))
}
shapes=(--model vit_l --batch-size 24)
step=(python -m bench.step "${shapes[@]}" --rounds 4)

part tests 120 python -m pytest tests -q -k cuda --no-header -p no:cacheprovider
part student 200 "${step[@]}" --peer hf --peer-compile --sharded "$@"
part others 90 "${step[@]}" --kind teacher ema "$@"
part larger 120 "${step[@]}" --peer hf --model vit_h --teacher vit_l "$@"
part attention 40 python -m bench.attention "${shapes[@]}" --calls 5 "$@"
for kernel in flash cudnn; do
    part "$kernel" 60 "${step[@]}" --attention $kernel "$@"
done
part compiles 60 python -m bench.step --compiles 100 --compile-backend inductor --model vit_l --batch-size 8 "$@"
part memory 60 python -m bench.memory --check --kind student "${shapes[@]}" "$@"
part sweep 480 python -m bench.sweep --time-budget $((BUDGET - SECONDS - 30)) "${shapes[@]}" "$@"
echo "$succeeded of $parts parts succeeded, $SECONDS s"
((succeeded == parts))
