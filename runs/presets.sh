# The settings of demo.sh and study.sh.
processes=2 # of one thread: about as fast as two threads on idle cores, far faster on shared ones
export OMP_NUM_THREADS=1
model=(--model vit_ti --width 96 --depth 4 --heads 2 --patch-size 8 --num-frames 16 --resolution 32
       --predictor-width 96 --predictor-depth 2 --predictor-heads 2)
learning=(--batch-size 24 --lr 2e-3 --final-weight-decay 0.04 --workers 0 --log-every 50)
probing=(--train-clips 350 --task synthetic-motion synthetic-shape synthetic-size --batch-size 25 --lr 8e-3
         --probe-depth 1 --probe-heads 4 --standardize --seeds 8 --workers 0)
teacher_steps=400 student_steps=800
small=(--width 48 --heads 1) large=(--width 192 --heads 4 --lr 1e-3) # other encoders, in study.sh
