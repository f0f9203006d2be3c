#!/bin/bash
# Four nodes of 8 GPUs under SLURM: sbatch examples/accelerate/slurm.sh. Not run here. Every node must see --output_dir.
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c "accelerate launch --config_file examples/accelerate/fsdp2.yaml \
    --num_machines \$SLURM_NNODES --num_processes \$((8 * SLURM_NNODES)) --machine_rank \$SLURM_NODEID \
    --main_process_ip $head --main_process_port 29500 --rdzv_backend c10d --max_restarts 3 \
    examples/math.py --config examples/recipes/paper.yaml --resume_from_checkpoint auto --output_dir /shared/run"
