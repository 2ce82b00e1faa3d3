"""Write a checkpoint's weights into the model's folder, as one bfloat16 file.

python testbed/lm/export.py checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

MODEL = Path(__file__).resolve().parents[2] / "models" / "testbed-lm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(MODEL)
    print(f"{(MODEL / 'model.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main()
