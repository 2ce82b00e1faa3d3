"""What does not pass, and the reason that docs/compatibility.md gives for it."""

from __future__ import annotations

# Families that use the interface and do not pass.
KNOWN_GAPS: dict[str, str] = {
    "blt": "one decoder inside another (bytes, patches, bytes), none on the top config's tokens alone; wrap() refuses it",
    "deepseek_v4": "appends compressed entries to the keys, which stand at no token's position; refused at the call",
}

# Families that pass on SDPA and not on eager.
KNOWN_GAPS_ON_EAGER: dict[str, str] = {
    "minimax_m3_vl_text": "it selects blocks by the padding's states too, and on eager those are arbitrary",
}

# Families of which no model can be built, so that nothing is known.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its text model is the family gemma3n_text",
    "gemma4_assistant": "transformers' own check of shared keys and values refuses its default config",
    "gemma4_unified_assistant": "transformers' own check of shared keys and values refuses its default config",
}
