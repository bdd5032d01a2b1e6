#!/usr/bin/env bash
# What there is to know about the training step on one GPU, in one call of below ten minutes, the most important first:
# tests, the step against its peer and under FSDP, its kinds, attention kernels, compilations, memory, growth of the cost.
#
#   ./runs/bench.sh                                   # paper's sizes; prints everything and keeps it in $OUT
#   BUDGET=120 ./runs/bench.sh --device cpu --width 96 --depth 4 --heads 4 --num-frames 8 --resolution 32 ...    # flags win
#
# A part that fails or lasts too long is ended, and the next one starts. The last line says how many were whole.
set -uo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export OUT=${OUT:-out/bench} PYTHONUNBUFFERED=1
BUDGET=${BUDGET:-540} # seconds
mkdir -p "$OUT"

whole=0 parts=0
part() { # name, most seconds, command
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS status
    shift 2
    parts=$((parts + 1))
    echo "== $name, after $SECONDS s: $*"
    ((left > 0)) || { echo "== $name: no time left"; return; }
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" 2>&1 | tee "$OUT/$name.txt"
    status=$?
    echo "== $name: status $status, $((SECONDS - start)) s"
    whole=$((whole + (status == 0)))
}
step=(python -m bench.step --model vit_l --batch-size 24 --rounds 4)

part tests 120 python -m pytest tests -q -k cuda --no-header -p no:cacheprovider
part student 200 "${step[@]}" --peer hf --peer-compile --sharded "$@"
part others 90 "${step[@]}" --kind teacher ema "$@"
part larger 120 "${step[@]}" --peer hf --model vit_h --teacher vit_l "$@"
part attention 40 python -m bench.attention --model vit_l --batch-size 24 --calls 5 "$@"
for kernel in flash cudnn; do
    part "$kernel" 60 "${step[@]}" --attention $kernel "$@"
done
part compiles 60 python -m bench.step --compiles 100 --compile-backend inductor --model vit_l --batch-size 8 "$@"
part memory 60 python -m bench.memory --check --kind student --model vit_l --batch-size 24 "$@"
part sweep 480 python -m bench.step --sweep --time-budget $((BUDGET - SECONDS - 30)) --model vit_l --batch-size 24 "$@"
echo "$whole of $parts parts are whole, $SECONDS s"
((whole == parts))
