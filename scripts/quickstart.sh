#!/bin/sh
# Every stage of the pipeline in order, each as the plain command line that the README shows. Run by `make quickstart`.
set -eu
run() { printf '\n$ %s\n' "$*"; "$@"; }

run python scripts/quickstart_corpus.py --config configs/quickstart/quickstart_corpus.yaml
run python scripts/train_tokenizer.py --config configs/quickstart/train_tokenizer.yaml
run python scripts/prepare_data.py --config configs/quickstart/prepare_data.yaml
run python scripts/prepare_data.py --config configs/quickstart/prepare_functions.yaml
run accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train.py --config configs/quickstart/train.yaml
run python scripts/evaluate.py --config configs/quickstart/evaluate.yaml
run python scripts/evaluate.py --config configs/quickstart/evaluate.yaml dataset=runs/quickstart/functions compression=false output_dir=runs/quickstart/test_functions
run python scripts/generate.py --config configs/quickstart/generate.yaml
run python scripts/verify.py runs/quickstart/test --recursive
run python scripts/quickstart_table.py
