"""Checkpoints: found, checked and read, from a folder in Hugging Face layout or a GGUF file.

`find` a checkpoint, read its `config`, `weights`, `vocabulary` and chat `template`; `saved` reads
and writes conversations. What a family of models adds is one row of FAMILIES in `config`.

`quantised` reads the matrices of quantised checkpoints, `gguf_file` a GGUF file, as if it were such
a folder (`gguf_types`: its numbers, `gguf_tokens`: its tokenizer).
"""
