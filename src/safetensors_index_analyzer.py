"""`amalgam analyze` under its older name: a checkpoint's index → a configuration.

python3 src/safetensors_index_analyzer.py --model_path DIR --export_config OUT.yaml \
    --attention_precision fp16 --mlp_precision fp8 --expert_precision int4
"""

from __future__ import annotations

import sys

from amalgam.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
