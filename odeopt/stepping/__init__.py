"""Stepping many parameters at once: packed rows, shards, and the loops over their coordinates."""

from odeopt.stepping.buckets import Bucket, state_fields, state_template
from odeopt.stepping.loops import StepOptions, step_bucket
from odeopt.stepping.shards import Shard, is_distributed

__all__ = ["Bucket", "Shard", "StepOptions", "is_distributed", "state_fields", "state_template", "step_bucket"]
