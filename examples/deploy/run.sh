#!/usr/bin/env bash
# A federation on this machine: a server and four devices over TLS, each device a process with data and a key of its own. Nothing to edit.
#
#   examples/deploy/run.sh [METHOD [FOLDER [OPTION ...]]]
#
#   examples/deploy/run.sh                                            fibecfed on TREC, in runs/deploy-fibecfed
#   examples/deploy/run.sh federa runs/mine --method.inner.lr 4e-3   another method, with its own options (fedloom run METHOD --help)
#   DATA="--data notes.jsonl --task text" examples/deploy/run.sh fedcybgd runs/cy --model ~/models/llama      other data and model
#
# Afterwards the same experiment is simulated in one process, and the two are compared: training losses, scores and bytes must be equal.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin:$PATH"  # what make setup installed, if it is there
method=${1:-fibecfed}
folder=${2:-runs/deploy-$method}
shift $(($# < 2 ? $# : 2))
port=${PORT:-9092}
devices=4
read -r -a data <<< "${DATA:-}"
data+=(--seed 7 --max-train 400 --max-validation 100 --max-test 100)
shape=(--rounds 5 --evaluate-every 5 --cohort 3 --max-length 32 --quorum 0.5 --plain "${data[@]}" "$@")
mkdir -p "$folder"
cd "$folder"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

fedloom certs certs --devices $devices --names 127.0.0.1 localhost > certs.log
[ -d shards ] || fedloom partition --clients $devices --alpha 0.5 "${data[@]}" --shards shards > partition.log

joined=()
trap 'kill "${joined[@]}" 2>/dev/null || true' EXIT
for k in $(seq 0 $((devices - 1))); do
    fedloom join "127.0.0.1:$port" "shards/$k" --certs "certs/device-$k" --out "device-$k" --threads 1 2> "device-$k.log" &
    joined+=($!)
done
fedloom serve "$method" --certs certs/server --listen "127.0.0.1:$port" "${shape[@]}" --out served

echo "the same, simulated in one process:"
fedloom run "$method" --clients $devices --alpha 0.5 "${shape[@]}" --out simulated
python - <<'PYTHON'
import json
from pathlib import Path

told = [[json.loads(line) for line in Path(run, "rounds.jsonl").read_text().splitlines()] for run in ("served", "simulated")]
keys = ("round", "loss", "personalised", "answered", "bytes_up", "bytes_down")  # the mean loss on validation is summed in another order
scores = ("personalised", "global")


def seen(rows):
    return [{**{key: row[key] for key in keys}, "validation": [row["validation"][score] for score in scores]} for row in rows]


same = seen(told[0]) == seen(told[1])
print("equal to the last digit: training losses, scores, bytes" if same else "NOT equal; see served/rounds.jsonl and simulated/rounds.jsonl")
raise SystemExit(0 if same else 1)
PYTHON
