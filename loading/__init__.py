"""Checkpoints in Hugging Face layout: found, checked and read.

`find` a folder, read its `config`, `weights`, `vocabulary` and chat `template`; `saved` reads and
writes conversations. What a family of models adds is one row of FAMILIES in `config`.
"""
