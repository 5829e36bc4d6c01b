# shellcheck shell=bash
# Settings of NCCL and Gloo, with the reason for each.
