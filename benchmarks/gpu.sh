#!/bin/sh
# What a machine with a GPU shows, step by step, since plans may be compiled where the solvers are:
#
#   benchmarks/gpu.sh profile -o hw.json             on the GPU machine, a minute: what klotski-compile plans with
#   benchmarks/gpu.sh calibrate hw.json -o hw2.json  where both are, half a minute; may be left out: the profile, corrected by a run
#   benchmarks/gpu.sh plans hw2.json -o plans        where OR-Tools is, half a minute: a plan per policy and model
#   benchmarks/gpu.sh run plans -o result.txt        on the GPU machine, under nine minutes: everything else
#
# It needs no installation: Python with torch, transformers, pydantic and greenlet will do; accelerate and deepspeed for rows of theirs.
# PYTHON names another interpreter.
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$here:$here/runtime:$here/tests${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$here/benchmarks/gpu.py" "$@"
