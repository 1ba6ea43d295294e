"""Every op that is measured, for all front ends: `alterrec-fast bench`, pytest, and the times on a GPU."""

from . import bench_loss, bench_rank, bench_step

OPS = (*bench_rank.OPS, *bench_loss.OPS, *bench_step.OPS)
