"""Whether a chain fits into the partition it is meant for, before anything is queued.

``sbatch --test-only`` is asked, too, but it takes jobs that would then wait for ever: with a time limit above the
partition's, or, depending on the site's settings, of an account that the partition does not take.
"""

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.profile import Profile
from megatron_eagle.cluster.submit import Chain
from megatron_eagle.errors import UserError


def check_chain(chain: Chain, profile: Profile) -> None:
    """Refuse what the partition does not give to one job; UserError has the numbers."""
    partition = slurm.partition(profile.partition)
    unit = "GPUs" if profile.gpus_per_node else "processes"
    lost = dict.fromkeys(slurm.host_names(profile.exclude), f"in exclude of cluster profile '{profile.name}'")
    lost |= slurm.unusable_nodes(partition.name)
    usable = slurm.node_names(partition.name) - lost.keys()
    for link in chain.links:
        if link.nodes > partition.largest_job:
            per_node, largest = profile.processes_per_node, partition.largest_job
            raise UserError(
                f"stage '{link.name}' needs {link.nodes} nodes x {per_node} = {link.nodes * per_node} {unit}; "
                f"partition '{partition.name}' gives one job {largest} nodes = {largest * per_node}"
            )
        if link.nodes > len(usable):
            names = "; ".join(f"{node} is {why}" for node, why in sorted(lost.items()))
            raise UserError(
                f"stage '{link.name}' needs {link.nodes} nodes; of the {partition.nodes} of partition "
                f"'{partition.name}' {len(usable)} can be used: {names}"
            )
        if profile.gpus_per_node and profile.gpu_request:
            _check_gpus(link.name, link.nodes, partition.name, profile.gpus_per_node)
    where = f"partition '{partition.name}'"
    if partition.accounts is not None and profile.account not in partition.accounts:
        given = f"account '{profile.account}'" if profile.account else "no account"
        raise UserError(
            f"{where} takes jobs of {', '.join(partition.accounts)} only, cluster profile '{profile.name}' has {given}"
        )
    if partition.max_seconds is not None and slurm.seconds(profile.time_limit) > partition.max_seconds:
        raise UserError(
            f"time_limit {profile.time_limit} of cluster profile '{profile.name}' is more than {where} allows: "
            f"{partition.max_seconds / 3600:g} hours; such a job would never start"
        )


def _check_gpus(name: str, nodes: int, partition: str, per_node: int) -> None:
    gpus = slurm.gpus_of_nodes(partition)
    enough = sum(count >= per_node for count in gpus)
    if enough < nodes:
        raise UserError(
            f"stage '{name}' needs {nodes} nodes with {per_node} GPUs each; partition '{partition}' has {enough} such "
            f"nodes, and {max(gpus, default=0)} GPUs on its largest"
        )
