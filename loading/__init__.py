"""Checkpoints in Hugging Face layout: found, checked and loaded, and what is decided before that.

`find` a folder, read its `config`, its `weights`, and `plan` device, dtype, schedule and memory.
"""
