#!/bin/sh
# A base like toy/model in six supervised stages: sh lab/pipeline.sh runs/warm    other flags go to every stage.
# docs/toy.md says what each is for. After a break the same command goes on with the first stage that is missing.
set -eu
python=${PYTHON:-python} out=$1 stage=0 last=
shift
$python -m lab.seed raw
while read -r flags; do
    stage=$((stage + 1))
    [ -e "$out/$stage/adapter_config.json" ] ||
        $python -m lab.seed train --out "$out/$stage" --adapter "$last" $flags "$@" < /dev/null
    last=$out/$stage
done << STAGES
--steps 80 --mix 10:1:0 --batch 11 --responses 2 --lr 1e-3
--steps 40 --mix 8:2:1 --batch 11 --lr 3e-4
--steps 100 --mix 4:4:1 --batch 18 --lr 3e-4 --seed 1
--steps 40 --mix 2:9:1 --batch 24 --lr 2e-4 --seed 2
--steps 130 --mix 10:1:1 --batch 24 --responses 2 --constraints .7 --errors 0 .4 .6 --lr 3e-4 --seed 3
--steps 22 --mix 1:1:1 --batch 24 --responses 2 --constraints .4 --errors .4 .4 .6 --lr 2e-4 --seed 4
STAGES
$python -m lab.seed merge --adapter "$last" --out "$out/model"
