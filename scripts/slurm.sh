#!/usr/bin/env bash
#SBATCH --job-name=darts
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.out
# A template for Slurm: a study on Ray, or one run on several GPUs. Fill in the lines above and hand it in with
#
#   sbatch scripts/slurm.sh study --study runs/study --gpus_per_trial 0.25     # trials.py run, on all nodes
#   sbatch scripts/slurm.sh train_search.py --unrolled --save runs/search      # torchrun, one rank a GPU
#   sbatch scripts/slurm.sh train.py --arch runs/search --save runs/train
#
# The same command again resumes what it left. The nodes must see this folder under the same path; PYTHON names a
# Python that has what requirements-cluster.txt lists (requirements.txt is enough for torchrun).
# Cost: what the lines above ask for. Two minutes before its time is up Slurm sends SIGTERM, and a run saves and ends.
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:-.}"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which srun does not take from sbatch
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-6379}

what=${1:?"say what to start: study, train_search.py or train.py, and its flags"}
shift
folder=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --save | --study) next=$((i + 1)) && folder=${!next} ;;
    --save=* | --study=*) folder=${!i#*=} ;;
  esac
done
if [ -z "$folder" ]; then
  echo "slurm.sh: give the job a directory to resume from, with --save or --study" >&2
  exit 2
fi
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}

if [ "$what" = study ]; then
  if [ -e "$folder/study.json" ]; then set -- --resume --study "$folder"; fi
  export RAY_AUTH_MODE=token # kept in ~/.ray, which the nodes share; without one, whoever reaches a node may run code
  "$PYTHON" -m ray.scripts.scripts get-auth-token --generate >/dev/null
  cpus=${SLURM_CPUS_PER_TASK:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
  srun --nodes=1 --ntasks=1 --nodelist="$head" \
    "$PYTHON" -m ray.scripts.scripts start --head --port="$PORT" --num-cpus="$cpus" --num-gpus="$gpus" --block &
  sleep 15 # until it listens
  if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
      "$PYTHON" -m ray.scripts.scripts start --address="$head:$PORT" --num-cpus="$cpus" --num-gpus="$gpus" --block &
    sleep 15
  fi
  exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" "$PYTHON" trials.py run "$@" --address "$head:$PORT"
fi

if [ -e "$folder/config.json" ]; then set -- --resume --save "$folder"; fi
exec srun "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --rdzv_backend=c10d --rdzv_endpoint="$head:$((PORT + 1))" \
  --rdzv_id="$SLURM_JOB_ID" "$what" "$@"
