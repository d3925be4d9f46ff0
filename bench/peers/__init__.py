"""Speed and memory of ramp_fast beside other attribution libraries."""
