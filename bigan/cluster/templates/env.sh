# shellcheck shell=bash
# Environment of a job, with the reason for each setting. A variable that is set already is kept;
# names of network interfaces and other properties of one cluster belong in a profile
# (slurm/profiles/), or are exported before `sbatch`.

# Python's output appears in the logs at once, and a crash in C code prints a Python traceback.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# NCCL prints errors and their causes only. INFO is for a search for errors: it prints megabytes.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The last collectives of each rank are kept in memory, and written when one of them times out.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# The launcher forwards these signals and then waits for its processes, which save. Without the
# first, SIGUSR2 kills the launcher only; without the second, a save may take 30 s at most.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGUSR2,SIGINT}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-90}

# Since SLURM 22.05, srun does not inherit the --cpus-per-task of its job.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi

# On clusters with several networks, NCCL and Gloo may choose one that does not reach the other
# nodes. The names of interfaces (`ip -br link`) differ between clusters, hence no default here:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
