#!/usr/bin/env bash
# Learn from real videos without labels, and probe what was learned, on two CPU cores.
#
#   ./runs/real.sh                  # ../shared/data: 394 clips of three UCF-101 classes, 284 of fights and non-fights,
#                                   # 99 of Panda-70M without labels
#   ./runs/real.sh data/mine ...    # your own folders, as tools.prepare folder writes them (docs/your-videos.md)
#
# Each folder has train.csv, and val.csv if its videos are labeled. Training uses the videos of all train.csv, but no
# labels. Then each labeled folder is a task for an untrained encoder, the teacher, the student, and both encoders of
# V-JEPA 2 (EMA and online), trained with equal executed FLOPs: once with clips, and once with a single frame of each
# clip, which shows how much of a task is motion. All train with causal masks: with the paper's, these short runs learn no
# motion (docs/NOTES.md). Three training seeds. Writes a figure and a table per task to out/real; the same command
# continues where it stopped. docs/replication.md has the results.
# Similar data: UCF-101 (www.crcv.ucf.edu/data/UCF101.php), HMDB51, and the fights of
# github.com/seymanurakti/fight-detection-surv-dataset.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
source runs/jobs.sh
OUT=${OUT:-out/real} seeds=(0 1 2)
folders=("$@")
[ $# -gt 0 ] || folders=(../shared/data/{ucf3,surveillance,panda_samples})

teacher_steps=800 student_steps=800 momentum=0.999
model=(--model vit_ti --width 96 --depth 4 --heads 2 --patch-size 16 --num-frames 8 --resolution 64
       --predictor-width 96 --predictor-depth 2 --predictor-heads 2)
learning=(--mask causal --batch-size 24 --lr 2e-3 --final-weight-decay 0.04 --workers 0)
probing=(--segments 4 --augment none --batch-size 25 --lr 2e-3 --probe-depth 1 --probe-heads 4 --standardize --seeds 5
         --workers 0)

train() { # script, run folder, seed, steps, further flags
    python "$1" "${model[@]}" "${learning[@]}" --data "${manifests[@]}" --log-every 50 \
        --out "$2" --seed "$3" --steps "$4" "${@:5}"
}
probe() { # run folder, name of the encoder, seed, further flags
    local task input videos out flags
    for task in "${tasks[@]}"; do
        videos=$OUT/videos/$task
        for input in clips single-frame; do
            out=$OUT/$task/$input/$2-seed$3 flags=("${@:4}")
            [ "$input" = clips ] || flags+=(--single-frame)
            [ -e "$out/results.json" ] || python probe.py --checkpoint "$1" --out "$out" --seed "$3" "${probing[@]}" \
                --train-data "$videos/train.csv" --val-data "$videos/val.csv" \
                --num-classes "$(awk '{ print $NF }' "$videos/train.csv" | sort -u | wc -l)" "${flags[@]}"
        done
    done
}
salt() { # folder, seed
    train train_teacher.py "$1/teacher-seed$2" "$2" "$teacher_steps"
    train train_student.py "$1/student-seed$2" "$2" "$student_steps" --teacher "$1/teacher-seed$2"
    probe "$1/teacher-seed$2" teacher "$2"
    probe "$1/student-seed$2" student "$2"
    probe "$1/student-seed$2" untrained "$2" --untrained
}
ema() { # folder, seed
    train train_ema_baseline.py "$1/ema-seed$2" "$2" "$ema_steps" --ema-momentum "$momentum"
    probe "$1/ema-seed$2" ema "$2"
    probe "$1/ema-seed$2" online "$2" --weights student
}

manifests=() tasks=()
for folder in "${folders[@]}"; do
    name=$(basename "$folder")
    for split in train val; do
        [ -e "$folder/$split.csv" ] || continue
        python -m tools.transcode copy "$folder/$split.csv" --out "$OUT/videos/$name" --short-side 96
    done
    manifests+=("$OUT/videos/$name/train.csv")
    [ ! -e "$folder/val.csv" ] || tasks+=("$name")
done
ema_steps=$(steps_of_equal_flops)
for seed in "${seeds[@]}"; do queue salt "$OUT/salt" "$seed"; done
for seed in "${seeds[@]}"; do queue ema "$OUT/ema" "$seed"; done
finish_all
for task in "${tasks[@]}"; do
    python -m tools.analyze compare "$OUT/$task/clips" "$OUT/$task/single-frame" --save "$OUT/$task.png"
done
python -m tools.analyze picture "$OUT/salt/teacher-seed0" "$OUT/salt/student-seed0" --data "${manifests[0]}" \
    --save "$OUT/real"
