#!/usr/bin/env bash
# From a LeRobot dataset to a policy: look at it, statistics, fine-tuning, open loop, closed loop in the simulator, export.
#
#   examples/finetune_lerobot/finetune.sh                      from the project's folder, after `make install`
#   DATASET=~/my_dataset examples/finetune_lerobot/finetune.sh     a dataset of your own: without the simulator's steps
#
# DEMONSTRATIONS per task, STEPS of training, SAMPLES compared with recordings, EPISODES played per task, WORKERS (processes that
# simulate, one per core unless set) and WORK (where everything goes) may be set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-experiments/finetune_lerobot}
demonstrations=${DEMONSTRATIONS:-60} steps=${STEPS:-1500} episodes=${EPISODES:-10}
simulator=(--env metaworld --tasks drawer-open drawer-close ${WORKERS:+--workers "$WORKERS"})
vla=${PALIGEMMA_VLA:-paligemma-vla}
mkdir -p "$work"

# 1. A LeRobot dataset: two tasks of the demonstration's simulator, with video. Yours takes its place.
if [ -z "${DATASET:-}" ]; then
  "$vla" collect "${simulator[@]}" --episodes "$demonstrations" --output_dir "$work/recorded"
  "$vla" data convert --to lerobot --input "$work/recorded" --output_dir "$work/lerobot" --images video
fi
dataset=lerobot:${DATASET:-$work/lerobot}

# 2. What is in it, and what is wrong with it.
"$vla" data info "$dataset"
described=$("$vla" data info "$dataset" --json)
number() { sed -n "s/^  \"$1\": \([0-9]*\),\$/\1/p" <<<"$described"; }
"$vla" data check "$dataset" --exclusion_list "$work/excluded_episodes.json"

# 3. A backbone. The tiny random one stands in for google/paligemma-3b-pt-224, which learns far more from far less.
[ -d "$work/tiny-paligemma" ] || "$vla" tiny --output_dir "$work/tiny-paligemma"

# 4. Statistics of what the model will see; then what training will hold in memory; then training.
settings=(
  --set "data.train_parquet_files='$dataset'"
  --set "data.state_dim=$(number state_dim)"
  --set "data.normalization_stats_path='$work/normalization_stats.json'"
  --set "model.vlm_config.model_name_or_path='$work/tiny-paligemma'"
  --set "model.vlm_config.num_cameras=$(number cameras)"
  --set "model.action_head_config.per_action_dim=$(number action_dim)"
  --set "training.checkpoint_dir='$work/experiments'"
  --set "training.max_steps=$steps"
)
"$vla" stats --config_path "$here/config.yaml" --output_path "$work/normalization_stats.json" --train_data_override "$dataset"
"$vla" plan --config_path "$here/config.yaml" "${settings[@]}"
"$vla" train --config_path "$here/config.yaml" "${settings[@]}"
checkpoint=$work/experiments/finetune/checkpoints/last.pth.tar

# 5. How good is it? Errors against the recordings, then success in the simulator.
"$vla" evaluate --checkpoint_path "$checkpoint" --eval_data_path "$dataset" --output_dir "$work/open_loop" --max_samples "${SAMPLES:-256}"
if [ -z "${DATASET:-}" ]; then
  "$vla" rollout --checkpoint_path "$checkpoint" "${simulator[@]}" --episodes "$episodes" --output_dir "$work/closed_loop"
fi

# 6. A folder in Hugging Face format, for the robot or the hub; `Policy.from_checkpoint` takes it.
"$vla" export --checkpoint_path "$checkpoint" --output_dir "$work/policy" --metrics "$work/open_loop/metrics.json"
echo "done: policy in $work/policy, report: $work/open_loop/report.html"
