"""testbed-vlm: scenes composed of emoji pictures, their texts, and the small LLaVA that is trained on them."""

from pathlib import Path

MODEL = Path(__file__).resolve().parents[2] / "models" / "testbed-vlm"
