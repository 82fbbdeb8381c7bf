"""Formats: torch files (archive, opcodes, builders) and safetensors. Nothing here knows where the bytes are stored."""
