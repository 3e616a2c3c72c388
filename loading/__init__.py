"""Checkpoints in Hugging Face layout: found, checked and loaded, and what is decided before that.

Check the `settings`, `find` a folder, read its `config`, its `weights`, its `vocabulary` and chat `template`, and
`plan` device, dtype, schedule and memory. What a family of models adds is one row of FAMILIES in `config`.
"""
